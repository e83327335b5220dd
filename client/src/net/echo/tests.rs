//! Frames in, frames out.

use proptest::prelude::*;

use super::*;

const OURS: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GUEST: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const ALL: [u8; 6] = [0xff; 6];
const GUEST_IP: [u8; 4] = [10, 0, 0, 2];
const OUR_IP: [u8; 4] = [10, 0, 0, 1];

fn answer(echo: &mut Echo, frame: &[u8]) -> Option<Vec<u8>> {
    let mut reply = b"kept".to_vec();
    let answered = echo.answer(frame, &mut reply);
    assert_eq!(&reply[..4], b"kept");
    assert_eq!(answered, reply.len() > 4);
    answered.then(|| reply.split_off(4))
}

fn anyone() -> Echo {
    Echo::new(OURS, None)
}

fn only(ip: [u8; 4]) -> Echo {
    Echo::new(OURS, Some(ip.into()))
}

fn frame(to: [u8; 6], kind: [u8; 2], body: &[u8]) -> Vec<u8> {
    [&to[..], &GUEST, &kind, body].concat()
}

fn who_has(sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    frame(ALL, TYPE_ARP, &[&[0, 1, 8, 0, 6, 4, 0, 1][..], &GUEST, &sender, &[0; 6], &target].concat())
}

/// An IPv4 packet; `fragment` is the field with flags and offset.
fn ipv4(fragment: u16, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + data.len()).expect("fits").to_be_bytes();
    let mut header =
        [&[0x45, 0][..], &len, &[0xab, 0xcd], &fragment.to_be_bytes(), &[3, 1, 0, 0], &GUEST_IP, &OUR_IP].concat();
    let sum = checksum(&[&header]).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    frame(OURS, TYPE_IPV4, &[&header[..], data].concat())
}

fn echo_request(payload: &[u8]) -> Vec<u8> {
    let mut data = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1][..], payload].concat();
    let sum = checksum(&[&data]).to_be_bytes();
    data[2..4].copy_from_slice(&sum);
    data
}

#[test]
fn arp_is_answered_with_our_address() {
    let reply = answer(&mut anyone(), &who_has(GUEST_IP, OUR_IP)).expect("answered");
    let expected =
        [&GUEST[..], &OURS, &TYPE_ARP, &[0, 1, 8, 0, 6, 4, 0, 2], &OURS, &OUR_IP, &GUEST, &GUEST_IP].concat();
    assert_eq!(reply, expected);
}

#[test]
fn arp_that_takes_no_answer() {
    assert_eq!(answer(&mut only([10, 0, 0, 7]), &who_has(GUEST_IP, OUR_IP)), None);
    assert!(answer(&mut only(OUR_IP), &who_has(GUEST_IP, OUR_IP)).is_some());
    assert_eq!(answer(&mut anyone(), &who_has([0; 4], GUEST_IP)), None, "a probe for a free address");
    assert!(answer(&mut only(OUR_IP), &who_has([0; 4], OUR_IP)).is_some(), "which this one is not");
    assert_eq!(answer(&mut anyone(), &who_has(GUEST_IP, GUEST_IP)), None, "an announcement");
    let mut reply = who_has(GUEST_IP, OUR_IP);
    reply[21] = 2;
    assert_eq!(answer(&mut anyone(), &reply), None);
    let full = who_has(GUEST_IP, OUR_IP);
    for len in 0..full.len() {
        assert_eq!(answer(&mut anyone(), &full[..len]), None, "cut to {len} bytes");
    }
}

#[test]
fn ping_is_answered_with_right_checksums() {
    for len in [0_usize, 1, 56, 57, 1472] {
        let payload: Vec<u8> = (0..len).map(|at| (at * 7).to_le_bytes()[0]).collect();
        let mut request = ipv4(0x4000, &echo_request(&payload));
        request.extend([0xee; 6]); // padding of a short frame
        let reply = answer(&mut anyone(), &request).expect("answered");
        assert_eq!(reply.len(), 14 + 20 + 8 + payload.len());
        assert_eq!((&reply[..6], &reply[6..12]), (&GUEST[..], &OURS[..]));
        assert_eq!((&reply[26..30], &reply[30..34]), (&OUR_IP[..], &GUEST_IP[..]));
        assert_eq!(checksum(&[&reply[14..34]]), 0);
        assert_eq!(checksum(&[&reply[34..]]), 0);
        assert_eq!(reply[22], TTL);
        assert_eq!((&reply[34..36], &reply[38..42]), (&[0, 0][..], &[0x12, 0x34, 0, 1][..]));
        assert_eq!(&reply[42..], &payload[..]);
    }
}

#[test]
fn a_ping_of_60000_bytes_is_answered_fragment_by_fragment() {
    let payload: Vec<u8> = (0..60_000_u32).map(|at| (at % 253) as u8).collect();
    let request = echo_request(&payload);
    let mut echo = anyone();
    let mut back = vec![0; request.len()];
    let mut filled = 0;
    for (index, piece) in request.chunks(1480).enumerate() {
        let more = if (index + 1) * 1480 < request.len() { 0x2000 } else { 0 };
        let field = more | u16::try_from(index * 185).expect("13 bits");
        let reply = answer(&mut echo, &ipv4(field, piece)).expect("each fragment is answered");
        assert_eq!(checksum(&[&reply[14..34]]), 0);
        assert_eq!(reply[18..22], [&[0xab, 0xcd][..], &field.to_be_bytes()].concat());
        let at = usize::from(field & 0x1fff) * 8;
        back[at..at + reply.len() - 34].copy_from_slice(&reply[34..]);
        filled += reply.len() - 34;
    }
    assert_eq!(filled, request.len());
    assert_eq!(checksum(&[&back]), 0, "of the whole reply");
    assert_eq!(back[..2], [0, 0]);
    assert_eq!(back[4..], request[4..]);
}

#[test]
fn fragments_of_something_else_are_not_answered() {
    let mut echo = anyone();
    assert_eq!(answer(&mut echo, &ipv4(185, &[1; 100])), None, "no first one was seen");
    let mut reply = echo_request(&[0; 1472]);
    reply[0] = 0;
    assert_eq!(answer(&mut echo, &ipv4(0x2000, &reply)), None);
    assert_eq!(answer(&mut echo, &ipv4(185, &[1; 100])), None, "its first one was no request");
    assert!(answer(&mut echo, &ipv4(0x2000, &echo_request(&[0; 1472]))).is_some());
    assert!(answer(&mut echo, &ipv4(185, &[1; 100])).is_some());
    assert_eq!(answer(&mut echo, &ipv4(0x1fff, &[1; 100])), None, "ends behind 64 KiB");
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut echo = anyone();
    for id in 0..1000_u16 {
        let mut request = ipv4(0x2000, &echo_request(&[0; 1472]));
        request[18..20].copy_from_slice(&id.to_be_bytes());
        request[24..26].fill(0);
        let sum = checksum(&[&request[14..34]]).to_be_bytes();
        request[24..26].copy_from_slice(&sum);
        assert!(answer(&mut echo, &request).is_some());
    }
    assert_eq!(echo.datagrams.len(), DATAGRAMS_MAX);
}

#[test]
fn damaged_pings_are_not_answered() {
    let good = ipv4(0, &echo_request(b"payload"));
    assert!(answer(&mut anyone(), &good).is_some());
    for len in 0..good.len() {
        assert_eq!(answer(&mut anyone(), &good[..len]), None, "cut to {len} bytes");
    }
    // One bit anywhere in the packet: a checksum is wrong, or it was not for us.
    for at in 14..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        assert_eq!(answer(&mut anyone(), &bad), None, "byte {at}");
    }
    let mut other = good.clone();
    other[5] ^= 1;
    assert_eq!(answer(&mut anyone(), &other), None, "for another station");
    let mut all = good.clone();
    all[..6].copy_from_slice(&ALL);
    assert_eq!(answer(&mut anyone(), &all), None, "broadcast");
    let mut group = good;
    group[6] |= 1;
    assert_eq!(answer(&mut anyone(), &group), None, "from a group");
}

const GUEST_IP6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0x50, 0x54, 0, 0xff, 0xfe, 0x12, 0x34, 0x56];

fn ipv6(to: [u8; 6], source: [u8; 16], target: [u8; 16], hop_limit: u8, data: &[u8]) -> Vec<u8> {
    let mut data = data.to_vec();
    finish_v6(&source, &target, &mut data);
    let mut body = Vec::new();
    ipv6_header(source, target, data.len(), hop_limit, &mut body);
    frame(to, TYPE_IPV6, &[&body[..], &data].concat())
}

#[test]
fn neighbour_solicitation_is_answered_with_our_address() {
    let ours = link_local(OURS).octets();
    let solicit = |source, hop_limit| {
        let data = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &ours, &[1, 1], &GUEST].concat();
        let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0, 0, 9];
        ipv6([0x33, 0x33, 0xff, 0, 0, 9], source, group, hop_limit, &data)
    };
    for mut echo in [anyone(), only(OUR_IP)] {
        let reply = answer(&mut echo, &solicit(GUEST_IP6, 255)).expect("answered");
        assert_eq!((&reply[..6], &reply[22..38], &reply[38..54]), (&GUEST[..], &ours[..], &GUEST_IP6[..]));
        assert_eq!((reply[21], reply[54]), (255, 136));
        assert_eq!(&reply[62..], &[&ours[..], &[2, 1], &OURS].concat()[..]);
        assert_eq!(checksum_v6(&ours, &GUEST_IP6, &reply[54..]), 0);
        assert_eq!(answer(&mut echo, &solicit(GUEST_IP6, 254)), None, "came over a router");
        assert_eq!(answer(&mut echo, &solicit([0; 16], 255)), None, "asks whether the address is free");
    }
}

#[test]
fn ping_over_ipv6_is_answered() {
    let ours = link_local(OURS).octets();
    let good = ipv6(OURS, GUEST_IP6, ours, 64, &[128, 0, 0, 0, 1, 2, 3, 4, 5]);
    let reply = answer(&mut only(OUR_IP), &good).expect("answered");
    assert_eq!(reply[54], 129);
    assert_eq!(reply[58..], [1, 2, 3, 4, 5]);
    assert_eq!(checksum_v6(&ours, &GUEST_IP6, &reply[54..]), 0);
    for len in 0..good.len() {
        assert_eq!(answer(&mut anyone(), &good[..len]), None, "cut to {len} bytes");
    }
    let mut bad = good;
    bad[60] ^= 1;
    assert_eq!(answer(&mut anyone(), &bad), None);
}

proptest! {
    #[test]
    fn no_frame_is_too_strange(to_us: bool, kind in 0..4_usize, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let kind = [TYPE_ARP, TYPE_IPV4, TYPE_IPV6, [0x81, 0]][kind];
        let mut echo = super::Echo::new(OURS, None);
        let mut reply = Vec::new();
        echo.answer(&frame(if to_us { OURS } else { ALL }, kind, &body), &mut reply);
        prop_assert!(reply.len() <= 14 + 200);
    }
}
