//! The event loop: attach, serve, and end or attach again.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use iotlb_proto::signals::stop_set;
use iotlb_proto::sync::Ordering;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::echo::Echo;
use super::lane::{Lane, Lost};
use super::options::{Options, OptionsError, PairPlan};
use super::pair::{Next, Pair, PairError, Port};
use super::tap::{Tap, TapError};
use crate::{AttachError, AttachOptions, Attachment, ClaimError, ReaderError};

/// How long a claim waits at a time, so that signals are seen in between.
const CLAIM_TIMEOUT_MS: u32 = 500;

/// Pause between two tries to attach.
const RECONNECT_PAUSE_MS: u16 = 250;

/// While tries to attach fail for the same reason, it is told so often: who looks finds it, and no disk fills.
const WAITING_REPORT: Duration = Duration::from_secs(60);

/// How often rings are looked at that are not started: their start rings no bell of its own.
const TICK_WAITING: Duration = Duration::from_millis(50);

/// How often rings are looked at that are.
const TICK_SERVING: Duration = Duration::from_secs(1);

/// Events taken from epoll at a time.
const EVENTS_MAX: usize = 64;

/// Why the worker ended.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The command line.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The TAP.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Attaching.
    #[error("cannot attach to the daemon: {0}")]
    Attach(#[from] AttachError),
    /// A reader for this thread.
    #[error("cannot read the table: {0}")]
    Reader(#[from] ReaderError),
    /// The leases.
    #[error("cannot lease the queues of --queues: {0}")]
    Claim(#[from] ClaimError),
    /// Serving.
    #[error(transparent)]
    Pair(#[from] PairError),
    /// A system call of the event loop.
    #[error("{step} failed: {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

impl WorkerError {
    /// Whether a new attachment may help.
    fn is_lost_attachment(&self) -> bool {
        match self {
            // Neither the command line nor what this process may do is ever another.
            WorkerError::Attach(AttachError::Name(_)) => false,
            WorkerError::Attach(AttachError::Pidfd(error)) => {
                !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
            }
            // Also a refusal: the next daemon may be of this worker's build, or have this device.
            WorkerError::Attach(_) | WorkerError::Reader(_) | WorkerError::Pair(PairError::Lost(_)) => true,
            // Also a refusal: the queue's last owner may be about to be found dead, and the next daemon have more.
            WorkerError::Claim(_) => true,
            WorkerError::Options(_) | WorkerError::Tap(_) | WorkerError::Pair(_) | WorkerError::System { .. } => false,
        }
    }
}

/// The signals that end the worker, as a descriptor: SIGTERM, SIGINT, and SIGHUP and SIGQUIT unless they are ignored.
/// To be made before any thread is, so that no thread gets them otherwise.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks the signals in this thread and its future children.
    ///
    /// # Errors
    ///
    /// [`WorkerError::System`].
    pub fn block() -> Result<Signals, WorkerError> {
        let set = stop_set();
        set.thread_block().map_err(system("blocking signals"))?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&set, flags).map_err(system("signalfd"))?;
        Ok(Signals { fd })
    }

    /// Whether one came, within the time.
    fn came(&self, timeout_ms: u16) -> bool {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::from(timeout_ms)), Ok(count) if count > 0)
    }
}

fn system(step: &'static str) -> impl FnOnce(Errno) -> WorkerError {
    move |source| WorkerError::System { step, source }
}

/// Serves until a signal comes (`Ok`) or it cannot go on.
///
/// # Errors
///
/// See [`WorkerError`]. With `--reconnect` a lost attachment is none.
pub fn run(options: &Options, signals: &Signals) -> Result<(), WorkerError> {
    let mut pairs = BTreeMap::new();
    let plans = options.pairs()?;
    for plan in &plans {
        pairs.insert(plan.pair, Pair::new(open_port(options, plan)?));
    }
    let mut waiting = Waiting::default();
    let ended = loop {
        let ended = attach_and_serve(options, signals, &mut pairs);
        match ended {
            Err(error) if options.reconnect && error.is_lost_attachment() => {
                waiting.failed(&error);
                pairs.values_mut().for_each(Pair::detach);
                if signals.came(RECONNECT_PAUSE_MS) {
                    break Ok(());
                }
            }
            ended => break ended,
        }
    };
    for (number, pair) in &pairs {
        let figures = pair.figures();
        tracing::info!(
            pair = number,
            received = figures.received,
            sent = figures.sent,
            dropped = figures.dropped,
            malformed = figures.malformed,
            "served"
        );
    }
    ended
}

/// What the log was told of tries to attach that failed.
#[derive(Debug, Default)]
struct Waiting {
    /// Tries that were not told.
    silent: u64,
    told: Option<(Instant, String)>,
}

impl Waiting {
    fn failed(&mut self, error: &WorkerError) {
        let reason = error.to_string();
        // One that was served is the first of its kind, whatever came before.
        let again = !matches!(error, WorkerError::Pair(_))
            && self.told.as_ref().is_some_and(|(when, told)| when.elapsed() < WAITING_REPORT && *told == reason);
        if again {
            self.silent += 1;
            tracing::debug!(error = reason, "trying to attach again");
            return;
        }
        tracing::warn!(error = reason, silent = self.silent, "trying to attach again");
        *self = Waiting { silent: 0, told: Some((Instant::now(), reason)) };
    }
}

fn open_port(options: &Options, plan: &PairPlan) -> Result<Port, TapError> {
    match &options.tap {
        Some(name) => Tap::open(name, plan.direction()).map(Port::Tap),
        None => Ok(Port::Echo(Echo::new(options.echo_mac, options.echo_ip))),
    }
}

fn attach_and_serve(options: &Options, signals: &Signals, pairs: &mut BTreeMap<u16, Pair>) -> Result<(), WorkerError> {
    let attach =
        AttachOptions { device: options.device.clone(), label: options.label.clone(), ..AttachOptions::default() };
    let attachment = match Attachment::connect_unless(signals.fd.as_fd(), &options.control_socket, &attach) {
        Err(AttachError::Interrupted) => return Ok(()),
        other => other?,
    };
    let mut reader = attachment.reader()?;
    let queues = loop {
        match attachment.claim_queues(&options.queues, CLAIM_TIMEOUT_MS) {
            // The daemon is slow. Where another worker has them it says so at once.
            Err(ClaimError::TimedOut { .. }) if !signals.came(0) => {}
            Err(ClaimError::TimedOut { .. }) => return Ok(()),
            Err(ClaimError::DaemonDead) => return Err(PairError::Lost(Lost::DaemonDead).into()),
            Err(ClaimError::Revoked) => return Err(PairError::Lost(Lost::Revoked).into()),
            other => break other?,
        }
    };
    tracing::info!(device = attachment.device(), worker = attachment.worker(), queues = ?options.queues, "attached");
    for queue in queues {
        let lane = Lane::new(queue, options.lookahead);
        if let Some(pair) = pairs.get_mut(&(lane.index() / 2)) {
            pair.add(lane);
        }
    }
    let events = Events::new(signals, &attachment, pairs)?;
    let mut timeout = Duration::ZERO;
    let mut refresh = true;
    loop {
        let came = events.wait(timeout, pairs)?;
        if came.signal {
            let counters = attachment.counters();
            // Relaxed: figures.
            let [misses, denied, timed_out, chains, bytes] =
                [&counters.misses, &counters.denied, &counters.timed_out, &counters.chains, &counters.bytes]
                    .map(|counter| counter.load(Ordering::Relaxed));
            tracing::info!(misses, denied, timed_out, chains, bytes, "counted");
            return Ok(());
        }
        if came.attachment {
            attachment.clear_events();
        }
        if !attachment.alive() {
            // The next pin says which of the two it is.
            reader.pin().map(drop).map_err(|error| PairError::Lost(error.into()))?;
            return Err(PairError::Lost(Lost::DaemonDead).into());
        }
        if refresh || came.attachment {
            for lane in pairs.values_mut().flat_map(Pair::lanes) {
                let index = lane.index();
                if let Some((old, new)) = lane.refresh().map_err(PairError::Lost)?
                    && let Err(error) = events.replace_kick(index, old.as_deref(), new.as_deref())
                {
                    lane.poll(&error.to_string());
                }
            }
        }
        let mut next = Next::Event;
        for pair in pairs.values_mut() {
            next = next.earlier(pair.serve(&mut reader, attachment.counters())?);
        }
        for pair in pairs.values_mut() {
            // Misses are waited for when nobody has anything else to do.
            if next != Next::Now {
                next = next.earlier(pair.wait(&mut reader)?);
            }
        }
        let waiting = !pairs.values().all(Pair::ready);
        let tick = if waiting { TICK_WAITING } else { TICK_SERVING };
        // Descriptors may come without a message where the daemon is older or busy; a tick looks for them too.
        refresh = next != Next::Now;
        timeout = match next {
            Next::Now => Duration::ZERO,
            Next::At(time) => time.saturating_duration_since(Instant::now()).min(tick),
            Next::Event => tick,
        };
    }
}

/// What woke the loop, besides kicks and ports, which are told to their pairs.
#[derive(Clone, Copy, Debug, Default)]
struct Came {
    signal: bool,
    attachment: bool,
}

/// Everything the loop waits on.
///
/// Kicks and ports are edge-triggered. A kick is never read: its counter says nothing that the ring does not say
/// better, each write is an edge whatever the counter holds, and a read could block when someone else cleared
/// O_NONBLOCK on the description that all share.
struct Events {
    epoll: Epoll,
}

const TOKEN_SIGNAL: u64 = 0;
const TOKEN_ATTACHMENT: u64 = 1;
const TOKEN_KICK: u64 = 1 << 32;
const TOKEN_PORT: u64 = 2 << 32;
const TOKEN_INDEX: u64 = 0xffff;

impl Events {
    fn new(signals: &Signals, attachment: &Attachment, pairs: &BTreeMap<u16, Pair>) -> Result<Events, WorkerError> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(system("epoll_create1"))?;
        let add = |fd, flags, token| epoll.add(fd, EpollEvent::new(flags, token)).map_err(system("epoll_ctl"));
        add(signals.fd.as_fd(), EpollFlags::EPOLLIN, TOKEN_SIGNAL)?;
        add(attachment.events(), EpollFlags::EPOLLIN, TOKEN_ATTACHMENT)?;
        let both_edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        for (number, pair) in pairs {
            if let Some(port) = pair.port_fd() {
                add(port, both_edges, TOKEN_PORT | u64::from(*number))?;
            }
        }
        Ok(Events { epoll })
    }

    /// Waits for another kick descriptor. One that cannot be waited for is a mistake of the front-end's, for one ring.
    fn replace_kick(&self, queue: u16, old: Option<&OwnedFd>, new: Option<&OwnedFd>) -> Result<(), Errno> {
        if let Some(old) = old {
            // What would still come of it is a look in vain.
            let _ = self.epoll.delete(old);
        }
        if let Some(new) = new {
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, TOKEN_KICK | u64::from(queue));
            self.epoll.add(new, event)?;
            tracing::debug!(queue, fd = new.as_raw_fd(), "new kick descriptor");
        }
        Ok(())
    }

    fn wait(&self, timeout: Duration, pairs: &mut BTreeMap<u16, Pair>) -> Result<Came, WorkerError> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        // Rounded up: a loop that wakes before its time would spin until then.
        let timeout_ms = u16::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let count = match self.epoll.wait(&mut events, EpollTimeout::from(timeout_ms)) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(source) => return Err(WorkerError::System { step: "epoll_wait", source }),
        };
        let mut came = Came::default();
        for event in &events[..count] {
            let token = event.data();
            let index = u16::try_from(token & TOKEN_INDEX).unwrap_or(u16::MAX);
            match token {
                TOKEN_SIGNAL => came.signal = true,
                TOKEN_ATTACHMENT => came.attachment = true,
                _ if token & TOKEN_KICK != 0 => {
                    let pair = pairs.get_mut(&(index / 2));
                    pair.into_iter().flat_map(Pair::lanes).filter(|lane| lane.index() == index).for_each(Lane::kicked);
                }
                _ => {
                    if let Some(pair) = pairs.get_mut(&index) {
                        let flags = event.events();
                        // Errors show in the next read or write.
                        let failed = flags.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
                        pair.port_event(
                            failed || flags.contains(EpollFlags::EPOLLIN),
                            failed || flags.contains(EpollFlags::EPOLLOUT),
                        );
                    }
                }
            }
        }
        Ok(came)
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::control;

    use super::*;

    #[test]
    fn what_no_daemon_can_mend_ends_the_tries() {
        let pidfd = |errno| WorkerError::Attach(AttachError::Pidfd(std::io::Error::from_raw_os_error(errno)));
        assert!(!pidfd(libc::EPERM).is_lost_attachment() && !pidfd(libc::ENOSYS).is_lost_attachment());
        assert!(pidfd(libc::EMFILE).is_lost_attachment());
        let name = control::check_name("the label", "a\nb").expect_err("not in one line");
        assert!(!WorkerError::from(AttachError::Name(name)).is_lost_attachment());
        // A daemon with more queues, workers or devices may come.
        assert!(WorkerError::from(AttachError::Full).is_lost_attachment());
        assert!(WorkerError::from(AttachError::NoSuchDevice { device: String::new() }).is_lost_attachment());
        let refused = ClaimError::Refused { queue: 9, reason: String::from("no such queue") };
        assert!(WorkerError::from(refused).is_lost_attachment());
    }
}
