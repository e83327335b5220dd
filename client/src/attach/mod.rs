//! The handshake, and the attachment it yields.

mod error;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::control::message::{CONTROL_VERSION, HELLO_MAGIC};
use iotlb_proto::control::{self, DaemonMessage, Hello, Welcome, WorkerMessage};
use iotlb_proto::layout::table::QUEUE_CAPACITY;
use iotlb_proto::layout::worker::{Counters, SEGMENT_SIZE};
use iotlb_proto::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use iotlb_proto::liveness::LivenessView;
use iotlb_proto::shm::memfd;
use iotlb_proto::socket::PacketSocket;
use iotlb_proto::socket::address::AddressError;
use iotlb_proto::table::TableReader;
use iotlb_proto::worker::WorkerSegment;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::PidfdFlags;

use crate::arena::Arena;
use crate::control::ControlThread;
use crate::control::channel::Channel;
use crate::eventfd;
use crate::queue::{ClaimError, Queue};
use crate::reader::{Reader, ReaderError};
use crate::shared::{Parts, Shared, deadline_in};
pub use error::AttachError;
use error::{WELCOME_FDS, refused};

/// Longest step of connecting, in milliseconds. The system offers no way to wait for a place in a listener's queue and
/// for something else, so in between it is seen whether to go on. A place that becomes free ends a step at once.
const CONNECT_STEP_MS: u32 = 100;

/// How to attach.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Device to attach to, at most 64 bytes; empty = the only one.
    pub device: String,
    /// Free text for the daemon's log, at most 64 bytes.
    pub label: String,
    /// Longest that connecting and the handshake may take together, in milliseconds.
    pub timeout_ms: u32,
}

impl Default for AttachOptions {
    fn default() -> Self {
        AttachOptions { device: String::new(), label: String::new(), timeout_ms: 5_000 }
    }
}

/// A worker's connection to one device. Clones share it; the last one (and the last [`Reader`] and [`Queue`] made
/// from it) detaches when it is dropped.
///
/// When the daemon dies, or this worker's access is revoked, the attachment is over for good: drop it and its
/// readers, and connect anew.
#[derive(Clone, Debug)]
pub struct Attachment {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    /// Its drop ends the thread.
    _control: ControlThread,
}

impl Attachment {
    /// Connects to the daemon's control socket and attaches.
    ///
    /// # Errors
    /// See [`AttachError`]; each names what to do.
    pub fn connect(control_socket: &Path, options: &AttachOptions) -> Result<Attachment, AttachError> {
        Attachment::begin(None, control_socket, options)
    }

    /// As [`Attachment::connect`], but gives up as soon as `stop` is readable: a descriptor of signals, say.
    ///
    /// # Errors
    /// As there, and [`AttachError::Interrupted`].
    pub fn connect_unless(
        stop: BorrowedFd<'_>,
        control_socket: &Path,
        options: &AttachOptions,
    ) -> Result<Attachment, AttachError> {
        Attachment::begin(Some(stop), control_socket, options)
    }

    /// As [`Attachment::connect`], over a `SOCK_SEQPACKET` socket that is connected already: one that was inherited,
    /// say.
    ///
    /// # Errors
    /// As there.
    pub fn from_socket(socket: OwnedFd, options: &AttachOptions) -> Result<Attachment, AttachError> {
        check_names(options)?;
        let channel = Channel::from_socket(socket).map_err(AttachError::Address)?;
        Attachment::over(channel, &Patience::new(None, options.timeout_ms), options)
    }

    fn begin(
        stop: Option<BorrowedFd<'_>>,
        control_socket: &Path,
        options: &AttachOptions,
    ) -> Result<Attachment, AttachError> {
        check_names(options)?;
        let patience = Patience::new(stop, options.timeout_ms);
        Attachment::over(connected(control_socket, &patience)?, &patience, options)
    }

    fn over(channel: Channel, patience: &Patience<'_>, options: &AttachOptions) -> Result<Attachment, AttachError> {
        let pidfd = own_pidfd().map_err(AttachError::Pidfd)?;
        let hello = WorkerMessage::Hello(Hello {
            magic: HELLO_MAGIC,
            control_version: CONTROL_VERSION,
            layout_version: LAYOUT_VERSION,
            layout_hash: LAYOUT_HASH,
            device: options.device.clone(),
            label: options.label.clone(),
        });
        channel.send(&hello, &[pidfd.as_fd()])?;
        let parts = first_answer(&channel, patience).and_then(|(message, fds)| match message {
            DaemonMessage::Welcome(welcome) => opened(welcome, fds),
            DaemonMessage::Refused(refusal) => Err(refused(refusal, &options.device)),
            _ => Err(AttachError::Unexpected),
        });
        // From its answer on, which may be on its way, the daemon counts a worker.
        let parts = parts.inspect_err(|_| channel.leave())?;
        let shared = Arc::new(Shared::new(parts, channel));
        let control = ControlThread::start(Arc::clone(&shared)).map_err(AttachError::Thread);
        let control = control.inspect_err(|_| shared.channel.leave())?;
        Ok(Attachment { inner: Arc::new(Inner { shared, _control: control }) })
    }

    /// A reader for one thread.
    ///
    /// # Errors
    /// When all reader slots of this worker are taken, or the attachment is over.
    pub fn reader(&self) -> Result<Reader, ReaderError> {
        Reader::new(self.clone())
    }

    /// Leases queues: all of them, or none. `timeout_ms` counts once for asking, which takes time when the daemon does
    /// not read, and for the answers. What was asked for and not had is given back then, when the daemon reads again at
    /// the latest; it may be claimed anew at once.
    ///
    /// # Errors
    /// When the daemon refuses one of them, does not answer within `timeout_ms`, or the attachment is over.
    pub fn claim_queues(&self, queues: &[u16], timeout_ms: u32) -> Result<Vec<Queue>, ClaimError> {
        Queue::claim(self, queues, timeout_ms)
    }

    /// Whether the daemon lives and has not revoked this worker's access. Loads only.
    #[must_use]
    pub fn alive(&self) -> bool {
        self.shared().check().is_ok()
    }

    /// What this worker has counted. Of what it shares with the daemon nothing else is handed out: reader slots and
    /// generations are what guards rest on.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.shared().segment.counters
    }

    /// An event descriptor that is readable, until [`Attachment::clear_events`], once a leased queue got other
    /// descriptors or the attachment's state changed. Only to be polled.
    #[must_use]
    pub fn events(&self) -> BorrowedFd<'_> {
        self.shared().events.as_fd()
    }

    /// Makes [`Attachment::events`] unreadable until the next change. Clear first, then look at what changed.
    pub fn clear_events(&self) {
        eventfd::clear(self.shared().events.as_fd());
    }

    /// Rings the device has.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        self.shared().queues
    }

    /// What the daemon calls this worker in its log.
    #[must_use]
    pub fn worker(&self) -> u32 {
        self.shared().worker
    }

    /// Name of the device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.shared().device
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.shared
    }
}

fn check_names(options: &AttachOptions) -> Result<(), AttachError> {
    control::check_name("the device name", &options.device).map_err(AttachError::Name)?;
    control::check_name("the label", &options.label).map_err(AttachError::Name)
}

/// Checks and maps what came with WELCOME.
fn opened(welcome: Welcome, fds: Vec<OwnedFd>) -> Result<Parts, AttachError> {
    let count = fds.len();
    let [table, segment, liveness, doorbell] =
        <[OwnedFd; WELCOME_FDS]>::try_from(fds).map_err(|_| AttachError::Descriptors { count })?;
    if welcome.segment_size != SEGMENT_SIZE as u64 {
        return Err(AttachError::Welcome { field: "segment_size", value: welcome.segment_size });
    }
    if usize::from(welcome.queues) > QUEUE_CAPACITY {
        return Err(AttachError::Welcome { field: "queues", value: u64::from(welcome.queues) });
    }
    for (what, fd, size) in [("table", &table, welcome.table_size), ("worker segment", &segment, welcome.segment_size)]
    {
        memfd::check_sealed(fd.as_fd(), size).map_err(|source| AttachError::Seals { what, size, source })?;
    }
    eventfd::adopt(&doorbell).map_err(AttachError::Doorbell)?;
    Ok(Parts {
        table: TableReader::open(table.as_fd(), welcome.table_size).map_err(AttachError::Table)?,
        segment: WorkerSegment::open(segment.as_fd(), welcome.incarnation).map_err(AttachError::Segment)?,
        liveness: LivenessView::open(liveness.as_fd(), welcome.liveness_offset).map_err(AttachError::Liveness)?,
        arena: Arena::new(welcome.arena_size)?,
        doorbell,
        events: eventfd::create().map_err(AttachError::Events)?,
        worker: welcome.worker,
        device: welcome.device,
        queues: welcome.queues,
    })
}

/// How long to go on with a handshake.
struct Patience<'a> {
    /// Until this is readable,
    stop: Option<BorrowedFd<'a>>,
    /// but no longer.
    deadline: Instant,
    timeout_ms: u32,
}

impl<'a> Patience<'a> {
    fn new(stop: Option<BorrowedFd<'a>>, timeout_ms: u32) -> Patience<'a> {
        Patience { stop, deadline: deadline_in(timeout_ms), timeout_ms }
    }

    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits until `channel`, if there is one, has something to read, `timeout` has passed, or a signal came.
    fn wait(&self, channel: Option<&Channel>, timeout: Duration) -> Result<(), AttachError> {
        let fds = self.stop.into_iter().chain(channel.map(Channel::as_fd));
        let mut fds: Vec<_> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        // All time-outs are below 50 days, and fit.
        let timeout = Timespec::try_from(timeout).unwrap_or(Timespec { tv_sec: i64::from(u32::MAX), tv_nsec: 0 });
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) if self.stop.is_some() && !fds[0].revents().is_empty() => Err(AttachError::Interrupted),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(AttachError::Poll(errno.into())),
        }
    }
}

fn connected(path: &Path, patience: &Patience<'_>) -> Result<Channel, AttachError> {
    loop {
        patience.wait(None, Duration::ZERO)?;
        let left_ms = u32::try_from(patience.left().as_millis()).unwrap_or(u32::MAX);
        match Channel::connect(path, left_ms.min(CONNECT_STEP_MS)) {
            Err(AddressError::ConnectTimedOut { .. }) if left_ms > CONNECT_STEP_MS => {}
            Err(AddressError::ConnectTimedOut { path, .. }) => {
                let timeout_ms = patience.timeout_ms;
                return Err(AttachError::Address(AddressError::ConnectTimedOut { path, timeout_ms }));
            }
            other => return other.map_err(AttachError::Address),
        }
    }
}

fn first_answer(channel: &Channel, patience: &Patience<'_>) -> Result<(DaemonMessage, Vec<OwnedFd>), AttachError> {
    loop {
        if let Some(answer) = channel.receive()? {
            return Ok(answer);
        }
        let left = patience.left();
        if left.is_zero() {
            return Err(AttachError::TimedOut { timeout_ms: patience.timeout_ms });
        }
        patience.wait(Some(channel), left)?;
    }
}

/// A descriptor that stands for this process. Where `pidfd_open` is not known (valgrind 3.19, under which the hot paths
/// are counted, is one such place), the other end of a socket pair names the same process, from Linux 6.5 on.
fn own_pidfd() -> io::Result<OwnedFd> {
    match rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()) {
        Err(rustix::io::Errno::NOSYS) => {
            let (one, _other) = PacketSocket::pair().map_err(io::Error::other)?;
            one.peer_pidfd().map_err(io::Error::other)
        }
        opened => opened.map_err(io::Error::from),
    }
}
