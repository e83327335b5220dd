//! What the threads of one attachment share.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use iotlb_proto::liveness::{LivenessView, LivenessWord};
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering};
use iotlb_proto::table::TableReader;
use iotlb_proto::worker::WorkerSegment;

use crate::arena::Arena;
use crate::control::channel::Channel;
use crate::eventfd;
use crate::miss::cells::CellPool;
use crate::queue::lease::LeaseBook;
use crate::queue::vring::Source;
use crate::reader::slots::SlotPool;

/// The daemon took all access away.
const STATE_REVOKED: u32 = 1;
/// The control socket is gone: neither regions nor a revocation could reach this process any more.
const STATE_LOST: u32 = 2;

/// No map has this generation.
const INCOMPLETE: u64 = u64::MAX;

/// Longest a blocked thread goes without looking whether the daemon lives, in milliseconds. The control thread wakes
/// sleepers as soon as it sees the end, so this only bounds a wake-up lost to a race.
pub(crate) const SLICE_MS: u64 = 50;

/// Why an attachment is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Down {
    /// The daemon died, or closed the control socket.
    DaemonDead,
    /// The daemon took all access away.
    Revoked,
}

/// Everything but the control thread's handle.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) table: TableReader,
    pub(crate) segment: WorkerSegment,
    pub(crate) liveness: LivenessView,
    pub(crate) arena: Arena,
    /// Unique in this process, as the arena is, which stays as long as this does: the table and its generations may be
    /// those of another attachment as well.
    pub(crate) source: Source,
    pub(crate) doorbell: OwnedFd,
    pub(crate) channel: Channel,
    pub(crate) events: OwnedFd,
    pub(crate) slots: SlotPool,
    pub(crate) cells: CellPool,
    pub(crate) leases: LeaseBook,
    pub(crate) worker: u32,
    pub(crate) device: String,
    pub(crate) queues: u16,
    /// Number of the process that attached.
    process: u32,
    /// Set of `STATE_*`.
    state: AtomicU32,
    /// Memory-map generation up to which the arena is what the daemon said.
    mapped_generation: AtomicU64,
    /// The same, or [`INCOMPLETE`] while some region could not be mapped.
    complete_generation: AtomicU64,
    mapped_lock: Mutex<()>,
    mapped_changed: Condvar,
}

/// The words that say whether an attachment is of use.
#[derive(Clone, Copy)]
pub(crate) struct Signs<'s> {
    state: &'s AtomicU32,
    liveness: LivenessWord<'s>,
}

impl Signs<'_> {
    /// Two loads: fit for every pin.
    #[inline(always)]
    pub(crate) fn check(self) -> Result<(), Down> {
        // Acquire pairs with the release in `set_state`; a revocation is not waited for by anybody who only reads the
        // flag.
        let state = self.state.load(Ordering::Acquire);
        if state == 0 && self.liveness.alive() {
            return Ok(());
        }
        Err(if state & STATE_REVOKED != 0 { Down::Revoked } else { Down::DaemonDead })
    }
}

/// What WELCOME brought, checked and mapped.
pub(crate) struct Parts {
    pub(crate) table: TableReader,
    pub(crate) segment: WorkerSegment,
    pub(crate) liveness: LivenessView,
    pub(crate) arena: Arena,
    pub(crate) doorbell: OwnedFd,
    pub(crate) events: OwnedFd,
    pub(crate) worker: u32,
    pub(crate) device: String,
    pub(crate) queues: u16,
}

impl Shared {
    pub(crate) fn new(parts: Parts, channel: Channel) -> Shared {
        Shared {
            table: parts.table,
            segment: parts.segment,
            liveness: parts.liveness,
            arena: parts.arena,
            source: Source::unique(),
            doorbell: parts.doorbell,
            channel,
            events: parts.events,
            slots: SlotPool::default(),
            cells: CellPool::default(),
            leases: LeaseBook::default(),
            worker: parts.worker,
            device: parts.device,
            queues: parts.queues,
            process: std::process::id(),
            state: AtomicU32::new(0),
            mapped_generation: AtomicU64::new(0),
            complete_generation: AtomicU64::new(0),
            mapped_lock: Mutex::new(()),
            mapped_changed: Condvar::new(),
        }
    }

    #[inline]
    pub(crate) fn check(&self) -> Result<(), Down> {
        self.signs().check()
    }

    /// Where [`Shared::check`] looks.
    #[inline]
    pub(crate) fn signs(&self) -> Signs<'_> {
        Signs { state: &self.state, liveness: self.liveness.word() }
    }

    /// Whether this is the process that attached. A forked child of it has copies of all handles, but neither the
    /// shared memory nor the threads, and its descriptors are the parent's as well; also, a lock may be held for ever
    /// there by a thread it has not got. So what a child drops must leave all that alone. A system call: not for every
    /// pin.
    pub(crate) fn is_ours(&self) -> bool {
        std::process::id() == self.process
    }

    pub(crate) fn set_revoked(&self) {
        self.set_state(STATE_REVOKED);
    }

    pub(crate) fn set_lost(&self) {
        self.set_state(STATE_LOST);
    }

    fn set_state(&self, bit: u32) {
        // Release pairs with the acquire in `Signs::check`.
        self.state.fetch_or(bit, Ordering::Release);
        self.wake_all();
    }

    /// Ends every wait of this process early, so that it looks at the state again.
    pub(crate) fn wake_all(&self) {
        self.cells.wake_sleepers(&self.segment);
        {
            let _held = self.mapped_lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.mapped_changed.notify_all();
        }
        self.leases.wake_all();
        self.raise_events();
    }

    pub(crate) fn raise_events(&self) {
        eventfd::signal(self.events.as_fd());
    }

    #[inline]
    pub(crate) fn ring_doorbell(&self) {
        eventfd::signal(self.doorbell.as_fd());
    }

    #[inline]
    pub(crate) fn mapped_generation(&self) -> u64 {
        // Acquire pairs with the release in `set_mapped`: who sees the generation sees the mappings.
        self.mapped_generation.load(Ordering::Acquire)
    }

    /// The memory-map generation whose regions are all mapped, and none refused; else a number no map has.
    #[inline]
    pub(crate) fn complete_generation(&self) -> u64 {
        // Acquire pairs with the release in `arena_changed`: who sees the generation sees the mappings.
        self.complete_generation.load(Ordering::Acquire)
    }

    /// The control thread changed the arena, or is done with a generation. Regions are refused under a generation that
    /// the table has named before they were announced, so no reader takes the time until then for a complete one.
    pub(crate) fn arena_changed(&self) {
        let generation = if self.arena.is_complete() { self.mapped_generation() } else { INCOMPLETE };
        // Release pairs with the acquire in `complete_generation`.
        self.complete_generation.store(generation, Ordering::Release);
    }

    pub(crate) fn set_mapped(&self, generation: u64) {
        let _held = self.mapped_lock.lock().unwrap_or_else(PoisonError::into_inner);
        // Release pairs with the acquire in `mapped_generation`.
        self.mapped_generation.store(generation, Ordering::Release);
        self.arena_changed();
        self.mapped_changed.notify_all();
    }

    /// Waits until everything the table may point into is mapped.
    pub(crate) fn wait_mapped(&self, deadline: Instant) -> Result<bool, Down> {
        let mut held = self.mapped_lock.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            self.check()?;
            // Acquire pairs with the daemon's release of a new generation, before the entries that need it.
            let wanted = self.table.header().state.memory_map_generation.load(Ordering::Acquire);
            if self.mapped_generation() >= wanted {
                return Ok(true);
            }
            let Some(slice) = slice_until(deadline) else { return Ok(false) };
            held = self.mapped_changed.wait_timeout(held, slice).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// How long to wait next for something due at `deadline`; `None` when it has passed.
pub(crate) fn slice_until(deadline: Instant) -> Option<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { None } else { Some(left.min(Duration::from_millis(SLICE_MS))) }
}

/// The moment `timeout_ms` from now.
pub(crate) fn deadline_in(timeout_ms: u32) -> Instant {
    Instant::now() + Duration::from_millis(u64::from(timeout_ms))
}
