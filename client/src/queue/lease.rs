//! What this process knows of its leases.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use iotlb_proto::control::QueueLease;
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering};
use tracing::{debug, error, warn};

use crate::eventfd;
use crate::queue::snapshot::Snapshot;
use crate::shared::slice_until;

/// The descriptors a ring has at present.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    /// Not an `OwnedFd` alone: a thread may sleep on it while it is replaced.
    pub(crate) kick: Option<Arc<OwnedFd>>,
    pub(crate) call: Option<OwnedFd>,
    /// Kept so that it stays open; the daemon signals it on request.
    pub(crate) _err: Option<OwnedFd>,
}

impl Descriptors {
    /// Sorts what came with a lease by its flags.
    fn from_lease(lease: &QueueLease, fds: Vec<OwnedFd>) -> Option<Descriptors> {
        let expected = usize::from(lease.kick) + usize::from(lease.call) + usize::from(lease.err);
        if fds.len() != expected {
            error!(
                queue = lease.queue,
                expected,
                got = fds.len(),
                "lease with the wrong number of descriptors; ignored"
            );
            return None;
        }
        let mut fds = fds.into_iter();
        let mut next = |flag: bool, what: &str| {
            let fd = if flag { fds.next() } else { None }?;
            match eventfd::adopt(&fd) {
                Ok(()) => Some(fd),
                Err(error) => {
                    error!(queue = lease.queue, what, %error, "ring descriptor cannot be used");
                    None
                }
            }
        };
        let kick = next(lease.kick, "kick").map(Arc::new);
        let call = next(lease.call, "call");
        Some(Descriptors { kick, call, _err: next(lease.err, "err") })
    }
}

/// One leased queue.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) queue: u16,
    /// The claim that it came of: its name towards the daemon.
    pub(crate) claim: u64,
    pub(crate) descriptors: Snapshot<Descriptors>,
    /// Grows after each replacement.
    pub(crate) generation: AtomicU64,
    /// Not 0: the daemon took it back.
    pub(crate) lost: AtomicU32,
}

impl Lease {
    fn replace(&self, descriptors: Descriptors) {
        self.descriptors.replace(descriptors);
        // Release pairs with the acquire in `Queue::descriptors_generation`: who sees it finds the new descriptors.
        self.generation.fetch_add(1, Ordering::Release);
    }
}

#[derive(Debug)]
enum State {
    /// Claimed; the daemon has not answered.
    Waiting,
    /// Refused; the claimer has not taken notice yet.
    Refused(String),
    /// Ours.
    Granted(Arc<Lease>),
}

/// A queue that this process claims or has.
#[derive(Debug)]
struct Entry {
    /// Under which number.
    claim: u64,
    state: State,
}

/// A queue is leased or being claimed by this very process.
#[derive(Debug)]
pub(crate) struct Busy(pub(crate) u16);

/// How a claim ended, apart from success.
#[derive(Debug)]
pub(crate) enum Unclaimed {
    /// The daemon refused one.
    Refused(u16, String),
    /// Not all were answered before the deadline, or the attachment ended.
    Unanswered,
}

#[derive(Debug, Default)]
struct Book {
    entries: HashMap<u16, Entry>,
    /// The newest claim's number; none is used twice.
    last_claim: u64,
    /// What the daemon is to be told when its socket has room: queues that were given back, with their claims.
    owed: Vec<(u16, u64)>,
}

impl Book {
    /// What the daemon speaks of. `None`: of a claim or lease that was given up; it was told, but not in time.
    fn entry(&mut self, queue: u16, claim: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&queue).filter(|entry| entry.claim == claim)
    }
}

fn ignored(queue: u16, claim: u64) {
    debug!(queue, claim, "the daemon speaks of a lease that was given up; ignored");
}

/// All leases and claims of an attachment. Nothing is logged while the lock is held: a revocation takes it before the
/// memory goes, and must not wait for who reads the log.
#[derive(Debug, Default)]
pub(crate) struct LeaseBook {
    book: Mutex<Book>,
    changed: Condvar,
}

impl LeaseBook {
    /// Notes that these queues are being claimed: all of them, or none. Returns the claim's number.
    pub(crate) fn begin(&self, queues: &[u16]) -> Result<u64, Busy> {
        let mut book = self.lock();
        for (i, queue) in queues.iter().enumerate() {
            if book.entries.contains_key(queue) || queues[..i].contains(queue) {
                return Err(Busy(*queue));
            }
        }
        // 2^64 claims take longer than any process lives.
        book.last_claim += 1;
        let claim = book.last_claim;
        book.entries.extend(queues.iter().map(|queue| (*queue, Entry { claim, state: State::Waiting })));
        Ok(claim)
    }

    /// Waits until all queues, of one claim, were granted. After an error the caller gives them up with
    /// [`LeaseBook::forget`]: until then nobody else can claim them, so their entries are those of that claim.
    pub(crate) fn wait(
        &self,
        queues: &[u16],
        deadline: Instant,
        over: impl Fn() -> bool,
    ) -> Result<Vec<Arc<Lease>>, Unclaimed> {
        let mut book = self.lock();
        loop {
            let mut granted = Vec::new();
            for queue in queues {
                match book.entries.get(queue).map(|entry| &entry.state) {
                    Some(State::Granted(lease)) => granted.push(Arc::clone(lease)),
                    Some(State::Refused(reason)) => return Err(Unclaimed::Refused(*queue, reason.clone())),
                    Some(State::Waiting) | None => {}
                }
            }
            if granted.len() == queues.len() {
                return Ok(granted);
            }
            let Some(slice) = slice_until(deadline).filter(|_| !over()) else { return Err(Unclaimed::Unanswered) };
            book = self.changed.wait_timeout(book, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The process has no more to do with the queue. Whether the daemon may still think it has.
    pub(crate) fn forget(&self, queue: u16, claim: u64) -> bool {
        let mut book = self.lock();
        if book.entry(queue, claim).is_none() {
            return false;
        }
        match book.entries.remove(&queue).map(|entry| entry.state) {
            // Acquire pairs with the release in `refused`.
            Some(State::Granted(lease)) => lease.lost.load(Ordering::Acquire) == 0,
            Some(State::Waiting) => true,
            Some(State::Refused(_)) | None => false,
        }
    }

    /// Notes a release that is to be sent.
    pub(crate) fn owe(&self, queue: u16, claim: u64) {
        self.lock().owed.push((queue, claim));
    }

    /// Takes a release that is to be sent; in any order.
    pub(crate) fn next_owed(&self) -> Option<(u16, u64)> {
        self.lock().owed.pop()
    }

    /// Whether releases are to be sent.
    pub(crate) fn owes(&self) -> bool {
        !self.lock().owed.is_empty()
    }

    /// A lease came. Whether descriptors of a queue in use changed.
    pub(crate) fn granted(&self, lease: &QueueLease, fds: Vec<OwnedFd>) -> bool {
        let Some(descriptors) = Descriptors::from_lease(lease, fds) else { return false };
        self.set(lease.queue, lease.claim, descriptors)
    }

    fn set(&self, queue: u16, claim: u64, descriptors: Descriptors) -> bool {
        let mut book = self.lock();
        let Some(entry) = book.entry(queue, claim) else {
            drop(book);
            ignored(queue, claim);
            return false;
        };
        match &entry.state {
            State::Waiting => {
                entry.state = State::Granted(Arc::new(Lease {
                    queue,
                    claim,
                    descriptors: Snapshot::new(descriptors),
                    generation: AtomicU64::new(1),
                    lost: AtomicU32::new(0),
                }));
                self.changed.notify_all();
                false
            }
            State::Granted(held) => {
                let held = Arc::clone(held);
                held.replace(descriptors);
                // Who uses other queues must not wait for what becomes of this one's call.
                drop(book);
                // Interrupts sent to the former call descriptor during the change may be lost, so one goes to the new
                // one. This is the thread that answers a revocation.
                held.descriptors.with(|d| d.call.as_ref().map(|call| eventfd::signal_if_room(call.as_fd())));
                true
            }
            // A daemon that refuses a claim does not grant it later.
            State::Refused(_) => false,
        }
    }

    /// A claim was refused, or a lease taken back. Whether a queue in use is affected.
    pub(crate) fn refused(&self, queue: u16, claim: u64, reason: String) -> bool {
        let mut book = self.lock();
        let Some(entry) = book.entry(queue, claim) else {
            drop(book);
            ignored(queue, claim);
            return false;
        };
        match &entry.state {
            State::Waiting => {
                entry.state = State::Refused(reason);
                self.changed.notify_all();
                false
            }
            State::Granted(held) => {
                // Release pairs with the acquire loads of `lost`.
                held.lost.store(1, Ordering::Release);
                held.replace(Descriptors::default());
                drop(book);
                warn!(queue, reason, "the daemon took a queue back");
                true
            }
            State::Refused(_) => false,
        }
    }

    pub(crate) fn wake_all(&self) {
        let _held = self.lock();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        // The book is whole between any two statements, so a panic elsewhere does not spoil it.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::event::EventfdFlags;

    use super::*;

    /// Longest the test waits for its thread: long, because many tests may share few processors.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_new_call_that_blocks_and_is_full_holds_nobody_up() {
        let book = Arc::new(LeaseBook::default());
        let claim = book.begin(&[0]).expect("free");
        assert!(!book.set(0, claim, Descriptors::default()), "a lease is no exchange");
        let call = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).expect("the counter takes it");
        let theirs = Descriptors { call: Some(call.try_clone().expect("a descriptor")), ..Descriptors::default() };
        let (done, ended) = mpsc::channel();
        let setting = std::thread::spawn(move || {
            let changed = book.set(0, claim, theirs);
            done.send((changed, book.forget(0, claim))).expect("the test waits");
        });
        let ended = ended.recv_timeout(PATIENCE);
        eventfd::clear(call.as_fd());
        setting.join().expect("no panic");
        assert_eq!(ended, Ok((true, true)), "the thread waits for who reads the counter");
    }
}
