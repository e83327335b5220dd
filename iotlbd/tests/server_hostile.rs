//! Peers that send descriptors which stop whoever touches them: the loop goes on, for everybody else and for them.

mod server_support;

use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::control::{self, DaemonMessage, Refusal, WorkerMessage};
use iotlb_proto::iova::IovaRange;
use iotlb_proto::socket::{PacketError, PacketSocket, ReceivedPacket};
use iotlbd::sim::channel::Channel;
use iotlbd::sim::wire::{MessageHeader, code};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use server_support::not_tested::not_tested;
use server_support::{RawWorker, Running, TIMEOUT_MS, connect, hear, hello, own_pidfd, say, watchdog};

/// An epoll set whose lock is held: a thread of this process was about to be told of an event, in memory that is not
/// there yet. Whoever closes something else that the set watches waits for the lock.
struct HeldEpoll {
    epoll: OwnedFd,
    userfault: OwnedFd,
    sleeper: JoinHandle<()>,
}

impl HeldEpoll {
    /// `None`: this user may not hold the kernel up so. That is said.
    fn new(watched: &[BorrowedFd<'_>]) -> Option<HeldEpoll> {
        const API: libc::Ioctl = 0xc018_aa3f;
        const REGISTER: libc::Ioctl = 0xc020_aa00;
        let mut page = memmap2::MmapMut::map_anon(4096).expect("a page");
        // SAFETY: what is registered below is a page of this function's own, which nobody but the thread touches.
        let Ok(userfault) = (unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }) else {
            not_tested("userfaultfd takes root");
            return None;
        };
        let mut api = [0xaa_u64, 0, 0];
        let mut register = [page.as_mut_ptr().addr() as u64, 4096, 1, 0];
        // SAFETY: the structures that the two calls read and write, in 64-bit words.
        let ready = unsafe {
            libc::ioctl(userfault.as_raw_fd(), API, api.as_mut_ptr())
                | libc::ioctl(userfault.as_raw_fd(), REGISTER, register.as_mut_ptr())
        };
        assert_eq!(ready, 0, "{}", std::io::Error::last_os_error());
        let epoll = epoll::create(CreateFlags::CLOEXEC).expect("epoll");
        let event = eventfd(1, EventfdFlags::CLOEXEC).expect("eventfd");
        epoll::add(&epoll, &event, EventData::new_u64(0), EventFlags::IN).expect("added");
        for fd in watched {
            epoll::add(&epoll, fd, EventData::new_u64(0), EventFlags::empty()).expect("added");
        }
        let number = epoll.as_raw_fd();
        let sleeper = std::thread::spawn(move || {
            let events = page.as_mut_ptr().cast();
            // SAFETY: the page has room for one event, and is this thread's.
            let count = unsafe { libc::epoll_wait(number, events, 1, -1) };
            assert_eq!(count, 1, "{}", std::io::Error::last_os_error());
            drop(event);
        });
        // The watchdog ends a wait for nothing.
        poll(&mut [PollFd::new(&userfault, PollFlags::IN)], None).expect("it sleeps");
        Some(HeldEpoll { epoll, userfault, sleeper })
    }

    fn let_go(self) {
        drop(self.userfault);
        self.sleeper.join().expect("told of the event");
    }
}

/// The last descriptor of a socket whose close waits: what it has to send does not fit the other side.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
    let mut near = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
    let (far, _) = listener.accept().expect("accepts");
    near.set_nonblocking(true).expect("a socket");
    while near.write(&[0; 65536]).is_ok() {}
    set_socket_linger(&near, Some(Duration::from_secs(3600))).expect("an option");
    (near.into(), far)
}

/// Says HELLO with whatever descriptor.
fn say_hello(control: &Path, fd: impl AsFd) -> PacketSocket {
    let socket = connect(control);
    let bytes = control::encode(&WorkerMessage::Hello(hello())).expect("encodes");
    socket.send_blocking(&bytes, &[fd.as_fd()], TIMEOUT_MS).expect("sends");
    socket
}

#[test]
fn what_came_with_hello_is_not_asked_before_it_is_known_to_be_a_pidfd() {
    let _watchdog = watchdog();
    let Some(held) = HeldEpoll::new(&[]) else { return };
    let server = Running::start();
    let socket = say_hello(&server.control(), &held.epoll);
    // Without its lock nothing is to be learned of the set.
    let answer = hear(&socket).map(|(message, _)| message);
    held.let_go();
    assert!(matches!(answer, Ok(DaemonMessage::Refused(Refusal::Pidfd))), "{answer:?}");
    RawWorker::attach(&server.control()).leave();
    server.stop();
}

/// Hears all up to the end.
fn hear_the_end(socket: &PacketSocket) {
    let end = loop {
        if let Err(error) = hear(socket) {
            break error;
        }
    };
    assert!(matches!(end, PacketError::Closed), "{end}");
}

/// A packet, of any length, with the last descriptor of something that takes long to close.
fn send_lingering(socket: &PacketSocket, bytes: &[u8]) -> TcpStream {
    let (fd, far) = lingering();
    let numbers = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let number = socket.as_fd().as_raw_fd();
    sendmsg::<()>(number, &[IoSlice::new(bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None).expect("sends");
    far
}

#[test]
fn a_workers_descriptor_that_takes_long_to_close_costs_it_its_connection_and_nobody_else_anything() {
    let _watchdog = watchdog();
    let mapped = control::encode(&WorkerMessage::Mapped { generation: 1 }).expect("encodes");
    let mut bad = None;
    let server = Running::start_behind(
        |_| {},
        |control| {
            let socket = say_hello(control, own_pidfd());
            let far = send_lingering(&socket, &mapped);
            bad = Some((socket, far));
        },
    );
    RawWorker::attach(&server.control()).leave();
    let (socket, _far) = bad.expect("it connected");
    hear_the_end(&socket);
    server.stop();
}

#[test]
fn a_strangers_descriptor_that_takes_long_to_close_stops_nobody() {
    let _watchdog = watchdog();
    let mut bad = Vec::new();
    let long = [0xee; control::MESSAGE_MAX + 1];
    let server = Running::start_behind(
        |_| {},
        |control| {
            // Refused for what it is; refused unread, as it is too long; left unread behind one that is refused.
            for (first, second) in [(None, &[0xee; 10][..]), (None, &long), (Some([0xee]), &[0xee; 10])] {
                let socket = connect(control);
                if let Some(bytes) = first {
                    socket.send_blocking(&bytes, &[], TIMEOUT_MS).expect("sends");
                }
                let far = send_lingering(&socket, second);
                bad.push((socket, far));
            }
        },
    );
    RawWorker::attach(&server.control()).leave();
    for (socket, _far) in &bad {
        hear_the_end(socket);
    }
    server.stop();
}

#[test]
fn workers_are_let_in_again_when_what_took_long_to_close_is_closed() {
    let _watchdog = watchdog();
    let mut far = Vec::new();
    let server = Running::start_behind(
        |_| {},
        |control| far.extend((0..14).map(|_| send_lingering(&connect(control), &[0xee; 10]))),
    );
    let socket = say_hello(&server.control(), own_pidfd());
    drop(far);
    assert!(matches!(hear(&socket), Ok((DaemonMessage::Welcome(_), _))));
    server.stop();
}

#[test]
fn a_doorbell_that_takes_long_to_close_stops_nobody() {
    let _watchdog = watchdog();
    let server = Running::start();
    let RawWorker { socket, doorbell, .. } = RawWorker::attach(&server.control());
    let Some(held) = HeldEpoll::new(&[doorbell.as_fd()]) else { return };
    // The daemon's is the last.
    drop(doorbell);
    say(&socket, &WorkerMessage::Revoked);
    let answer = hear(&say_hello(&server.control(), own_pidfd())).map(|(message, _)| message);
    held.let_go();
    assert!(matches!(answer, Ok(DaemonMessage::Welcome(_))), "{answer:?}");
    hear_the_end(&socket);
    server.stop();
}

#[test]
fn an_event_descriptor_of_a_ring_that_takes_long_to_close_stops_nobody() {
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    let stream = UnixStream::connect(server.front_end()).expect("connects");
    let main = Channel::new(stream, Duration::from_millis(TIMEOUT_MS.into()));
    let set_call = |payload: u64, fds: &[BorrowedFd<'_>]| {
        let header = MessageHeader::request(code::SET_VRING_CALL, 8, false);
        main.send("a call descriptor", header, &payload.to_ne_bytes(), fds).expect("sent");
    };
    let call = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    set_call(0, &[call.as_fd()]);
    drop(call);
    say(&worker.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    let call = loop {
        if let (DaemonMessage::Lease(_), mut fds) = hear(&worker.socket).expect("a message")
            && let Some(call) = fds.pop()
        {
            break call;
        }
    };
    let Some(held) = HeldEpoll::new(&[call.as_fd()]) else { return };
    // The daemon's is the last.
    drop(call);
    // None any more.
    set_call(1 << 8, &[]);
    main.send("a question", MessageHeader::request(code::GET_FEATURES, 0, false), &[], &[]).expect("sent");
    let answer = main.receive("the features");
    held.let_go();
    assert!(answer.is_ok(), "{answer:?}");
    server.stop();
}

/// Whether an epoll set still has something that was added to it: what is closed for good is taken out.
fn has_any(set: &OwnedFd) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", set.as_raw_fd())).expect("readable");
    info.lines().any(|line| line.starts_with("tfd:"))
}

#[test]
fn what_strangers_sent_does_not_keep_the_front_ends_descriptors_open() {
    // As many as there are threads that close such things.
    const SLOW: usize = 8;
    let _watchdog = watchdog();
    let mut slow = Vec::new();
    let server = Running::start_behind(
        |_| {},
        |control| {
            for _ in 0..SLOW {
                let socket = connect(control);
                let far = send_lingering(&socket, &[0xee; 10]);
                slow.push((socket, far));
            }
        },
    );
    for (socket, _far) in &slow {
        hear_the_end(socket);
    }
    let stream = UnixStream::connect(server.front_end()).expect("connects");
    let main = Channel::new(stream, Duration::from_millis(TIMEOUT_MS.into()));
    let set_call = |payload: u64, fds: &[BorrowedFd<'_>]| {
        let header = MessageHeader::request(code::SET_VRING_CALL, 8, false);
        main.send("a call descriptor", header, &payload.to_ne_bytes(), fds).expect("sent");
    };
    let set = epoll::create(CreateFlags::CLOEXEC).expect("epoll");
    let call = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    epoll::add(&set, &call, EventData::new_u64(0), EventFlags::empty()).expect("added");
    set_call(0, &[call.as_fd()]);
    drop(call);
    assert!(has_any(&set), "on its way, or the daemon's");
    set_call(1 << 8, &[]);
    while has_any(&set) {
        std::thread::yield_now();
    }
    drop(slow);
    server.stop();
}

#[test]
fn many_who_watch_a_workers_socket_hold_up_that_worker_only() {
    const WATCHES: usize = 100_000;
    const CLAIMS: u64 = 32;
    let _watchdog = watchdog();
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("raised");
    let server = Running::start();
    let [bad, good] = [(); 2].map(|()| RawWorker::attach(&server.control()));
    let copies: Vec<_> = (0..400).map(|_| bad.socket.as_fd().try_clone_to_owned().expect("a copy")).collect();
    let sets: Vec<_> =
        (0..WATCHES / copies.len()).map(|_| epoll::create(CreateFlags::CLOEXEC).expect("epoll")).collect();
    for set in &sets {
        for copy in &copies {
            // Only urgent data, which never comes: nobody is woken up, but every one is asked.
            if epoll::add(set, copy, EventData::new_u64(0), EventFlags::PRI).is_err() {
                not_tested("/proc/sys/fs/epoll/max_user_watches is too low");
                return;
            }
        }
    }
    for claim in 0..CLAIMS {
        say(&bad.socket, &WorkerMessage::ClaimQueues { claim, queues: vec![0, 1] });
    }
    assert!(matches!(hear(&bad.socket), Ok((DaemonMessage::Lease(_), _))), "the loop is in the middle of it");
    good.segment.cells[0].post(1, IovaRange::page_of(0x1000), Access::READ);
    good.segment.mark_posted(0);
    rustix::io::write(&good.doorbell, &1_u64.to_ne_bytes()).expect("rings");
    while good.segment.cells[0].answer(1).is_none() {
        std::thread::yield_now();
    }
    let mut answers = 1;
    while let Ok(ReceivedPacket::Packet { .. }) = bad.socket.receive() {
        answers += 1;
    }
    assert!(answers < 2 * CLAIMS, "all {answers} answers to one worker came before the one to the other");
    server.stop();
}
