//! A front-end's connection from its side, while answered requests are left in the socket: its end, and little room.

mod server_support;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::socket::{PacketError, PacketListener};
use iotlb_proto::vhost_user::features::protocol;
use iotlbd::server::{FrontEndSocket, FrontEndSource};
use iotlbd::sim::channel::Channel;
use iotlbd::sim::front_end::FrontEnd;
use iotlbd::sim::wire::{HEADER_LEN, MessageHeader, code};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use server_support::{Running, TIMEOUT_MS, connect, started_front_end, watchdog};

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
