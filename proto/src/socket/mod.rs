//! Descriptor-safe sockets: every received descriptor is close-on-exec from birth, counted, and owned.
//!
//! [`stream`] carries vhost-user (both channels), [`packet`] the control messages, [`address`] finds the other side.

pub mod address;
mod ancillary;
mod glance;
pub mod packet;
mod payload;
mod send_queue;
pub mod stream;

pub use address::AddressError;
pub use packet::{PacketError, PacketListener, PacketSocket, ReceivedPacket};
pub use payload::Payload;
pub use stream::{MessageStream, Received, StreamError, StreamListener};
