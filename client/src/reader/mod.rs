//! One thread's right to pin.

pub(crate) mod slots;

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Instant;

use iotlb_proto::epoch;
use iotlb_proto::shm::SharedObject;
use iotlb_proto::sync::{AtomicU64, Ordering};
use iotlb_proto::table::LastNodes;
use iotlb_proto::tree::NearNodes;

use crate::arena::Span;
use crate::attach::Attachment;
use crate::guard::Guard;
use crate::miss::{self, RequestError, ResolveError, Spin, Ticket};
use crate::segments::{Kept, Piece, Pieces};
use crate::shared::{Down, Shared, deadline_in};
use crate::{Access, Answer, thread_pins};

/// Lookups a reader keeps to itself before it adds them to the segment's counters. An add is two locked operations on a
/// line that other threads write too, so it must not come with every pin.
const FLUSH_LOOKUPS: u64 = 1024;

/// In [`Reader::due`]: translations of this pin keep pieces.
const KEEPS_PIECES: u64 = 1 << 63;
/// In [`Reader::due`]: there are inner guards.
const NESTED: u64 = 1 << 62;
/// In [`Reader::due`]: this pin keeps nodes.
const KEEPS_NODES: u64 = 1 << 61;
/// In [`Reader::due`]: lookups not flushed yet. As many as nine years of them under one pin.
const LOOKUPS: u64 = (1 << 56) - 1;

/// Why there is no reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReaderError {
    /// Every slot of the segment is taken.
    #[error("all reader slots of this worker are taken: drop readers that are not needed, or attach once more")]
    TooMany,
    /// The daemon died.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
}

/// Why a pin was refused. Nothing of the guest may be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// The daemon died, or closed the control socket: no invalidation could reach this worker any more.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away; the guest's memory is not mapped any more.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
}

impl From<Down> for ReaderError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => ReaderError::DaemonDead,
            Down::Revoked => ReaderError::Revoked,
        }
    }
}

impl From<Down> for PinError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => PinError::DaemonDead,
            Down::Revoked => PinError::Revoked,
        }
    }
}

/// One thread's right to pin: it owns a slot in the segment that the daemon watches. May move between threads while
/// it is not pinned, cannot be shared.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    /// Keeps the control thread running.
    _attachment: Attachment,
    slot: usize,
    slot_word: SharedObject<AtomicU64>,
    writer_sleeps: SharedObject<AtomicU64>,
    /// Guards that live, but for one: that there is one at all is in the slot. 64 bits, so that no number of forgotten
    /// guards can wrap it.
    inner: Cell<u64>,
    /// [`LOOKUPS`], [`KEEPS_NODES`], [`NESTED`] and [`KEEPS_PIECES`]: below [`FLUSH_LOOKUPS`] there is nothing more to
    /// do when a guard is dropped than to unpin, which one comparison tells.
    due: Cell<u64>,
    faults: Cell<u64>,
    /// What the translations of this pin keep.
    pieces: RefCell<Pieces>,
    /// Where `shared` has its arena.
    arena: Span,
    /// The nodes of the GiB that this pin looked into last.
    last_nodes: LastNodes,
    /// The table's memory-map generation.
    map_generation: SharedObject<AtomicU64>,
    /// The one whose regions were all mapped when the pin began; see [`Shared::complete_generation`].
    complete_generation: Cell<u64>,
    /// Nodes that this pin met.
    near: NearNodes,
    spin: Spin,
    /// For the end of a long request, once the rest is there.
    end_spin: Spin,
}

impl Reader {
    pub(crate) fn new(attachment: Attachment) -> Result<Reader, ReaderError> {
        let shared = Arc::clone(attachment.shared());
        shared.check()?;
        let slot = shared.slots.take().ok_or(ReaderError::TooMany)?;
        shared.segment.announce(slot + 1);
        let (slot_word, writer_sleeps) = (shared.segment.slot(slot), shared.table.writer_sleeps());
        let (last_nodes, map_generation) = (shared.table.last_nodes(), shared.table.map_generation());
        let arena = shared.arena.span();
        Ok(Reader {
            shared,
            _attachment: attachment,
            slot,
            slot_word,
            writer_sleeps,
            inner: Cell::new(0),
            due: Cell::new(0),
            faults: Cell::new(0),
            pieces: RefCell::default(),
            arena,
            last_nodes,
            map_generation,
            complete_generation: Cell::new(0),
            near: NearNodes::default(),
            spin: Spin::default(),
            end_spin: Spin::default(),
        })
    }

    /// Pins: until the guard is dropped, everything a translation yields stays what it was. No system call, no lock.
    ///
    /// Pins nest: an inner one counts, and ends nothing when it is dropped. Pin for a burst, not for a program: the
    /// guest stands still when it takes memory away and a pin does not end. Never wait while pinned, and never pin in
    /// a signal handler.
    ///
    /// # Errors
    /// The daemon died, or revoked this worker's access.
    #[inline(always)]
    pub fn pin(&self) -> Result<Guard<'_>, PinError> {
        // Part of the caller, so that a guard is put together where it stays: passed on through memory in pieces of
        // another size, it costs more than all else here.
        //
        // Where everything is, is found out before the fence: no load begins before that is done, so behind it each
        // load that needs another one's result counts in full.
        let shared = &*self.shared;
        let signs = shared.signs();
        if epoch::is_pinned(&self.slot_word) {
            // The outer pin may be an old one, or have been forgotten.
            signs.check()?;
            self.inner.set(self.inner.get() + 1);
            self.due.set(self.due.get() | NESTED);
        } else {
            // Before the fence: it waits for stores, so that what reads this one back at the end does not have to.
            thread_pins::enter();
            // What they say was valid under the pin before.
            self.last_nodes.forget();
            self.complete_generation.set(shared.complete_generation());
            epoch::pin(&self.slot_word, &shared.table.header().epoch.word);
            if let Err(down) = signs.check() {
                return Err(self.refuse(down));
            }
        }
        Ok(Guard::new(self, shared))
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, down: Down) -> PinError {
        self.unpin();
        down.into()
    }

    #[inline(always)]
    pub(crate) fn unpin(&self) {
        if self.due.get() < FLUSH_LOOKUPS {
            self.unpin_outermost();
        } else {
            self.unpin_slowly();
        }
    }

    #[inline(always)]
    fn unpin_outermost(&self) {
        self.unpin_slot();
        thread_pins::leave();
    }

    /// What not every end of a guard has to do.
    #[cold]
    #[inline(never)]
    fn unpin_slowly(&self) {
        if self.due.get() & NESTED != 0 {
            self.inner.set(self.inner.get() - 1);
            if self.inner.get() == 0 {
                self.due.set(self.due.get() & !NESTED);
            }
            return;
        }
        self.unpin_outermost();
        // Nothing that refers to the pieces is left: it borrowed a guard.
        if self.due.get() & KEEPS_PIECES != 0 {
            self.due.set(self.due.get() & !KEEPS_PIECES);
            self.pieces.borrow_mut().clear();
        }
        // The next pin must not find them: what they say was valid under this one.
        self.forget_near();
        if self.due.get() >= FLUSH_LOOKUPS {
            self.flush_counters();
        }
    }

    #[inline]
    fn forget_near(&self) {
        if self.due.get() & KEEPS_NODES != 0 {
            self.due.set(self.due.get() & !KEEPS_NODES);
            self.near.clear();
        }
    }

    /// Forgets all nodes that this pin met: the next lookups begin at the root word.
    #[inline]
    pub(crate) fn forget_nodes(&self) {
        self.last_nodes.forget();
        self.forget_near();
    }

    #[inline]
    fn unpin_slot(&self) {
        epoch::unpin(&self.slot_word);
        // Relaxed, and no fence: a daemon that went to sleep in between looks again by itself shortly after.
        if self.writer_sleeps.load(Ordering::Relaxed) != 0 {
            self.wake_writer();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_writer(&self) {
        self.shared.ring_doorbell();
    }

    /// Makes sure that `len` bytes from `iova` are in the table with `access`, by asking the daemon for what is
    /// missing. Blocks: spins for up to a tenth of a millisecond while that pays, then sleeps; for a long range the
    /// same again before its end.
    /// Any length; asks for all that is missing at once.
    ///
    /// That all is there when this returns does not mean that it still is at the next pin: translate, and resolve again
    /// on a [`Fault::Miss`](crate::Fault::Miss).
    ///
    /// # Errors
    /// [`ResolveError::Pinned`] when the calling thread holds a pin on any device, or a guard of this reader was
    /// forgotten: what it waits for might wait for the pin.
    pub fn resolve(&mut self, iova: u64, len: u64, access: Access, timeout_ms: u32) -> Result<(), ResolveError> {
        let deadline = self.deadline(timeout_ms);
        miss::resolve(self, iova, len, access, deadline)
    }

    /// Asks for `len` bytes from `iova` without waiting; at most
    /// [`CELL_PAGES_MAX`](iotlb_proto::layout::worker::CELL_PAGES_MAX) pages. No system call when the daemon polls.
    ///
    /// A ticket that is dropped before it was answered only keeps its place until the answer has come.
    ///
    /// # Errors
    /// The range makes no sense, too many requests are outstanding, or the attachment is over.
    pub fn request(&mut self, iova: u64, len: u64, access: Access) -> Result<Ticket, RequestError> {
        Ticket::post(&self.shared, self.slot, iova, len, access)
    }

    /// As [`Reader::request`] for several ranges, each `(iova, len, access)`, with at most one wake-up of the daemon
    /// for all of them: it takes them up together, so they go out in one batch.
    ///
    /// The tickets come in the order of the ranges. They are fewer when cells run out.
    ///
    /// # Errors
    /// As [`Reader::request`], but for [`RequestError::Full`]. Nothing is left posted by the first range that makes no
    /// sense but what stood before it.
    pub fn request_all(
        &mut self,
        ranges: impl IntoIterator<Item = (u64, u64, Access)>,
    ) -> Result<Vec<Ticket>, RequestError> {
        Ticket::post_all(&self.shared, self.slot, ranges)
    }

    /// Sleeps until a request is answered; see [`Reader::poll`]. Who waits for several does so from the last one on:
    /// answers mostly come in order, so that one sleep is enough.
    ///
    /// # Errors
    /// [`ResolveError::TimedOut`] when the time is over, [`ResolveError::Pinned`] when the calling thread holds a pin,
    /// [`ResolveError::DaemonDead`] and [`ResolveError::Revoked`]. What the answer says is no error.
    pub fn wait(&mut self, ticket: &mut Ticket, timeout_ms: u32) -> Result<Answer, ResolveError> {
        let deadline = self.deadline(timeout_ms);
        if self.must_not_wait() {
            return Err(ResolveError::Pinned);
        }
        ticket.wait_with(&mut self.spin, deadline)
    }

    /// The answer to a request, if there is one yet; the same one again when asked again. Never blocks. After
    /// [`Answer::Resolved`] translate again: the table held the translation when the answer was given.
    pub fn poll(&mut self, ticket: &mut Ticket) -> Option<Answer> {
        ticket.take_answer()
    }

    /// Waits until this process has mapped all memory regions the table may point into: what to do after
    /// [`Fault::Remapping`](crate::Fault::Remapping). `false` when that did not happen in time, when the attachment is
    /// over, or when the calling thread holds a pin.
    pub fn wait_mapped(&mut self, timeout_ms: u32) -> bool {
        !self.must_not_wait() && self.shared.wait_mapped(self.deadline(timeout_ms)) == Ok(true)
    }

    /// Whether a wait might be for something that waits for a pin. A guard of this reader that was forgotten counts for
    /// the thread that pinned, which may be another one; the slot is pinned all the same.
    pub(crate) fn must_not_wait(&self) -> bool {
        thread_pins::count() != 0 || epoch::is_pinned(&self.slot_word)
    }

    /// Adds what this reader counted to the segment's counters now, instead of every thousand lookups or so. Before a
    /// thread goes idle, say.
    pub fn flush_counters(&self) {
        let (lookups, faults) = (self.due.get() & LOOKUPS, self.faults.replace(0));
        self.due.set(self.due.get() & !LOOKUPS);
        if lookups > 0 {
            let counters = &self.shared.segment.counters;
            // Relaxed: statistics.
            counters.lookups.fetch_add(lookups, Ordering::Relaxed);
            counters.hits.fetch_add(lookups.saturating_sub(faults), Ordering::Relaxed);
        }
    }

    fn deadline(&self, timeout_ms: u32) -> Instant {
        self.flush_counters();
        deadline_in(timeout_ms)
    }

    #[inline]
    pub(crate) fn count_lookups(&self, count: u64) {
        self.due.set(self.due.get().wrapping_add(count));
    }

    #[inline]
    pub(crate) fn count_fault(&self) {
        self.faults.set(self.faults.get().wrapping_add(1));
    }

    /// Keeps all but the first piece of a translation until the pin ends.
    pub(crate) fn keep_pieces<E>(&self, pieces: impl Iterator<Item = Result<Piece, E>>) -> Result<Option<Kept>, E> {
        self.due.set(self.due.get() | KEEPS_PIECES);
        // Borrowed nowhere else: the iterator translates and does not come here.
        self.pieces.borrow_mut().add(pieces)
    }

    pub(crate) fn kept_piece(&self, at: usize) -> Option<Piece> {
        self.pieces.borrow().get(at)
    }

    /// Where the arena is; for as long as the reader is there.
    #[inline(always)]
    pub(crate) fn arena(&self) -> Span {
        self.arena
    }

    /// The nodes that this pin looked into last.
    #[inline(always)]
    pub(crate) fn last_nodes(&self) -> &LastNodes {
        &self.last_nodes
    }

    /// The table's memory-map generation. Asked for *after* an entry was loaded: the entry points into regions of this
    /// generation or of older ones.
    #[inline(always)]
    pub(crate) fn map_generation(&self) -> u64 {
        // Acquire, after the acquire load of the entry. Its partner is the daemon's bump of the generation, which comes
        // before its release of the first entry into a new region: who sees the entry sees the generation.
        self.map_generation.load(Ordering::Acquire)
    }

    /// Whether an entry that was loaded *before* this is asked may point into regions that were not mapped when the pin
    /// began. What is mapped stays so for the length of the pin: the daemon says that a region goes when no pin can
    /// reach it any more.
    #[inline(always)]
    pub(crate) fn map_changed(&self) -> bool {
        self.map_generation() != self.complete_generation.get()
    }

    /// Nodes of the table that this pin met.
    #[inline(always)]
    pub(crate) fn near_nodes(&self) -> &NearNodes {
        &self.near
    }

    /// Keeps the node around `iova` until the pin ends. `false`: there is none of the usual kind.
    pub(crate) fn keep_near(&self, iova: u64) -> bool {
        let kept = self.shared.table.keep_near(&self.near, iova);
        if kept {
            self.due.set(self.due.get() | KEEPS_NODES);
        }
        kept
    }

    #[inline]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn spin(&mut self) -> &mut Spin {
        &mut self.spin
    }

    pub(crate) fn end_spin(&mut self) -> &mut Spin {
        &mut self.end_spin
    }

    pub(crate) fn slot(&self) -> usize {
        self.slot
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A forked child has not got the slot; its parent goes on with it.
        if !self.shared.is_ours() {
            return;
        }
        if epoch::is_pinned(&self.slot_word) {
            // A guard was forgotten. Nothing it yielded can be reached any more, since all of it borrowed this reader.
            self.unpin_slot();
        }
        self.flush_counters();
        self.shared.slots.give_back(self.slot);
    }
}
