//! The writer's half: stamps, and which completed grace period covers which unlink. See the [module](super).

use crate::sync::{AtomicU64, Ordering, full_fence};

/// First value of the epoch word. A slot with 0 is not pinned, so 0 is no epoch.
pub const FIRST_EPOCH: u64 = 1;

/// The epoch at the moment of an unlink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(u64);

/// What the writer knows of epochs.
#[derive(Debug)]
pub struct Grace {
    /// Value of the epoch word.
    current: u64,
    /// Epoch of the newest grace period that every reader has passed.
    completed: u64,
    /// Stamp of the last unlink; below `completed` when all is quiet.
    last_unlink: Stamp,
}

impl Default for Grace {
    fn default() -> Grace {
        Grace { current: FIRST_EPOCH, completed: FIRST_EPOCH, last_unlink: Stamp(FIRST_EPOCH - 1) }
    }
}

impl Grace {
    /// Stamps an unlink that has just been stored, or is stored before the next [`Grace::begin`].
    pub fn unlinked(&mut self) -> Stamp {
        self.last_unlink = Stamp(self.current);
        self.last_unlink
    }

    /// The stamp of an unlink that happens now; [`Grace::unlinked`] must follow when there really is one.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        Stamp(self.current)
    }

    /// Whether readers can no longer reach what was unlinked at `stamp`.
    #[must_use]
    pub fn has_passed(&self, stamp: Stamp) -> bool {
        self.completed > stamp.0
    }

    /// Whether readers can no longer reach anything that was ever unlinked: a take may be acknowledged.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.has_passed(self.last_unlink)
    }

    /// The epoch of the grace period that covers everything unlinked so far. Begins one when none that does is under
    /// way; a grace period begun earlier is covered by the new one. `None` when all is quiet.
    pub fn begin(&mut self, epoch: &AtomicU64) -> Option<u64> {
        if self.is_quiet() {
            return None;
        }
        if self.current <= self.last_unlink.0 {
            self.current += 1;
            // Release pairs with F_r in `pin`: who pins this epoch sees all that was unlinked before.
            epoch.store(self.current, Ordering::Release);
            // F_w; its partner is F_r in `pin`.
            full_fence();
        }
        Some(self.current)
    }

    /// Every slot was seen at 0 or at least `epoch`, which [`Grace::begin`] returned.
    pub fn complete(&mut self, epoch: u64) {
        debug_assert!(epoch <= self.current, "completed a grace period that was never begun");
        self.completed = self.completed.max(epoch.min(self.current));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn quiet_until_something_is_unlinked() {
        let word = AtomicU64::new(FIRST_EPOCH);
        let mut grace = Grace::default();
        assert!(grace.is_quiet());
        assert_eq!(grace.begin(&word), None);
        let stamp = grace.unlinked();
        assert!(!grace.is_quiet());
        let epoch = grace.begin(&word).expect("not quiet");
        assert_eq!((epoch, word.load(Ordering::Relaxed)), (2, 2));
        assert!(!grace.has_passed(stamp));
        grace.complete(epoch);
        assert!(grace.is_quiet() && grace.has_passed(stamp));
    }

    #[test]
    fn an_unlink_during_a_grace_period_needs_another() {
        let word = AtomicU64::new(FIRST_EPOCH);
        let mut grace = Grace::default();
        let first = grace.unlinked();
        let epoch = grace.begin(&word).expect("not quiet");
        let second = grace.unlinked();
        grace.complete(epoch);
        assert!(grace.has_passed(first));
        assert!(!grace.has_passed(second) && !grace.is_quiet());
        let next = grace.begin(&word).expect("not quiet");
        assert_eq!(next, epoch + 1);
        grace.complete(next);
        assert!(grace.is_quiet());
    }

    #[test]
    fn takes_share_a_grace_period_that_began_after_both() {
        let word = AtomicU64::new(FIRST_EPOCH);
        let mut grace = Grace::default();
        grace.unlinked();
        grace.unlinked();
        let epoch = grace.begin(&word);
        assert_eq!(grace.begin(&word), epoch, "nothing new was unlinked");
    }

    #[test]
    fn a_grace_period_under_way_does_not_cover_what_is_unlinked_after_it_began() {
        let word = AtomicU64::new(FIRST_EPOCH);
        let mut grace = Grace::default();
        let first = grace.unlinked();
        let early = grace.begin(&word).expect("not quiet");
        let second = grace.unlinked();
        let late = grace.begin(&word).expect("not quiet");
        assert!(late > early);
        grace.complete(early);
        assert!(grace.has_passed(first) && !grace.has_passed(second) && !grace.is_quiet());
        assert_eq!(grace.begin(&word), Some(late), "it is under way");
        grace.complete(late);
        assert!(grace.has_passed(second) && grace.is_quiet());
        grace.complete(early);
        assert!(grace.is_quiet(), "a late report takes nothing back");
    }
}
