//! What tests of lookups have in common.

use std::os::fd::AsFd;

use super::entry;
use crate::access::Access;
use crate::iova::IovaRange;
use crate::layout::table::Node;
use crate::sync::{AtomicU64, Ordering};
use crate::table::{TableConfig, TableReader, TableWriter};

/// Words of a broken writer that lead to no node of a table of three.
pub(crate) const NO_LINKS: [u64; 6] =
    [entry::EMPTY, entry::link(3), entry::link(u32::MAX), entry::leaf(0, Access::READ), u64::MAX, 1 << 63 | 1];

/// A small table, and a second view of the same memory, as a reader has one.
pub(crate) fn tables() -> (TableWriter, TableReader) {
    let (table, fd) = TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("a table");
    let size = table.memory().header().identity.segment_size.load(Ordering::Relaxed);
    let reader = TableReader::open(fd.as_fd(), size).expect("mapped");
    (table, reader)
}

/// Publishes a page that may be read.
pub(crate) fn insert(table: &mut TableWriter, iova: u64, target: u64) {
    table.insert(IovaRange::page_of(iova), target, Access::READ).expect("there is room");
}

/// A node in which nothing is.
pub(crate) fn empty_node() -> Node {
    Node { entries: std::array::from_fn(|_| AtomicU64::new(0)) }
}
