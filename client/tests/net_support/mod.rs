//! `iotlb-net` as a process of its own, over a daemon and a guest that the test plays by hand.
#![allow(dead_code, unreachable_pub)] // each test program uses its part

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use iotlb_client::Access;
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::worker::Answer;
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};

use crate::support::program::Program;
use crate::support::{Daemon, Memory, Next, PATIENCE, eventfd, take_count, wait_readable, wait_until};

pub const FEATURES: u64 =
    virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::EVENT_IDX | virtio::INDIRECT_DESC | virtio::NET_MRG_RXBUF;
pub const SIZE: u16 = 128;
pub const PAGES: u64 = 256;
/// Ring `n` has its tables and buffers from here.
pub const RINGS: [u64; 2] = [0x1000_0000, 0x2000_0000];
pub const AVAIL: u64 = 0x1_0000;
pub const USED: u64 = 0x2_0000;
pub const BUFFERS: u64 = 0x3_0000;
pub const BUFFER_PAGES: u64 = 80;
pub const BUFFER_LEN: u32 = 2048;
pub const NEIGHBOUR: [u8; 6] = *b"\x02iotlb";
pub const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const HEADER: usize = 12;
/// A page that nobody is told of, neither that it is there nor that it is not.
pub const WITHHELD: u64 = 0x3000_0000;

/// Where workers find the daemon.
pub struct Socket {
    pub listener: OwnedFd,
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Socket {
    pub fn new() -> Socket {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("control.sock");
        let listener =
            socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("short")).expect("bind");
        socket::listen(&listener, Backlog::new(4).expect("small")).expect("listen");
        Socket { listener, path, _directory: directory }
    }

    pub fn worker(&self, arguments: &[&str]) -> Program {
        Program::start(&mut self.command(arguments))
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_iotlb-net"));
        command.arg("--control-socket").arg(&self.path).args(arguments);
        command.env("RUST_LOG", "info").stderr(Stdio::piped());
        command
    }

    /// A worker that finds `signal` to do this when it starts: whoever runs the tests may have it ignored.
    pub fn worker_with(&self, signal: Signal, handler: SigHandler) -> Program {
        let mut command = self.command(&["--queues", "0,1", "--echo"]);
        // SAFETY: between fork and exec only sigaction is called, which is async-signal-safe, and no function is
        // registered.
        unsafe {
            command.pre_exec(move || Ok(nix::sys::signal::signal(signal, handler).map(drop)?));
        }
        Program::start(&mut command)
    }
}

/// Kick, call and error descriptors of a ring.
pub struct Bells {
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
}

impl Bells {
    pub fn new() -> Bells {
        Bells { kick: eventfd(), call: eventfd(), err: eventfd() }
    }

    /// With a kick descriptor that is none: nobody can wait for it. Others of no inode of their own are not to be had
    /// without a right, or not on every system.
    pub fn that_nobody_hears() -> Bells {
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

    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.kick.as_fd(), self.call.as_fd(), self.err.as_fd()]
    }

    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).expect("kick");
    }
}

/// Daemon and guest of one attachment.
pub struct Stage {
    pub daemon: Daemon,
    pub memory: Memory,
    pub bells: [Bells; 2],
    pub pages: BTreeMap<u64, u64>,
    pub avail: [u16; 2],
    pub session: u64,
}

impl Stage {
    /// A guest for a worker that serves both rings.
    pub fn attach(socket: &Socket) -> Stage {
        Stage::attach_part(socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1])
    }

    /// Plays the daemon until the worker has its queues; the guest's rings are up, and nothing is in the IOTLB.
    pub fn attach_part(socket: &Socket, memory: Memory, wanted: &[u16]) -> Stage {
        Stage::attach_with(socket, memory, wanted, [Bells::new(), Bells::new()])
    }

    pub fn attach_with(socket: &Socket, memory: Memory, wanted: &[u16], bells: [Bells; 2]) -> Stage {
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

    pub fn start_rings(&mut self) {
        {
            let mut table = self.daemon.table();
            self.session = table.bump_session();
            table.set_acked_features(FEATURES);
            table.set_running(true);
        }
        self.set_ring(0, true);
        self.set_ring(1, true);
    }

    pub fn set_ring(&mut self, queue: u16, enabled: bool) {
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

    pub fn serve_misses(&self) {
        let pages = self.pages.clone();
        self.daemon.serve_all_misses(move |table, request| {
            if request.range.first() == WITHHELD {
                return Next::Silence;
            }
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
        });
    }

    pub fn target(&self, iova: u64) -> u64 {
        self.pages[&(iova & !(PAGE_SIZE - 1))] + iova % PAGE_SIZE
    }

    pub fn write(&self, mut iova: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let len = bytes.len().min(usize::try_from(PAGE_SIZE - iova % PAGE_SIZE).expect("small"));
            self.memory.poke(self.target(iova), &bytes[..len]);
            (iova, bytes) = (iova + len as u64, &bytes[len..]);
        }
    }

    pub fn read(&self, mut iova: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let part = (len - bytes.len()).min(usize::try_from(PAGE_SIZE - iova % PAGE_SIZE).expect("small"));
            bytes.extend(self.memory.peek(self.target(iova), part));
            iova += part as u64;
        }
        bytes
    }

    pub fn used_index(&self, ring: usize) -> u16 {
        u16::from_le_bytes(self.read(RINGS[ring] + USED + 2, 2).try_into().expect("two bytes"))
    }

    pub fn used(&self, ring: usize, index: u16) -> (u64, usize) {
        let element = self.read(RINGS[ring] + USED + 4 + 8 * u64::from(index % SIZE), 8);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().expect("four bytes"));
        (word(0).into(), word(4) as usize)
    }

    /// Posts one descriptor; its index is that of its buffer.
    pub fn post(&mut self, ring: usize, iova: u64, len: u32, writable: bool) {
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

    pub fn buffer(&self, ring: usize) -> u64 {
        RINGS[ring] + BUFFERS + u64::from(self.avail[ring] % SIZE) * u64::from(BUFFER_LEN)
    }

    pub fn post_receive_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = self.buffer(0);
            self.post(0, buffer, BUFFER_LEN, true);
        }
    }

    pub fn send(&mut self, frame: &[u8]) {
        let packet = [&[0; HEADER], frame].concat();
        let buffer = self.buffer(1);
        self.write(buffer, &packet);
        self.post(1, buffer, u32::try_from(packet.len()).expect("small"), false);
    }

    /// Waits until the guest has received up to `index`, woken by calls as a guest is.
    pub fn wait_received(&self, index: u16) {
        wait_until("packets for the guest", || {
            wait_readable(self.bells[0].call.as_fd(), PATIENCE);
            take_count(&self.bells[0].call);
            // The driver re-arms, then looks again.
            self.write(RINGS[0] + AVAIL + 4 + 2 * u64::from(SIZE), &self.used_index(0).to_le_bytes());
            self.used_index(0) == index
        });
    }

    /// The ports that flows of [`send_flows`] went to and of which the guest received something.
    pub fn flows(&self) -> BTreeSet<u16> {
        let udp = |index| {
            let frame = self.received(index);
            let ours = frame[12..14] == [8, 0] && frame[23] == 17;
            ours.then(|| u16::from_be_bytes([frame[36], frame[37]]))
        };
        (0..self.used_index(0)).filter_map(udp).collect()
    }

    pub fn wait_flows(&self, wanted: &BTreeSet<u16>) {
        wait_until("all flows", || {
            let flows = self.flows();
            assert!(self.used_index(0) < SIZE, "too many packets");
            flows == *wanted
        });
    }

    pub fn received(&self, index: u16) -> Vec<u8> {
        let (id, len) = self.used(0, index);
        let packet = self.read(RINGS[0] + BUFFERS + id * u64::from(BUFFER_LEN), len);
        assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        packet[HEADER..].to_vec()
    }
}

/// Where the guest's pages are: neighbours nowhere near each other.
pub fn guest_pages() -> BTreeMap<u64, u64> {
    let mut iovas = Vec::new();
    for base in RINGS {
        iovas.extend([base, base + AVAIL, base + USED]);
        iovas.extend((0..BUFFER_PAGES).map(|page| base + BUFFERS + page * PAGE_SIZE));
    }
    // 101 is prime to 256.
    (0..).zip(iovas).map(|(n, iova)| (iova, (n * 101 % PAGES) * PAGE_SIZE)).collect()
}

pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    iotlb_client::net::header::checksum(&[bytes]).to_be_bytes()
}

pub fn fragment(field: u16, data: &[u8]) -> Vec<u8> {
    let len = u16::try_from(20 + data.len()).expect("below the MTU").to_be_bytes();
    let mut ip =
        [&[0x45, 0][..], &len, &[0, 7], &field.to_be_bytes(), &[64, 1, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    [&NEIGHBOUR[..], &GUEST, &[8, 0], &ip, data].concat()
}

pub fn ping(payload: &[u8]) -> Vec<u8> {
    let mut data = [&[8, 0, 0, 0, 0, 1, 0, 2][..], payload].concat();
    let sum = checksum(&data);
    data[2..4].copy_from_slice(&sum);
    data
}

pub fn signal(child: &Child, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
    nix::sys::signal::kill(pid, signal).expect("our own child");
}

pub fn terminate(child: Program) {
    signal(&child, Signal::SIGTERM);
    end(child);
}

/// Waits for the clean end that a signal asked for.
pub fn end(child: Program) {
    let output = child.wait_with_output().expect("it ends");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {log}", output.status);
    assert!(log.contains("served"), "{log}");
}
