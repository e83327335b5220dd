//! A daemon made of the contract's own parts, driven by hand from a test.
#![allow(dead_code, unreachable_pub)] // each test program uses its part

pub mod namespace;
#[path = "../../../tests/src/not_tested.rs"]
pub mod not_tested;
#[path = "../../../tests/src/program.rs"]
pub mod program;
#[path = "../../../tests/src/watchdog.rs"]
mod watchdog;

use std::io::{IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use iotlb_client::{AttachError, AttachOptions, Attachment};
use iotlb_proto::access::Access;
use iotlb_proto::control::message::CONTROL_VERSION;
use iotlb_proto::control::{self, DaemonMessage, MESSAGE_MAX, RegionInfo, Welcome, WorkerMessage};
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::layout::worker::{SEGMENT_SIZE, WorkerSegmentLayout};
use iotlb_proto::liveness::{LivenessOwner, WORD_OFFSET};
use iotlb_proto::shm::memfd;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::worker::{Answer, MissRequest, WorkerSegment};
use rustix::event::EventfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
pub use watchdog::Watchdog;

/// Bytes of the test's table.
pub const TABLE_SIZE: u64 = 4 << 20;
/// Bytes of the test's arena.
pub const ARENA_SIZE: u64 = 64 << 20;
/// Longest any single wait of a test may take: long, because many tests may share few processors.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// For the waits of the client.
pub const PATIENCE_MS: u32 = 60_000;
/// Which worker the daemon takes the client for.
pub const INCARNATION: u64 = 0x1234_5678_9abc_def0;

/// Looks until `condition` holds.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Owns a liveness word, in a thread that can die.
struct Heart {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

pub struct Daemon {
    _watchdog: Watchdog,
    pub table: Arc<Mutex<TableWriter>>,
    pub segment: Arc<WorkerSegment>,
    pub table_fd: OwnedFd,
    pub segment_fd: OwnedFd,
    pub liveness_fd: OwnedFd,
    pub doorbell: OwnedFd,
    heart: Option<Heart>,
    pub socket: Option<OwnedFd>,
    memory_generation: u64,
}

impl Daemon {
    pub fn new() -> Daemon {
        let config = TableConfig { size: TABLE_SIZE, generation: 1 };
        let (table, table_fd) = TableWriter::create(&config).expect("a table");
        let (segment, segment_fd) = WorkerSegment::create(INCARNATION).expect("a worker segment");
        let (stop, stopped) = mpsc::channel();
        let (made, page) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let (owner, fd) = LivenessOwner::create().expect("a liveness word");
            made.send(fd).expect("the test waits");
            let _ = stopped.recv();
            // As a killed thread leaves it: only the kernel clears up.
            std::mem::forget(owner);
        });
        Daemon {
            _watchdog: Watchdog::new(),
            table: Arc::new(Mutex::new(table)),
            segment: Arc::new(segment),
            table_fd,
            segment_fd,
            liveness_fd: page.recv_timeout(PATIENCE).expect("a liveness page"),
            doorbell: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
            heart: Some(Heart { stop, thread }),
            socket: None,
            memory_generation: 0,
        }
    }

    /// A daemon with one region of `pages` pages at the start of the arena, and a worker that has mapped it.
    pub fn with_memory(pages: u64) -> (Daemon, Memory, Attachment) {
        let mut daemon = Daemon::new();
        let memory = Memory::new(pages * PAGE_SIZE);
        let attachment = daemon.attach().expect("attach");
        daemon.add_region(1, 0, &memory);
        daemon.finish_map();
        (daemon, memory, attachment)
    }

    pub fn welcome(&self) -> Welcome {
        Welcome {
            worker: 7,
            incarnation: INCARNATION,
            device: "net0".to_owned(),
            table_size: TABLE_SIZE,
            segment_size: SEGMENT_SIZE as u64,
            liveness_offset: WORD_OFFSET,
            arena_size: ARENA_SIZE,
            miss_timeout_ms: 1000,
            queues: 4,
        }
    }

    pub fn welcome_fds(&self) -> [BorrowedFd<'_>; 4] {
        [self.table_fd.as_fd(), self.segment_fd.as_fd(), self.liveness_fd.as_fd(), self.doorbell.as_fd()]
    }

    /// Answers the handshake as it should be.
    pub fn attach(&mut self) -> Result<Attachment, AttachError> {
        let welcome = DaemonMessage::Welcome(self.welcome());
        self.attach_with(|daemon| daemon.send(&welcome, &daemon.welcome_fds()))
    }

    /// Answers it by whatever `answer` does. The answer waits in the socket before the question is asked.
    pub fn attach_with(&mut self, answer: impl FnOnce(&Daemon)) -> Result<Attachment, AttachError> {
        let (ours, theirs) = socket_pair();
        self.attach_over(ours, theirs, answer)
    }

    /// The same over the ends of a connection that are ours and the worker's.
    pub fn attach_over(
        &mut self,
        ours: OwnedFd,
        theirs: OwnedFd,
        answer: impl FnOnce(&Daemon),
    ) -> Result<Attachment, AttachError> {
        self.adopt(ours);
        answer(self);
        let options = AttachOptions { label: "test".to_owned(), timeout_ms: 300, ..AttachOptions::default() };
        let attachment = Attachment::from_socket(theirs, &options);
        match self.receive() {
            (WorkerMessage::Hello(hello), fds) => {
                assert_eq!(hello.label, "test");
                assert_eq!(hello.control_version, CONTROL_VERSION);
                assert_eq!(fds.len(), 1, "HELLO carries a pidfd");
            }
            (other, _) => panic!("{other:?} instead of a HELLO"),
        }
        attachment
    }

    /// Takes a connected socket for the control socket.
    pub fn adopt(&mut self, socket: OwnedFd) {
        rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))
            .expect("a time-out");
        self.socket = Some(socket);
    }

    pub fn send(&self, message: &DaemonMessage, fds: &[BorrowedFd<'_>]) {
        self.send_bytes(&control::encode(message).expect("a message that fits"), fds);
    }

    pub fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let socket = self.socket.as_ref().expect("attached");
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).expect("send");
    }

    /// The worker's next message. `None`: it closed the socket.
    pub fn try_receive(&self) -> Option<(WorkerMessage, Vec<OwnedFd>)> {
        let mut bytes = [0; MESSAGE_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let socket = self.socket.as_ref().expect("attached");
        let received =
            rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let len = match received {
            Ok(received) if received.bytes > 0 => received.bytes,
            Ok(_) | Err(rustix::io::Errno::CONNRESET) => return None,
            Err(error) => panic!("no message from the worker: {error}"),
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        Some((control::decode(&bytes[..len]).expect("a worker message"), fds))
    }

    pub fn receive(&self) -> (WorkerMessage, Vec<OwnedFd>) {
        self.try_receive().expect("the worker closed the socket")
    }

    pub fn table(&self) -> MutexGuard<'_, TableWriter> {
        self.table.lock().expect("no test panics while it holds the table")
    }

    /// Announces a region as a daemon does: generation first, then the region.
    pub fn add_region(&mut self, id: u64, arena_offset: u64, memory: &Memory) {
        self.add_region_of(id, arena_offset, memory, memory.size);
    }

    pub fn add_region_of(&mut self, id: u64, arena_offset: u64, memory: &Memory, size: u64) {
        let generation = self.table().bump_memory_map();
        self.memory_generation = generation;
        let info = RegionInfo { id, arena_offset, guest_address: arena_offset, size, file_offset: 0 };
        self.send(&DaemonMessage::AddRegion(info), &[memory.fd.as_fd()]);
    }

    /// Ends a change of the memory map and waits until the worker has followed.
    pub fn finish_map(&self) {
        let generation = self.memory_generation;
        self.send(&DaemonMessage::MemoryMap { generation }, &[]);
        assert_eq!(self.receive().0, WorkerMessage::Mapped { generation });
    }

    pub fn map(&self, iova: u64, len: u64, target: u64, access: Access) {
        let range = IovaRange::from_len(iova, len).expect("a range");
        self.table().insert(range, target, access).expect("the table has room");
    }

    pub fn unmap(&self, iova: u64, len: u64) {
        self.table().remove(IovaRange::from_len(iova, len).expect("a range"));
    }

    /// Ends as a killed daemon does, but for the socket: the kernel marks the word before it closes anything.
    pub fn kill(&mut self) {
        if let Some(heart) = self.heart.take() {
            drop(heart.stop);
            heart.thread.join().expect("the thread only waits");
        }
    }

    /// Answers misses with `answer` in a thread of its own until it says that this was the last one. It does not wait
    /// for ever for the next.
    pub fn serve_misses(
        &self,
        answer: impl FnMut(&mut TableWriter, MissRequest) -> Next + Send + 'static,
    ) -> JoinHandle<()> {
        self.serve(Some(PATIENCE), answer)
    }

    /// The same for misses that may come or not, as long as the test's process lives.
    pub fn serve_all_misses(&self, answer: impl FnMut(&mut TableWriter, MissRequest) -> Next + Send + 'static) {
        drop(self.serve(None, answer));
    }

    fn serve(
        &self,
        patience: Option<Duration>,
        mut answer: impl FnMut(&mut TableWriter, MissRequest) -> Next + Send + 'static,
    ) -> JoinHandle<()> {
        let (table, segment) = (Arc::clone(&self.table), Arc::clone(&self.segment));
        let doorbell = self.doorbell.try_clone().expect("a descriptor");
        self.table().set_doorbell_wanted(true);
        std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                assert!(patience.is_none_or(|patience| last.elapsed() < patience), "no miss came");
                let mut posted = Vec::new();
                segment.take_posted(|cell| posted.push(cell));
                let any = !posted.is_empty();
                for cell in posted {
                    let cell = &segment.cells[usize::from(cell)];
                    let (ticket, next) = match cell.take() {
                        Ok(Some(request)) => (request.ticket, answer(&mut table.lock().expect("table"), request)),
                        Ok(None) => panic!("a posted bit without a request"),
                        Err(ticket) => (ticket, Next::Answer(Answer::Invalid)),
                    };
                    let said = match next {
                        Next::Answer(said) | Next::Last(said) => said,
                        Next::Silence => continue,
                    };
                    if cell.store_answer(ticket, said) {
                        rustix::thread::futex::wake(&cell.state, rustix::thread::futex::Flags::empty(), 1)
                            .expect("wake");
                    }
                    if matches!(next, Next::Last(_)) {
                        return;
                    }
                }
                if any {
                    last = Instant::now();
                }
                if !wait_readable(doorbell.as_fd(), Duration::from_millis(100)) {
                    continue;
                }
                let _ = rustix::io::read(&doorbell, &mut [0; 8]);
            }
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the miss server does with a request.
#[derive(Clone, Copy)]
pub enum Next {
    Answer(Answer),
    /// Answers, and serves no more.
    Last(Answer),
    Silence,
}

/// Guest memory.
pub struct Memory {
    pub fd: OwnedFd,
    pub size: u64,
}

impl Memory {
    pub fn new(size: u64) -> Memory {
        Memory { fd: memfd::create("guest", size).expect("a memfd"), size }
    }

    pub fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.fd, bytes, at).expect("write"), bytes.len());
    }

    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(rustix::io::pread(&self.fd, &mut bytes, at).expect("read"), len);
        bytes
    }
}

pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(timeout).expect("a short time");
    rustix::event::poll(&mut fds, Some(&timeout)).expect("poll") > 0
}

/// Where the worker has mapped the table behind `fd`: for reading, unlike the daemon of the test.
pub fn table_address(fd: impl AsFd) -> usize {
    let inode = rustix::fs::fstat(fd).expect("fstat").st_ino.to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let first = maps.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (range, permissions) = (words.next()?, words.next()?);
        let found = permissions == "r--s" && words.nth(2)? == inode;
        found.then(|| range.split('-').next())?
    });
    usize::from_str_radix(first.expect("the table is mapped"), 16).expect("an address")
}

/// Where the worker has mapped its segment.
pub fn segment_address(attachment: &Attachment) -> usize {
    std::ptr::from_ref(attachment.counters()).addr() - offset_of!(WorkerSegmentLayout, counters)
}

/// Takes the counter of an event descriptor; 0 when it was not signalled.
pub fn take_count(fd: impl AsFd) -> u64 {
    let mut bytes = [0; 8];
    match rustix::io::read(fd, &mut bytes) {
        Ok(_) => u64::from_ne_bytes(bytes),
        Err(error) => {
            assert_eq!(error, rustix::io::Errno::AGAIN);
            0
        }
    }
}

/// A connection for control messages.
pub fn socket_pair() -> (OwnedFd, OwnedFd) {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a socket pair")
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}
