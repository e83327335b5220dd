//! What the bytes of the two shared segments mean.
//!
//! Both segments start with an [`Identity`]. A worker attaches only when magic, version, layout hash and sizes all
//! agree with its own build; nothing else in a segment is looked at before that.

pub mod table;
pub mod worker;

use crate::sync::AtomicU64;

/// Raised whenever a field of either segment, or the meaning of one, changes.
pub const LAYOUT_VERSION: u32 = 2;

/// Distance between words that different processors write, in bytes: two cache lines, because the adjacent-line
/// prefetcher of x86 pulls lines in pairs.
pub const LINE: usize = 128;

/// First bytes of both segments. Written once, before the descriptor is sent; never changed.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Identity {
    /// Which segment this is: [`table::MAGIC`] or [`worker::MAGIC`].
    pub magic: AtomicU64,
    /// [`LAYOUT_VERSION`] in the low 32 bits.
    pub version: AtomicU64,
    /// [`LAYOUT_HASH`].
    pub layout_hash: AtomicU64,
    /// Size of the whole segment in bytes.
    pub segment_size: AtomicU64,
    /// Number of the thing that follows the header: tree nodes, or reader slots.
    pub element_count: AtomicU64,
    /// Table: which daemon generation made it. Worker segment: the worker's incarnation.
    pub generation: AtomicU64,
}

/// A number that differs when any size or offset of the shared structures differs: FNV-1a over all of them.
pub const LAYOUT_HASH: u64 = {
    let mut hash = fnv(0xcbf2_9ce4_8422_2325, LAYOUT_VERSION as u64);
    let mut i = 0;
    while i < table::SHAPE.len() {
        hash = fnv(hash, table::SHAPE[i] as u64);
        i += 1;
    }
    let mut i = 0;
    while i < worker::SHAPE.len() {
        hash = fnv(hash, worker::SHAPE[i] as u64);
        i += 1;
    }
    hash
};

const fn fnv(mut hash: u64, word: u64) -> u64 {
    let bytes = word.to_le_bytes();
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}
