//! No input leaks a descriptor. One test alone in its process, because it counts what is open.

#[path = "../../tests/src/not_tested.rs"]
mod not_tested;

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use iotlb_proto::socket::{MessageStream, PacketSocket, Received};
use iotlb_proto::vhost_user::header::{FLAG_NEED_REPLY, FLAG_VERSION};
use iotlb_proto::vhost_user::{Header, Incoming, Request, RequestCode, VringFd, decode, encode};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, setsockopt, sockopt};
use not_tested::not_tested;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is there").count()
}

fn send_raw(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if fds.is_empty() { &[][..] } else { &control };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    // What does not fit is not sent: the receiver drains only between chunks.
    let _ = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
}

/// Receives until there is no more, decoding what comes.
fn drain(stream: &mut MessageStream) {
    while let Ok(Received::Message { header, payload, fds }) = stream.receive() {
        let _ = decode(header, &payload, fds);
    }
}

/// Chunks of bytes with descriptors, in any order and number: garbage mostly, whole headers often.
fn chunks() -> impl Strategy<Value = Vec<(Vec<u8>, usize)>> {
    let header =
        (0u32..45, prop_oneof![Just(FLAG_VERSION), Just(FLAG_VERSION | FLAG_NEED_REPLY), any::<u32>()], 0u32..80)
            .prop_map(|(request, flags, size)| Header { request, flags, size }.to_bytes().to_vec());
    let message =
        (0usize..RequestCode::ALL.len(), prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(code, payload)| {
            let size = u32::try_from(payload.len()).expect("short");
            let header = Header::request(RequestCode::ALL[code].number(), size, true);
            [&header.to_bytes()[..], &payload].concat()
        });
    let bytes = prop_oneof![header, message, prop::collection::vec(any::<u8>(), 1..100)];
    let fds = prop_oneof![3 => 0usize..3, 1 => 30usize..35, 1 => 55usize..65, 1 => Just(253usize)];
    prop::collection::vec((bytes, fds), 1..12)
}

/// With `SO_PASSCRED` and `SO_PASSPIDFD` set by the peer, who may hold a duplicate of our end. False where the kernel
/// knows only the first of them.
fn meddle(socket: BorrowedFd<'_>) -> bool {
    setsockopt(&socket, sockopt::PassCred, &true).expect("SO_PASSCRED");
    let one: libc::c_int = 1;
    const SO_PASSPIDFD: libc::c_int = 76;
    // SAFETY: a plain call with a pointer to a live integer and its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSPIDFD,
            (&raw const one).cast(),
            libc::socklen_t::try_from(size_of_val(&one)).expect("4"),
        )
    };
    let error = std::io::Error::last_os_error();
    assert!(result == 0 || error.raw_os_error() == Some(libc::ENOPROTOOPT), "SO_PASSPIDFD: {error}");
    result == 0
}

#[test]
fn no_input_leaks_a_descriptor() {
    let null: OwnedFd = std::fs::File::open("/dev/null").expect("/dev/null opens").into();
    let pidfds = meddle(UnixStream::pair().expect("pair").0.as_fd());
    if !pidfds {
        not_tested("SO_PASSPIDFD and SO_PEERPIDFD take Linux 6.5");
    }
    let before = open_descriptors();

    let mut runner =
        TestRunner::new(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() });
    runner
        .run(&(chunks(), any::<bool>(), any::<bool>()), |(chunks, meddled, requests)| {
            {
                let (ours, theirs) = UnixStream::pair().expect("pair");
                let incoming = if requests { Incoming::Requests } else { Incoming::Replies };
                let mut stream = MessageStream::from_fd(ours.into(), incoming).expect("a unix stream");
                let (one, two) = PacketSocket::pair().expect("pair");
                if meddled {
                    meddle(stream.as_fd());
                    meddle(two.as_fd());
                }
                for (bytes, fd_count) in &chunks {
                    let fds = vec![null.as_fd(); *fd_count];
                    send_raw(theirs.as_fd(), bytes, &fds);
                    send_raw(one.as_fd(), bytes, &fds);
                    drain(&mut stream);
                    let _ = two.receive();
                }
            }
            prop_assert_eq!(open_descriptors(), before);
            Ok(())
        })
        .expect("no leak");

    // A failed step in the middle of a process out of descriptors: some arrive, some are cut off by the system.
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let mut stream = MessageStream::from_fd(ours.into(), Incoming::Requests).expect("a unix stream");
    let (one, two) = PacketSocket::pair().expect("pair");
    send_raw(theirs.as_fd(), &Header::request(5, 0, false).to_bytes(), &[null.as_fd(); 8]);
    send_raw(one.as_fd(), &[1], &[null.as_fd(); 8]);
    let used = open_descriptors();
    let (soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("limit");
    // Room for a few of the eight; counting took one itself, which is free again.
    let limit = u64::try_from(used + 3).expect("small");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, hard).expect("limit");
    let stream_result = stream.receive();
    let packet_result = two.receive();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, soft, hard).expect("limit");
    let cut = stream_result.expect_err("descriptors are missing").to_string();
    assert!(cut.contains("limit of open files"), "{cut}");
    let cut = packet_result.expect_err("descriptors are missing").to_string();
    assert!(cut.contains("limit of open files"), "{cut}");
    assert_eq!(open_descriptors(), used);

    // A stream that is given up closes what it had collected, and does not wait for its own end to do so.
    let (ours, broken_peer) = UnixStream::pair().expect("pair");
    let mut broken = MessageStream::from_fd(ours.into(), Incoming::Requests).expect("a unix stream");
    let used = open_descriptors();
    send_raw(broken_peer.as_fd(), &[1], &[null.as_fd(); 8]);
    assert!(matches!(broken.receive(), Ok(Received::WouldBlock)));
    assert_eq!(open_descriptors(), used + 8);
    send_raw(broken_peer.as_fd(), &[0], &[null.as_fd(); 30]);
    assert!(broken.receive().is_err());
    assert_eq!(open_descriptors(), used);
    drop((broken, broken_peer));

    // Descriptors that wait to be sent go with the stream, and a pidfd that was asked for with its owner.
    let request = Request::SetVringKick(VringFd { index: 0, fd: Some(null.try_clone().expect("dup")) });
    let (ours, reader) = UnixStream::pair().expect("pair");
    let mut sender = MessageStream::from_fd(ours.into(), Incoming::Replies).expect("a unix stream");
    let outgoing = encode(&request, false).expect("encodes");
    while !sender.wants_write() {
        sender.send(&outgoing.bytes, &outgoing.fds).expect("queued at the latest");
    }
    assert_eq!(two.peer_pidfd().is_ok(), pidfds);
    drop(outgoing);
    drop((stream, theirs, one, two, sender, reader, request));
    // What was in flight is dropped with the last end of its socket.
    assert_eq!(open_descriptors(), before);
}
