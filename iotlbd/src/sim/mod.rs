//! A vhost-user front-end in a box: what QEMU, its vIOMMU and a guest driver do, without QEMU.
//!
//! The demo, the container test and the tests drive the daemon with it. It encodes and decodes messages with code of
//! its own, not with the daemon's, so that a mistake in the codec cannot hide by being made on both sides.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`guest`] | guest memory: memfd regions, pages handed out and taken back |
//! | [`viommu`] | the simulated vIOMMU: which page an IOVA names, which IOVAs are free |
//! | [`channel`] | one end of a vhost-user socket, every wait with a watchdog |
//! | [`wire`] | message bodies as bytes |
//! | [`front_end`] | the session: handshake, start, stop, memory regions |
//! | [`iotlb`] | misses, strict invalidation, lazy flushes |
//! | [`ring`] | the driver's side of a split virtqueue |
//! | [`net`], [`packet`] | a virtio-net driver that pings |

pub mod channel;
pub mod error;
pub mod front_end;
pub mod guest;
pub mod iotlb;
pub mod net;
pub mod packet;
pub mod ring;
pub mod viommu;
pub mod wire;

#[cfg(test)]
mod tests;

pub use error::SimError;
pub use front_end::{FrontEnd, FrontEndOptions, RingAddresses};
pub use guest::Guest;
pub use iotlb::{IotlbStats, Wake};
pub use net::{PingSummary, Unmapping, VirtioNet};
pub use viommu::{IovaSpace, Viommu};
