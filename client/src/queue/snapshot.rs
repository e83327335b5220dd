//! A value that one thread replaces while others use it, without a lock on their side.

use crossbeam_epoch::{self as epoch, Atomic, Owned};
use iotlb_proto::sync::Ordering;

/// The present value. Replaced ones are dropped once nobody looks at them.
#[derive(Debug)]
pub(crate) struct Snapshot<T: Send + Sync + 'static> {
    present: Atomic<T>,
}

impl<T: Send + Sync + 'static> Snapshot<T> {
    pub(crate) fn new(value: T) -> Snapshot<T> {
        Snapshot { present: Atomic::new(value) }
    }

    /// Looks at the present value. `look` should be short: it holds up the dropping of replaced values.
    #[inline]
    pub(crate) fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        let guard = epoch::pin();
        // Acquire pairs with the release in `replace`.
        let present = self.present.load(Ordering::Acquire, &guard);
        // SAFETY: the pointer is never null and was made by `Atomic::new` or `replace`; a value is destroyed only after
        // every guard that could have loaded it is gone, and this one is held until `look` returns.
        look(unsafe { present.deref() })
    }

    pub(crate) fn replace(&self, value: T) {
        let guard = epoch::pin();
        // Release pairs with the acquire in `with`; acquire, because the old value is dropped later.
        let old = self.present.swap(Owned::new(value), Ordering::AcqRel, &guard);
        // SAFETY: the swap made the old value unreachable for new guards, and each value is swapped out once.
        unsafe { guard.defer_destroy(old) };
        // Replacements are rare, so do not wait for a full bag: descriptors should close soon.
        guard.flush();
    }
}

impl<T: Send + Sync + 'static> Drop for Snapshot<T> {
    fn drop(&mut self) {
        let guard = epoch::pin();
        // Acquire pairs with the release in `replace`.
        let present = self.present.load(Ordering::Acquire, &guard);
        // SAFETY: `&mut self`: nobody looks, and nobody will.
        drop(unsafe { present.into_owned() });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn readers_see_whole_values_while_they_are_replaced() {
        let snapshot = Arc::new(Snapshot::new((0_u64, Box::new(0_u64))));
        let reader = Arc::clone(&snapshot);
        let seen = std::thread::spawn(move || {
            let mut last = 0;
            while last < 1000 {
                let now = reader.with(|(a, b)| {
                    assert_eq!(*a, **b);
                    *a
                });
                assert!(now >= last);
                last = now;
                std::thread::yield_now();
            }
        });
        for i in 1..=1000 {
            snapshot.replace((i, Box::new(i)));
        }
        seen.join().expect("the reader saw only whole values, in order");
    }
}
