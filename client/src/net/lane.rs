//! One leased queue: its ring, what it waits for, and its notifications.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::access::Access;
use iotlb_proto::layout::worker::Counters;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::QueueRecord;

use super::asked::{Asked, Refusal, Waited};
use crate::queue::vring::{Limits, MissPlace, MissSet, RingFault, Vring};
use crate::{Guard, PinError, Queue, Reader, RequestError, ResolveError};

/// How long a new memory map is waited for at a time.
const REMAP_TIMEOUT_MS: u32 = 100;

/// Pause after a miss that nobody answered: the front-end is busy or gone.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Pause after the ring's tables were denied: each time they are asked for may be a line in the guest's log.
const DENIED_PAUSE: Duration = Duration::from_secs(1);

/// How often a ring without a kick descriptor is looked at: its driver expects to be polled.
const POLL_PAUSE: Duration = Duration::from_millis(1);

/// Errors of a ring are reported at most this often: each is a message and a log line, and the guest can cause one with
/// every chain.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// Why the attachment is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// The daemon is gone.
    #[error("the daemon ended; start it again, and use --reconnect to attach again without help")]
    DaemonDead,
    /// The daemon cut this worker off.
    #[error("the daemon revoked this worker's access; its log says why")]
    Revoked,
    /// Another worker owns a queue now.
    #[error("the lease of queue {queue} ended")]
    Lease {
        /// The queue.
        queue: u16,
    },
}

impl From<PinError> for Lost {
    fn from(error: PinError) -> Lost {
        match error {
            PinError::DaemonDead => Lost::DaemonDead,
            PinError::Revoked => Lost::Revoked,
        }
    }
}

/// What a burst of work reports to its lane.
#[derive(Debug, Default)]
pub struct Done {
    /// The driver wants a call.
    pub call: bool,
    /// Chains completed.
    pub chains: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Why it ended early.
    pub fault: Option<RingFault>,
}

/// How the lane is after a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// As far as the lane is concerned all is done.
    Idle,
    /// Something changed; run again soon.
    Again,
    /// Pages are missing and were asked for: see to what else there is, then [`Lane::wait`].
    Missing,
    /// The ring takes no packets: stopped or broken. A message from the daemon ends that.
    Resting,
    /// Not before this time.
    Later(Instant),
}

/// Why a lane does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// The ring is broken; until queue records change.
    Broken { queue_generation: u64 },
    /// The front-end denied the ring's tables, or they cannot be mapped; until that, or until the guest kicks again.
    /// But a ring that asked for no kicks gets none, and cannot ask otherwise while it is out of reach: so not for
    /// longer than this either.
    Denied { queue_generation: u64, until: Instant },
    /// A miss was not answered.
    Until(Instant),
}

/// A queue at work.
#[derive(Debug)]
pub struct Lane {
    queue: Queue,
    ring: Vring,
    rest: Option<Rest>,
    /// A chain that has addresses which were denied.
    reject: Option<Rejected>,
    /// The call descriptor was replaced; the driver may have missed a call on the old one.
    call_owed: bool,
    /// Started and enabled when last looked at.
    ready: bool,
    descriptors: Option<u64>,
    kick: Option<Arc<OwnedFd>>,
    reported: Option<Instant>,
    asked: Asked,
    /// What the last run missed.
    missing: Option<Missing>,
}

/// A chain that goes back unused.
#[derive(Clone, Copy, Debug)]
struct Rejected {
    /// Where it was in the available ring,
    position: u16,
    /// when queue records were these.
    queue_generation: u64,
}

/// What a run missed, and what it knew of the ring.
#[derive(Debug)]
struct Missing {
    set: MissSet,
    record: QueueRecord,
    queue_generation: u64,
    /// It was not waited for yet.
    wait_due: bool,
}

impl Lane {
    /// Work for a leased queue. `lookahead`: see [`Limits`].
    #[must_use]
    pub fn new(queue: Queue, lookahead: u16) -> Lane {
        Lane {
            queue,
            ring: Vring::new(Limits { lookahead, ..Limits::default() }),
            rest: None,
            reject: None,
            call_owed: false,
            ready: false,
            descriptors: None,
            kick: None,
            reported: None,
            asked: Asked::default(),
            missing: None,
        }
    }

    /// The vring's index.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.queue.index()
    }

    /// Whether the ring takes and gives packets: started and enabled when last looked at, and not resting.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// The guest kicked.
    pub fn kicked(&mut self) {
        if matches!(self.rest, Some(Rest::Denied { .. })) {
            self.rest = None;
        }
    }

    /// The kick descriptor to wait on, when it is another than last time: `(old, new)`.
    ///
    /// # Errors
    ///
    /// [`Lost::Lease`].
    #[expect(clippy::type_complexity, reason = "two optional descriptors")]
    pub fn refresh(&mut self) -> Result<Option<(Option<Arc<OwnedFd>>, Option<Arc<OwnedFd>>)>, Lost> {
        if !self.queue.held() {
            return Err(Lost::Lease { queue: self.index() });
        }
        let generation = self.queue.descriptors_generation();
        if self.descriptors == Some(generation) {
            return Ok(None);
        }
        self.descriptors = Some(generation);
        self.call_owed = true;
        self.kicked();
        let new = self.queue.kick();
        let old = std::mem::replace(&mut self.kick, new.clone());
        match (&old, &new) {
            (Some(a), Some(b)) if Arc::ptr_eq(a, b) => Ok(None),
            _ => Ok(Some((old, new))),
        }
    }

    /// Nobody can wait for the kick descriptor: the ring is looked at as one without.
    pub fn poll(&mut self, reason: &str) {
        self.kick = None;
        self.report(&format!("its kick descriptor cannot be waited for, so the ring is polled: {reason}"));
    }

    /// Pins and lets `work` loose on the ring; then, unpinned, asks for what it missed. Waits for no answer,
    /// but for a moment for a new memory map.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn run(
        &mut self,
        reader: &mut Reader,
        counters: &Counters,
        work: impl FnOnce(&mut Vring, &Guard<'_>, &QueueRecord, u64) -> Done,
    ) -> Result<Step, Lost> {
        if let Some(Rest::Until(time)) = self.rest {
            if Instant::now() < time {
                return Ok(Step::Later(time));
            }
            self.rest = None;
        }
        if let Some(missing) = self.missing.take()
            && let Some(refusal) = self.asked.take_refusal(reader, &missing.set)
        {
            return Ok(self.refused(&missing, refusal));
        }
        self.asked.forget_answered(reader);
        let (done, record, queue_generation) = {
            let guard = reader.pin()?;
            let queue_generation = guard.queue_generation();
            self.asked.keep_of(queue_generation);
            match self.rest {
                Some(Rest::Broken { queue_generation: then }) if then == queue_generation => {
                    return Ok(Step::Resting);
                }
                Some(Rest::Denied { queue_generation: then, until })
                    if then == queue_generation && Instant::now() < until =>
                {
                    return Ok(Step::Later(until));
                }
                _ => self.rest = None,
            }
            let record = guard.queue_record(self.queue.index()).filter(|_| guard.running()).unwrap_or_default();
            let features = guard.acked_features();
            let rejected = match self.reject.take() {
                // Of another set-up of the ring there is nothing to reject.
                Some(chain) if chain.queue_generation == queue_generation => {
                    self.reject(chain, &guard, &record, features)
                }
                _ => Done::default(),
            };
            let mut done = work(&mut self.ring, &guard, &record, features);
            done.call |= rejected.call;
            done.chains += rejected.chains;
            if record.started && (done.call || self.call_owed) {
                // Inside the pin: afterwards the front-end may have taken the ring away.
                self.queue.signal_call();
                self.call_owed = false;
            }
            if done.chains > 0 {
                self.queue.set_progress(self.ring.position());
            }
            (done, record, queue_generation)
        };
        self.ready = record.started && record.enabled && !matches!(done.fault, Some(RingFault::Stopped));
        // Only this worker counts here, but its threads share the words. Relaxed: figures, nothing hangs on them.
        counters.chains.fetch_add(done.chains, Ordering::Relaxed);
        counters.bytes.fetch_add(done.bytes, Ordering::Relaxed);
        match done.fault {
            None if done.chains > 0 => Ok(Step::Again),
            None if self.ready && self.kick.is_none() => Ok(Step::Later(Instant::now() + POLL_PAUSE)),
            None => Ok(Step::Idle),
            Some(RingFault::Stopped) => Ok(Step::Resting),
            Some(RingFault::Remapping) => {
                if reader.wait_mapped(REMAP_TIMEOUT_MS) {
                    return Ok(Step::Again);
                }
                Ok(self.pause())
            }
            Some(RingFault::Broken(reason)) => {
                self.report(&format!("the guest broke the ring, which rests until it is set up anew: {reason}"));
                self.rest = Some(Rest::Broken { queue_generation });
                self.ready = false;
                Ok(Step::Resting)
            }
            Some(RingFault::Unmapped { iova, len, place }) => {
                let what = format!("{len} bytes at {iova:#x}");
                Ok(self.give_up(place, &what, "could not be mapped here", queue_generation))
            }
            Some(RingFault::Miss(set)) => match self.asked.ask(reader, &set) {
                Ok(()) => {
                    self.missing = Some(Missing { set, record, queue_generation, wait_due: true });
                    Ok(Step::Missing)
                }
                Err(RequestError::DaemonDead) => Err(Lost::DaemonDead),
                Err(RequestError::Revoked) => Err(Lost::Revoked),
                // Full is never said; no miss is empty, wraps or is longer than a cell takes.
                Err(RequestError::Full | RequestError::Invalid) => Ok(self.pause()),
            },
        }
    }

    /// Gives the chain back whose addresses were denied, and those in front that were to hold the same packet.
    fn reject(&mut self, chain: Rejected, guard: &Guard<'_>, record: &QueueRecord, features: u64) -> Done {
        let mut done = Done::default();
        match self.ring.begin(guard, record, features) {
            Ok(mut burst) => {
                done.chains = burst.reject_through(chain.position).map_or(0, u64::from);
                done.call = burst.publish();
            }
            // Later, when the tables are there again.
            Err(RingFault::Miss(_) | RingFault::Remapping) => self.reject = Some(chain),
            Err(RingFault::Unmapped { .. } | RingFault::Stopped | RingFault::Broken(_)) => {}
        }
        done
    }

    fn pause(&mut self) -> Step {
        let until = Instant::now() + RETRY_PAUSE;
        self.rest = Some(Rest::Until(until));
        Step::Later(until)
    }

    /// Waits for some of what the last run missed; `None` at once if it missed nothing, or was waited for already.
    /// Sleeps for some milliseconds at most, and not twice for the same answer: others want to be served, too.
    ///
    /// # Errors
    ///
    /// See [`Lost`].
    pub fn wait(&mut self, reader: &mut Reader) -> Result<Option<Step>, Lost> {
        let Some(mut missing) = self.missing.take_if(|missing| missing.wait_due) else { return Ok(None) };
        let step = match self.asked.wait(reader, &missing.set) {
            Ok(Waited::Answered) => {
                // The next run looks for what was refused of the rest.
                missing.wait_due = false;
                self.missing = Some(missing);
                Step::Again
            }
            Ok(Waited::Refused(refusal)) => self.refused(&missing, refusal),
            Ok(Waited::Nothing) => self.pause(),
            Ok(later @ (Waited::NotYet | Waited::Look(_))) => {
                self.missing = Some(missing);
                if let Waited::Look(time) = later { Step::Later(time) } else { Step::Again }
            }
            Err(ResolveError::DaemonDead) => return Err(Lost::DaemonDead),
            Err(ResolveError::Revoked) => return Err(Lost::Revoked),
            Err(_) => self.pause(),
        };
        Ok(Some(step))
    }

    fn refused(&mut self, missing: &Missing, refusal: Refusal) -> Step {
        match refusal {
            Refusal::Denied { iova, access } => {
                self.denied(missing.set.place, iova, access, &missing.record, missing.queue_generation)
            }
            Refusal::Unanswered => self.pause(),
        }
    }

    fn denied(
        &mut self,
        place: MissPlace,
        iova: u64,
        access: Access,
        record: &QueueRecord,
        queue_generation: u64,
    ) -> Step {
        if place == MissPlace::Tables && self.ring.denied(iova, access, record) {
            return Step::Again;
        }
        self.give_up(place, &format!("bytes at {iova:#x} ({access})"), "were denied", queue_generation)
    }

    /// The ring, or one of its chains, is of no use for now.
    fn give_up(&mut self, place: MissPlace, what: &str, why: &str, queue_generation: u64) -> Step {
        match place {
            MissPlace::Tables => {
                self.report(&format!("the ring's own {what} {why}"));
                let until = Instant::now() + DENIED_PAUSE;
                self.rest = Some(Rest::Denied { queue_generation, until });
                self.ready = false;
                Step::Later(until)
            }
            MissPlace::Chain { position } => {
                self.report(&format!("a buffer's {what} {why}; its chain goes back unused"));
                self.reject = Some(Rejected { position, queue_generation });
                Step::Again
            }
        }
    }

    /// Tells the log, and through the daemon the front-end.
    fn report(&mut self, reason: &str) {
        let now = Instant::now();
        if self.reported.is_none_or(|last| now.duration_since(last) >= REPORT_PAUSE) {
            self.reported = Some(now);
            tracing::warn!(queue = self.index(), "{reason}");
            self.queue.signal_error(reason);
        }
    }
}
