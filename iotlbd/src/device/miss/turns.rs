//! Who is served next: one queue of pages a worker, and the device's own, one page of each in turn.

use std::collections::{BTreeMap, BTreeSet};
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

/// The queues. None of them is empty.
#[derive(Debug, Default)]
pub(super) struct Turns {
    queues: BTreeMap<Owner, BTreeSet<(u64, u64)>>,
    served_last: Option<Owner>,
    next_order: u64,
}

impl Turns {
    /// Puts `page` at the end of a queue.
    pub(super) fn join(&mut self, owner: Owner, page: u64) -> Place {
        let order = self.next_order;
        self.next_order += 1;
        self.queues.entry(owner).or_default().insert((order, page));
        Place { owner, order }
    }

    /// Takes `page` out of its place.
    pub(super) fn leave(&mut self, place: Place, page: u64) {
        let Some(queue) = self.queues.get_mut(&place.owner) else { return };
        queue.remove(&(place.order, page));
        if queue.is_empty() {
            self.queues.remove(&place.owner);
        }
    }

    /// Takes out the first page of the queue whose turn it is.
    pub(super) fn next(&mut self) -> Option<u64> {
        let after = self.served_last.and_then(|last| {
            self.queues.range((Bound::Excluded(last), Bound::Unbounded)).next().map(|(owner, _)| *owner)
        });
        let owner = after.or_else(|| self.queues.first_key_value().map(|(owner, _)| *owner))?;
        let queue = self.queues.get_mut(&owner)?;
        let (_, page) = queue.pop_first()?;
        if queue.is_empty() {
            self.queues.remove(&owner);
        }
        self.served_last = Some(owner);
        Some(page)
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
        assert!(self.queues.values().all(|queue| !queue.is_empty()), "an empty queue");
        let places = |(owner, queue): (&Owner, &BTreeSet<(u64, u64)>)| {
            let owner = *owner;
            queue.iter().map(move |&(order, page)| (Place { owner, order }, page)).collect::<Vec<_>>()
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
        turns.leave(place, 7);
        turns.join(owner, 7);
        // Twice is once.
        turns.leave(place, 7);
        assert_eq!([turns.next(), turns.next(), turns.next()], [Some(8), Some(7), None]);
        assert!(turns.is_empty());
    }
}
