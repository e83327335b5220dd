//! How many pins the calling thread holds, over all devices and readers.
//!
//! A thread that waits while it is pinned can hold up a grace period that the answer it waits for depends on. A reader
//! knows only its own pins, so the count is kept for the thread.
//!
//! A guard that was forgotten (`mem::forget`) counts for good in the thread that pinned, also when its reader is gone:
//! that thread waits no more. To take the count back, a reader would have to note with each pin which thread it is in.

use std::cell::Cell;

thread_local! {
    // 64 bits, so that no number of forgotten guards can wrap it.
    static PINS: Cell<u64> = const { Cell::new(0) };
}

/// Pins the calling thread holds. Nested pins of one reader count once.
#[inline]
#[must_use]
pub fn count() -> u32 {
    u32::try_from(PINS.get()).unwrap_or(u32::MAX)
}

/// The thread took an outermost pin.
#[inline]
pub(crate) fn enter() {
    PINS.set(PINS.get().wrapping_add(1));
}

/// The thread dropped an outermost pin; it is the one that took it, since a guard does not leave its thread.
#[inline]
pub(crate) fn leave() {
    PINS.set(PINS.get().wrapping_sub(1));
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_thread_counts_for_itself() {
        super::enter();
        super::enter();
        assert_eq!(super::count(), 2);
        assert_eq!(std::thread::spawn(super::count).join().expect("the thread only reads a number"), 0);
        super::leave();
        super::leave();
        assert_eq!(super::count(), 0);
    }
}
