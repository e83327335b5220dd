//! The reader's half: a slot is stored, fenced, cleared. See the [module](super) for the argument.

use crate::sync::{AtomicU64, Ordering, full_fence};

/// Value of a slot whose reader is not pinned.
pub const UNPINNED: u64 = 0;

/// Pins: publishes the present epoch in the reader's slot. Everything read from the table until [`unpin`] stays valid
/// at least that long. Returns the epoch.
#[inline]
pub fn pin(slot: &AtomicU64, epoch: &AtomicU64) -> u64 {
    // Relaxed: F_r below makes it an acquire, whose partner is the release store in `Grace::begin`.
    let now = epoch.load(Ordering::Relaxed);
    // Release pairs with the acquire in `is_drained`: the loads of this reader's former pin come before it.
    slot.store(now, Ordering::Release);
    // F_r; its partner is F_w in `Grace::begin`.
    full_fence();
    now
}

/// Whether the slot's own reader has pinned and not unpinned. For nobody else.
#[inline]
#[must_use]
pub fn is_pinned(slot: &AtomicU64) -> bool {
    // Relaxed: it reads back its own store.
    slot.load(Ordering::Relaxed) != UNPINNED
}

/// Unpins.
#[inline]
pub fn unpin(slot: &AtomicU64) {
    // Release pairs with the acquire in `is_drained`: the pin's loads come before it.
    slot.store(UNPINNED, Ordering::Release);
}

/// Whether the slot no longer holds back the grace period with epoch `target`.
#[inline]
#[must_use]
pub fn is_drained(slot: &AtomicU64, target: u64) -> bool {
    // Acquire pairs with the release stores in `pin` and `unpin`.
    let value = slot.load(Ordering::Acquire);
    value == UNPINNED || value >= target
}
