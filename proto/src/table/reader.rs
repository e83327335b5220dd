//! A worker's view of the table: loads, nothing else.

use std::os::fd::BorrowedFd;

use super::{LastNodes, QueueRecord, TableError, TableMemory, Translation};
use crate::access::Access;
use crate::layout::table::TableHeader;
use crate::shm::SharedObject;
use crate::sync::{AtomicU64, Ordering};
use crate::tree::{Leaf, NearNodes};

/// Attempts to copy a queue record between two of the daemon's changes. One change is some ten stores, and they are
/// rare.
const RECORD_ATTEMPTS: usize = 1 << 16;

/// A table, mapped read-only. What its methods return means something under a pin ([`crate::epoch`]) and no longer.
#[derive(Debug)]
pub struct TableReader {
    memory: TableMemory,
}

impl TableReader {
    /// Maps the table and checks that it is one of this build. `size` comes from WELCOME.
    ///
    /// # Errors
    /// It is not a sealed memfd of that size, or not such a table.
    pub fn open(fd: BorrowedFd<'_>, size: u64) -> Result<TableReader, TableError> {
        TableMemory::open(fd, size).map(|memory| TableReader { memory })
    }

    /// The header's words. The mapping is read-only: a store through them ends the process.
    #[inline]
    #[must_use]
    pub fn header(&self) -> &TableHeader {
        self.memory.header()
    }

    /// [`State::memory_map_generation`](crate::layout::table::State::memory_map_generation), for who looks at it with
    /// each lookup.
    #[must_use]
    pub fn map_generation(&self) -> SharedObject<AtomicU64> {
        self.memory.header_object().part(|header| &header.state.memory_map_generation)
    }

    /// [`Wake::writer_sleeps`](crate::layout::table::Wake::writer_sleeps), for who looks at it all the time.
    #[must_use]
    pub fn writer_sleeps(&self) -> SharedObject<AtomicU64> {
        self.memory.header_object().part(|header| &header.wake.writer_sleeps)
    }

    /// The leaf or byte-granular range around `iova`.
    #[inline]
    #[must_use]
    pub fn lookup(&self, iova: u64) -> Option<Translation> {
        self.memory.lookup(iova)
    }

    /// The tree's leaf around `iova`: the fast path. When it finds nothing, [`TableReader::lookup_side`] still may.
    #[inline]
    #[must_use]
    pub fn lookup_leaf(&self, iova: u64) -> Option<Leaf> {
        self.memory.lookup_leaf(iova)
    }

    /// The root word. Acquire pairs with its release stores in `tree::edit`.
    #[inline]
    fn root(&self) -> u64 {
        self.memory.header().roots.tree.load(Ordering::Acquire)
    }

    /// A place for the nodes that were looked into last; none were.
    #[must_use]
    pub fn last_nodes(&self) -> LastNodes {
        self.memory.last_nodes()
    }

    /// Has `last`, which is of this table, keep the node of the GiB around `iova` for as long as the present pin lasts.
    pub fn keep_node(&self, last: &LastNodes, iova: u64) {
        last.keep(self.root(), iova);
    }

    /// The entry of the page around `iova`, when its node is one of `near`, which this pin met in this table; see
    /// [`NearNodes::page`].
    #[inline(always)]
    #[must_use]
    pub fn page_near(&self, near: &NearNodes, iova: u64, access: Access) -> Option<u64> {
        near.page(self.memory.nodes(), iova, access)
    }

    /// Keeps the node around `iova` in `near`; see [`NearNodes::keep`].
    #[inline]
    pub fn keep_near(&self, near: &NearNodes, iova: u64) -> bool {
        near.keep(self.root(), self.memory.nodes(), iova)
    }

    /// The byte-granular range around `iova`, which counts only when the tree has no leaf there.
    #[inline]
    #[must_use]
    pub fn lookup_side(&self, iova: u64) -> Option<Translation> {
        self.memory.lookup_side(iova)
    }

    /// A stable copy of a queue record; `None` for an index past the capacity, or when the daemon died while it wrote
    /// the record.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<QueueRecord> {
        let words = self.memory.queues().get(usize::from(index))?;
        (0..RECORD_ATTEMPTS).find_map(|_| {
            let record = QueueRecord::load(words);
            if record.is_none() {
                std::hint::spin_loop();
            }
            record
        })
    }
}
