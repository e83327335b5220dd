//! The segment one worker shares with the daemon: reader slots, miss cells, progress words, counters.
//!
//! A miss is a [`cell`]: the worker fills it and sets its bit in the posted bitmap, the daemon takes a copy, and the
//! answer comes back through the same cell. There is no queue that could fill up, overtake or be corrupted: a bit is
//! set or not, and a cell a worker scribbles over is that worker's own miss.

pub mod cell;
#[cfg(not(loom))]
pub mod segment;

pub use cell::{Answer, MissRequest};
#[cfg(not(loom))]
pub use segment::{SegmentError, WorkerSegment};
