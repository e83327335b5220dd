//! The life of an `iotlb-net`: what it waits for, what ends it and what does not.

mod net_support;
mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use iotlb_proto::control::{self, DaemonMessage, Refusal, WorkerMessage};
use net_support::{Socket, Stage, end, fragment, ping, signal, terminate};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use support::program::Program;
use support::{Daemon, PATIENCE, Watchdog, wait_readable, wait_until};

#[test]
fn other_signals_end_it_as_well_unless_they_are_ignored() {
    for which in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT] {
        let socket = Socket::new();
        let worker = socket.worker_with(which, SigHandler::SigDfl);
        let _stage = Stage::attach(&socket);
        signal(&worker, which);
        end(worker);
    }
    for which in [Signal::SIGHUP, Signal::SIGQUIT] {
        let socket = Socket::new();
        let worker = socket.worker_with(which, SigHandler::SigIgn);
        let mut stage = Stage::attach(&socket);
        signal(&worker, which);
        stage.post_receive_buffers(100);
        for count in 1..=2 {
            stage.send(&fragment(0, &ping(b"hello")));
            stage.bells[1].kick();
            stage.wait_received(count);
        }
        terminate(worker);
    }
}

#[test]
fn without_its_daemon_the_worker_ends_and_says_so() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.send(&fragment(0, &ping(b"hello")));
    stage.bells[1].kick();
    stage.wait_received(1);
    stage.daemon.kill();
    stage.daemon.socket = None;
    let output = worker.wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("the daemon ended") && log.contains("--reconnect"), "{log}");
}

#[test]
fn with_reconnect_it_serves_under_the_next_daemon() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo", "--reconnect"]);
    let mut stage = Stage::attach(&socket);
    stage.daemon.kill();
    stage.daemon.socket = None;
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.send(&fragment(0, &ping(b"back")));
    stage.bells[1].kick();
    stage.wait_received(1);
    assert_eq!(&stage.received(0)[42..], b"back");
    terminate(worker);
}

/// Takes a connection that says HELLO. The worker's log is nobody's business here: it is not read.
fn hello(socket: &Socket) -> OwnedFd {
    assert!(wait_readable(socket.listener.as_fd(), PATIENCE), "no worker came");
    let connection = socket::accept4(socket.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).expect("accept");
    // SAFETY: just accepted, and owned by nobody else.
    let connection: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(connection) };
    assert!(wait_readable(connection.as_fd(), PATIENCE), "no HELLO came");
    connection
}

#[test]
fn a_log_that_nobody_reads_any_more_does_not_end_it() {
    let _watchdog = Watchdog::new();
    let socket = Socket::new();
    let mut worker = socket.worker(&["--queues", "0,1", "--echo", "--reconnect"]);
    drop(worker.stderr.take());
    // The end of each attachment is a line of the log.
    for _ in 0..3 {
        drop(hello(&socket));
    }
    signal(&worker, Signal::SIGTERM);
    let status = worker.wait().expect("it ends");
    assert!(status.success(), "{status:?}");
}

#[test]
fn a_log_that_is_full_keeps_nothing_waiting() {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
    assert_eq!(rustix::io::write(&writer, &vec![0; size]), Ok(size), "the pipe is full");
    let socket = Socket::new();
    let mut command = socket.command(&["--queues", "0,1", "--echo"]);
    let mut worker = Program::start(command.stderr(writer));
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.send(&fragment(0, &ping(b"hello")));
    stage.bells[1].kick();
    stage.wait_received(1);
    signal(&worker, Signal::SIGTERM);
    let status = worker.wait().expect("it ends");
    assert!(status.success(), "{status:?}");
    drop(reader);
}

#[test]
fn what_it_waits_for_is_told_once_and_again_when_it_is_something_else() {
    const TRIES: usize = 5;
    let _watchdog = Watchdog::new();
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo", "--reconnect"]);
    for refusal in std::iter::repeat_n(Refusal::Full, TRIES).chain([Refusal::NoSuchDevice]) {
        let connection = hello(&socket);
        let message = control::encode(&DaemonMessage::Refused(refusal)).expect("encodes");
        rustix::io::write(&connection, &message).expect("the worker listens");
    }
    // The next try comes after the line about the last one.
    let _connection = hello(&socket);
    signal(&worker, Signal::SIGTERM);
    let log = String::from_utf8_lossy(&worker.wait_with_output().expect("it ends").stderr).into_owned();
    let count = |words: &str| log.lines().filter(|line| line.contains("trying") && line.contains(words)).count();
    assert!((1..TRIES).contains(&count("as many workers")), "{log}");
    assert_eq!(count("no device"), 1, "{log}");
}

/// A TERM ends it as it should, although the daemon does not answer: the time-out would be a failure.
#[test]
fn sigterm_ends_a_worker_that_waits_for_its_daemon() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut daemon = Daemon::new();
    assert!(wait_readable(socket.listener.as_fd(), PATIENCE), "no worker came");
    let connection = socket::accept4(socket.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).expect("accept");
    // SAFETY: just accepted, and owned by nobody else.
    daemon.adopt(unsafe { std::os::fd::FromRawFd::from_raw_fd(connection) });
    assert!(matches!(daemon.receive().0, WorkerMessage::Hello(_)));
    terminate(worker);
}

#[test]
fn sigterm_ends_a_worker_that_is_not_accepted() {
    let socket = Socket::new();
    let address = UnixAddr::new(&socket.path).expect("short");
    let mut crowd = Vec::new();
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        crowd.push(socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket"));
        match socket::connect(crowd[crowd.len() - 1].as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::EAGAIN) => break,
            Err(error) => panic!("connect: {error}"),
        }
    }
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    // Once it has taken TERM for itself there is one thing that it sleeps in: a place in the queue.
    wait_until("the worker waits", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", worker.id())).expect("our own child");
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).expect("a field of proc");
        let blocked = u64::from_str_radix(field("SigBlk:").trim(), 16).expect("hexadecimal");
        blocked & 1 << (libc::SIGTERM - 1) != 0 && field("State:").trim().starts_with('S')
    });
    terminate(worker);
}

#[test]
fn half_a_pair_cannot_echo() {
    let socket = Socket::new();
    let output = socket.worker(&["--queues", "1", "--echo"]).wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains("--queues has 1 without 0"), "{log}");
}
