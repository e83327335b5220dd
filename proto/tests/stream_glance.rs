//! Messages that are looked at, handed out and taken later: nothing is lost or seen twice, whatever comes between.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::socket::{MessageStream, Received, StreamError};
use iotlb_proto::vhost_user::{Header, Incoming, IotlbMessage, Request, encode};
use nix::sys::socket::{MsgFlags, send};
use rustix::io::ioctl_fionread;

const WATCHDOG: Duration = Duration::from_secs(20);
/// Some request with a payload of eight bytes; which one does not matter here.
const REQUEST: u32 = 2;

/// A stream that receives requests, and the raw other end.
fn pair() -> (MessageStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    (MessageStream::from_fd(ours.into(), Incoming::Requests).expect("a unix stream"), theirs)
}

fn message(number: u64) -> Vec<u8> {
    [&Header::request(REQUEST, 8, false).to_bytes()[..], &number.to_le_bytes()].concat()
}

fn messages(numbers: std::ops::Range<u64>) -> Vec<u8> {
    numbers.flat_map(message).collect()
}

/// The next message's number.
fn next(stream: &mut MessageStream) -> u64 {
    match stream.receive() {
        Ok(Received::Message { payload, .. }) => u64::from_le_bytes(payload[..].try_into().expect("eight bytes")),
        other => panic!("{other:?} instead of a message"),
    }
}

fn would_block(stream: &mut MessageStream) {
    assert!(matches!(stream.receive(), Ok(Received::WouldBlock)));
}

#[test]
fn what_was_seen_and_not_handed_out_is_there_after_putting_away() {
    for handed_out in 0..10 {
        let (mut stream, mut peer) = pair();
        peer.write_all(&messages(0..10)).expect("writes");
        (0..handed_out).for_each(|number| assert_eq!(next(&mut stream), number));
        stream.put_away().expect("whole");
        peer.write_all(&messages(10..12)).expect("writes");
        (handed_out..12).for_each(|number| assert_eq!(next(&mut stream), number));
        would_block(&mut stream);
    }
}

#[test]
fn a_cut_message_behind_kept_ones_survives_putting_away() {
    let cut_one = message(3);
    for cut in 1..cut_one.len() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&[&messages(0..3)[..], &cut_one[..cut]].concat()).expect("writes");
        (0..3).for_each(|number| assert_eq!(next(&mut stream), number));
        if cut % 2 == 0 {
            would_block(&mut stream);
        }
        stream.put_away().expect("whole");
        would_block(&mut stream);
        stream.put_away().expect("whole");
        peer.write_all(&cut_one[cut..]).expect("writes");
        peer.write_all(&message(4)).expect("writes");
        assert_eq!([next(&mut stream), next(&mut stream)], [3, 4], "cut at {cut}");
        would_block(&mut stream);
    }
}

/// A front-end waits for the answers to all it has sent together: it is not to be answered in two parts because of what
/// came before.
#[test]
fn a_burst_is_seen_as_a_whole_however_much_is_kept() {
    let update =
        encode(&Request::Iotlb(IotlbMessage::update(0, 0x1000, 0, Access::READ)), true).expect("encodes").bytes;
    for kept in 0..32 {
        let (mut stream, mut peer) = pair();
        let mut receive = |count| {
            peer.write_all(&update.repeat(count)).expect("writes");
            for n in 1..=count {
                assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
                assert_eq!(stream.has_message(), n < count, "message {n} of {count} behind {kept}");
            }
        };
        (0..kept).for_each(|_| receive(1));
        receive(32);
        receive(32);
        let unread = usize::try_from(ioctl_fionread(&stream).expect("a socket")).expect("few");
        assert!(unread <= 55 * update.len(), "{unread} bytes take up the peer's room");
    }
}

#[test]
fn hundreds_of_messages_without_payload_come_once_each() {
    let requests: Vec<u32> = (0..600).map(|number| 1 + number % 30).collect();
    let bytes: Vec<u8> = requests.iter().flat_map(|request| Header::request(*request, 0, false).to_bytes()).collect();
    // They are more than a look has room for, which with one or another number of longer ones in front ends inside a
    // message.
    for longer in 0..3 {
        let (mut stream, mut peer) = pair();
        peer.write_all(&[messages(0..longer), bytes.clone()].concat()).expect("writes");
        (0..longer).for_each(|number| assert_eq!(next(&mut stream), number));
        for (number, request) in requests.iter().enumerate() {
            let Ok(Received::Message { header, .. }) = stream.receive() else { panic!("message {number}") };
            assert_eq!(header.request, *request, "message {number}");
            if number > 300 && number % 37 == 0 {
                stream.put_away().expect("whole");
            }
        }
        would_block(&mut stream);
    }
}

#[test]
fn a_peer_that_leaves_without_reading_is_heard_out_first() {
    for put_away in [false, true] {
        let (mut stream, mut peer) = pair();
        peer.write_all(&messages(0..3)).expect("writes");
        assert_eq!(next(&mut stream), 0);
        // The peer never reads this, so the system says reset instead of the end.
        stream.send(&message(0), &[]).expect("sends");
        drop(peer);
        if put_away {
            stream.put_away().expect("what was handed out is there");
        }
        assert_eq!([next(&mut stream), next(&mut stream)], [1, 2], "put away: {put_away}");
        assert!(matches!(stream.receive(), Ok(Received::Closed)), "put away: {put_away}");
    }
}

#[test]
fn a_byte_out_of_band_does_not_hold_up_a_blocking_call_beyond_its_time() {
    let (mut stream, peer) = pair();
    send(peer.as_raw_fd(), b"!", MsgFlags::MSG_OOB).expect("sends");
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(stream.receive_blocking(50).map(drop)));
    let result = wait.recv_timeout(WATCHDOG).expect("the call ends");
    assert!(matches!(result, Err(StreamError::TimedOut { timeout_ms: 50 })), "{result:?}");
    drop(peer);
}
