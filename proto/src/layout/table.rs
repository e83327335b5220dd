//! Layout of the table segment: one per device and daemon generation, written only by the daemon.
//!
//! ```text
//! page 0          TableHeader: words written at different rates on lines of their own
//! then            QUEUE_CAPACITY QueueRecords
//! then            SIDE_COPIES copies of the side array
//! then            tree nodes, 4 KiB each, to the end of the segment
//! ```

use std::mem::{offset_of, size_of};

use super::Identity;
use crate::sync::AtomicU64;

/// `"iotlbTBL"`, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"iotlbTBL");

/// Vrings a device can have. 128 queue pairs, the most QEMU drives over one socket, and one control queue.
pub const QUEUE_CAPACITY: usize = 257;

/// log2 of the entries in a node. Two under loom, so that a model reaches several levels.
pub const NODE_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
/// Entries in a node.
pub const NODE_ENTRIES: usize = 1 << NODE_BITS;

/// Byte-granular ranges the side array can hold.
pub const SIDE_CAPACITY: usize = if cfg!(loom) { 2 } else { 256 };
/// Copies of the side array: the live one, and those that wait for a grace period after they were replaced.
pub const SIDE_COPIES: usize = 4;

/// The header. Every field but the identity changes at run time, and only the daemon stores to it.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct TableHeader {
    /// Written once.
    pub identity: Identity,
    /// What changes when something is taken away.
    pub epoch: Epoch,
    /// What changes when the guest's memory or rings do.
    pub state: State,
    /// Where lookups begin: tree root and side array.
    pub roots: Roots,
    /// How workers should wake the daemon.
    pub wake: Wake,
}

/// What every removal stores, on one line: it has to come back from those who read it, and once is enough.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Epoch {
    /// The grace-period epoch; starts at 1, because a slot with 0 is not pinned.
    pub word: AtomicU64,
    /// Grows with every unlink, before the epoch of its grace period is stored. Pointers kept across pins are keyed by
    /// it.
    pub removal_generation: AtomicU64,
}

/// Generations, which each only grow, and flags. Lookups read this line, so nothing is here that often changes.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct State {
    /// Grows with every front-end session and device reset: rings and cached pointers of an older one are void.
    pub session_generation: AtomicU64,
    /// Grows *before* the first entry that points into a new memory region is published.
    pub memory_map_generation: AtomicU64,
    /// Grows whenever a queue record changed.
    pub queue_generation: AtomicU64,
    /// Virtio feature bits the driver acknowledged; 0 before it did.
    pub acked_features: AtomicU64,
    /// [`FLAG_RUNNING`] and others to come.
    pub flags: AtomicU64,
}

/// [`State::flags`]: a front-end is connected and its session may be served.
pub const FLAG_RUNNING: u64 = 1;

/// Where lookups begin.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Roots {
    /// `node index << 8 | height`; height 0 means that the tree is empty.
    pub tree: AtomicU64,
    /// `copy index << 32 | number of ranges`.
    pub side: AtomicU64,
}

/// Hints from the daemon to workers about wake-ups.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Wake {
    /// Not 0: the daemon may be asleep, so a worker that posted a miss rings its doorbell.
    pub doorbell_wanted: AtomicU64,
    /// Not 0: the daemon waits for a grace period, so a reader that unpins rings its doorbell.
    pub writer_sleeps: AtomicU64,
}

/// One vring as workers see it. `sequence` is odd while the daemon rewrites the rest; a reader takes a copy and
/// keeps it when `sequence` was even and the same before and after.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct QueueRecordWords {
    /// Even: stable. Grows by two with every change.
    pub sequence: AtomicU64,
    /// Bit set of `QUEUE_*`.
    pub flags: AtomicU64,
    /// Number of descriptors; a power of two up to 32,768.
    pub size: AtomicU64,
    /// IOVA of the descriptor table.
    pub desc: AtomicU64,
    /// IOVA of the available ring.
    pub avail: AtomicU64,
    /// IOVA of the used ring.
    pub used: AtomicU64,
    /// Available index to start from: what the front-end told, and then how far owners came that left the ring.
    pub base: AtomicU64,
    /// Session this record belongs to.
    pub session_generation: AtomicU64,
}

/// [`QueueRecordWords::flags`]: the ring may be touched.
pub const QUEUE_STARTED: u64 = 1;
/// [`QueueRecordWords::flags`]: the ring is enabled; a started ring that is not enabled discards TX and takes no RX.
pub const QUEUE_ENABLED: u64 = 2;

/// One byte-granular range.
#[derive(Debug)]
#[repr(C)]
pub struct SideEntry {
    /// First address.
    pub first: AtomicU64,
    /// Last address, inclusive.
    pub last: AtomicU64,
    /// `target of the first address << 2 | access`; 0 when the range was removed in place.
    pub target: AtomicU64,
}

/// One copy of the side array: sorted by `first`, without overlaps.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct SideCopy {
    /// Valid up to the count in [`Roots::side`].
    pub entries: [SideEntry; SIDE_CAPACITY],
}

/// One node of the tree.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Node {
    /// See `tree::entry`.
    pub entries: [AtomicU64; NODE_ENTRIES],
}

/// Offset of the queue records.
pub const QUEUES_OFFSET: usize = 4096;
/// Offset of the side copies.
pub const SIDE_OFFSET: usize = align_up(QUEUES_OFFSET + QUEUE_CAPACITY * size_of::<QueueRecordWords>(), 4096);
/// Offset of the tree nodes.
pub const NODES_OFFSET: usize = SIDE_OFFSET + SIDE_COPIES * size_of::<SideCopy>();

/// Bytes of a segment with `nodes` tree nodes; `None` when that does not fit a `usize`.
#[must_use]
pub const fn segment_size(nodes: u32) -> Option<usize> {
    match (nodes as usize).checked_mul(size_of::<Node>()) {
        Some(bytes) => bytes.checked_add(NODES_OFFSET),
        None => None,
    }
}

const fn align_up(value: usize, to: usize) -> usize {
    value.div_ceil(to) * to
}

/// What goes into the layout hash.
pub const SHAPE: [usize; 15] = [
    size_of::<TableHeader>(),
    offset_of!(TableHeader, epoch),
    offset_of!(Epoch, removal_generation),
    offset_of!(TableHeader, state),
    offset_of!(TableHeader, roots),
    offset_of!(TableHeader, wake),
    size_of::<QueueRecordWords>(),
    size_of::<SideCopy>(),
    size_of::<Node>(),
    QUEUES_OFFSET,
    SIDE_OFFSET,
    NODES_OFFSET,
    QUEUE_CAPACITY,
    SIDE_CAPACITY,
    NODE_ENTRIES,
];

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Identity>() == super::LINE);
    assert!(offset_of!(Identity, magic) == 0);
    assert!(offset_of!(Identity, version) == 8);
    assert!(offset_of!(Identity, layout_hash) == 16);
    assert!(offset_of!(Identity, segment_size) == 24);
    assert!(offset_of!(Identity, element_count) == 32);
    assert!(offset_of!(Identity, generation) == 40);
    assert!(size_of::<TableHeader>() == 640);
    assert!(offset_of!(TableHeader, epoch) == super::LINE);
    assert!(offset_of!(Epoch, removal_generation) == 8);
    assert!(offset_of!(TableHeader, state) == 256);
    assert!(offset_of!(State, memory_map_generation) == 8);
    assert!(offset_of!(TableHeader, roots) == 384);
    assert!(offset_of!(Roots, side) == 8);
    assert!(offset_of!(TableHeader, wake) == 512);
    assert!(offset_of!(Wake, writer_sleeps) == 8);
    assert!(size_of::<QueueRecordWords>() == super::LINE);
    assert!(offset_of!(QueueRecordWords, session_generation) == 56);
    assert!(size_of::<SideEntry>() == 24);
    assert!(size_of::<SideCopy>() == 8192);
    assert!(size_of::<Node>() == 4096);
    assert!(SIDE_OFFSET == 40960);
    assert!(NODES_OFFSET == 73728);
};
