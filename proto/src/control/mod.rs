//! The messages between the daemon and its workers, over one `SOCK_SEQPACKET` socket each.

pub mod codec;
pub mod message;

pub use codec::{ControlError, ControlMessage, MESSAGE_MAX, check_name, decode, encode};
pub use message::{DaemonMessage, Hello, QueueLease, Refusal, RegionInfo, Welcome, WorkerMessage, clip_reason};
