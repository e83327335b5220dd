//! Worker side of iotlbd: translate I/O virtual addresses with plain loads.
//!
//! A worker attaches to one device of a running daemon, makes a [`Reader`] for each of its threads, and then, for each
//! burst of work, pins, translates, copies and unpins. Nothing of that is a system call.
//!
//! ```no_run
//! use iotlb_client::{Access, AttachOptions, Attachment, Fault};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let attachment = Attachment::connect("/run/iotlbd/control.sock".as_ref(), &AttachOptions::default())?;
//! let mut reader = attachment.reader()?;
//! let mut bytes = [0_u8; 64];
//! loop {
//!     let fault = match reader.pin()?.read(0x1000, &mut bytes) {
//!         Ok(()) => break,
//!         Err(fault) => fault,
//!     };
//!     // The guard is gone: only now may this thread wait.
//!     match fault {
//!         Fault::Miss { iova, access } => reader.resolve(iova, 1, access, 1000)?,
//!         Fault::Remapping => assert!(reader.wait_mapped(1000)),
//!         Fault::Invalid => return Err("wrapped or empty range".into()),
//!     }
//! }
//! # Ok(()) }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`attach`] | the handshake, and the [`Attachment`] it yields |
//! | [`reader`] | one thread's right to pin |
//! | [`guard`] | a pin: everything that may be done with guest memory |
//! | [`segments`] | what a translation yields |
//! | [`miss`] | asking the daemon for what is not in the table |
//! | [`memory`] | `vm_memory::GuestMemory` for a guard |
//! | `net` | the reference worker `iotlb-net`; a default feature |
//! | [`queue`] | leased virtqueues and their descriptors |
//! | [`thread_pins`] | how many pins this thread holds, over all devices |
//!
//! # Rules a worker keeps
//!
//! - Never wait for anything while pinned: the guest's CPUs may stand still until the pin is gone.
//! - On guest memory only plain copying; no system call that lives longer than the pin (`O_DIRECT`, AIO, `io_uring`,
//!   `MSG_ZEROCOPY`, `vmsplice`): bounce instead.
//! - Pins are not async-signal-safe: never pin in a signal handler.
//! - Guest memory changes under the reader's hands. Copy first, check the copy.
//! - A forked child may drop what it inherited, which leaves its parent's alone, and do nothing else with it. It must
//!   not even drop a guard, which unpins in memory that is not there: never fork while pinned.

mod arena;
pub mod attach;
mod burst;
mod control;
mod eventfd;
pub mod guard;
pub mod memory;
pub mod miss;
#[cfg(feature = "net")]
pub mod net;
#[cfg(test)]
#[path = "../../tests/src/not_tested.rs"]
mod not_tested;
pub mod queue;
pub mod reader;
pub mod segments;
mod shared;
pub mod thread_pins;

pub use attach::{AttachError, AttachOptions, Attachment};
pub use guard::{Fault, Guard};
pub use iotlb_proto::access::Access;
pub use iotlb_proto::socket::address::AddressError;
pub use iotlb_proto::table::QueueRecord;
pub use iotlb_proto::worker::Answer;
pub use miss::{RequestError, ResolveError, Ticket};
pub use queue::{ClaimError, Queue};
pub use reader::{PinError, Reader, ReaderError};
pub use segments::{Segment, Segments};
