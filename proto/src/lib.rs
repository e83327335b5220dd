//! The contract between `iotlbd`, its workers and the front-end.
//!
//! Everything two processes must agree on lives here, and nothing else: no policy, no threads, no clocks.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`iova`], [`access`] | address ranges without overflow, permissions |
//! | [`sync`] | the one place atomics come from, so that loom can replace them |
//! | [`shm`] | sealed memfds and raw mappings: all `unsafe` that maps memory |
//! | [`layout`] | `repr(C)` of the table segment and the worker segment, versioned and const-asserted |
//! | [`epoch`] | pin, unpin and grace periods across processes |
//! | [`tree`] | the radix tree of translations and its node pool |
//! | [`table`] | the table segment as a whole: what the daemon writes and workers read |
//! | [`worker`] | the segment one worker shares with the daemon: slots, miss cells, progress |
//! | [`vhost_user`] | the front-end's messages, both channels |
//! | [`control`] | the messages between daemon and workers |
//! | [`socket`] | descriptor-safe sockets |
//! | [`liveness`] | the word that tells every worker that the daemon has died |
//! | [`signals`] | the signals that end a program |

#[cfg(not(target_pointer_width = "64"))]
compile_error!("iotlb-proto needs a 64-bit target: table words are 64 bits and arenas are large");

pub mod access;
pub mod epoch;
pub mod iova;
pub mod layout;
pub mod sync;
pub mod table;
pub mod tree;
pub mod worker;

#[cfg(not(loom))]
pub mod control;
#[cfg(not(loom))]
pub mod liveness;
#[cfg(not(loom))]
pub mod shm;
#[cfg(not(loom))]
pub mod signals;
#[cfg(not(loom))]
pub mod socket;
#[cfg(not(loom))]
pub mod vhost_user;
