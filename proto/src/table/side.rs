//! The side array: byte-granular ranges that do not fit the tree's pages.
//!
//! The protocol allows translations of any size and alignment. What covers whole pages is in the tree; the rest, which
//! no front-end of today sends, is a small sorted array, looked at only after the tree had nothing. It is copied on
//! write between a few copies: a new array is written into a free copy and published by one store of the word `copy
//! index << 32 | count`, and the copy it replaces is free again after a grace period.
//!
//! Removal must not wait for a free copy. A range can be ended in place: its target word becomes 0, one store, and
//! readers skip it. Then the whole range goes, where a new copy would have kept the parts that were not asked for.

use std::ops::RangeInclusive;

use crate::access::Access;
use crate::epoch::{Grace, Stamp};
use crate::iova::IovaRange;
use crate::layout::table::{SIDE_CAPACITY, SIDE_COPIES, SideCopy};
use crate::sync::{AtomicU64, Ordering};
use crate::table::Translation;

const ACCESS_BITS: u32 = 2;
const ACCESS_MASK: u64 = 3;

/// Number of ranges a published word speaks of.
#[inline]
#[must_use]
pub const fn count(word: u64) -> usize {
    // Masked to 32 bits.
    #[allow(clippy::cast_possible_truncation)]
    {
        (word & 0xffff_ffff) as usize
    }
}

const fn copy_index(word: u64) -> usize {
    // 32 bits.
    #[allow(clippy::cast_possible_truncation)]
    {
        (word >> 32) as usize
    }
}

/// Reader: the range around `iova`.
#[must_use]
pub fn lookup(word: u64, copies: &[SideCopy], iova: u64) -> Option<Translation> {
    let live = copies.get(copy_index(word))?.entries.get(..count(word))?;
    // Relaxed: `first` and `last` were stored before the word that was loaded with acquire.
    let at = live.partition_point(|entry| entry.last.load(Ordering::Relaxed) < iova);
    let entry = live.get(at)?;
    let first = entry.first.load(Ordering::Relaxed);
    let last = entry.last.load(Ordering::Relaxed);
    // A target that turns 0 in place is a removal; either value is right until the grace period.
    let target = entry.target.load(Ordering::Relaxed);
    let access = Access::from_bits((target & ACCESS_MASK).to_le_bytes()[0])?;
    if access.is_none() || iova < first {
        return None;
    }
    Some(Translation { first, last, target: target >> ACCESS_BITS, access })
}

/// The writer's knowledge of the array.
#[derive(Debug)]
pub(super) struct SideRanges {
    /// As published, in order, with ended ranges (no access) still in their places.
    ranges: Vec<Translation>,
    live: usize,
    /// When each copy was replaced; `None`: free since long.
    replaced: [Option<Stamp>; SIDE_COPIES],
}

impl SideRanges {
    pub(super) fn new() -> SideRanges {
        SideRanges { ranges: Vec::new(), live: 0, replaced: [None; SIDE_COPIES] }
    }

    pub(super) fn len(&self) -> usize {
        self.ranges.iter().filter(|range| !range.access.is_none()).count()
    }

    /// Whether nothing was published that is still there, ended ranges included.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Translation> {
        self.ranges.iter().filter(|range| !range.access.is_none())
    }

    pub(super) fn overlaps(&self, range: IovaRange) -> bool {
        self.iter().any(|old| old.first <= range.last() && range.first() <= old.last)
    }

    /// Whether [`SideRanges::replace`] can publish now.
    pub(super) fn has_free_copy(&self, grace: &Grace) -> bool {
        self.free_copy(grace).is_some()
    }

    fn free_copy(&self, grace: &Grace) -> Option<usize> {
        (0..SIDE_COPIES)
            .find(|&copy| copy != self.live && self.replaced[copy].is_none_or(|stamp| grace.has_passed(stamp)))
    }

    /// Takes `range` out and puts `added` in (inside `range`, in order, not overlapping), in one publication. Needs a
    /// free copy. Returns how many ranges were cut, replaced or pushed out.
    pub(super) fn replace(
        &mut self,
        word: &AtomicU64,
        copies: &[SideCopy],
        grace: &Grace,
        range: IovaRange,
        added: &[Translation],
    ) -> u64 {
        let mut unlinked = 0;
        let mut next = Vec::with_capacity(self.ranges.len() + added.len() + 1);
        for old in self.ranges.iter().filter(|old| !old.access.is_none()) {
            if range.last() < old.first || old.last < range.first() {
                next.push(*old);
                continue;
            }
            unlinked += 1;
            if old.first < range.first() {
                next.push(Translation { last: range.first() - 1, ..*old });
            }
            if range.last() < old.last {
                let first = range.last() + 1;
                next.push(Translation { first, target: old.address(first), ..*old });
            }
        }
        next.extend_from_slice(added);
        next.sort_by_key(|entry| entry.first);
        // Full: the lowest ranges that were not asked for just now go. This is a cache.
        while next.len() > SIDE_CAPACITY {
            let victim = next.iter().position(|entry| !added.contains(entry)).unwrap_or(0);
            next.remove(victim);
            unlinked += 1;
        }
        self.publish(word, copies, grace, next);
        unlinked
    }

    /// Ends every range that `range` touches, in place when no copy is free. Returns how many were cut or ended.
    pub(super) fn remove(&mut self, word: &AtomicU64, copies: &[SideCopy], grace: &Grace, range: IovaRange) -> u64 {
        if !self.overlaps(range) {
            return 0;
        }
        if self.has_free_copy(grace) {
            return self.replace(word, copies, grace, range, &[]);
        }
        self.end_in_place(copies, |old| old.first <= range.last() && range.first() <= old.last)
    }

    /// Ends every range whose target overlaps `targets`, as a whole. Returns how many that were.
    pub(super) fn remove_targets(
        &mut self,
        word: &AtomicU64,
        copies: &[SideCopy],
        grace: &Grace,
        targets: &RangeInclusive<u64>,
    ) -> u64 {
        let goes = |old: &Translation| {
            old.target <= *targets.end() && *targets.start() <= old.target.saturating_add(old.last - old.first)
        };
        let doomed = self.iter().filter(|old| goes(old)).count();
        if doomed > 0 && self.has_free_copy(grace) {
            let next = self.iter().filter(|old| !goes(old)).copied().collect();
            self.publish(word, copies, grace, next);
            return doomed as u64;
        }
        self.end_in_place(copies, goes)
    }

    /// Ends ranges where they are; returns how many.
    fn end_in_place(&mut self, copies: &[SideCopy], ends: impl Fn(&Translation) -> bool) -> u64 {
        let mut ended = 0;
        for (old, entry) in self.ranges.iter_mut().zip(&copies[self.live].entries) {
            if !old.access.is_none() && ends(old) {
                old.access = Access::NONE;
                // Release pairs with nothing a reader could miss: either value is right until the grace period.
                entry.target.store(0, Ordering::Release);
                ended += 1;
            }
        }
        ended
    }

    fn publish(&mut self, word: &AtomicU64, copies: &[SideCopy], grace: &Grace, next: Vec<Translation>) {
        let Some(copy) = self.free_copy(grace) else {
            debug_assert!(false, "replace needs a free copy");
            return;
        };
        for (entry, range) in copies[copy].entries.iter().zip(&next) {
            entry.first.store(range.first, Ordering::Relaxed);
            entry.last.store(range.last, Ordering::Relaxed);
            entry.target.store(range.target << ACCESS_BITS | u64::from(range.access.bits()), Ordering::Relaxed);
        }
        // Release pairs with the acquire load in `TableMemory::lookup_side`: the copy is complete.
        word.store((copy as u64) << 32 | next.len() as u64, Ordering::Release);
        self.replaced[self.live] = Some(grace.stamp());
        self.replaced[copy] = None;
        self.live = copy;
        self.ranges = next;
    }
}
