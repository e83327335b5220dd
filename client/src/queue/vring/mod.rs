//! The device side of a split virtqueue behind an IOMMU, where a missing translation is an answer and not an accident.
//!
//! # Why it is ours
//!
//! `virtio_queue::Queue` knows no misses: a descriptor it cannot read becomes an *empty chain that is already
//! popped*, a buffer page that is missing shows up half-way through the copy, and a missing indirect table ends the
//! chain early. Behind an IOMMU all three are everyday events, since every page starts out unknown. So this ring
//! translates a **whole chain before anything is consumed**. When a page is missing it says which ones
//! ([`RingFault::Miss`]: all of this chain and, as a read-ahead, of the chains posted behind it, to be asked
//! for in one batch) and nothing has changed: ask, then try again. (Workers that prefer `virtio_queue::Queue` can
//! run it over a guard, when they resolve ring and tables first.)
//!
//! # Life of a ring
//!
//! ```text
//! Vring::begin(&guard, record, features) -> Burst      one a pin: checks what changed, translates the tables
//!     burst.next_chain()  -> Chain                     whole, translated, checked
//!     burst.complete(chain, written)                   used element written, not yet visible
//!     burst.publish()     -> needs a call?             one store of used.idx for all completed chains
//!     burst.enable_kick() -> more work already there?
//! ```
//!
//! A [`Burst`] and its chains borrow the guard, so no pointer into guest memory outlives the pin. Between pins the
//! ring keeps the addresses of its three tables, keyed by the removal, session and queue generation and the attachment
//! that they are of; `begin` compares the key *after* the pin, which is what makes keeping them sound: whatever was
//! unlinked before the pin shows in the removal generation, whatever is unlinked later waits for the unpin, and another
//! attachment, which has the same table and generations but memory elsewhere, is another source.
//!
//! # Position
//!
//! The ring works in order: chains are completed in the order they were taken, and a chain that was taken and not
//! completed goes back when the burst ends. So `used.idx` in guest memory is the whole state. It is the *commit
//! point*: a successor of a killed worker, or a ring that was stopped and started, resumes from it. Only where the
//! front-end lets the device write the used ring but not read it does the base in the queue's record count, which the
//! daemon keeps: what SET_VRING_BASE said, and then how far each worker came that left the queue. `begin` asks the used
//! ring each time, since nothing else says that another worker had the queue in between; so what a forgotten burst
//! completed and did not publish is taken again.
//!
//! # What the driver may do
//!
//! Anything. Guest memory is read with atomics and volatile copies, every descriptor is copied once and then
//! checked, walks are bounded by the ring size, and nonsense ends in [`RingFault::Broken`] until the ring is set up
//! anew. Section numbers in this module are those of the virtio 1.2 specification.

mod burst;
mod chain;
mod event;
mod fault;
mod memory;
mod ring;
mod table;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod walk;

pub use burst::Burst;
pub use chain::Chain;
pub use fault::{Broken, Miss, MissPlace, MissSet, RingFault};
pub use memory::{Generations, RawPiece, RingMemory, Source};
pub use ring::{Limits, Vring};
