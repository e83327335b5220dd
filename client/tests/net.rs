//! `iotlb-net` as a process of its own, over a daemon and a guest that the test plays by hand.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use iotlb_client::Access;
use iotlb_proto::control::{self, DaemonMessage, QueueLease, Refusal, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::worker::Answer;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use support::namespace::{bring_up_with_addresses, in_a_namespace, ip, queues};
use support::{Daemon, Memory, Next, PATIENCE, Watchdog, eventfd, take_count, wait_readable, wait_until};

const FEATURES: u64 =
    virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::EVENT_IDX | virtio::INDIRECT_DESC | virtio::NET_MRG_RXBUF;
const SIZE: u16 = 128;
const PAGES: u64 = 256;
/// Ring `n` has its tables and buffers from here.
const RINGS: [u64; 2] = [0x1000_0000, 0x2000_0000];
const AVAIL: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const BUFFERS: u64 = 0x3_0000;
const BUFFER_PAGES: u64 = 80;
const BUFFER_LEN: u32 = 2048;
const NEIGHBOUR: [u8; 6] = *b"\x02iotlb";
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const HEADER: usize = 12;

/// Where workers find the daemon.
struct Socket {
    listener: OwnedFd,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Socket {
    fn new() -> Socket {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("control.sock");
        let listener =
            socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("short")).expect("bind");
        socket::listen(&listener, Backlog::new(4).expect("small")).expect("listen");
        Socket { listener, path, _directory: directory }
    }

    fn worker(&self, arguments: &[&str]) -> Child {
        self.command(arguments).spawn().expect("the worker starts")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_iotlb-net"));
        command.arg("--control-socket").arg(&self.path).args(arguments);
        command.env("RUST_LOG", "info").stderr(Stdio::piped());
        command
    }

    /// A worker that finds `signal` to do this when it starts: whoever runs the tests may have it ignored.
    fn worker_with(&self, signal: Signal, handler: SigHandler) -> Child {
        let mut command = self.command(&["--queues", "0,1", "--echo"]);
        // SAFETY: between fork and exec only sigaction is called, which is async-signal-safe, and no function is
        // registered.
        unsafe {
            command.pre_exec(move || Ok(nix::sys::signal::signal(signal, handler).map(drop)?));
        }
        command.spawn().expect("the worker starts")
    }
}

/// Kick, call and error descriptors of a ring.
struct Bells {
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl Bells {
    fn new() -> Bells {
        Bells { kick: eventfd(), call: eventfd(), err: eventfd() }
    }

    /// With a kick descriptor that is none: nobody can wait for it. Others of no inode of their own are not to be had
    /// without a right, or not on every system.
    fn that_nobody_hears() -> Bells {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        let new = || Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll set");
        let mut kick = new();
        // So many may watch each other, and one more may not.
        for depth in 0.. {
            let around = new();
            match around.add(&kick.0, EpollEvent::new(EpollFlags::EPOLLIN, 0)) {
                // A set that is closed is not watched any more, so each stays open.
                Ok(()) => std::mem::forget(std::mem::replace(&mut kick, around)),
                Err(error) => {
                    assert_eq!(error, Errno::ELOOP);
                    break;
                }
            }
            assert!(depth < 100, "no end to epoll sets in epoll sets");
        }
        Bells { kick: kick.0, ..Bells::new() }
    }

    fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.kick.as_fd(), self.call.as_fd(), self.err.as_fd()]
    }

    fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).expect("kick");
    }
}

/// Daemon and guest of one attachment.
struct Stage {
    daemon: Daemon,
    memory: Memory,
    bells: [Bells; 2],
    pages: BTreeMap<u64, u64>,
    avail: [u16; 2],
    session: u64,
}

impl Stage {
    /// A guest for a worker that serves both rings.
    fn attach(socket: &Socket) -> Stage {
        Stage::attach_part(socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1])
    }

    /// Plays the daemon until the worker has its queues; the guest's rings are up, and nothing is in the IOTLB.
    fn attach_part(socket: &Socket, memory: Memory, wanted: &[u16]) -> Stage {
        Stage::attach_with(socket, memory, wanted, [Bells::new(), Bells::new()])
    }

    fn attach_with(socket: &Socket, memory: Memory, wanted: &[u16], bells: [Bells; 2]) -> Stage {
        let mut daemon = Daemon::new();
        let pages = guest_pages();
        assert!(wait_readable(socket.listener.as_fd(), PATIENCE), "no worker came");
        let connection = socket::accept4(socket.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).expect("accept");
        // SAFETY: just accepted, and owned by nobody else.
        daemon.adopt(unsafe { std::os::fd::FromRawFd::from_raw_fd(connection) });
        assert!(matches!(daemon.receive().0, WorkerMessage::Hello(_)));
        daemon.send(&DaemonMessage::Welcome(daemon.welcome()), &daemon.welcome_fds());
        daemon.add_region(1, 0, &memory);
        let mut stage = Stage { daemon, memory, bells, pages, avail: [0; 2], session: 0 };
        stage.start_rings();
        stage.serve_misses();
        let generation = stage.daemon.table().bump_memory_map();
        stage.daemon.send(&DaemonMessage::MemoryMap { generation }, &[]);
        let (mut mapped, mut claimed) = (false, false);
        while !(mapped && claimed) {
            match stage.daemon.receive().0 {
                WorkerMessage::Mapped { generation: done } => mapped = done == generation,
                WorkerMessage::ClaimQueues { claim, queues } => {
                    assert_eq!(queues, wanted);
                    claimed = true;
                    for queue in wanted.iter().copied() {
                        // Of a ring that is never started nobody has a bell.
                        let fds = stage.bells.get(usize::from(queue)).map_or(Vec::new(), |bells| bells.fds().into());
                        let here = !fds.is_empty();
                        let lease = QueueLease { queue, claim, kick: here, call: here, err: here };
                        stage.daemon.send(&DaemonMessage::Lease(lease), &fds);
                    }
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        stage
    }

    fn start_rings(&mut self) {
        {
            let mut table = self.daemon.table();
            self.session = table.bump_session();
            table.set_acked_features(FEATURES);
            table.set_running(true);
        }
        self.set_ring(0, true);
        self.set_ring(1, true);
    }

    fn set_ring(&mut self, queue: u16, enabled: bool) {
        let base = RINGS[usize::from(queue)];
        let record = QueueRecord {
            started: true,
            enabled,
            size: SIZE,
            desc: base,
            avail: base + AVAIL,
            used: base + USED,
            base: 0,
            session_generation: self.session,
        };
        self.daemon.table().publish_queue(queue, &record);
    }

    fn serve_misses(&self) {
        let pages = self.pages.clone();
        // Ends with the test's process.
        drop(self.daemon.serve_misses(move |table, request| {
            let mut granted = true;
            let mut page = request.range.first() & !(PAGE_SIZE - 1);
            while page <= request.range.last() {
                match pages.get(&page) {
                    Some(target) => {
                        let range = iotlb_proto::iova::IovaRange::page_of(page);
                        table.insert(range, *target, Access::READ_WRITE).expect("the table has room");
                    }
                    None => granted = false,
                }
                page += PAGE_SIZE;
            }
            Next::Answer(if granted { Answer::Resolved } else { Answer::Denied })
        }));
    }

    fn target(&self, iova: u64) -> u64 {
        self.pages[&(iova & !(PAGE_SIZE - 1))] + iova % PAGE_SIZE
    }

    fn write(&self, mut iova: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = bytes.len().min(usize::try_from(PAGE_SIZE - iova % PAGE_SIZE).expect("small"));
            self.memory.poke(self.target(iova), &bytes[..len]);
            (iova, bytes) = (iova + len as u64, &bytes[len..]);
        }
    }

    fn read(&self, mut iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let part = (len - bytes.len()).min(usize::try_from(PAGE_SIZE - iova % PAGE_SIZE).expect("small"));
            bytes.extend(self.memory.peek(self.target(iova), part));
            iova += part as u64;
        }
        bytes
    }

    fn used_index(&self, ring: usize) -> u16 {
        u16::from_le_bytes(self.read(RINGS[ring] + USED + 2, 2).try_into().expect("two bytes"))
    }

    fn used(&self, ring: usize, index: u16) -> (u64, usize) {
        let element = self.read(RINGS[ring] + USED + 4 + 8 * u64::from(index % SIZE), 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().expect("four bytes"));
        (word(0).into(), word(4) as usize)
    }

    /// Posts one descriptor; its index is that of its buffer.
    fn post(&mut self, ring: usize, iova: u64, len: u32, writable: bool) {
        let index = self.avail[ring] % SIZE;
        let mut descriptor = iova.to_le_bytes().to_vec();
        descriptor.extend(len.to_le_bytes());
        descriptor.extend([if writable { 2 } else { 0 }, 0, 0, 0]);
        self.write(RINGS[ring] + 16 * u64::from(index), &descriptor);
        self.write(RINGS[ring] + AVAIL + 4 + 2 * u64::from(index), &index.to_le_bytes());
        self.avail[ring] = self.avail[ring].wrapping_add(1);
        self.write(RINGS[ring] + AVAIL + 2, &self.avail[ring].to_le_bytes());
        // Call for every element: nothing is lost when a call is taken for the one before.
        self.write(RINGS[ring] + AVAIL + 4 + 2 * u64::from(SIZE), &self.used_index(ring).to_le_bytes());
    }

    fn buffer(&self, ring: usize) -> u64 {
        RINGS[ring] + BUFFERS + u64::from(self.avail[ring] % SIZE) * u64::from(BUFFER_LEN)
    }

    fn post_receive_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.buffer(0);
            self.post(0, buffer, BUFFER_LEN, true);
        }
    }

    fn send(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER], frame].concat();
        let buffer = self.buffer(1);
        self.write(buffer, &packet);
        self.post(1, buffer, u32::try_from(packet.len()).expect("small"), false);
    }

    /// Waits until the guest has received up to `index`, woken by calls as a guest is.
    fn wait_received(&self, index: u16) {
        wait_until("packets for the guest", || {
            wait_readable(self.bells[0].call.as_fd(), PATIENCE);
            take_count(&self.bells[0].call);
            // The driver re-arms, then looks again.
            self.write(RINGS[0] + AVAIL + 4 + 2 * u64::from(SIZE), &self.used_index(0).to_le_bytes());
            self.used_index(0) == index
        });
    }

    /// The ports that flows of [`send_flows`] went to and of which the guest received something.
    fn flows(&self) -> BTreeSet<u16> {
        let udp = |index| {
            let frame = self.received(index);
            let ours = frame[12..14] == [8, 0] && frame[23] == 17;
            ours.then(|| u16::from_be_bytes([frame[36], frame[37]]))
        };
        (0..self.used_index(0)).filter_map(udp).collect()
    }

    fn wait_flows(&self, wanted: &BTreeSet<u16>) {
        wait_until("all flows", || {
            let flows = self.flows();
            assert!(self.used_index(0) < SIZE, "too many packets");
            flows == *wanted
        });
    }

    fn received(&self, index: u16) -> Vec<u8> {
        let (id, len) = self.used(0, index);
        let packet = self.read(RINGS[0] + BUFFERS + id * u64::from(BUFFER_LEN), len);
        assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        packet[HEADER..].to_vec()
    }
}

/// Where the guest's pages are: neighbours nowhere near each other.
fn guest_pages() -> BTreeMap<u64, u64> {
    let mut iovas = Vec::new();
    for base in RINGS {
        iovas.extend([base, base + AVAIL, base + USED]);
        iovas.extend((0..BUFFER_PAGES).map(|page| base + BUFFERS + page * PAGE_SIZE));
    }
    // 101 is prime to 256.
    (0..).zip(iovas).map(|(n, iova)| (iova, (n * 101 % PAGES) * PAGE_SIZE)).collect()
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    iotlb_client::net::header::checksum(&[bytes]).to_be_bytes()
}

fn fragment(field: u16, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + data.len()).expect("below the MTU").to_be_bytes();
    let mut ip =
        [&[0x45, 0][..], &len, &[0, 7], &field.to_be_bytes(), &[64, 1, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    [&NEIGHBOUR[..], &GUEST, &[8, 0], &ip, data].concat()
}

fn ping(payload: &[u8]) -> Vec<u8> {
    let mut data = [&[8, 0, 0, 0, 0, 1, 0, 2][..], payload].concat();
    let sum = checksum(&data);
    data[2..4].copy_from_slice(&sum);
    data
}

fn signal(child: &Child, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
    nix::sys::signal::kill(pid, signal).expect("our own child");
}

fn terminate(child: Child) {
    signal(&child, Signal::SIGTERM);
    end(child);
}

/// Waits for the clean end that a signal asked for.
fn end(child: Child) {
    let output = child.wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {log}", output.status);
    assert!(log.contains("served"), "{log}");
}

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
fn pings_are_answered_through_cold_tables_and_sigterm_ends_it() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(100);
    stage.send(&fragment(0, &ping(b"hello")));
    stage.bells[1].kick();
    stage.wait_received(1);
    let reply = stage.received(0);
    assert_eq!((&reply[..6], &reply[6..12]), (&GUEST[..], &NEIGHBOUR[..]));
    assert_eq!((reply[34], checksum(&reply[34..]), &reply[42..]), (0, [0, 0], &b"hello"[..]));

    // 60,000 bytes in 41 fragments, posted at once.
    let request = ping(&(0..60_000_u32).map(|at| (at % 253).to_le_bytes()[0]).collect::<Vec<_>>());
    let count = request.chunks(1480).len();
    for (index, data) in request.chunks(1480).enumerate() {
        let more = if index + 1 < count { 0x2000 } else { 0 };
        stage.send(&fragment(more | u16::try_from(index * 185).expect("13 bits"), data));
    }
    stage.bells[1].kick();
    let last = 1 + u16::try_from(count).expect("41");
    stage.wait_received(last);
    let mut reply = Vec::new();
    for index in 1..last {
        reply.extend_from_slice(&stage.received(index)[34..]);
    }
    assert_eq!(checksum(&reply), [0, 0]);
    assert_eq!((reply[0], &reply[4..]), (0, &request[4..]));
    assert_eq!(stage.used_index(1), last);
    terminate(worker);
}

#[test]
fn a_denied_buffer_costs_its_chain_and_is_reported() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.post(1, 0xdead_beef_0000, 100, false);
    stage.send(&fragment(0, &ping(b"after")));
    stage.bells[1].kick();
    stage.wait_received(1);
    assert_eq!(&stage.received(0)[42..], b"after");
    assert_eq!((stage.used(1, 0), stage.used_index(1)), ((0, 0), 2));
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("0xdeadbeef0000"), "{reason}");
    terminate(worker);
}

#[test]
fn a_ring_whose_kick_nobody_can_wait_for_is_polled() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let bells = [Bells::new(), Bells::that_nobody_hears()];
    let mut stage = Stage::attach_with(&socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1], bells);
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("kick"), "{reason}");
    stage.post_receive_buffers(10);
    for count in 1..=2 {
        stage.send(&fragment(0, &ping(b"unheard")));
        stage.wait_received(count);
    }
    terminate(worker);
}

#[test]
fn a_broken_ring_rests_until_it_is_set_up_anew() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.write(RINGS[1] + AVAIL + 2, &(SIZE + 1).to_le_bytes());
    stage.bells[1].kick();
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("avail.idx"), "{reason}");
    // The guest resets its device and starts over; the session changes.
    stage.write(RINGS[1] + AVAIL + 2, &[0, 0]);
    stage.start_rings();
    stage.send(&fragment(0, &ping(b"again")));
    stage.bells[1].kick();
    stage.wait_received(1);
    assert_eq!(&stage.received(0)[42..], b"again");
    terminate(worker);
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
    let mut worker = command.stderr(writer).spawn().expect("the worker starts");
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

/// An EtherType for experiments, big endian.
const TYPE: u16 = 0x88b5;

/// Sends a packet to each of these ports: the kernel takes each for a flow.
fn send_flows(ports: &BTreeSet<u16>) {
    let socket = UdpSocket::bind("10.9.8.1:0").expect("our address");
    for port in ports {
        socket.send_to(b"to the guest", ("10.9.8.2", *port)).expect("sent");
    }
}

/// The host's end of a TAP, for frames of our type.
fn host_end(name: &str) -> OwnedFd {
    ip(&format!("link set {name} up"));
    let socket = socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .expect("root may open packet sockets");
    let index = nix::net::if_::if_nametoindex(name).expect("the TAP exists");
    // SAFETY: a C structure of numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET.try_into().expect("small");
    address.sll_protocol = TYPE.to_be();
    address.sll_ifindex = index.try_into().expect("small");
    let size = u32::try_from(size_of_val(&address)).expect("small");
    // SAFETY: the address lives across the call and has the size given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0, "bind: {}", std::io::Error::last_os_error());
    socket
}

fn frame(to: u8, from: u8, text: &[u8]) -> Vec<u8> {
    [&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from][..], &TYPE.to_be_bytes(), text].concat()
}

#[test]
fn two_processes_serve_one_guest_over_one_tap() {
    if !in_a_namespace("two_processes_serve_one_guest_over_one_tap") {
        return;
    }
    let memory = Memory::new(PAGES * PAGE_SIZE);
    let shared = Memory { fd: memory.fd.try_clone().expect("a descriptor"), size: memory.size };
    let (rx_socket, tx_socket) = (Socket::new(), Socket::new());
    // The one that only sends comes first: its queue stays detached, and the other still gets all packets.
    let tx_worker = tx_socket.worker(&["--queues", "1", "--tap", "tap0"]);
    let mut tx = Stage::attach_part(&tx_socket, shared, &[1]);
    let rx_worker = rx_socket.worker(&["--queues", "0", "--tap", "tap0"]);
    let mut rx = Stage::attach_part(&rx_socket, memory, &[0]);
    let host = host_end("tap0");
    wait_until("the receiver's queue", || queues("tap0") == (1, 1));

    rx.post_receive_buffers(100);
    let mut seen = 0;
    for round in 0..50 {
        let sent = frame(200, round, b"from the guest");
        tx.send(&sent);
        tx.bells[1].kick();
        assert!(wait_readable(host.as_fd(), PATIENCE), "nothing came out of the TAP");
        let mut got = [0; 2048];
        let len = socket::recv(host.as_raw_fd(), &mut got, socket::MsgFlags::empty()).expect("readable");
        assert_eq!(got[..len], sent);

        // The answer goes to the station that was just heard on the other process's queue.
        let answer = frame(round, 200, b"to the guest");
        socket::send(host.as_raw_fd(), &answer, socket::MsgFlags::empty()).expect("sent");
        // The kernel announces itself on a new device; the guest drops what it does not know.
        loop {
            wait_until("a packet for the guest", || rx.used_index(0) > seen);
            seen += 1;
            if rx.received(seen - 1) == answer {
                break;
            }
            assert!(seen < 90, "the packet did not come");
        }
    }
    terminate(tx_worker);
    terminate(rx_worker);
}

#[test]
fn a_tap_that_is_down_is_told_once_until_it_is_up() {
    if !in_a_namespace("a_tap_that_is_down_is_told_once_until_it_is_up") {
        return;
    }
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--tap", "tap0"]);
    let mut stage = Stage::attach(&socket);
    let mut sent = 0;
    for state in ["down", "up", "down"] {
        ip(&format!("link set tap0 {state}"));
        for _ in 0..3 {
            stage.send(&frame(200, 1, b"from the guest"));
            stage.bells[1].kick();
            sent += 1;
            wait_until("the packet is taken", || stage.used_index(1) == sent);
        }
    }
    signal(&worker, Signal::SIGTERM);
    let log = String::from_utf8_lossy(&worker.wait_with_output().expect("it ends").stderr).into_owned();
    let told = log.lines().filter(|line| line.contains("WARN") && line.contains("ip link set tap0 up")).count();
    assert_eq!(told, 2, "{log}");
}

#[test]
fn a_pair_whose_rings_are_not_started_attracts_no_flow() {
    if !in_a_namespace("a_pair_whose_rings_are_not_started_attracts_no_flow") {
        return;
    }
    let socket = Socket::new();
    // A guest that knows one pair only, and a worker that serves two.
    let worker = socket.worker(&["--queues", "0,1,2,3", "--tap", "tap0"]);
    let mut stage = Stage::attach_part(&socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1, 2, 3]);
    stage.post_receive_buffers(SIZE.into());
    bring_up_with_addresses("tap0");
    wait_until("a queue", || queues("tap0").0 > 0);
    let mut flows: BTreeSet<u16> = (1000..1050).collect();
    send_flows(&flows);
    stage.wait_flows(&flows);

    // The guest takes its ring out of service for a while. What comes meanwhile is not for it.
    stage.set_ring(0, false);
    wait_until("no queue", || queues("tap0") == (0, 2));
    send_flows(&(2000..2010).collect());
    stage.set_ring(0, true);
    wait_until("a queue", || queues("tap0") == (1, 1));
    let more = (3000..3020).collect();
    send_flows(&more);
    flows.extend(more);
    stage.wait_flows(&flows);
    terminate(worker);
}

#[test]
fn a_process_that_waits_for_its_daemon_attracts_no_flow() {
    if !in_a_namespace("a_process_that_waits_for_its_daemon_attracts_no_flow") {
        return;
    }
    let (socket, deaf) = (Socket::new(), Socket::new());
    socket::shutdown(deaf.listener.as_raw_fd(), socket::Shutdown::Both).expect("refuses connections from here on");
    let waiting = deaf.worker(&["--queues", "0,1", "--tap", "tap0", "--reconnect"]);
    let worker = socket.worker(&["--queues", "0,1", "--tap", "tap0", "--reconnect"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(SIZE.into());
    wait_until("both", || matches!(queues("tap0"), (attached, detached) if attached > 0 && attached + detached == 2));
    bring_up_with_addresses("tap0");
    let flows = (1000..1050).collect();
    send_flows(&flows);
    stage.wait_flows(&flows);

    stage.daemon.kill();
    stage.daemon.socket = None;
    wait_until("the end of the attachment", || queues("tap0") == (0, 2));
    terminate(waiting);
    terminate(worker);
}
