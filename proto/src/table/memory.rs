//! Where in the segment each part of a table is, checked once.

#[cfg(not(loom))]
pub use mapped::{TableError, TableMemory};
#[cfg(loom)]
pub use model::{TableError, TableMemory};

use super::Translation;
use super::side;
use crate::layout::table::{Node, SideCopy, TableHeader};
use crate::sync::Ordering;
use crate::tree::{self, TreeView};

/// Fewest tree nodes a table has: twice what an insert with ragged edges can take in the highest tree (30), so that one
/// finds room while as many again wait for a grace period.
pub const NODES_MIN: u32 = 64;
/// Most tree nodes a table has: 16 GiB of them, two thousand million leaves.
pub const NODES_MAX: u32 = 1 << 22;

impl TableMemory {
    /// The tree's shared words.
    #[must_use]
    pub fn tree(&self) -> TreeView<'_> {
        TreeView { root: &self.header().roots.tree, nodes: self.nodes() }
    }

    /// The leaf around `iova`, or the byte-granular range when the tree has none.
    #[inline]
    #[must_use]
    pub fn lookup(&self, iova: u64) -> Option<Translation> {
        match self.lookup_leaf(iova) {
            Some(leaf) => Some(leaf.translation(iova)),
            None => self.lookup_side(iova),
        }
    }

    /// The tree's leaf around `iova`: the fast path of [`TableMemory::lookup`].
    #[inline]
    #[must_use]
    pub fn lookup_leaf(&self, iova: u64) -> Option<tree::Leaf> {
        // Acquire pairs with the release stores of the root word in `tree::edit`.
        tree::lookup(self.header().roots.tree.load(Ordering::Acquire), self.nodes(), iova)
    }

    /// The byte-granular range around `iova`: what is left when the tree has no leaf.
    #[inline]
    #[must_use]
    pub fn lookup_side(&self, iova: u64) -> Option<Translation> {
        // Acquire pairs with the release store in `side::SideRanges::publish`.
        let word = self.header().roots.side.load(Ordering::Acquire);
        if side::count(word) == 0 { None } else { side::lookup(word, self.side(), iova) }
    }
}

#[cfg(not(loom))]
mod mapped {
    use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
    use std::sync::Arc;

    use super::{NODES_MAX, NODES_MIN, Node, Ordering, SideCopy, TableHeader};
    use crate::layout::table::{
        MAGIC, NODES_OFFSET, QUEUE_CAPACITY, QUEUES_OFFSET, QueueRecordWords, SIDE_COPIES, SIDE_OFFSET, segment_size,
    };
    use crate::layout::{LAYOUT_HASH, LAYOUT_VERSION};
    use crate::shm::{Mapping, MappingError, MemfdError, SharedObject, SharedSlice, memfd};
    use crate::table::LastNodes;
    use crate::tree::entry::NOTHING;

    /// Why a table could not be made or taken.
    #[derive(Debug, thiserror::Error)]
    pub enum TableError {
        /// The budget is too small or too large.
        #[error(
            "a table of {size} bytes is not possible: give it between {} and {} bytes",
            segment_size(NODES_MIN).unwrap_or(0),
            segment_size(NODES_MAX).unwrap_or(0)
        )]
        Size {
            /// What was asked for.
            size: u64,
        },
        /// Creating, sealing or checking the memory.
        #[error("table: {0}")]
        Memfd(#[from] MemfdError),
        /// Mapping it.
        #[error("table: {0}")]
        Mapping(#[from] MappingError),
        /// Its first words are not those of a table of this build.
        #[error("the table is of another kind or build ({field} is {found:#x}, expected {expected:#x})")]
        Identity {
            /// Which word.
            field: &'static str,
            /// What it should hold.
            expected: u64,
            /// What it holds.
            found: u64,
        },
    }

    /// A mapped table segment.
    #[derive(Debug)]
    pub struct TableMemory {
        header: SharedObject<TableHeader>,
        nodes: SharedSlice<Node>,
        /// The first of the nodes.
        nothing: SharedObject<Node>,
        side: SharedSlice<SideCopy>,
        queues: SharedSlice<QueueRecordWords>,
    }

    impl TableMemory {
        /// Creates a segment of at most `size` bytes, maps it for writing and seals it.
        pub(in crate::table) fn create(size: u64, generation: u64) -> Result<(TableMemory, OwnedFd), TableError> {
            let nodes = node_count(size).ok_or(TableError::Size { size })?;
            let bytes = segment_size(nodes).ok_or(TableError::Size { size })?;
            let fd = memfd::create("iotlbd-table", bytes as u64)?;
            let mapping = Mapping::read_write(fd.as_fd(), bytes)?;
            memfd::seal_read_only(fd.as_fd())?;
            let memory = TableMemory::view(mapping, nodes)?;
            let identity = &memory.header.identity;
            identity.magic.store(MAGIC, Ordering::Relaxed);
            identity.version.store(u64::from(LAYOUT_VERSION), Ordering::Relaxed);
            identity.layout_hash.store(LAYOUT_HASH, Ordering::Relaxed);
            identity.segment_size.store(bytes as u64, Ordering::Relaxed);
            identity.element_count.store(u64::from(nodes), Ordering::Relaxed);
            // Sending the descriptor orders these stores before a worker's loads.
            identity.generation.store(generation, Ordering::Relaxed);
            Ok((memory, fd))
        }

        /// Maps a received segment of `size` bytes for reading and checks that it is a table of this build.
        pub(in crate::table) fn open(fd: BorrowedFd<'_>, size: u64) -> Result<TableMemory, TableError> {
            let nodes = node_count(size).ok_or(TableError::Size { size })?;
            memfd::check_sealed(fd, size)?;
            let bytes = usize::try_from(size).map_err(|_| TableError::Size { size })?;
            let memory = TableMemory::view(Mapping::read_only(fd, bytes)?, nodes)?;
            let identity = &memory.header.identity;
            for (field, word, expected) in [
                ("magic", &identity.magic, MAGIC),
                ("version", &identity.version, u64::from(LAYOUT_VERSION)),
                ("layout hash", &identity.layout_hash, LAYOUT_HASH),
                ("size", &identity.segment_size, size),
                ("node count", &identity.element_count, u64::from(nodes)),
            ] {
                let found = word.load(Ordering::Relaxed);
                if found != expected {
                    return Err(TableError::Identity { field, expected, found });
                }
            }
            Ok(memory)
        }

        fn view(mapping: Mapping, nodes: u32) -> Result<TableMemory, TableError> {
            let mapping = Arc::new(mapping);
            Ok(TableMemory {
                header: SharedObject::new(&mapping, 0)?,
                nodes: SharedSlice::new(&mapping, NODES_OFFSET, nodes as usize)?,
                nothing: SharedObject::new(&mapping, NODES_OFFSET + NOTHING as usize * size_of::<Node>())?,
                side: SharedSlice::new(&mapping, SIDE_OFFSET, SIDE_COPIES)?,
                queues: SharedSlice::new(&mapping, QUEUES_OFFSET, QUEUE_CAPACITY)?,
            })
        }

        /// The header.
        #[inline]
        #[must_use]
        pub fn header(&self) -> &TableHeader {
            &self.header
        }

        pub(in crate::table) fn header_object(&self) -> &SharedObject<TableHeader> {
            &self.header
        }

        /// The tree's nodes.
        #[inline]
        #[must_use]
        pub fn nodes(&self) -> &[Node] {
            &self.nodes
        }

        pub(in crate::table) fn last_nodes(&self) -> LastNodes {
            LastNodes::new(self.nodes.clone(), self.nothing.part(|node| node))
        }

        /// The copies of the side array.
        #[inline]
        #[must_use]
        pub fn side(&self) -> &[SideCopy] {
            &self.side
        }

        /// The queue records.
        #[inline]
        #[must_use]
        pub fn queues(&self) -> &[QueueRecordWords] {
            &self.queues
        }
    }

    /// Nodes that fit a segment of `size` bytes.
    fn node_count(size: u64) -> Option<u32> {
        let nodes = size.checked_sub(NODES_OFFSET as u64)? / std::mem::size_of::<Node>() as u64;
        u32::try_from(nodes).ok().filter(|nodes| (NODES_MIN..=NODES_MAX).contains(nodes))
    }
}

#[cfg(loom)]
mod model {
    use super::{Node, SideCopy, TableHeader};
    use crate::layout::Identity;
    use crate::layout::table::{Epoch, QueueRecordWords, Roots, SIDE_CAPACITY, SIDE_COPIES, SideEntry, State, Wake};
    use crate::sync::{AtomicU64, count_fence};

    /// Nothing fails in a model.
    #[derive(Debug, thiserror::Error)]
    pub enum TableError {}

    /// A table on the heap, with loom's atomics. Shared between a writer and readers by reference count.
    #[derive(Debug, Clone)]
    pub struct TableMemory(std::sync::Arc<Parts>);

    #[derive(Debug)]
    struct Parts {
        header: TableHeader,
        nodes: Vec<Node>,
        side: Vec<SideCopy>,
        queues: Vec<QueueRecordWords>,
    }

    fn zero() -> AtomicU64 {
        AtomicU64::new(0)
    }

    impl TableMemory {
        /// A table of one queue and `nodes` nodes that can be used.
        #[must_use]
        pub fn model(nodes: u32) -> TableMemory {
            count_fence();
            let identity = Identity {
                magic: zero(),
                version: zero(),
                layout_hash: zero(),
                segment_size: zero(),
                element_count: zero(),
                generation: zero(),
            };
            let state = State {
                session_generation: zero(),
                memory_map_generation: zero(),
                queue_generation: zero(),
                acked_features: zero(),
                flags: zero(),
            };
            let header = TableHeader {
                identity,
                epoch: Epoch { word: AtomicU64::new(1), removal_generation: zero() },
                state,
                roots: Roots { tree: zero(), side: zero() },
                wake: Wake { doorbell_wanted: zero(), writer_sleeps: zero() },
            };
            let side_entry = |_| SideEntry { first: zero(), last: zero(), target: zero() };
            TableMemory(std::sync::Arc::new(Parts {
                header,
                nodes: (0..=nodes).map(|_| Node { entries: std::array::from_fn(|_| zero()) }).collect(),
                side: (0..SIDE_COPIES)
                    .map(|_| SideCopy { entries: std::array::from_fn::<_, SIDE_CAPACITY, _>(side_entry) })
                    .collect(),
                queues: vec![QueueRecordWords {
                    sequence: zero(),
                    flags: zero(),
                    size: zero(),
                    desc: zero(),
                    avail: zero(),
                    used: zero(),
                    base: zero(),
                    session_generation: zero(),
                }],
            }))
        }

        /// The header.
        #[must_use]
        pub fn header(&self) -> &TableHeader {
            &self.0.header
        }

        /// The tree's nodes.
        #[must_use]
        pub fn nodes(&self) -> &[Node] {
            &self.0.nodes
        }

        /// The copies of the side array.
        #[must_use]
        pub fn side(&self) -> &[SideCopy] {
            &self.0.side
        }

        /// The queue records.
        #[must_use]
        pub fn queues(&self) -> &[QueueRecordWords] {
            &self.0.queues
        }
    }
}
