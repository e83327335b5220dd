//! Layout of a worker segment: one per attached worker, shared by that worker and the daemon only.
//!
//! Both sides write it, so **to the daemon every byte of it is hostile**. The daemon never trusts a count, an
//! index or a pointer it reads here; whatever a worker scribbles, only that worker's own service can suffer.

use std::mem::{offset_of, size_of};

use super::Identity;
use super::table::QUEUE_CAPACITY;
use crate::sync::{AtomicU32, AtomicU64};

/// `"iotlbWRK"`, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iotlbWRK");

/// Reader slots, one a thread. Each idle one costs the daemon a load in every grace period, so it is bounded.
pub const SLOT_CAPACITY: usize = 64;

/// Misses a worker can have outstanding. One word of `posted` holds 64 of them.
pub const CELL_CAPACITY: usize = 256;
/// Words of the posted bitmap.
pub const POSTED_WORDS: usize = CELL_CAPACITY / 64;

/// Pages one miss cell may ask for: a 64 KiB buffer that starts inside a page.
pub const CELL_PAGES_MAX: u64 = 17;

/// The segment.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct WorkerSegmentLayout {
    /// Written once by the daemon.
    pub identity: Identity,
    /// Worker sets bits, daemon takes them: cell `i` holds a new miss. Bit `i % 64` of word `i / 64`.
    pub posted: Posted,
    /// The worker writes and reads them; the daemon does neither.
    pub counters: Counters,
    /// Reader slots, a ring. They are used in order, beginning with the one that [`first_slot`] names; the daemon looks
    /// at them in that order as well, as far as they say that there is more, and once round at most.
    pub slots: [ReaderSlot; SLOT_CAPACITY],
    /// Misses.
    pub cells: [MissCell; CELL_CAPACITY],
    /// Per queue: how many available-ring heads were completely processed, as a running 16-bit index in the low
    /// bits, with [`PROGRESS_VALID`] set. A fall-back; the used ring's own index is the commit point. Whose the queue
    /// is writes it: the worker from the lease to the release, the daemon, which clears it, when it grants the lease.
    pub progress: [AtomicU64; QUEUE_CAPACITY],
}

/// [`WorkerSegmentLayout::progress`]: the word was written in the queue's present lease.
pub const PROGRESS_VALID: u64 = 1 << 63;

/// Which slot is used first, in the segment with this incarnation. Not the same one everywhere: lines at the same place
/// of a page compete for the same few places of a processor's cache, and most workers have one reader.
#[must_use]
pub const fn first_slot(incarnation: u64) -> usize {
    // Below the capacity.
    #[allow(clippy::cast_possible_truncation)]
    {
        (incarnation % SLOT_CAPACITY as u64) as usize
    }
}

/// What one reader thread says. All on one line, so that an idle reader costs the daemon one.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct ReaderSlot {
    /// 0 = not pinned, else the epoch that was pinned.
    pub word: AtomicU64,
    /// Not 0: the next slot is or was in use, too. Never taken back.
    pub more: AtomicU64,
}

/// The posted bitmap.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Posted {
    /// Bit per cell.
    pub words: [AtomicU64; POSTED_WORDS],
}

/// What a worker counts. All only grow.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Counters {
    /// Translations asked for.
    pub lookups: AtomicU64,
    /// Of these, answered from the table.
    pub hits: AtomicU64,
    /// Misses posted.
    pub misses: AtomicU64,
    /// Misses answered with a denial.
    pub denied: AtomicU64,
    /// Misses that timed out.
    pub timed_out: AtomicU64,
    /// Chains completed on all queues.
    pub chains: AtomicU64,
    /// Bytes moved on all queues.
    pub bytes: AtomicU64,
}

/// One miss. The worker fills `first`, `request`, then stores `state` = ticket | POSTED and sets the cell's bit; the
/// daemon answers by storing `state` = same ticket | answer. See `worker::cell`.
#[derive(Debug)]
#[repr(C, align(32))]
pub struct MissCell {
    /// First address that is wanted.
    pub first: AtomicU64,
    /// `length in bytes << 8 | access`.
    pub request: AtomicU64,
    /// `ticket << 8 | code`; a futex word while the worker sleeps on it.
    pub state: AtomicU32,
    /// Not 0 while the worker sleeps on `state`.
    pub sleeping: AtomicU32,
}

/// What goes into the layout hash.
pub const SHAPE: [usize; 12] = [
    size_of::<WorkerSegmentLayout>(),
    offset_of!(ReaderSlot, more),
    offset_of!(WorkerSegmentLayout, posted),
    offset_of!(WorkerSegmentLayout, counters),
    offset_of!(WorkerSegmentLayout, slots),
    offset_of!(WorkerSegmentLayout, cells),
    offset_of!(WorkerSegmentLayout, progress),
    size_of::<MissCell>(),
    offset_of!(MissCell, state),
    SLOT_CAPACITY,
    CELL_CAPACITY,
    QUEUE_CAPACITY,
];

/// Bytes of a worker segment.
pub const SEGMENT_SIZE: usize = size_of::<WorkerSegmentLayout>();

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<MissCell>() == 32);
    assert!(offset_of!(MissCell, request) == 8);
    assert!(offset_of!(MissCell, state) == 16);
    assert!(offset_of!(MissCell, sleeping) == 20);
    assert!(size_of::<ReaderSlot>() == super::LINE);
    assert!(offset_of!(ReaderSlot, more) == 8);
    assert!(offset_of!(WorkerSegmentLayout, posted) == super::LINE);
    assert!(offset_of!(WorkerSegmentLayout, counters) == 256);
    assert!(offset_of!(WorkerSegmentLayout, slots) == 384);
    assert!(offset_of!(WorkerSegmentLayout, cells) == 8576);
    assert!(offset_of!(WorkerSegmentLayout, progress) == 16768);
    assert!(SEGMENT_SIZE == 20480);
    assert!(SEGMENT_SIZE <= 64 * 1024);
};
