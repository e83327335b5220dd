//! A whole service in one process: a real daemon on a thread of its own, a simulated front-end, an attached worker.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread::JoinHandle;

use iotlb_client::{Access, AttachOptions, Attachment};
use iotlbd::server::{DeviceKind, FrontEndSource, Server, ServerConfig, ServerError};
use iotlbd::sim::{FrontEnd, FrontEndOptions, Guest, SimError, Unmapping, VirtioNet};

use super::measure::Shuffle;
use super::peers::{PAGE, Page};

/// Guest memory behind the benchmarks: large enough that pages differ, small enough that its content stays out of the
/// way.
const GUEST_SIZE: u64 = 64 << 20;
/// First IOVA handed out. Linux gives addresses from below 4 GiB downwards.
const IOVA_BASE: u64 = 0x4000_0000;
/// Addresses from here to [`DRIVER_END`] are left to the simulated driver.
const DRIVER_BASE: u64 = 0xf000_0000;
/// See [`DRIVER_BASE`].
const DRIVER_END: u64 = 0x1_0000_0000;
/// Room for the largest table measured, 1 Mi entries of 8 bytes and their upper levels.
const TABLE_SIZE: u64 = 32 << 20;

/// Address space of the worker, small enough for programs that keep an eye on all of it, such as valgrind.
const ARENA_SIZE: u64 = 1 << 30;
/// Longest a worker may take to map guest memory, in milliseconds, on a machine that is busy with other things.
const TIMEOUT_MS: u32 = 10_000;

/// Why the rig does not stand.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// No place for the sockets, or no stop pipe.
    #[error("cannot prepare the sockets: {0}")]
    Prepare(#[from] std::io::Error),
    /// The daemon does not start.
    #[error("the daemon does not start: {0}")]
    Server(#[from] ServerError),
    /// The front-end fails.
    #[error("the front-end: {0}")]
    FrontEnd(#[from] SimError),
    /// The worker fails.
    #[error("the worker: {0}")]
    Attach(#[from] iotlb_client::AttachError),
    /// The worker has no reader left.
    #[error("the worker: {0}")]
    Reader(#[from] iotlb_client::ReaderError),
    /// The worker's control thread does not come to it.
    #[error("the worker has not mapped guest memory within {TIMEOUT_MS} ms")]
    NotMapped,
}

/// The service. Stops when dropped.
#[derive(Debug)]
pub struct Rig {
    /// The front-end.
    pub front_end: FrontEnd,
    /// The worker's side.
    pub worker: Attachment,
    _driver: VirtioNet,
    folder: tempfile::TempDir,
    stop: Option<std::io::PipeWriter>,
    daemon: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Rig {
    /// Starts all three, and the device's rings, which nobody serves: nothing but the caller changes the table.
    ///
    /// # Errors
    /// See [`RigError`].
    pub fn start() -> Result<Rig, RigError> {
        Rig::with_queue_pairs(1)
    }

    /// As [`Rig::start`], with so many queue pairs.
    ///
    /// # Errors
    /// See [`RigError`].
    pub fn with_queue_pairs(queue_pairs: u16) -> Result<Rig, RigError> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("vhost.sock");
        let control = folder.path().join("control.sock");
        let source = FrontEndSource::Path { path: socket.clone(), mode: 0o600 };
        let mut config = ServerConfig::new(DeviceKind::Net { queue_pairs }, source, control.clone());
        config.table_size = TABLE_SIZE;
        config.arena_size = ARENA_SIZE;
        let server = Server::start(config)?;
        let (stop_reader, stop) = std::io::pipe()?;
        let daemon = std::thread::spawn(move || server.run(OwnedFd::from(stop_reader)));
        let options = FrontEndOptions { queue_pairs, ..FrontEndOptions::default() };
        let mut front_end = FrontEnd::connect(&socket, Guest::new(0, GUEST_SIZE)?, options)?;
        let driver = VirtioNet::start(&mut front_end, Unmapping::Strict)?;
        let worker =
            Attachment::connect(&control, &AttachOptions { label: "bench".into(), ..AttachOptions::default() })?;
        Ok(Rig { front_end, worker, _driver: driver, folder, stop: Some(stop), daemon: Some(daemon) })
    }

    /// Where workers attach.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// Maps `count` pages, one UPDATE each, to targets in no order, and waits until the worker has mapped guest memory.
    /// Pages that were there before stay.
    ///
    /// # Errors
    /// The front-end fails.
    pub fn fill(&mut self, count: u64) -> Result<Vec<Page>, RigError> {
        let pages = pages(count);
        for page in &pages {
            if self.front_end.viommu.walk(page.iova).is_none() {
                self.front_end.viommu.map(page.iova, page.target, Access::READ_WRITE)?;
                self.front_end.push_update(page.iova)?;
            }
        }
        if !self.worker.reader()?.wait_mapped(TIMEOUT_MS) {
            return Err(RigError::NotMapped);
        }
        Ok(pages)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(daemon) = self.daemon.take() {
            // The daemon's own result was of interest only while something could be done about it.
            let _ = daemon.join();
        }
    }
}

/// `count` pages with consecutive addresses and targets in no order, so that no two can be merged.
#[must_use]
pub fn pages(count: u64) -> Vec<Page> {
    let frames = GUEST_SIZE / PAGE;
    let mut shuffle = Shuffle::new(0x1077_1bd0);
    let order = shuffle.permutation(frames);
    (0..count)
        .map(|n| {
            // Past the number of frames they are used again, in another order.
            let frame = (n + (n / frames) * 7919) % frames;
            let target = order.get(usize::try_from(frame).unwrap_or(0)).copied().unwrap_or(0) * PAGE;
            let iova = IOVA_BASE + n * PAGE;
            // The simulated driver's own addresses lie around the interrupt window, below 4 GiB.
            Page { iova: if iova < DRIVER_BASE { iova } else { iova - DRIVER_BASE + DRIVER_END }, target }
        })
        .collect()
}
