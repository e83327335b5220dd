//! What a pair does without a ring; with one it is tested over a whole daemon.

use super::*;
use crate::net::header::{FLAG_NEEDS_CSUM, checksum};

const OURS: [u8; 6] = [2, 0, 0, 0, 0, 9];

/// A ping whose ICMP checksum is left to the device.
fn unfinished_ping(header: Header) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 32, 0, 1, 0, 0, 64, 1, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    let sum = checksum(&[&ip]).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);
    let icmp = [8, 0, 0, 0, 0, 7, 0, 1, 0xca, 0xfe, 0xba, 0xbe];
    [&header.to_bytes()[..], &OURS, &[2, 0, 0, 0, 0, 1], &[8, 0], &ip, &icmp].concat()
}

#[test]
fn an_unfinished_ping_is_finished_before_it_is_answered() {
    let mut echo = Echo::new(OURS, None);
    let header = Header { flags: FLAG_NEEDS_CSUM, csum_start: 34, csum_offset: 2, ..Header::default() };
    let mut reply = Vec::new();
    assert!(answer(&mut echo, &mut unfinished_ping(header), &mut reply));
    assert_eq!(reply[..HEADER_LEN], [0; HEADER_LEN], "nothing is left to the guest");
    assert_eq!(checksum(&[&reply[HEADER_LEN + 34..]]), 0);

    for bad in
        [Header::default(), Header { csum_offset: 60000, ..header }, Header { gso_type: 1, gso_size: 1000, ..header }]
    {
        assert!(!answer(&mut echo, &mut unfinished_ping(bad), &mut Vec::new()), "{bad:?}");
    }
    assert!(!answer(&mut echo, &mut [0; 5], &mut Vec::new()));
}

#[test]
fn the_earlier_of_two_wishes_wins() {
    let (soon, late) = (Instant::now(), Instant::now() + Duration::from_secs(9));
    assert_eq!(Next::At(late).earlier(Next::At(soon)), Next::At(soon));
    assert_eq!(Next::Event.earlier(Next::At(late)), Next::At(late));
    assert_eq!(Next::At(soon).earlier(Next::Now), Next::Now);
    assert_eq!(Next::Event.earlier(Next::Event), Next::Event);
}
