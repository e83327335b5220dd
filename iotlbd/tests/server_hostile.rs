//! Peers that send descriptors which stop whoever touches them: the loop goes on, for everybody else and for them.

mod server_support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread::JoinHandle;

use iotlb_proto::control::{self, DaemonMessage, Refusal, WorkerMessage};
use iotlb_proto::socket::PacketSocket;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use server_support::{RawWorker, Running, TIMEOUT_MS, connect, hear, hello, watchdog};

/// An epoll set whose lock is held: a thread of this process was about to be told of an event, in memory that is not
/// there yet.
struct HeldEpoll {
    epoll: OwnedFd,
    userfault: OwnedFd,
    sleeper: JoinHandle<()>,
}

impl HeldEpoll {
    /// `None`: this user may not hold the kernel up so. That is said.
    fn new() -> Option<HeldEpoll> {
        const API: libc::Ioctl = 0xc018_aa3f;
        const REGISTER: libc::Ioctl = 0xc020_aa00;
        let mut page = memmap2::MmapMut::map_anon(4096).expect("a page");
        // SAFETY: what is registered below is a page of this function's own, which nobody but the thread touches.
        let Ok(userfault) = (unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }) else {
            eprintln!("NOT TESTED: a held epoll set, because userfaultfd needs root");
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

/// Says HELLO with whatever descriptor.
fn say_hello(server: &Running, fd: impl AsFd) -> PacketSocket {
    let socket = connect(&server.control());
    let bytes = control::encode(&WorkerMessage::Hello(hello())).expect("encodes");
    socket.send_blocking(&bytes, &[fd.as_fd()], TIMEOUT_MS).expect("sends");
    socket
}

#[test]
fn what_came_with_hello_is_not_asked_before_it_is_known_to_be_a_pidfd() {
    let _watchdog = watchdog();
    let Some(held) = HeldEpoll::new() else { return };
    let server = Running::start();
    let socket = say_hello(&server, &held.epoll);
    // Without its lock nothing is to be learned of the set.
    let answer = hear(&socket).map(|(message, _)| message);
    held.let_go();
    assert!(matches!(answer, Ok(DaemonMessage::Refused(Refusal::Pidfd))), "{answer:?}");
    RawWorker::attach(&server.control()).leave();
    server.stop();
}
