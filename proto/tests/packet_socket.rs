//! Control packets over real sockets.

#[path = "../../tests/src/not_tested.rs"]
mod not_tested;

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::thread::JoinHandleExt;

use iotlb_proto::control::{MESSAGE_MAX, WorkerMessage, decode, encode};
use iotlb_proto::socket::packet::PACKET_FDS_MAX;
use iotlb_proto::socket::{AddressError, PacketError, PacketListener, PacketSocket, ReceivedPacket};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use not_tested::not_tested;

const WATCHDOG_MS: u32 = 20_000;

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null opens").into()
}

fn is_close_on_exec(fd: &OwnedFd) -> bool {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).expect("flags") & libc::FD_CLOEXEC != 0
}

fn send_raw(socket: &PacketSocket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if fds.is_empty() { &[][..] } else { &control };
    let raw = socket.as_fd().as_raw_fd();
    sendmsg::<()>(raw, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).expect("sends");
}

#[test]
fn packets_keep_their_borders_and_descriptors() {
    let (one, two) = PacketSocket::pair().expect("pair");
    assert!(matches!(two.receive(), Ok(ReceivedPacket::WouldBlock)));
    let fd = null();
    one.send(&encode(&WorkerMessage::Revoked).expect("encodes"), &[]).expect("sends");
    one.send(&encode(&WorkerMessage::Mapped { generation: 3 }).expect("encodes"), &[fd.as_fd(); 4]).expect("sends");
    one.send(&[7; MESSAGE_MAX], &[fd.as_fd(); PACKET_FDS_MAX]).expect("sends");
    let next = || match two.receive() {
        Ok(ReceivedPacket::Packet { bytes, fds }) => (bytes, fds),
        other => panic!("{other:?}"),
    };
    let (bytes, fds) = next();
    assert_eq!((decode::<WorkerMessage>(&bytes).expect("decodes"), fds.len()), (WorkerMessage::Revoked, 0));
    let (bytes, fds) = next();
    let mapped = WorkerMessage::Mapped { generation: 3 };
    assert_eq!((decode::<WorkerMessage>(&bytes).expect("decodes"), fds.len()), (mapped, 4));
    assert!(fds.iter().all(is_close_on_exec));
    let (bytes, fds) = next();
    assert_eq!((bytes, fds.len()), (vec![7; MESSAGE_MAX], PACKET_FDS_MAX));
    drop(one);
    assert!(matches!(two.receive(), Ok(ReceivedPacket::Closed)));
}

#[test]
fn last_words_are_heard_also_of_a_peer_that_did_not_listen() {
    let (one, two) = PacketSocket::pair().expect("pair");
    two.send(&[1], &[]).expect("sends");
    let words = [&[2; 3][..], &[3; 2]];
    for word in words {
        one.send(word, &[]).expect("sends");
    }
    drop(one);
    for word in words {
        let heard = two.receive();
        assert!(matches!(&heard, Ok(ReceivedPacket::Packet { bytes, .. }) if bytes == word), "{heard:?}");
    }
    assert!(matches!(two.receive(), Ok(ReceivedPacket::Closed)));
    assert!(matches!(two.receive(), Ok(ReceivedPacket::Closed)));
}

#[test]
fn signals_do_not_make_a_wait_longer() {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, and no other test uses the signal.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.expect("a handler");

    let directory = std::env::temp_dir().join(format!("iotlb-signals-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a fresh directory");
    let path = directory.join("control");
    let _listener = PacketListener::bind(&path, 0o600).expect("binds");
    let waiter = std::thread::spawn(move || {
        let mut crowd = Vec::new();
        let refused = loop {
            match PacketSocket::connect(&path, 50) {
                Ok(socket) => crowd.push(socket),
                Err(error) => break error,
            }
        };
        let (one, _two) = PacketSocket::pair().expect("pair");
        (refused, one.receive_blocking(50))
    });
    let start = std::time::Instant::now();
    while !waiter.is_finished() {
        assert!(start.elapsed() < std::time::Duration::from_millis(WATCHDOG_MS.into()), "a wait does not end");
        // SAFETY: the thread was not joined yet, so its handle is good.
        unsafe { libc::pthread_kill(waiter.as_pthread_t(), libc::SIGUSR1) };
        // More often than either of the waits is long.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let (refused, nothing_came) = waiter.join().expect("no panic");
    std::fs::remove_dir_all(&directory).expect("cleans up");
    assert!(matches!(refused, AddressError::ConnectTimedOut { timeout_ms: 50, .. }), "{refused:?}");
    assert!(matches!(nothing_came, Err(PacketError::TimedOut { timeout_ms: 50 })), "{nothing_came:?}");
}

#[test]
fn a_bad_packet_is_one_bad_packet() {
    let (one, two) = PacketSocket::pair().expect("pair");
    let fd = null();
    send_raw(&one, &[0; MESSAGE_MAX + 1], &[fd.as_fd()]);
    send_raw(&one, &[0], &[fd.as_fd(); PACKET_FDS_MAX + 1]);
    send_raw(&one, &[0], &[fd.as_fd(); 253]);
    send_raw(&one, &[1], &[]);
    assert!(matches!(two.receive(), Err(PacketError::TooLong)));
    assert!(matches!(two.receive(), Err(PacketError::TooManyDescriptors { count: 9 })));
    // All that the system lets through: none was closed within the call.
    assert!(matches!(two.receive(), Err(PacketError::TooManyDescriptors { count: 253 })));
    assert!(matches!(two.receive(), Ok(ReceivedPacket::Packet { bytes, .. }) if bytes == [1]));
}

#[test]
fn descriptors_of_a_refused_packet_are_handed_out() {
    let (one, two) = PacketSocket::pair().expect("pair");
    let fd = null();
    send_raw(&one, &[0; MESSAGE_MAX + 1], &[fd.as_fd(); 2]);
    send_raw(&one, &[0], &[fd.as_fd(); 253]);
    send_raw(&one, &[], &[fd.as_fd()]);
    let mut fds = Vec::new();
    assert!(matches!(two.receive_into(&mut fds), Err(PacketError::TooLong)));
    assert!(matches!(two.receive_into(&mut fds), Err(PacketError::TooManyDescriptors { count: 253 })));
    assert!(matches!(two.receive_into(&mut fds), Err(PacketError::Closed)));
    assert_eq!(fds.len(), 2 + 253 + 1);
    assert!(fds.iter().all(is_close_on_exec));
    assert!(matches!(two.receive_into(&mut fds), Ok(None)));
}

#[test]
fn descriptors_are_seen_before_they_are_received() {
    use nix::sys::socket::{setsockopt, sockopt};
    let (one, two) = PacketSocket::pair().expect("pair");
    assert!(!two.brings_descriptors().expect("nothing is there"));
    // As a listener's option would have it.
    setsockopt(&two, sockopt::PassCred, &true).expect("an option");
    two.take_descriptors_only();
    let fd = null();
    send_raw(&one, &[1, 2], &[]);
    send_raw(&one, &[3], &[fd.as_fd()]);
    assert!(!two.brings_descriptors().expect("a packet"));
    assert!(matches!(two.receive(), Ok(ReceivedPacket::Packet { bytes, .. }) if bytes == [1, 2]));
    assert!(two.brings_descriptors().expect("a packet"));
    let Ok(ReceivedPacket::Packet { bytes, fds }) = two.receive() else { panic!("it is still there") };
    assert_eq!((bytes, fds.len()), (vec![3], 1));
    drop(one);
    assert!(!two.brings_descriptors().expect("the end"));
}

#[test]
fn what_cannot_be_sent_is_said() {
    let (one, two) = PacketSocket::pair().expect("pair");
    let fd = null();
    let long = [0; MESSAGE_MAX + 1];
    assert!(matches!(one.send(&long, &[]), Err(PacketError::Unsendable { .. })));
    assert!(matches!(one.send(&[], &[]), Err(PacketError::Unsendable { .. })));
    assert!(matches!(one.send(&[0], &[fd.as_fd(); PACKET_FDS_MAX + 1]), Err(PacketError::Unsendable { .. })));
    let full = loop {
        if let Err(error) = one.send(&[0; MESSAGE_MAX], &[]) {
            break error;
        }
    };
    assert!(matches!(full, PacketError::WouldBlock), "{full}");
    assert!(matches!(one.send_blocking(&[0], &[], 1), Err(PacketError::TimedOut { timeout_ms: 1 })));
    let reader = std::thread::spawn(move || {
        let mut count = 0;
        while two.receive_blocking(WATCHDOG_MS).expect("a packet").0.len() > 1 {
            count += 1;
        }
        (two, count)
    });
    one.send_blocking(&[0], &[], WATCHDOG_MS).expect("the reader makes room");
    let (two, count) = reader.join().expect("no panic");
    assert!(count > 0);
    drop(two);
    assert!(matches!(one.send(&[0], &[]), Err(PacketError::Closed)));
}

#[test]
fn listening_connecting_and_who_is_there() {
    let directory = std::env::temp_dir().join(format!("iotlb-packet-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a fresh directory");
    let path = directory.join("control");
    let listener = PacketListener::bind(&path, 0o660).expect("binds");
    assert_eq!(std::fs::metadata(&path).expect("a file").permissions().mode() & 0o777, 0o660);
    assert!(listener.accept().expect("accepts").is_none());
    let worker = PacketSocket::connect(&path, WATCHDOG_MS).expect("connects");
    let daemon = listener.accept().expect("accepts").expect("one connection");
    assert_eq!(daemon.peer_uid().expect("a user"), nix::unistd::getuid().as_raw());

    // Both ends are this process, so both pidfds name it.
    let inode = |fd: OwnedFd| nix::sys::stat::fstat(&fd).expect("fstat").st_ino;
    let ours = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
    let ours = inode(ours.expect("a pidfd"));
    match daemon.peer_pidfd() {
        Err(PacketError::Peer(error)) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
            not_tested("SO_PEERPIDFD takes Linux 6.5");
        }
        pidfd => {
            let pidfd = pidfd.expect("a pidfd");
            assert!(is_close_on_exec(&pidfd));
            assert_eq!(inode(pidfd), ours);
            assert_eq!(inode(worker.peer_pidfd().expect("a pidfd")), ours);
        }
    }

    worker.send_blocking(&[1, 2], &[], WATCHDOG_MS).expect("sends");
    assert_eq!(daemon.receive_blocking(WATCHDOG_MS).expect("receives").0, [1, 2]);
    assert!(matches!(daemon.receive_blocking(1), Err(PacketError::TimedOut { .. })));
    drop(worker);
    assert!(matches!(daemon.receive_blocking(WATCHDOG_MS), Err(PacketError::Closed)));

    let stream = std::os::unix::net::UnixStream::connect(&path);
    assert!(stream.is_err(), "a stream must not connect to a packet socket");
    let (one, _two) = std::os::unix::net::UnixStream::pair().expect("pair");
    assert!(matches!(PacketSocket::from_fd(one.into()), Err(AddressError::WrongSocket { .. })));
    std::fs::remove_dir_all(&directory).expect("removes");
}

/// A listener that accepts nothing: its queue fills, and connecting ends by its time limit.
#[test]
fn connecting_to_a_listener_that_does_not_accept_times_out() {
    let directory = std::env::temp_dir().join(format!("iotlb-backlog-{}", std::process::id()));
    std::fs::create_dir(&directory).expect("a fresh directory");
    let path = directory.join("control");
    let listener = PacketListener::bind(&path, 0o600).expect("binds");
    let mut connections = Vec::new();
    let error = loop {
        match PacketSocket::connect(&path, 10) {
            Ok(connection) => connections.push(connection),
            Err(error) => break error,
        }
        assert!(connections.len() < 10_000, "the queue is not bounded");
    };
    assert!(matches!(error, AddressError::ConnectTimedOut { timeout_ms: 10, .. }), "{error}");
    drop(listener);
    std::fs::remove_dir_all(&directory).expect("removes");
}
