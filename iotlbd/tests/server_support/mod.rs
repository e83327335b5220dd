//! A running server, and a worker made of raw sockets, for tests of the server's edge.

#![allow(dead_code, unreachable_pub, missing_docs, missing_debug_implementations)] // each test binary uses a part of it

#[path = "../../../tests/src/not_tested.rs"]
pub mod not_tested;
#[path = "../../../tests/src/program.rs"]
pub mod program;
#[path = "../../../tests/src/watchdog.rs"]
mod watchdog;

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use iotlb_proto::access::Access;
use iotlb_proto::control::message::{CONTROL_VERSION, HELLO_MAGIC};
use iotlb_proto::control::{self, DaemonMessage, Hello, Welcome, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use iotlb_proto::liveness::LivenessView;
use iotlb_proto::socket::{PacketError, PacketSocket};
use iotlb_proto::table::TableReader;
use iotlb_proto::worker::WorkerSegment;
use iotlbd::server::{DeviceKind, FrontEndSource, Server, ServerConfig, ServerError};
use iotlbd::sim::front_end::{FrontEnd, FrontEndOptions, RingAddresses};
use iotlbd::sim::guest::Guest;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use watchdog::Watchdog;

/// Longest wait for one message.
pub const TIMEOUT_MS: u32 = 20_000;

pub fn watchdog() -> Watchdog {
    Watchdog::new()
}

/// A server in a thread of this process.
pub struct Running {
    pub directory: tempfile::TempDir,
    stop: Option<std::io::PipeWriter>,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Running {
    pub fn start() -> Running {
        Running::start_with(|_| {})
    }

    pub fn start_with(change: impl FnOnce(&mut ServerConfig)) -> Running {
        Running::start_behind(change, |_| {})
    }

    /// Runs the server only after `before`, which gets the path of its control socket: what is sent there waits.
    pub fn start_behind(change: impl FnOnce(&mut ServerConfig), before: impl FnOnce(&Path)) -> Running {
        let directory = tempfile::tempdir().expect("temporary directory");
        let front_end = FrontEndSource::Path { path: directory.path().join("front-end"), mode: 0o600 };
        let mut config =
            ServerConfig::new(DeviceKind::Net { queue_pairs: 1 }, front_end, directory.path().join("control"));
        // A test that holds a pin does so from the test's own process: it must not be killed for it.
        config.stall.kill_ms = 3_600_000;
        config.stall.revoke_ms = 3_600_000;
        change(&mut config);
        let server = Server::start(config).expect("starts");
        before(&directory.path().join("control"));
        let (reader, writer) = std::io::pipe().expect("pipe");
        let thread = std::thread::spawn(move || server.run(OwnedFd::from(reader)));
        Running { directory, stop: Some(writer), thread: Some(thread) }
    }

    pub fn front_end(&self) -> PathBuf {
        self.directory.path().join("front-end")
    }

    pub fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    /// Tells the server to stop, or tells it again.
    pub fn tell(&self) {
        // It reads all that is there, so each byte is news. An Err shows in how the server ends.
        let _ = self.stop.as_ref().map(|mut stop| stop.write_all(&[0]));
    }

    /// How the server ends, once it was told.
    pub fn ended(mut self) -> Result<(), ServerError> {
        self.thread.take().expect("runs").join().expect("no panic")
    }

    /// Ends the server and expects that it ended well and cleaned up.
    pub fn stop(mut self) {
        drop(self.stop.take());
        let thread = self.thread.take().expect("runs");
        thread.join().expect("no panic").expect("a clean end");
        let left: Vec<_> = std::fs::read_dir(self.directory.path()).expect("readable").collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }
}

pub fn own_pidfd() -> OwnedFd {
    pidfd_open(getpid(), PidfdFlags::empty()).expect("pidfd")
}

pub fn hello() -> Hello {
    Hello {
        magic: HELLO_MAGIC,
        control_version: CONTROL_VERSION,
        layout_version: LAYOUT_VERSION,
        layout_hash: LAYOUT_HASH,
        device: String::new(),
        label: String::from("test"),
    }
}

pub fn connect(path: &Path) -> PacketSocket {
    PacketSocket::connect(path, TIMEOUT_MS).expect("connects")
}

pub fn say(socket: &PacketSocket, message: &WorkerMessage) {
    socket.send_blocking(&control::encode(message).expect("encodes"), &[], TIMEOUT_MS).expect("sends");
}

pub fn hear(socket: &PacketSocket) -> Result<(DaemonMessage, Vec<OwnedFd>), PacketError> {
    let (bytes, fds) = socket.receive_blocking(TIMEOUT_MS)?;
    Ok((control::decode(&bytes).expect("a message"), fds))
}

/// A front-end whose guest has started both rings.
pub fn started_front_end(path: &Path) -> FrontEnd {
    started_front_end_with(path, FrontEndOptions::default())
}

pub fn started_front_end_with(path: &Path, options: FrontEndOptions) -> FrontEnd {
    let guest = Guest::new(0, 1 << 20).expect("guest");
    let mut front_end = FrontEnd::connect(path, guest, options).expect("front-end");
    let mut ring = |base: u64| {
        for iova in [base, base + PAGE_SIZE, base + 2 * PAGE_SIZE] {
            let page = front_end.guest.allocate().expect("a page");
            front_end.viommu.map(iova, page, Access::READ_WRITE).expect("maps");
        }
        RingAddresses { desc: base, avail: base + PAGE_SIZE, used: base + 2 * PAGE_SIZE, base: 0 }
    };
    let rings = [ring(0x1_0000), ring(0x2_0000)];
    front_end.start(&rings).expect("starts");
    front_end
}

/// An attached worker.
pub struct RawWorker {
    pub socket: PacketSocket,
    pub welcome: Welcome,
    pub table: TableReader,
    pub segment: WorkerSegment,
    pub liveness: LivenessView,
    pub doorbell: OwnedFd,
}

impl RawWorker {
    pub fn attach(path: &Path) -> RawWorker {
        let socket = connect(path);
        let bytes = control::encode(&WorkerMessage::Hello(hello())).expect("encodes");
        socket.send_blocking(&bytes, &[own_pidfd().as_fd()], TIMEOUT_MS).expect("sends");
        let (message, fds) = hear(&socket).expect("an answer");
        let DaemonMessage::Welcome(welcome) = message else { panic!("not welcome: {message:?}") };
        let [table, segment, liveness, doorbell] = <[OwnedFd; 4]>::try_from(fds).expect("four descriptors");
        let worker = RawWorker {
            table: TableReader::open(table.as_fd(), welcome.table_size).expect("table"),
            segment: WorkerSegment::open(segment.as_fd(), welcome.incarnation).expect("segment"),
            liveness: LivenessView::open(liveness.as_fd(), welcome.liveness_offset).expect("liveness"),
            doorbell,
            socket,
            welcome,
        };
        worker.hear_memory_map();
        worker
    }

    /// Takes messages up to the next complete memory map; returns how many regions came.
    pub fn hear_memory_map(&self) -> usize {
        let mut regions = 0;
        loop {
            match hear(&self.socket).expect("a message").0 {
                DaemonMessage::MemoryMap { generation } => {
                    say(&self.socket, &WorkerMessage::Mapped { generation });
                    return regions;
                }
                DaemonMessage::AddRegion(_) => regions += 1,
                DaemonMessage::RemoveRegion { .. } | DaemonMessage::Lease(_) => {}
                other => panic!("unexpected: {other:?}"),
            }
        }
    }

    /// Pins the worker's first slot.
    pub fn pin(&self) {
        self.segment.announce(1);
        iotlb_proto::epoch::pin(&self.segment.slot(0), &self.table.header().epoch.word);
    }

    pub fn unpin(&self) {
        iotlb_proto::epoch::unpin(&self.segment.slot(0));
    }

    /// Waits until the server sleeps over a grace period.
    pub fn wait_until_held(&self) {
        use iotlb_proto::sync::Ordering;
        // Acquire: what the server did before it went to sleep is done.
        while self.table.header().wake.writer_sleeps.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
    }

    /// Leaves in good order.
    pub fn leave(self) {
        say(&self.socket, &WorkerMessage::Revoked);
        // The server closes when it has forgotten the worker.
        loop {
            match hear(&self.socket) {
                Ok(_) => {}
                Err(PacketError::Closed) => return,
                Err(error) => panic!("{error}"),
            }
        }
    }
}
