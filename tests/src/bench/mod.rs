//! Benchmarks against peers, in one process and one run.
//!
//! - [`measure`]: rounds of all contestants in turn, so that a noisy neighbour hits all of them; medians.
//! - [`groups`]: what is measured.
//! - [`report`]: rows with ratio and target, curves; as text, as JSON, as Markdown.
//! - [`chart`]: a curve as SVG.
//! - [`hardware`]: the machine a run came from.
//! - [`peers`]: what others use to translate: `vm_memory::Iotlb`, a B-tree, plain memory.
//! - [`daemon`]: what the daemon answers, and how fast.
//! - [`rig`]: a real daemon, a simulated front-end and an attached worker.
//! - [`session`]: a device behind a stream, without the loop around it.
//! - [`child`]: the benchmark program started once more, as a neighbour, a daemon or a worker.
//! - [`eviction`]: caches emptied of what is to be cold.

pub mod chart;
pub mod child;
pub mod daemon;
pub mod eviction;
pub mod groups;
pub mod hardware;
pub mod measure;
pub mod peers;
pub mod report;
pub mod rig;
pub mod session;
