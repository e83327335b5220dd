//! What can happen to a device.

use iotlb_proto::vhost_user::{DecodeError, Header, Request};
use iotlb_proto::worker::MissRequest;

/// Names an attached worker within a device: the registry's slot. Never reused while actions for it are queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId(pub u32);

/// An input.
#[derive(Debug)]
pub enum Event {
    /// A front-end connected. Only delivered when the former session was closed with [`super::Action::CloseFrontEnd`].
    FrontEndConnected,
    /// A request on the main channel. Only delivered while [`super::Device::accepts_requests`].
    Request {
        /// Its header, for the reply.
        header: Header,
        /// The request.
        request: Request,
    },
    /// A whole message came in step, but its content makes no sense: answered non-zero where a reply is due.
    BadRequest {
        /// Its header.
        header: Header,
        /// What is wrong.
        error: DecodeError,
    },
    /// The main channel is at its end or lost its framing. Also a take: drained before it is closed.
    FrontEndLost {
        /// For the log.
        reason: String,
    },
    /// The answer to the oldest unanswered miss on the back-end channel that asked for one.
    MissReply {
        /// 0 = done.
        value: u64,
    },
    /// The back-end channel is gone.
    BackEndLost,
    /// A worker posted a miss.
    Miss {
        /// Who.
        worker: WorkerId,
        /// Which cell.
        cell: u16,
        /// What.
        request: MissRequest,
    },
    /// A worker is gone: forget its misses.
    WorkerGone {
        /// Who.
        worker: WorkerId,
    },
    /// Every slot of every worker was seen at 0 or at least `epoch`.
    GraceCompleted {
        /// The epoch.
        epoch: u64,
    },
    /// There is time for a slice of work. Delivered again and again while [`super::Device::has_work`], other events in
    /// between.
    Continue,
    /// Time passed ([`super::Device::next_deadline_ns`] was reached).
    Tick,
}
