//! The table segment as a whole: what the daemon writes and workers read.
//!
//! One writer, the daemon ([`TableWriter`]), puts together the tree, the [`side`] array of byte-granular ranges, the
//! queue records, the generations and the grace-period bookkeeping. Any number of readers ([`TableReader`]) map the
//! same memory read-only. [`memory`] says where in the segment each part is.

#[cfg(not(loom))]
pub mod last;
pub mod memory;
#[cfg(not(loom))]
pub mod reader;
pub mod record;
pub mod side;
pub mod translation;
pub mod writer;

#[cfg(not(loom))]
pub use last::LastNodes;
pub use memory::{TableError, TableMemory};
#[cfg(not(loom))]
pub use reader::TableReader;
pub use record::QueueRecord;
pub use translation::Translation;
pub use writer::{NeedsGrace, TableConfig, TableStats, TableWriter};

pub use crate::tree::TargetRemoval;
