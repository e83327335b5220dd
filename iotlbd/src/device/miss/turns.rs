//! Who is served next: one queue of pages a worker, and the device's own, one page of each in turn.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;

use crate::device::WorkerId;

/// Whose turn it is: `None` is the device itself, which asks for ring pages.
pub(super) type Owner = Option<WorkerId>;

/// A place in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    owner: Owner,
    order: u64,
}

impl Place {
    /// Whose queue it is in.
    pub(super) fn owner(self) -> Owner {
        self.owner
    }
}

/// Places that were left are swept out when there are this many more of them than pages: seldom enough that each place
/// pays for one look at another.
const LEFT_MAX: usize = 64;

/// Largest buffer that is kept, in places: a few requests of a worker. The rest of the memory goes back.
const SPARE_MAX: usize = 128;

/// One owner's pages.
#[derive(Debug, Default)]
struct Queue {
    /// In the order they came. A place that was left has no page any more.
    places: VecDeque<(u64, Option<u64>)>,
    /// How many have one.
    pages: usize,
}

impl Queue {
    fn leave(&mut self, order: u64) {
        let Ok(at) = self.places.binary_search_by_key(&order, |place| place.0) else { return };
        if self.places.get_mut(at).and_then(|place| place.1.take()).is_some() {
            self.pages -= 1;
        }
        if self.places.len() > 2 * self.pages + LEFT_MAX {
            self.places.retain(|place| place.1.is_some());
        }
    }

    fn pop(&mut self) -> Option<u64> {
        while let Some((_, page)) = self.places.pop_front() {
            if page.is_some() {
                self.pages -= 1;
                return page;
            }
        }
        None
    }
}

/// The queues. None of them is without a page.
#[derive(Debug, Default)]
pub(super) struct Turns {
    queues: BTreeMap<Owner, Queue>,
    /// The buffer of a queue that came to its end, for the next one.
    spare: VecDeque<(u64, Option<u64>)>,
    served_last: Option<Owner>,
    next_order: u64,
}

impl Turns {
    /// Puts `page` at the end of a queue.
    pub(super) fn join(&mut self, owner: Owner, page: u64) -> Place {
        let order = self.next_order;
        self.next_order += 1;
        let queue = self
            .queues
            .entry(owner)
            .or_insert_with(|| Queue { places: std::mem::take(&mut self.spare), ..Queue::default() });
        queue.places.push_back((order, Some(page)));
        queue.pages += 1;
        Place { owner, order }
    }

    /// Takes the page at `place` out.
    pub(super) fn leave(&mut self, place: Place) {
        let Some(queue) = self.queues.get_mut(&place.owner) else { return };
        queue.leave(place.order);
        if queue.pages == 0 {
            self.end(place.owner);
        }
    }

    /// Removes a queue that has no page.
    fn end(&mut self, owner: Owner) {
        if let Some(queue) = self.queues.remove(&owner)
            && queue.places.capacity() <= SPARE_MAX
        {
            self.spare = queue.places;
            self.spare.clear();
        }
    }

    /// Takes out the first page of the queue whose turn it is.
    pub(super) fn next(&mut self) -> Option<u64> {
        let after = match self.queues.len() {
            0 => return None,
            1 => None,
            _ => self.served_last.and_then(|last| {
                self.queues.range((Bound::Excluded(last), Bound::Unbounded)).next().map(|(owner, _)| *owner)
            }),
        };
        let owner = after.or_else(|| self.queues.first_key_value().map(|(owner, _)| *owner))?;
        let queue = self.queues.get_mut(&owner)?;
        let page = queue.pop();
        if queue.pages == 0 {
            self.end(owner);
        }
        self.served_last = Some(owner);
        page
    }

    /// How many pages wait in a queue.
    pub(super) fn pages_of(&self, owner: Owner) -> usize {
        self.queues.get(&owner).map_or(0, |queue| queue.pages)
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }
}

#[cfg(test)]
impl Turns {
    /// Every page and its place.
    pub(super) fn all(&self) -> Vec<(Place, u64)> {
        for queue in self.queues.values() {
            let pages = queue.places.iter().filter(|place| place.1.is_some()).count();
            assert!(pages > 0 && pages == queue.pages, "{queue:?}");
        }
        let places = |(owner, queue): (&Owner, &Queue)| {
            let owner = *owner;
            let page = |&(order, page): &(u64, Option<u64>)| Some((Place { owner, order }, page?));
            queue.places.iter().filter_map(page).collect::<Vec<_>>()
        };
        self.queues.iter().flat_map(places).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_owner_has_its_turn_however_much_another_wants() {
        let mut turns = Turns::default();
        let (greedy, modest) = (Some(WorkerId(1)), Some(WorkerId(2)));
        for page in 0..100 {
            turns.join(greedy, page);
        }
        turns.join(modest, 500);
        turns.join(None, 600);
        turns.join(modest, 501);
        let first: Vec<u64> = std::iter::from_fn(|| turns.next()).take(6).collect();
        assert_eq!(first, [600, 0, 500, 1, 501, 2], "in turn, and each in its own order");
    }

    #[test]
    fn who_leaves_is_not_served_and_loses_its_place() {
        let mut turns = Turns::default();
        let owner = Some(WorkerId(1));
        let place = turns.join(owner, 7);
        assert_eq!(place.owner(), owner);
        turns.join(owner, 8);
        turns.leave(place);
        turns.join(owner, 7);
        // Twice is once.
        turns.leave(place);
        assert_eq!([turns.next(), turns.next(), turns.next()], [Some(8), Some(7), None]);
        assert!(turns.is_empty());
    }

    #[test]
    fn the_next_queue_has_the_buffer_of_the_last_but_never_its_pages() {
        let mut turns = Turns::default();
        let owner = Some(WorkerId(1));
        for page in 0..17 {
            turns.join(owner, page);
        }
        let place = turns.join(None, 100);
        assert_eq!(std::iter::from_fn(|| turns.next()).take(17).filter(|page| *page < 17).count(), 16);
        turns.leave(place);
        assert_eq!(turns.next(), Some(16));
        let kept = turns.spare.capacity();
        assert!((17..=SPARE_MAX).contains(&kept) && turns.spare.is_empty(), "{kept} places");
        turns.join(owner, 50);
        assert_eq!((turns.spare.capacity(), turns.queues[&owner].places.capacity()), (0, kept));
        assert_eq!([turns.next(), turns.next()], [Some(50), None]);
    }

    #[test]
    fn a_large_buffer_is_given_back() {
        let mut turns = Turns::default();
        for page in 0..=SPARE_MAX as u64 {
            turns.join(None, page);
        }
        while turns.next().is_some() {}
        assert!(turns.spare.capacity() <= SPARE_MAX);
    }

    #[test]
    fn places_that_were_left_do_not_pile_up() {
        let mut turns = Turns::default();
        let owner = Some(WorkerId(1));
        turns.join(owner, 1);
        let mut last = turns.join(owner, 2);
        for page in 3..10_000 {
            turns.leave(last);
            last = turns.join(owner, page);
            let queue = &turns.queues[&owner];
            assert!(queue.pages == 2 && queue.places.len() <= 2 * 2 + LEFT_MAX, "{} places", queue.places.len());
        }
        assert_eq!([turns.next(), turns.next(), turns.next()], [Some(1), Some(9_999), None]);
    }
}
