//! A daemon made of its parts, whose table the benchmark writes itself: what is timed is the writer's work and nothing
//! around it, while the readers are real ones.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use iotlb_client::Access;
use iotlb_proto::control::{self, DaemonMessage, RegionInfo, Welcome, WorkerMessage};
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::SEGMENT_SIZE;
use iotlb_proto::liveness::{LivenessOwner, WORD_OFFSET};
use iotlb_proto::shm::memfd;
use iotlb_proto::socket::packet::{PacketListener, PacketSocket};
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::worker::WorkerSegment;
use rustix::event::{EventfdFlags, eventfd};

use crate::bench::peers::Page;

const TABLE_SIZE: u64 = 4 << 20;
/// Room for the targets of the pages.
const MEMORY_SIZE: u64 = 64 << 20;
/// Longest wait for a worker.
const TIMEOUT_MS: u32 = 10_000;

type Failure = Box<dyn std::error::Error>;

/// The daemon. It lives as long as this does, in the thread that made it.
#[derive(Debug)]
pub(super) struct ByHand {
    /// The table.
    pub(super) table: TableWriter,
    table_fd: OwnedFd,
    memory: OwnedFd,
    doorbell: OwnedFd,
    liveness_fd: OwnedFd,
    _liveness: LivenessOwner,
    generation: u64,
    workers: Vec<Worker>,
    listener: PacketListener,
    folder: tempfile::TempDir,
}

#[derive(Debug)]
struct Worker {
    segment: WorkerSegment,
    _socket: PacketSocket,
}

impl ByHand {
    /// Makes it, with these pages mapped.
    ///
    /// # Errors
    /// The system gives no memory or no socket.
    pub(super) fn with(pages: &[Page]) -> Result<ByHand, Failure> {
        let folder = tempfile::tempdir()?;
        let listener = PacketListener::bind(&socket_in(folder.path()), 0o600)?;
        let (mut table, table_fd) = TableWriter::create(&TableConfig { size: TABLE_SIZE, generation: 1 })?;
        let (liveness, liveness_fd) = LivenessOwner::create()?;
        for page in pages {
            table.insert(IovaRange::page_of(page.iova), page.target, Access::READ_WRITE)?;
        }
        Ok(ByHand {
            generation: table.bump_memory_map(),
            table,
            table_fd,
            memory: memfd::create("guest", MEMORY_SIZE)?,
            doorbell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            liveness_fd,
            _liveness: liveness,
            workers: Vec::new(),
            listener,
            folder,
        })
    }

    /// Has `connect` attach a worker to the socket it is given, and waits until that has mapped guest memory.
    ///
    /// # Errors
    /// What `connect` returns, or the worker does not say what it should.
    pub(super) fn attach<T: Send, E: Into<Failure> + Send>(
        &mut self,
        connect: impl FnOnce(&Path) -> Result<T, E> + Send,
    ) -> Result<T, Failure> {
        let path = socket_in(self.folder.path());
        std::thread::scope(|scope| {
            let connected = scope.spawn(|| connect(&path));
            self.greet()?;
            connected.join().map_err(|_| "the worker panicked")?.map_err(E::into)
        })
    }

    /// Whether all readers of all workers let the grace period pass.
    pub(super) fn is_drained(&self, epoch: u64) -> bool {
        self.workers.iter().all(|worker| worker.segment.is_drained(epoch))
    }

    fn greet(&mut self) -> Result<(), Failure> {
        let socket = self.accept()?;
        let WorkerMessage::Hello(_) = heard(&socket)? else { return Err("a worker that does not say hello".into()) };
        let number = u32::try_from(self.workers.len())? + 1;
        let (segment, segment_fd) = WorkerSegment::create(u64::from(number))?;
        let welcome = Welcome {
            worker: number,
            incarnation: u64::from(number),
            device: "bench".to_owned(),
            table_size: TABLE_SIZE,
            segment_size: SEGMENT_SIZE as u64,
            liveness_offset: WORD_OFFSET,
            arena_size: MEMORY_SIZE,
            miss_timeout_ms: TIMEOUT_MS,
            queues: 2,
        };
        let region = RegionInfo { id: 1, arena_offset: 0, guest_address: 0, size: MEMORY_SIZE, file_offset: 0 };
        let parts = [self.table_fd.as_fd(), segment_fd.as_fd(), self.liveness_fd.as_fd(), self.doorbell.as_fd()];
        let generation = self.generation;
        for (message, fds) in [
            (DaemonMessage::Welcome(welcome), &parts[..]),
            (DaemonMessage::AddRegion(region), &[self.memory.as_fd()][..]),
            (DaemonMessage::MemoryMap { generation }, &[][..]),
        ] {
            socket.send_blocking(&control::encode(&message)?, fds, TIMEOUT_MS)?;
        }
        if heard(&socket)? != (WorkerMessage::Mapped { generation }) {
            return Err("a worker that has not mapped guest memory".into());
        }
        self.workers.push(Worker { segment, _socket: socket });
        Ok(())
    }

    fn accept(&self) -> Result<PacketSocket, Failure> {
        let until = Instant::now() + Duration::from_millis(TIMEOUT_MS.into());
        while Instant::now() < until {
            if let Some(socket) = self.listener.accept()? {
                return Ok(socket);
            }
            // A program takes some milliseconds to start.
            std::thread::sleep(Duration::from_millis(1));
        }
        Err("no worker has come".into())
    }
}

fn heard(socket: &PacketSocket) -> Result<WorkerMessage, Failure> {
    Ok(control::decode(&socket.receive_blocking(TIMEOUT_MS)?.0)?)
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}
