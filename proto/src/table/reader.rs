//! A worker's view of the table: loads, nothing else.

use std::os::fd::BorrowedFd;

use super::{QueueRecord, TableError, TableMemory, Translation};
use crate::access::Access;
use crate::layout::table::TableHeader;
use crate::shm::SharedObject;
use crate::sync::{AtomicU64, Ordering};
use crate::tree::{Leaf, NearNodes, Top};

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

    /// Where the root word is, for a reader that finds that out before its fence and asks for the [`TableReader::top`]
    /// after it.
    #[inline(always)]
    #[must_use]
    pub fn root(&self) -> &AtomicU64 {
        &self.memory.header().roots.tree
    }

    /// The short way to most leaves, for as long as the present pin lasts. What it does not find,
    /// [`TableReader::lookup_leaf`] still may. `root` is [`TableReader::root`].
    #[inline(always)]
    #[must_use]
    pub fn top(&self, root: &AtomicU64) -> Top<'_> {
        // Acquire pairs with the release stores of the root word in `tree::edit`.
        Top::new(root.load(Ordering::Acquire), self.memory.nodes())
    }

    /// The word of the 4 KiB page around `iova` below `top`, which comes from this table; see [`Top::word`].
    #[inline(always)]
    #[must_use]
    pub fn page_word<'t>(&'t self, top: Top<'t>, iova: u64) -> Option<&'t AtomicU64> {
        top.word(self.memory.nodes(), iova)
    }

    /// The entry of the page around `iova` below `top`, which comes from this table; see [`Top::page`].
    #[inline(always)]
    #[must_use]
    pub fn page<'t>(&'t self, top: Top<'t>, iova: u64, access: Access) -> Option<u64> {
        top.page(self.memory.nodes(), iova, access)
    }

    /// As [`TableReader::page`], when the node is one of `near`, which this pin met in this table; see
    /// [`NearNodes::page`].
    #[inline(always)]
    #[must_use]
    pub fn page_near(&self, near: &NearNodes, iova: u64, access: Access) -> Option<u64> {
        near.page(self.memory.nodes(), iova, access)
    }

    /// Keeps the node around `iova` below `top` in `near`; see [`NearNodes::keep`].
    #[inline]
    pub fn keep_near(&self, near: &NearNodes, top: Top<'_>, iova: u64) -> bool {
        near.keep(top, self.memory.nodes(), iova)
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
