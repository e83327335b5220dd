//! What each UPDATE covered.
//!
//! An INVALIDATE may name a part of what an UPDATE brought, and means all of it: a translation is one thing for whoever
//! made it, and hardware, Linux's vhost and DPDK drop each that an invalidation touches. QEMU's SMMUv3 counts on that.
//! It hands out a block of 2 MiB as one UPDATE, and where the guest's driver ends the block with one command of unknown
//! granule, it sends an INVALIDATE of 4 KiB.
//!
//! The tree does not know any more what belonged together: a block may have been split, by the border of two memory
//! regions or by an UPDATE inside it. So the ranges of all UPDATEs that reach beyond one page are kept here, and an
//! invalidation is widened to those that it touches. Pages need no record, since invalidations are of whole pages.
//!
//! More may go than was asked for, never less. That allows two simplifications. Ranges that overlap become one; and
//! when there are too many, each becomes one with its neighbour and what lies between them.

use std::collections::BTreeMap;

use iotlb_proto::iova::IovaRange;

/// Most ranges that are kept: the 2 MiB pages of 32 GiB. They take half a MiB, and to join them in pairs some hundred
/// microseconds, which nobody should have to wait for more often.
const EXTENTS_MAX: usize = 1 << 14;

/// Ranges of UPDATEs, none of which overlap: last addresses by the first ones.
#[derive(Debug, Default)]
pub(super) struct Extents {
    ranges: BTreeMap<u64, u64>,
}

impl Extents {
    /// An UPDATE of `range` comes.
    pub(super) fn add(&mut self, range: IovaRange) {
        if IovaRange::page_of(range.first()).covers(range) {
            return;
        }
        let whole = self.take(range);
        self.ranges.insert(whole.first(), whole.last());
        if self.ranges.len() > EXTENTS_MAX {
            self.coarsen();
        }
    }

    /// What an INVALIDATE of `range` takes. The ranges that it touches are forgotten.
    pub(super) fn widen(&mut self, range: IovaRange) -> IovaRange {
        self.take(range.page_aligned())
    }

    /// Nothing is translated any more.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Takes out all that `range` touches; returns it with them.
    fn take(&mut self, range: IovaRange) -> IovaRange {
        let mut whole = range;
        if self.ranges.last_key_value().is_some_and(|(_, last)| *last <= range.last()) {
            // As the flushes of a lazy guest. To take thousands one by one would be milliseconds.
            drop(self.ranges.split_off(&range.first()));
        }
        // From the highest down: where one does not reach into `range`, those below do not either.
        while let Some((&first, &last)) = self.ranges.range(..=range.last()).next_back()
            && last >= range.first()
        {
            self.ranges.remove(&first);
            whole = IovaRange::new(whole.first().min(first), whole.last().max(last)).unwrap_or(whole);
        }
        whole
    }

    /// Makes each two neighbours one.
    fn coarsen(&mut self) {
        let mut all = std::mem::take(&mut self.ranges).into_iter();
        while let Some((first, last)) = all.next() {
            self.ranges.insert(first, all.next().map_or(last, |(_, last)| last));
        }
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::iova::{PAGE_MASK, PAGE_SIZE};
    use proptest::prelude::*;

    use super::*;

    fn pages(first: u64, count: u64) -> IovaRange {
        IovaRange::from_len(first * PAGE_SIZE, count * PAGE_SIZE).expect("a range")
    }

    #[test]
    fn a_part_stands_for_all_and_only_once() {
        let mut extents = Extents::default();
        extents.add(pages(512, 512));
        extents.add(pages(1024, 512));
        assert_eq!(extents.widen(pages(511, 1)), pages(511, 1));
        assert_eq!(extents.widen(pages(1024, 1)), pages(1024, 512));
        assert_eq!(extents.widen(pages(1024, 1)), pages(1024, 1));
        assert_eq!(extents.widen(pages(1023, 5)), pages(512, 516));
        assert!(extents.ranges.is_empty());
    }

    #[test]
    fn pages_are_not_kept_and_go_as_a_whole() {
        let mut extents = Extents::default();
        extents.add(pages(7, 1));
        extents.add(IovaRange::from_len(7 * PAGE_SIZE + 100, 50).expect("a range"));
        assert!(extents.ranges.is_empty());
        assert_eq!(extents.widen(IovaRange::from_len(7 * PAGE_SIZE + 10, 1).expect("a range")), pages(7, 1));
        let last = IovaRange::new(u64::MAX - 1, u64::MAX).expect("a range");
        extents.add(last);
        assert_eq!(extents.widen(last), IovaRange::page_of(u64::MAX));
        extents.add(IovaRange::new(7 * PAGE_SIZE + PAGE_MASK, 8 * PAGE_SIZE).expect("a range"));
        assert_eq!(extents.widen(pages(8, 1)).first(), 7 * PAGE_SIZE + PAGE_MASK);
    }

    #[test]
    fn a_flush_takes_all_and_what_reaches_into_it() {
        let mut extents = Extents::default();
        (0..1000).for_each(|n| extents.add(pages(3 * n, 2)));
        assert_eq!(extents.widen(pages(1501, 9000)), pages(1500, 9001));
        assert_eq!(extents.ranges.len(), 500);
        assert_eq!(extents.widen(pages(0, 1400)), pages(0, 1400));
        assert_eq!(extents.ranges.len(), 33);
        assert_eq!(extents.widen(IovaRange::ALL), IovaRange::ALL);
        assert!(extents.ranges.is_empty());
    }

    #[test]
    fn too_many_are_joined_and_none_is_lost() {
        let mut extents = Extents::default();
        let count = EXTENTS_MAX as u64 * 2 + 1;
        (0..count).for_each(|n| extents.add(pages(3 * n, 2)));
        assert!(extents.ranges.len() <= EXTENTS_MAX);
        for n in 0..count {
            let below = extents.ranges.range(..=pages(3 * n, 2).first()).next_back();
            assert!(below.is_some_and(|(_, last)| *last >= pages(3 * n, 2).last()), "{n}");
        }
        extents.clear();
        assert_eq!(extents.widen(pages(0, 1)), pages(0, 1));
    }

    proptest! {
        /// Against the plain list of all that were added.
        #[test]
        fn whatever_touches_goes(
            added in prop::collection::vec((0_u64..200, 1_u64..20), 0..40),
            asked in prop::collection::vec((0_u64..200, 1_u64..20), 1..10),
        ) {
            let mut extents = Extents::default();
            let mut plain: Vec<IovaRange> = Vec::new();
            for (first, count) in added {
                extents.add(pages(first, count));
                plain.push(pages(first, count));
            }
            for (first, count) in asked {
                let range = pages(first, count);
                let whole = extents.widen(range);
                prop_assert!(whole.covers(range));
                plain.retain(|extent| {
                    assert!(!extent.overlaps(range) || whole.covers(*extent), "{extent} touched by {range}");
                    !extent.overlaps(whole)
                });
                let mut at = None;
                for (first, last) in &extents.ranges {
                    prop_assert!(first < last && at.is_none_or(|at| at < *first), "apart and in order");
                    at = Some(*last);
                }
            }
        }
    }
}
