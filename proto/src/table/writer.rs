//! The daemon's side of a table.

#[cfg(not(loom))]
use std::os::fd::OwnedFd;

#[cfg(not(loom))]
use super::TableError;
use super::side::SideRanges;
use super::{QueueRecord, TableMemory, Translation};
use crate::access::Access;
use crate::epoch::Grace;
use crate::iova::{IovaRange, PAGE_MASK, PAGE_SIZE};
use crate::layout::table::FLAG_RUNNING;
use crate::sync::{AtomicU64, Ordering, full_fence};
use crate::tree::{Budget, SLICE_WORDS, TargetRemoval, Tree};

/// Targets stay below this, so that side ranges can keep permissions in the same word.
pub const TARGET_LIMIT: u64 = 1 << 56;

/// When the table is full, this part of its nodes is emptied at once, so that not every insert waits for a grace
/// period.
const EVICT_FRACTION: usize = 64;

/// And never more than that, so that an insert into a large table is no longer than one into a small one.
const EVICT_NODES_MAX: usize = 512;

/// Leaves that are compared before an insert to see whether it says anything new. More are replaced unseen, by fewer
/// and larger ones: a front-end that names a million leaves again and again would hold up other devices. An identity
/// map of 512 GiB in superpages is this many.
const SAME_LEAVES_MAX: usize = 512;

/// How large a table is.
#[derive(Clone, Copy, Debug)]
pub struct TableConfig {
    /// Most bytes the whole segment may take.
    pub size: u64,
    /// Generation of the daemon, for the identity.
    pub generation: u64,
}

/// No free node or side copy: complete a grace period, report it with [`TableWriter::grace_completed`], and try again.
/// The writer has already unlinked enough that the next try finds room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the table needs a grace period before it can take this entry")]
pub struct NeedsGrace;

/// Figures for status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Leaves in the tree and byte-granular ranges. Those of a large removal count until [`TableWriter::tidy`] came by.
    pub entries: u64,
    /// Nodes readers can reach, and those that `tidy` has not put away yet.
    pub nodes_used: u64,
    /// Nodes that wait for a grace period.
    pub nodes_retired: u64,
    /// All nodes.
    pub nodes_total: u64,
    /// Leaves dropped to make room, since the start.
    pub evictions: u64,
}

/// The only writer of a table.
///
/// No call does more than a slice of work ([`SLICE_WORDS`]), whatever the table holds. What is more than that is done
/// by further calls: of [`TableWriter::remove_targets`] until the removal is done, of [`TableWriter::tidy`] whenever
/// there is time.
#[derive(Debug)]
pub struct TableWriter {
    memory: TableMemory,
    tree: Tree,
    side: SideRanges,
    grace: Grace,
    evictions: u64,
    slice_words: usize,
}

impl TableWriter {
    /// Creates the segment, maps it and seals it; returns the descriptor to hand to workers.
    ///
    /// # Errors
    /// The size is out of range, or the system has no memory or descriptors.
    #[cfg(not(loom))]
    pub fn create(config: &TableConfig) -> Result<(TableWriter, OwnedFd), TableError> {
        let (memory, fd) = TableMemory::create(config.size, config.generation)?;
        Ok((TableWriter::over(memory), fd))
    }

    /// The writer of a table that was never written.
    #[must_use]
    pub fn over(memory: TableMemory) -> TableWriter {
        let grace = Grace::default();
        memory.header().epoch.word.store(crate::epoch::grace::FIRST_EPOCH, Ordering::Relaxed);
        let nodes = u32::try_from(memory.nodes().len()).unwrap_or(u32::MAX);
        TableWriter {
            memory,
            tree: Tree::new(nodes),
            side: SideRanges::new(),
            grace,
            evictions: 0,
            slice_words: SLICE_WORDS,
        }
    }

    /// Sets how many words a slice has, for tests: with a few, small tables need many slices.
    pub fn set_slice_words(&mut self, words: usize) {
        self.slice_words = words;
    }

    /// Publishes `range -> target` (arena offset of the first byte; the range must end below [`TARGET_LIMIT`] there),
    /// replacing whatever overlapped. When all of it is translated so already, in a moderate number of leaves, nothing
    /// changes. A narrower access than before is a take like any other; a wider one is none where a leaf stays the same
    /// leaf.
    ///
    /// # Errors
    /// [`NeedsGrace`]: nothing of the new translation was published.
    pub fn insert(&mut self, range: IovaRange, target: u64, access: Access) -> Result<(), NeedsGrace> {
        let fits = target.checked_add(range.len_minus_one()).is_some_and(|last| last < TARGET_LIMIT);
        let aligned = (range.first() | target) & PAGE_MASK == 0;
        if aligned
            && fits
            && !access.is_none()
            && self.side.is_empty()
            && let Some(edit) = self.tree.insert_page(self.memory.tree(), range, target, access)
        {
            self.note(edit.unlinked);
            return Ok(());
        }
        if self.is_translated(range, target, access) {
            return Ok(());
        }
        if !fits || access.is_none() {
            // Nothing the table could hold; a cache may forget, but must not keep what is no longer true.
            self.remove(range);
            return Ok(());
        }
        let (pages, pieces) = split(range, target, access);
        let needs_side = !pieces.is_empty() || self.side.overlaps(range);
        if needs_side && !self.side.has_free_copy(&self.grace) {
            return Err(NeedsGrace);
        }
        if let Some(pages) = pages {
            self.reserve(pages.last(), pieces.len())?;
        }
        let mut unlinked = 0;
        let stamp = self.grace.stamp();
        for piece in &pieces {
            // A leaf would hide the piece from readers: they ask the side array last.
            if let Some(range) = IovaRange::new(piece.first, piece.last) {
                unlinked += self.tree.remove(self.memory.tree(), stamp, range).unlinked;
            }
        }
        if needs_side {
            // Also what the pages replace: it would come to light again when they are removed.
            let word = &self.memory.header().roots.side;
            unlinked += self.side.replace(word, self.memory.side(), &self.grace, range, &pieces).max(1);
        }
        if let Some(pages) = pages {
            let target = target + (pages.first() - range.first());
            match self.tree.insert(self.memory.tree(), stamp, pages, target, access) {
                Ok(edit) => unlinked += edit.unlinked,
                Err(crate::tree::NeedsNodes) => {
                    // `reserve` saw to it; should it be wrong, the old translation must go all the same.
                    debug_assert!(false, "reserve counts every node that an insert can take");
                    unlinked += self.tree.remove(self.memory.tree(), stamp, pages).unlinked;
                }
            }
        }
        self.note(unlinked);
        Ok(())
    }

    /// Removes at least `range`, all at once however much that is. Returns how many leaves and ranges were removed or
    /// cut, where a subtree that goes as a whole counts as the entries of its topmost node. Never needs memory.
    pub fn remove(&mut self, range: IovaRange) -> u64 {
        if range.first() & PAGE_MASK == 0
            && self.side.is_empty()
            && let Some(edit) = self.tree.remove_page(self.memory.tree(), &self.memory.header().epoch.word, range)
        {
            self.note(edit.unlinked);
            return edit.unlinked;
        }
        let stamp = self.grace.stamp();
        let mut unlinked = self.tree.remove(self.memory.tree(), stamp, range).unlinked;
        unlinked += self.side.remove(&self.memory.header().roots.side, self.memory.side(), &self.grace, range);
        self.note(unlinked);
        unlinked
    }

    /// Removes everything; returns what [`TableWriter::remove`] does.
    pub fn clear(&mut self) -> u64 {
        self.remove(IovaRange::ALL)
    }

    /// Goes on with the removal of every leaf and range whose target (an arena offset) is one of those, for one slice;
    /// returns how many it removed. Only when the removal is done is there nothing left. What is inserted between two
    /// slices may stay, so nothing that leads there may be.
    pub fn remove_targets(&mut self, removal: &mut TargetRemoval) -> u64 {
        if removal.is_done() {
            return 0;
        }
        let stamp = self.grace.stamp();
        let mut budget = Budget::new(self.slice_words);
        let mut unlinked = self.tree.remove_targets(self.memory.tree(), stamp, removal, &mut budget).unlinked;
        if removal.is_done() {
            let word = &self.memory.header().roots.side;
            unlinked += self.side.remove_targets(word, self.memory.side(), &self.grace, removal.targets());
        }
        self.note(unlinked);
        unlinked
    }

    /// Does a slice of what removals left for later: finds the nodes of what was taken off, frees those that readers
    /// can no longer reach. Returns whether more is left. Nothing waits for it: an insert that finds no room does of it
    /// what it needs.
    pub fn tidy(&mut self) -> bool {
        self.tree.tidy(self.memory.tree(), &self.grace, &mut Budget::new(self.slice_words));
        !self.is_tidy()
    }

    /// Whether there is nothing for [`TableWriter::tidy`] to do.
    #[must_use]
    pub fn is_tidy(&self) -> bool {
        self.tree.is_tidy(&self.grace)
    }

    /// The leaf or range around `iova`, as a reader sees it.
    #[must_use]
    pub fn lookup(&self, iova: u64) -> Option<Translation> {
        self.memory.lookup(iova)
    }

    /// All leaves in order of address, then all byte-granular ranges in order of address.
    pub fn for_each(&self, mut each: impl FnMut(Translation)) {
        self.tree.for_each(self.memory.tree(), &mut each);
        self.side.iter().for_each(|range| each(*range));
    }

    /// Whether a take may be acknowledged now: a grace period that began after the last unlink has completed, or
    /// nothing was ever unlinked.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.grace.is_quiet()
    }

    /// Makes sure that a grace period is under way which covers everything unlinked so far; returns the epoch every
    /// slot must have reached (or be 0). `None`: all is quiet.
    pub fn begin_grace(&mut self) -> Option<u64> {
        self.grace.begin(&self.memory.header().epoch.word)
    }

    /// The edge saw every slot of every worker at 0 or at least `epoch`. Frees what was retired before, as
    /// [`TableWriter::tidy`] does.
    pub fn grace_completed(&mut self, epoch: u64) {
        self.grace.complete(epoch);
        self.tidy();
    }

    /// Counts as an unlink without touching a translation: a ring was stopped, a region is to go, the log was switched.
    pub fn note_taken(&mut self) {
        self.note(1);
    }

    /// Starts a new session: what workers keep of the former one is void. Returns its generation.
    pub fn bump_session(&mut self) -> u64 {
        bump(&self.memory.header().state.session_generation)
    }

    /// Bumps the memory-map generation and returns it. To be called before entries into a new region are published.
    pub fn bump_memory_map(&mut self) -> u64 {
        bump(&self.memory.header().state.memory_map_generation)
    }

    /// Publishes a queue's record and bumps the queue generation. An index past the capacity is ignored.
    pub fn publish_queue(&mut self, index: u16, record: &QueueRecord) {
        if let Some(words) = self.memory.queues().get(usize::from(index)) {
            record.store(words);
            bump(&self.memory.header().state.queue_generation);
        }
    }

    /// Publishes the virtio features the driver acknowledged.
    pub fn set_acked_features(&mut self, features: u64) {
        // Release pairs with the reader's acquire load under its pin.
        self.memory.header().state.acked_features.store(features, Ordering::Release);
    }

    /// Whether a front-end is connected and its session may be served.
    pub fn set_running(&mut self, running: bool) {
        self.memory.header().state.flags.store(if running { FLAG_RUNNING } else { 0 }, Ordering::Release);
    }

    /// Whether workers ring their doorbells when they post a miss. After switching it on, look at all posted bitmaps
    /// once more before going to sleep.
    pub fn set_doorbell_wanted(&self, wanted: bool) {
        self.memory.header().wake.doorbell_wanted.store(u64::from(wanted), Ordering::Relaxed);
        // Partner: the fence in `WorkerSegment::mark_posted`. Either the worker sees the flag, or the daemon the bit.
        full_fence();
    }

    /// Whether readers ring their doorbells when they unpin. A reader that unpins just then may miss the flag (it has
    /// no fence there), so the daemon sleeps with a short time-out all the same.
    pub fn set_writer_sleeps(&self, sleeps: bool) {
        self.memory.header().wake.writer_sleeps.store(u64::from(sleeps), Ordering::Relaxed);
        full_fence();
    }

    /// Figures.
    #[must_use]
    pub fn stats(&self) -> TableStats {
        let (free, retired, total) = self.tree.nodes();
        TableStats {
            entries: self.tree.leaves() + self.side.len() as u64,
            nodes_used: (total - free - retired) as u64,
            nodes_retired: retired as u64,
            nodes_total: total as u64,
            evictions: self.evictions,
        }
    }

    /// The memory, for readers in the same process (models and tests).
    #[must_use]
    pub fn memory(&self) -> &TableMemory {
        &self.memory
    }

    /// Makes sure that an insert up to `last` finds its nodes after `cuts` pages were removed.
    fn reserve(&mut self, last: u64, cuts: usize) -> Result<(), NeedsGrace> {
        let needed = self.tree.nodes_needed(self.memory.tree(), last, cuts);
        let (mut free, mut retired, total) = self.tree.nodes();
        let wanted = (needed + (total / EVICT_FRACTION).min(EVICT_NODES_MAX)).min(total);
        // What was removed already makes room first. Two slices of the usual size are enough.
        while free < needed
            && (self.tree.has_reclaimable(&self.grace) || free + retired < wanted && self.tree.has_detached())
        {
            self.tidy();
            (free, retired, _) = self.tree.nodes();
        }
        if free >= needed {
            return Ok(());
        }
        let gone = self.tree.evict(self.memory.tree(), self.grace.stamp(), wanted).unlinked;
        self.evictions += gone;
        self.note(gone);
        Err(NeedsGrace)
    }

    /// Whether all of `range` already leads to `target` with just this access, in no more than [`SAME_LEAVES_MAX`]
    /// leaves.
    fn is_translated(&self, range: IovaRange, target: u64, access: Access) -> bool {
        let mut at = range.first();
        for _ in 0..SAME_LEAVES_MAX {
            match self.lookup(at) {
                Some(found) => {
                    let expected = target.wrapping_add(at - range.first());
                    if found.address(at) != expected || found.access != access {
                        return false;
                    }
                    if found.last >= range.last() {
                        return true;
                    }
                    at = found.last + 1;
                }
                None => return false,
            }
        }
        false
    }

    /// After stores that took something away: the removal generation goes up before the epoch does.
    fn note(&mut self, unlinked: u64) {
        if unlinked > 0 {
            self.grace.unlinked();
            bump(&self.memory.header().epoch.removal_generation);
        }
    }
}

/// Adds one to a generation, which nobody else writes.
fn bump(generation: &AtomicU64) -> u64 {
    let next = generation.load(Ordering::Relaxed) + 1;
    // Release pairs with the reader's acquire load under its pin: what was stored before the bump comes with it.
    generation.store(next, Ordering::Release);
    next
}

/// The whole pages of a translation, and the pieces at its edges that fill none. Where the target is not aligned like
/// the address, no page of the tree can hold any of it, and all of it is one piece.
fn split(range: IovaRange, target: u64, access: Access) -> (Option<IovaRange>, Vec<Translation>) {
    let (first, last) = (range.first(), range.last());
    let piece = |first: u64, last: u64| Translation { first, last, target: target + (first - range.first()), access };
    if (first ^ target) & PAGE_MASK != 0 {
        return (None, vec![piece(first, last)]);
    }
    // First address of the first whole page, last address of the last one.
    let pages_first = first.checked_add(PAGE_MASK).map(|up| up & !PAGE_MASK);
    let pages_last = if last & PAGE_MASK == PAGE_MASK { Some(last) } else { (last & !PAGE_MASK).checked_sub(1) };
    let pages = pages_first.zip(pages_last).and_then(|(first, last)| IovaRange::new(first, last));
    let Some(pages) = pages else { return (None, vec![piece(first, last)]) };
    let mut pieces = Vec::new();
    if first < pages.first() {
        pieces.push(piece(first, pages.first() - 1));
    }
    if pages.last() < last {
        pieces.push(piece(pages.last() + 1, last));
    }
    debug_assert!((pages.first() | pages.last().wrapping_add(1)) % PAGE_SIZE == 0);
    (Some(pages), pieces)
}
