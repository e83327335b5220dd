//! The pages that a waiter still lacks.

use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SHIFT, PAGE_SIZE};
use iotlb_proto::layout::worker::CELL_PAGES_MAX;

/// A set of pages of one range, a bit for each.
#[derive(Debug)]
pub(super) struct OpenPages {
    /// The range's first page.
    first: u64,
    bits: u32,
}

const _: () = assert!(CELL_PAGES_MAX <= u32::BITS as u64, "a request has a bit for each of its pages");

impl OpenPages {
    /// None yet of the pages of `range`, which has at most [`CELL_PAGES_MAX`].
    pub(super) fn none_of(range: IovaRange) -> OpenPages {
        OpenPages { first: range.first() & !PAGE_MASK, bits: 0 }
    }

    /// Adds a page. `false` if it was there already, or is none of the range's.
    pub(super) fn insert(&mut self, page: u64) -> bool {
        let bit = self.bit(page);
        let is_new = bit & !self.bits != 0;
        self.bits |= bit;
        is_new
    }

    /// Takes a page out.
    pub(super) fn remove(&mut self, page: u64) {
        self.bits &= !self.bit(page);
    }

    /// Whether nothing is lacking.
    pub(super) fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// The first bytes of the pages.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + use<> {
        let (first, bits) = (self.first, self.bits);
        // A page was inserted at that address, so the sum does not wrap.
        (0..u32::BITS).filter(move |n| bits >> n & 1 != 0).map(move |n| first + u64::from(n) * PAGE_SIZE)
    }

    /// 0 for a page that is none of the range's.
    fn bit(&self, page: u64) -> u32 {
        let number = page.wrapping_sub(self.first) >> PAGE_SHIFT;
        u32::try_from(number).ok().and_then(|number| 1_u32.checked_shl(number)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_counts_once_up_to_the_end_of_the_space() {
        let last = u64::MAX - PAGE_MASK;
        for first in [0, 5 * PAGE_SIZE, last - (CELL_PAGES_MAX - 1) * PAGE_SIZE] {
            let range = IovaRange::from_len(first + 7, CELL_PAGES_MAX * PAGE_SIZE - 7).expect("a range");
            let mut open = OpenPages::none_of(range);
            assert!(open.is_empty());
            let pages: Vec<u64> = (0..CELL_PAGES_MAX).map(|n| first + n * PAGE_SIZE).collect();
            assert!(pages.iter().rev().all(|page| open.insert(*page)));
            assert!(pages.iter().all(|page| !open.insert(*page)));
            assert_eq!(open.iter().collect::<Vec<_>>(), pages);
            open.remove(pages[3]);
            assert!(!open.is_empty() && !open.iter().any(|page| page == pages[3]));
            pages.iter().for_each(|page| open.remove(*page));
            assert!(open.is_empty());
        }
    }

    #[test]
    fn pages_outside_are_not_counted() {
        let mut open = OpenPages::none_of(IovaRange::page_of(64 * PAGE_SIZE));
        for page in [0, 63 * PAGE_SIZE, (64 + 32) * PAGE_SIZE, u64::MAX - PAGE_MASK] {
            assert!(!open.insert(page), "{page:#x}");
            open.remove(page);
        }
        assert!(open.is_empty() && open.insert(64 * PAGE_SIZE));
    }
}
