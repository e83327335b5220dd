//! A front-end's connection from its side, while answered requests are left in the socket: its end, and little room.

mod server_support;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::socket::{PacketError, PacketListener};
use iotlb_proto::vhost_user::features::protocol;
use iotlb_proto::worker::Answer;
use iotlbd::server::{FrontEndSocket, FrontEndSource};
use iotlbd::sim::channel::Channel;
use iotlbd::sim::front_end::FrontEnd;
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, Iotlb, MessageHeader, code};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use server_support::{RawWorker, Running, TIMEOUT_MS, connect, started_front_end, watchdog};

const IOVA: u64 = 0x10_0000;

/// A server that never sleeps, so that it leaves answered requests in the socket, and a front-end some of whose
/// messages were answered just now.
fn polling() -> (Running, FrontEnd) {
    let server = Running::start_with(|config| config.busy_poll = true);
    let mut front_end = started_front_end(&server.front_end());
    let page = front_end.guest.allocate().expect("a page");
    front_end.viommu.map(IOVA, page, Access::READ_WRITE).expect("maps");
    for _ in 0..3 {
        front_end.push_update(IOVA).expect("acknowledged");
    }
    (server, front_end)
}

/// The front-end's main channel, on its own.
fn main_channel(front_end: &FrontEnd) -> OwnedFd {
    front_end.channels().0.try_clone_to_owned().expect("a descriptor")
}

/// How many bytes come next; 0 is the end.
fn next(socket: &OwnedFd) -> Result<usize, Errno> {
    poll(&mut [PollFd::new(socket, PollFlags::IN)], None).expect("polls");
    recv(socket, &mut [0; 64][..], RecvFlags::DONTWAIT).map(|(count, _)| count)
}

#[test]
fn a_daemon_that_stops_closes_without_an_error() {
    let _watchdog = watchdog();
    let (server, front_end) = polling();
    let main = main_channel(&front_end);
    server.stop();
    assert_eq!(next(&main), Ok(0), "answered requests are no reason to reset the connection");
}

#[test]
fn a_front_end_with_little_room_in_its_socket_is_served() {
    let _watchdog = watchdog();
    let (server, mut front_end) = polling();
    // As little as the system allows: a handful of messages.
    nix::sys::socket::setsockopt(&main_channel(&front_end), nix::sys::socket::sockopt::SndBuf, &1).expect("SO_SNDBUF");
    for _ in 0..100 {
        front_end.push_update(IOVA).expect("room, and an acknowledgement");
    }
    server.stop();
}

#[test]
fn a_front_end_that_will_send_no_more_is_let_go() {
    let _watchdog = watchdog();
    let (server, front_end) = polling();
    let main = main_channel(&front_end);
    shutdown(&main, Shutdown::Write).expect("half closed");
    assert_eq!(next(&main), Ok(0), "the end comes from the other side too");
    drop(started_front_end(&server.front_end()));
    server.stop();
}

#[test]
fn what_was_asked_before_framing_is_lost_is_answered() {
    let _watchdog = watchdog();
    let server = Running::start();
    let mut stream = UnixStream::connect(server.front_end()).expect("connects");
    let mut bytes = MessageHeader::request(code::GET_FEATURES, 0, false).encode().to_vec();
    // No version of vhost-user has such a header: where the next message starts is unknown.
    bytes.extend([0xff; HEADER_LEN]);
    stream.write_all(&bytes).expect("sent in one go");
    let main = OwnedFd::from(stream);
    assert_eq!(next(&main), Ok(HEADER_LEN + 8), "the features");
    assert!(matches!(next(&main), Ok(0) | Err(Errno::CONNRESET)), "then the end");
    server.stop();
}

#[test]
fn a_front_end_that_gave_away_its_own_end_is_gone_when_it_is_gone() {
    let _watchdog = watchdog();
    let server = Running::start();
    let stream = UnixStream::connect(server.front_end()).expect("connects");
    let own = stream.try_clone().expect("a copy");
    let main = Channel::new(stream, Duration::from_millis(TIMEOUT_MS.into()));
    let features = (protocol::BACKEND_REQ | protocol::REPLY_ACK).to_ne_bytes();
    let header = MessageHeader::request(code::SET_PROTOCOL_FEATURES, 8, false);
    main.send("features", header, &features, &[]).expect("sent");
    let header = MessageHeader::request(code::SET_BACKEND_REQ_FD, 0, true);
    main.send("a channel", header, &[], &[own.as_fd()]).expect("sent");
    let answer = main.receive("an acknowledgement").expect("answered");
    assert_eq!(answer.body, 1_u64.to_ne_bytes(), "taken for a back-end channel");
    drop((main, own));
    drop(started_front_end(&server.front_end()));
    server.stop();
}

#[test]
fn who_waits_behind_a_connection_that_cannot_be_used_is_not_forgotten() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("packets");
    // Connections of the wrong kind, all of which wait before the first is looked at.
    let listener = PacketListener::bind(&path, 0o600).expect("binds");
    let fd = listener.as_fd().try_clone_to_owned().expect("a copy");
    let mut waiting = Vec::new();
    let server = Running::start_behind(
        |config| config.front_end = FrontEndSource::Inherited(FrontEndSocket::Listener(fd)),
        |_| waiting.extend((0..3).map(|_| connect(&path))),
    );
    for socket in &waiting {
        assert!(matches!(socket.receive_blocking(TIMEOUT_MS), Err(PacketError::Closed)));
    }
    server.stop();
}

/// The next miss on the back-end channel, if one is there: its header and where.
fn next_miss(channel: BorrowedFd<'_>) -> Option<(MessageHeader, u64)> {
    let mut bytes = [0; HEADER_LEN + Iotlb::LEN];
    match recv(channel, &mut bytes[..], RecvFlags::DONTWAIT) {
        Err(Errno::AGAIN) => None,
        got => {
            assert_eq!(got.map(|(count, _)| count), Ok(bytes.len()), "misses come whole");
            let (header, body) = bytes.split_first_chunk().expect("a header");
            Some((MessageHeader::decode(header), Iotlb::decode(body).expect("an IOTLB message").iova))
        }
    }
}

/// What was sent on a socket and not yet taken by the other side, in bytes as the kernel counts them.
fn untaken(channel: BorrowedFd<'_>) -> i32 {
    let mut bytes = 0;
    // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int to the address given; `bytes` is one.
    let result = unsafe { libc::ioctl(channel.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    bytes
}

fn send_message(channel: BorrowedFd<'_>, header: MessageHeader, body: &[u8]) {
    let bytes = [&header.encode()[..], body].concat();
    assert_eq!(send(channel, &bytes, SendFlags::empty()), Ok(bytes.len()));
}

#[test]
fn a_reply_on_one_channel_does_not_overtake_the_update_on_the_other() {
    const MISSED: u64 = 0x20_0000;
    let _watchdog = watchdog();
    let server = Running::start_with(|config| config.miss_timeout_ms = 3_600_000);
    let worker = RawWorker::attach(&server.control());
    let mut front_end = started_front_end(&server.front_end());
    let page = front_end.guest.allocate().expect("a page");
    front_end.viommu.map(IOVA, page, Access::READ_WRITE).expect("maps");
    front_end.push_update(IOVA).expect("acknowledged");
    worker.segment.cells[0].post(1, IovaRange::page_of(MISSED), Access::READ);
    worker.segment.mark_posted(0);
    rustix::io::write(&worker.doorbell, &1_u64.to_ne_bytes()).expect("rings");
    let channel = front_end.channels().1.expect("a back-end channel");
    let mut due = 0;
    loop {
        poll(&mut [PollFd::new(&channel, PollFlags::IN)], None).expect("polls");
        let Some((header, iova)) = next_miss(channel) else { continue };
        due += usize::from(header.needs_reply());
        if iova == MISSED {
            assert!(header.needs_reply(), "nothing was asked for together with it");
            break;
        }
    }
    worker.pin();
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |front_end| {
        worker.wait_until_held();
        let (main, channel) = front_end.channels();
        let channel = channel.expect("a back-end channel");
        // The translation, of which no acknowledgement is asked for, and then that it was sent. The server may read
        // only the latter now.
        let update = Iotlb::update(MISSED, PAGE_SIZE, front_end.guest.user_address(page)?, Access::READ).encode();
        send_message(main, MessageHeader::request(code::IOTLB_UPDATE, update.len(), false), &update);
        for _ in 0..due {
            send_message(channel, MessageHeader::reply(BACKEND_IOTLB), &0_u64.to_ne_bytes());
        }
        while untaken(channel) != 0 {
            std::thread::yield_now();
        }
        worker.unpin();
        Ok(())
    });
    result.expect("acknowledged");
    let answer = loop {
        if let Some(answer) = worker.segment.cells[0].answer(1) {
            break answer;
        }
        std::thread::yield_now();
    };
    assert_eq!(answer, Answer::Resolved);
    // Whatever the server had to ask is there when it has answered this.
    front_end.push_update(IOVA).expect("acknowledged");
    let channel = front_end.channels().1.expect("a back-end channel");
    let asked: Vec<u64> = std::iter::from_fn(|| next_miss(channel)).map(|(_, iova)| iova).collect();
    assert!(!asked.contains(&MISSED), "asked for again although it was on its way: {asked:x?}");
    server.stop();
}
