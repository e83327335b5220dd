//! Pages that somebody waits for.
//!
//! A hash map, since nearly every UPDATE is one page: from the request to the answer each is entered, looked up three
//! times and taken out. What goes through all of them is rare, and in order of address, so that a run can be repeated.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::RandomState;
use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SIZE};

use super::crowd::Crowd;
use super::turns::Place;

/// Room that stays when nobody waits any more, in pages: some bursts of a worker, 45 KiB. More goes back, or one great
/// burst would be paid for as long as the device lives.
const ROOM_KEPT: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waits for its turn.
    Queued(Place),
    /// The message with this number is out.
    Sent { number: u64 },
}

#[derive(Debug)]
pub(super) struct PageMiss {
    pub(super) state: State,
    /// Ask for one waiter's access at a time: asked together they were refused.
    pub(super) apart: bool,
    pub(super) waiters: Crowd,
}

/// All of them, by the page's first address.
///
/// Workers choose the addresses, so the hash has a seed of this process. How many pages there are is bounded by the
/// workers' cells.
#[derive(Debug, Default)]
pub(super) struct PageMisses {
    pages: HashMap<u64, PageMiss, RandomState>,
}

impl PageMisses {
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    pub(super) fn get(&self, page: u64) -> Option<&PageMiss> {
        self.pages.get(&page)
    }

    pub(super) fn get_mut(&mut self, page: u64) -> Option<&mut PageMiss> {
        self.pages.get_mut(&page)
    }

    pub(super) fn entry(&mut self, page: u64) -> Entry<'_, u64, PageMiss> {
        self.pages.entry(page)
    }

    pub(super) fn remove(&mut self, page: u64) -> Option<PageMiss> {
        self.pages.remove(&page)
    }

    /// Pages were removed: gives back room that nobody needs.
    pub(super) fn tidy(&mut self) {
        if self.pages.is_empty() && self.pages.capacity() > ROOM_KEPT {
            self.pages.shrink_to(0);
        }
    }

    /// Those that `range` touches, in order of address.
    pub(super) fn touched(&self, range: IovaRange) -> Vec<u64> {
        let first = range.first() & !PAGE_MASK;
        let count = (range.last() - first) / PAGE_SIZE;
        if count < self.pages.len() as u64 {
            let all = (0..=count).map(|n| first + n * PAGE_SIZE);
            return all.filter(|page| self.pages.contains_key(page)).collect();
        }
        self.sorted(|page, _| (first..=range.last()).contains(&page))
    }

    /// Those whose message is out, in order of address.
    pub(super) fn sent(&self) -> Vec<u64> {
        self.sorted(|_, miss| matches!(miss.state, State::Sent { .. }))
    }

    fn sorted(&self, wanted: impl Fn(u64, &PageMiss) -> bool) -> Vec<u64> {
        let mut pages: Vec<u64> =
            self.pages.iter().filter(|(page, miss)| wanted(**page, miss)).map(|(page, _)| *page).collect();
        pages.sort_unstable();
        pages
    }
}

#[cfg(test)]
impl PageMisses {
    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&u64, &PageMiss)> {
        self.pages.iter()
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::access::Access;

    use super::super::crowd::Interest;
    use super::*;

    fn wanted(number: u64) -> PageMiss {
        let access = Access::READ;
        let interest = Interest { waiter: 0, owner: None, joined: 0, access, denials: 0, attempts: 0 };
        PageMiss { state: State::Sent { number }, apart: false, waiters: Crowd::of(interest) }
    }

    #[test]
    fn the_room_of_a_great_burst_goes_back() {
        let mut pages = PageMisses::default();
        for count in [100, 10 * ROOM_KEPT as u64] {
            for page in 0..count {
                pages.entry(page << 12).or_insert(wanted(page));
            }
            pages.tidy();
            assert_eq!(pages.len() as u64, count, "nothing is lost");
            for page in 0..count {
                assert!(pages.remove(page << 12).is_some());
            }
            pages.tidy();
            assert!(pages.pages.capacity() <= ROOM_KEPT);
            assert_eq!(pages.pages.capacity() > 0, count == 100, "what is usual stays");
        }
    }

    #[test]
    fn a_range_finds_the_pages_it_touches_in_order() {
        let mut pages = PageMisses::default();
        for page in [5, 3, 9, 4, 20, 0, u64::MAX >> 12] {
            pages.entry(page << 12).or_insert(wanted(page));
        }
        let touched = |first: u64, last: u64| {
            let pages = pages.touched(IovaRange::new(first, last).expect("in order"));
            pages.into_iter().map(|page| page >> 12).collect::<Vec<_>>()
        };
        // Fewer pages than are waited for, and more.
        assert_eq!(touched(0x3fff, 0x5000), [3, 4, 5]);
        assert!(touched(0x6000, 0x8fff).is_empty());
        assert_eq!(touched(0x3fff, 0x1_3fff), [3, 4, 5, 9]);
        assert_eq!(touched(0, u64::MAX), [0, 3, 4, 5, 9, 20, u64::MAX >> 12]);
        assert_eq!(touched(u64::MAX, u64::MAX), [u64::MAX >> 12]);
        assert_eq!(pages.sent().len(), 7);
        assert!(pages.sent().is_sorted());
    }
}
