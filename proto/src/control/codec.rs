//! Control messages as bytes: bincode with variable-length integers, one message a packet.
//!
//! bincode is pinned to exactly 2.0.1 in the workspace: 3.0 is a release that does not compile, and both sides must
//! agree on every byte, so a new encoding comes only with a deliberate change here. This is the only file that names
//! bincode.
//!
//! The order of variants and fields *is* the encoding. Variants are only ever appended, and neither
//! [`WorkerMessage::Hello`] nor [`DaemonMessage::Refused`] changes: builds that do not fit must still be able to say so
//! to each other. HELLO carries [`super::message::CONTROL_VERSION`], which every change here or in `message` bumps.
//!
//! The sender is hostile until its message has passed: no length is believed beyond [`MESSAGE_MAX`], bytes after the
//! message are an error, and texts are checked because they end up in logs and metrics.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::{
    DaemonMessage, HELLO_MAGIC, NAME_MAX, QUEUES_MAX, REASON_MAX, Refusal, RegionInfo, WorkerMessage,
};
use crate::iova::{IovaRange, PAGE_MASK};

/// Longest encoded message, in bytes. The longest real one is a claim of all queues, about 800 bytes.
pub const MESSAGE_MAX: usize = 4096;

/// Why a control message was not taken, or cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Longer than [`MESSAGE_MAX`].
    #[error("control message of {size} bytes, at most {MESSAGE_MAX} are accepted")]
    TooLong {
        /// Bytes there are.
        size: usize,
    },
    /// The bytes are no message of this protocol.
    #[error("control message cannot be decoded: {0}")]
    Decode(#[source] bincode::error::DecodeError),
    /// The message has no encoding within the limits.
    #[error("control message cannot be encoded: {0}")]
    Encode(#[source] bincode::error::EncodeError),
    /// Bytes follow the message.
    #[error("control message: {trailing} bytes follow the message")]
    Trailing {
        /// How many.
        trailing: usize,
    },
    /// The first word of a HELLO is not [`HELLO_MAGIC`].
    #[error("HELLO starts with {0:#018x}: whoever is on this socket is not a worker")]
    Magic(u64),
    /// A text is too long.
    #[error("control message: {field} is {len} bytes long, at most {max} are accepted")]
    TextTooLong {
        /// Which text.
        field: &'static str,
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        max: usize,
    },
    /// A text has characters that would break a log line.
    #[error("control message: {field} has control characters in it")]
    TextControl {
        /// Which text.
        field: &'static str,
    },
    /// More queues than a device can have.
    #[error("control message: {count} queues in one claim, at most {QUEUES_MAX} are accepted")]
    QueueCount {
        /// How many.
        count: usize,
    },
    /// A region that cannot be mapped.
    #[error("control message: region {id}: {field} {value:#x} with size {size:#x} is empty, off a page, or wraps")]
    Region {
        /// Name of the region.
        id: u64,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Size of the region.
        size: u64,
    },
}

/// What both kinds of control message have in common. Only this crate implements it.
pub trait ControlMessage: Serialize + DeserializeOwned + private::Sealed {
    /// Checks all that the types alone do not say: lengths of texts and lists, page alignment, the magic word.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    fn validate(&self) -> Result<(), ControlError>;
}

mod private {
    pub trait Sealed {}
    impl Sealed for super::WorkerMessage {}
    impl Sealed for super::DaemonMessage {}
}

/// Encodes a message.
///
/// # Errors
///
/// The message does not pass [`ControlMessage::validate`], or is longer than [`MESSAGE_MAX`].
pub fn encode<T: ControlMessage>(message: &T) -> Result<Vec<u8>, ControlError> {
    message.validate()?;
    let bytes = bincode::serde::encode_to_vec(message, config()).map_err(ControlError::Encode)?;
    // The limit in the configuration holds for decoding only.
    if bytes.len() > MESSAGE_MAX {
        return Err(ControlError::TooLong { size: bytes.len() });
    }
    Ok(bytes)
}

/// Decodes a message that must take up all of `bytes`.
///
/// # Errors
///
/// Anything in [`ControlError`]: the sender is broken or hostile, and nothing it says should be acted on.
pub fn decode<T: ControlMessage>(bytes: &[u8]) -> Result<T, ControlError> {
    if bytes.len() > MESSAGE_MAX {
        return Err(ControlError::TooLong { size: bytes.len() });
    }
    let (message, taken): (T, usize) =
        bincode::serde::decode_from_slice(bytes, config()).map_err(ControlError::Decode)?;
    match bytes.len().saturating_sub(taken) {
        0 => {}
        trailing => return Err(ControlError::Trailing { trailing }),
    }
    message.validate()?;
    Ok(message)
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MESSAGE_MAX>()
}

/// Whether HELLO can carry `name` as the name of a device or worker; `field` says which, in the error.
///
/// # Errors
/// It is too long, or has control characters.
pub fn check_name(field: &'static str, name: &str) -> Result<(), ControlError> {
    text(field, name, NAME_MAX)
}

fn text(field: &'static str, text: &str, max: usize) -> Result<(), ControlError> {
    if text.len() > max {
        return Err(ControlError::TextTooLong { field, len: text.len(), max });
    }
    if text.chars().any(char::is_control) {
        return Err(ControlError::TextControl { field });
    }
    Ok(())
}

fn region(region: &RegionInfo) -> Result<(), ControlError> {
    let size = region.size;
    let starts = [
        ("arena offset", region.arena_offset),
        ("guest address", region.guest_address),
        ("file offset", region.file_offset),
    ];
    for (field, value) in starts {
        if (value | size) & PAGE_MASK != 0 || IovaRange::from_len(value, size).is_none() {
            return Err(ControlError::Region { id: region.id, field, value, size });
        }
    }
    Ok(())
}

impl ControlMessage for WorkerMessage {
    fn validate(&self) -> Result<(), ControlError> {
        match self {
            WorkerMessage::Hello(hello) => {
                if hello.magic != HELLO_MAGIC {
                    return Err(ControlError::Magic(hello.magic));
                }
                check_name("device name", &hello.device)?;
                check_name("worker label", &hello.label)
            }
            WorkerMessage::ClaimQueues { claim: _, queues } => {
                if queues.len() > QUEUES_MAX {
                    return Err(ControlError::QueueCount { count: queues.len() });
                }
                Ok(())
            }
            WorkerMessage::QueueError { queue: _, reason } => text("reason", reason, REASON_MAX),
            WorkerMessage::ReleaseQueue { queue: _, claim: _ }
            | WorkerMessage::Mapped { generation: _ }
            | WorkerMessage::Revoked => Ok(()),
        }
    }
}

impl ControlMessage for DaemonMessage {
    fn validate(&self) -> Result<(), ControlError> {
        match self {
            DaemonMessage::Welcome(welcome) => check_name("device name", &welcome.device),
            DaemonMessage::Refused(Refusal::Exhausted { reason })
            | DaemonMessage::LeaseRefused { queue: _, claim: _, reason } => text("reason", reason, REASON_MAX),
            DaemonMessage::AddRegion(info) => region(info),
            DaemonMessage::Refused(_)
            | DaemonMessage::RemoveRegion { id: _ }
            | DaemonMessage::MemoryMap { generation: _ }
            | DaemonMessage::Lease(_)
            | DaemonMessage::Revoke => Ok(()),
        }
    }
}
