//! Which of the segment's reader slots this process uses.

use std::sync::{Mutex, PoisonError};

use iotlb_proto::layout::worker::SLOT_CAPACITY;

const _: () = assert!(SLOT_CAPACITY <= 64, "the pool is one word");

/// A bit a slot, set while a reader has it.
#[derive(Debug, Default)]
pub(crate) struct SlotPool {
    taken: Mutex<u64>,
}

impl SlotPool {
    /// The lowest free slot, so that the daemon scans as few as possible.
    pub(crate) fn take(&self) -> Option<usize> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = taken.trailing_ones() as usize;
        if slot >= SLOT_CAPACITY {
            return None;
        }
        *taken |= 1 << slot;
        Some(slot)
    }

    pub(crate) fn give_back(&self, slot: usize) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) &= !(1 << slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_once_and_the_lowest_first() {
        let pool = SlotPool::default();
        for expected in 0..SLOT_CAPACITY {
            assert_eq!(pool.take(), Some(expected));
        }
        assert_eq!(pool.take(), None);
        pool.give_back(17);
        pool.give_back(5);
        assert_eq!((pool.take(), pool.take(), pool.take()), (Some(5), Some(17), None));
    }
}
