//! A device as a pure state machine: [`event::Event`]s in, [`action::Action`]s out. No socket, no clock, no thread.
//!
//! The one rule it keeps: whatever the front-end takes away is unpublished first, then one grace period passes, then
//! the front-end gets its reply. What the front-end gives is published and acknowledged at once.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`event`], [`action`] | what goes in and what comes out |
//! | [`machine`] | the device: dispatch, the life of a session, workers' misses |
//! | [`config`] | what is offered to the front-end |
//! | `request` | the handlers of front-end requests |
//! | `iotlb` | UPDATE and INVALIDATE |
//! | `extents` | what each UPDATE covered, since an INVALIDATE takes it as a whole |
//! | `take` | jobs: what waits for a grace period, and how it goes on |
//! | `session` | what one front-end negotiated |
//! | `memory` | regions of guest memory: user address to arena offset |
//! | `ring` | vrings: when workers may touch them, and how far they got |
//! | `miss` | the miss engine |
//! | `held` | misses of sessions without IOMMU that wait |
pub mod action;
pub mod config;
pub mod event;
mod extents;
mod held;
mod iotlb;
pub mod machine;
mod memory;
mod miss;
mod request;
mod ring;
mod session;
mod take;
pub use action::{Action, MemoryChange, ReplyPayload};
pub use config::DeviceConfig;
pub use event::{Event, WorkerId};
pub use machine::{Counters, Device};
