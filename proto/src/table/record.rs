//! A vring as workers see it.

use crate::layout::table::{QUEUE_ENABLED, QUEUE_STARTED, QueueRecordWords};
use crate::sync::{Ordering, fence};

/// A stable copy of one queue record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueRecord {
    /// The ring may be touched.
    pub started: bool,
    /// The ring is enabled: a started ring that is not discards what the guest sends and takes nothing to receive.
    pub enabled: bool,
    /// Number of descriptors.
    pub size: u16,
    /// IOVA of the descriptor table.
    pub desc: u64,
    /// IOVA of the available ring.
    pub avail: u64,
    /// IOVA of the used ring.
    pub used: u64,
    /// Available index to start from when the used ring's own index cannot be read.
    pub base: u16,
    /// Session the record belongs to.
    pub session_generation: u64,
}

impl QueueRecord {
    /// Writer: publishes the record. Readers see the former one or this one, never a mixture.
    pub(super) fn store(&self, words: &QueueRecordWords) {
        let sequence = words.sequence.load(Ordering::Relaxed);
        words.sequence.store(sequence | 1, Ordering::Relaxed);
        // Partner: the acquire fence in `load`. A reader that sees any new word sees the odd sequence before it.
        fence(Ordering::Release);
        let flags = if self.started { QUEUE_STARTED } else { 0 } | if self.enabled { QUEUE_ENABLED } else { 0 };
        words.flags.store(flags, Ordering::Relaxed);
        words.size.store(u64::from(self.size), Ordering::Relaxed);
        words.desc.store(self.desc, Ordering::Relaxed);
        words.avail.store(self.avail, Ordering::Relaxed);
        words.used.store(self.used, Ordering::Relaxed);
        words.base.store(u64::from(self.base), Ordering::Relaxed);
        words.session_generation.store(self.session_generation, Ordering::Relaxed);
        // Release pairs with the first acquire load in `load`.
        words.sequence.store((sequence | 1).wrapping_add(1), Ordering::Release);
    }

    /// Reader: a copy, or `None` while the daemon is writing the record (some ten stores: try again).
    #[must_use]
    pub fn load(words: &QueueRecordWords) -> Option<QueueRecord> {
        // Acquire pairs with the release store at the end of `store`.
        let before = words.sequence.load(Ordering::Acquire);
        let flags = words.flags.load(Ordering::Relaxed);
        let record = QueueRecord {
            started: flags & QUEUE_STARTED != 0,
            enabled: flags & QUEUE_ENABLED != 0,
            size: u16::try_from(words.size.load(Ordering::Relaxed)).unwrap_or(0),
            desc: words.desc.load(Ordering::Relaxed),
            avail: words.avail.load(Ordering::Relaxed),
            used: words.used.load(Ordering::Relaxed),
            base: u16::try_from(words.base.load(Ordering::Relaxed)).unwrap_or(0),
            session_generation: words.session_generation.load(Ordering::Relaxed),
        };
        // Partner: the release fence in `store`.
        fence(Ordering::Acquire);
        let after = words.sequence.load(Ordering::Relaxed);
        (before == after && before & 1 == 0).then_some(record)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::AtomicU64;

    #[test]
    fn a_record_half_written_is_no_record() {
        let words: [AtomicU64; 8] = std::array::from_fn(|_| AtomicU64::new(0));
        let [sequence, flags, size, desc, avail, used, base, session_generation] = words;
        let words = QueueRecordWords { sequence, flags, size, desc, avail, used, base, session_generation };
        let record = QueueRecord { started: true, size: 256, base: 7, desc: 0x1000, ..QueueRecord::default() };
        record.store(&words);
        assert_eq!(QueueRecord::load(&words), Some(record));
        let stable = words.sequence.load(Ordering::Relaxed);
        words.sequence.store(stable + 1, Ordering::Relaxed);
        assert_eq!(QueueRecord::load(&words), None);
        // A writer that comes after one that died halfway.
        record.store(&words);
        assert_eq!(QueueRecord::load(&words), Some(record));
        assert!(words.sequence.load(Ordering::Relaxed) > stable);
    }
}
