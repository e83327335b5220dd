//! The vhost-user messages a back-end exchanges with a front-end, both channels.
//!
//! [`codec`] turns bytes into [`message::Request`]s, [`encode`](mod@encode) goes the other way; nothing here touches a
//! socket. Names and numbers are those of the vhost-user specification (QEMU `docs/interop/vhost-user.rst`).

pub mod codec;
pub mod encode;
pub mod features;
mod fields;
pub mod header;
pub mod iotlb;
pub mod message;

pub use codec::{DecodeError, decode, decode_backend, decode_reply_u64, decode_reply_vring_state};
pub use encode::{EncodeError, Outgoing, backend_iotlb, encode, reply_bytes, reply_u64, reply_vring_state};
pub use header::{BACKEND_IOTLB_MSG, Header, HeaderError, Incoming, RequestCode};
pub use iotlb::{IotlbError, IotlbKind, IotlbMessage};
pub use message::{MemoryRegion, RegionError, Request, VringAddress, VringFd, VringState};
