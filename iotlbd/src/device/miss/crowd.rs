//! Who waits for a page: mostly one, seldom a few. But workers choose what they ask for, and all of their cells may ask
//! for one page. When those time out or are refused, or their worker leaves, they come off one after the other, which
//! must not take a look at all others each time.

use std::collections::BTreeMap;

use iotlb_proto::access::Access;
use smallvec::{SmallVec, smallvec};

use super::turns::Owner;

/// So many are looked through one by one; those that come when they are there already have an index.
const FEW_MAX: usize = 8;

/// One waiter of one page.
#[derive(Clone, Debug)]
pub(super) struct Interest {
    /// Its number. A waiter that came later has a higher one.
    pub(super) waiter: u64,
    pub(super) owner: Owner,
    /// Messages sent, of any page, when the waiter joined: only later ones say something about it.
    pub(super) joined: u64,
    pub(super) access: Access,
    pub(super) denials: u8,
    pub(super) attempts: u8,
}

/// The waiters of one page, the oldest first.
#[derive(Debug)]
pub(super) struct Crowd {
    few: SmallVec<[Interest; 1]>,
    /// All of these are younger.
    many: Option<Box<Many>>,
}

/// Never empty.
#[derive(Debug, Default)]
struct Many {
    by_number: BTreeMap<u64, Interest>,
    /// How many each owner has among them.
    owners: BTreeMap<Owner, usize>,
}

impl Crowd {
    /// One alone.
    pub(super) fn of(interest: Interest) -> Crowd {
        Crowd { few: smallvec![interest], many: None }
    }

    /// The youngest comes.
    pub(super) fn join(&mut self, interest: Interest) {
        if self.many.is_none() && self.few.len() < FEW_MAX {
            self.few.push(interest);
            return;
        }
        let many = self.many.get_or_insert_default();
        *many.owners.entry(interest.owner).or_default() += 1;
        many.by_number.insert(interest.waiter, interest);
    }

    pub(super) fn leave(&mut self, waiter: u64) {
        let at = self.few.iter().inspect(|_| looked()).position(|interest| interest.waiter == waiter);
        if let Some(at) = at {
            self.few.remove(at);
        } else if let Some(many) = &mut self.many {
            looked();
            if let Some(gone) = many.by_number.remove(&waiter) {
                forget(&mut many.owners, gone.owner);
            }
            self.tidy();
        }
    }

    /// Keeps those only.
    pub(super) fn retain(&mut self, mut stays: impl FnMut(&Interest) -> bool) {
        self.few.retain(|interest| stays(interest));
        if let Some(many) = &mut self.many {
            for (_, gone) in many.by_number.extract_if(.., |_, interest| !stays(interest)) {
                forget(&mut many.owners, gone.owner);
            }
            self.tidy();
        }
    }

    fn tidy(&mut self) {
        if self.many.as_ref().is_some_and(|many| many.by_number.is_empty()) {
            self.many = None;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.few.len() + self.many.as_ref().map_or(0, |many| many.by_number.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.few.is_empty() && self.many.is_none()
    }

    pub(super) fn first(&self) -> Option<&Interest> {
        self.few.first().or_else(|| self.many.as_ref().and_then(|many| many.by_number.values().next()))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Interest> {
        self.few.iter().chain(self.many.iter().flat_map(|many| many.by_number.values()))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Interest> {
        self.few.iter_mut().chain(self.many.iter_mut().flat_map(|many| many.by_number.values_mut()))
    }

    /// Whether one of them is `owner`'s.
    pub(super) fn has_of(&self, owner: Owner) -> bool {
        self.few.iter().inspect(|_| looked()).any(|interest| interest.owner == owner)
            || self.many.as_ref().is_some_and(|many| many.owners.contains_key(&owner))
    }
}

/// One of `owner`'s is gone.
fn forget(owners: &mut BTreeMap<Owner, usize>, owner: Owner) {
    if let Some(count) = owners.get_mut(&owner) {
        *count -= 1;
        if *count == 0 {
            owners.remove(&owner);
        }
    }
}

/// One of those that wait was looked at, to find another.
#[inline]
fn looked() {
    #[cfg(test)]
    LOOKS.set(LOOKS.get() + 1);
}

#[cfg(test)]
thread_local! {
    /// How often that was.
    pub(super) static LOOKS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::WorkerId;

    fn interest(waiter: u64, owner: u32) -> Interest {
        let owner = Some(WorkerId(owner));
        Interest { waiter, owner, joined: 0, access: Access::READ, denials: 0, attempts: 0 }
    }

    fn numbers(crowd: &Crowd) -> Vec<u64> {
        assert_eq!((crowd.iter().count(), crowd.first().is_none()), (crowd.len(), crowd.is_empty()));
        crowd.iter().map(|interest| interest.waiter).collect()
    }

    #[test]
    fn age_decides_whoever_leaves() {
        let count = 4 * FEW_MAX as u64;
        let mut crowd = Crowd::of(interest(0, 0));
        (1..count).for_each(|waiter| crowd.join(interest(waiter, u32::from(waiter % 2 == 1))));
        assert_eq!(numbers(&crowd), (0..count).collect::<Vec<_>>());
        for waiter in [0, 2, 3, count - 2, count] {
            crowd.leave(waiter);
        }
        // There is room among the few, but those who are here already are older.
        crowd.join(interest(count, 2));
        let left: Vec<u64> = (0..=count).filter(|n| ![0, 2, 3, count - 2].contains(n)).collect();
        assert_eq!(numbers(&crowd), left);
        assert_eq!(crowd.iter_mut().map(|interest| interest.waiter).collect::<Vec<_>>(), left);
        crowd.retain(|interest| interest.owner == Some(WorkerId(2)));
        assert_eq!(numbers(&crowd), [count]);
        crowd.retain(|_| false);
        assert!(numbers(&crowd).is_empty());
    }

    #[test]
    fn an_owner_is_there_until_its_last_one_leaves() {
        let count = 4 * FEW_MAX as u64;
        let mut crowd = Crowd::of(interest(0, 0));
        (1..count).for_each(|waiter| crowd.join(interest(waiter, 0)));
        [count, count + 1].into_iter().for_each(|waiter| crowd.join(interest(waiter, 1)));
        let (first, second) = (Some(WorkerId(0)), Some(WorkerId(1)));
        assert!(crowd.has_of(first) && crowd.has_of(second) && !crowd.has_of(None));
        crowd.leave(count);
        assert!(crowd.has_of(second));
        crowd.leave(count + 1);
        assert!(!crowd.has_of(second));
        crowd.retain(|interest| interest.waiter == count - 1);
        assert!(crowd.has_of(first));
        crowd.leave(count - 1);
        assert!(!crowd.has_of(first) && crowd.is_empty());
    }
}
