//! What a device wants done.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iotlb_proto::control::RegionInfo;
use iotlb_proto::vhost_user::IotlbMessage;
use iotlb_proto::worker::Answer;

use super::event::WorkerId;

/// An output, to be carried out in order.
#[derive(Debug)]
pub enum Action {
    /// Write a reply on the main channel.
    Reply {
        /// Request number to repeat.
        request: u32,
        /// Body.
        payload: ReplyPayload,
    },
    /// From now on this is the back-end channel (non-blocking, `None`: there is none).
    UseBackEndChannel(Option<OwnedFd>),
    /// Write a message on the back-end channel.
    SendBackEnd {
        /// The message.
        message: IotlbMessage,
        /// Ask for a reply, which comes back as [`super::Event::MissReply`].
        need_reply: bool,
    },
    /// Answer a worker's miss.
    AnswerMiss {
        /// Who.
        worker: WorkerId,
        /// Which cell.
        cell: u16,
        /// Which request in it.
        ticket: u32,
        /// How it ended.
        answer: Answer,
    },
    /// Tell every worker that guest memory changed.
    Memory(MemoryChange),
    /// The descriptors of a queue changed: tell the worker that leases it. `call_changed`: it signals the new call
    /// once.
    QueueDescriptors {
        /// Ring index.
        queue: u16,
        /// The call descriptor is a new one.
        call_changed: bool,
    },
    /// Close a ring's descriptor. The worker that leased the ring had it too, so that may take long.
    CloseDescriptor(OwnedFd),
    /// The session is drained: close both channels and listen again.
    CloseFrontEnd {
        /// For the log.
        reason: String,
    },
}

/// A reply body.
#[derive(Debug, PartialEq, Eq)]
pub enum ReplyPayload {
    /// A number (also an acknowledgement: 0 = success).
    U64(u64),
    /// GET_VRING_BASE.
    VringState {
        /// Ring.
        index: u32,
        /// Available index.
        num: u32,
    },
    /// Raw bytes (GET_CONFIG, inflight), complete with their inner header.
    Bytes(Vec<u8>),
}

/// A change of guest memory.
#[derive(Debug, Clone)]
pub enum MemoryChange {
    /// Map this.
    Add(RegionInfo, Arc<OwnedFd>),
    /// Unmap that; drained already.
    Remove {
        /// Which.
        id: u64,
    },
    /// All changes up to this generation are out.
    Generation(u64),
}
