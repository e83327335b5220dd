//! Control messages. Descriptors travel beside a message; which ones, and in what order, is said at each variant.

use serde::{Deserialize, Serialize};

/// The first words of a worker's HELLO; anything else on the socket is not a worker.
pub const HELLO_MAGIC: u64 = u64::from_le_bytes(*b"iotlbHEL");

/// Version of the control messages. Bumped with every change of what is said or how; the layouts of shared memory have
/// a version of their own, [`crate::layout::LAYOUT_VERSION`].
pub const CONTROL_VERSION: u32 = 1;

/// Longest device name and worker label, in bytes.
pub const NAME_MAX: usize = 64;

/// Longest reason, in bytes. See [`clip_reason`].
pub const REASON_MAX: usize = 256;

/// Most queues in one claim: as many as a device can have.
pub const QUEUES_MAX: usize = crate::layout::table::QUEUE_CAPACITY;

/// Makes any text fit for a `reason` field: control characters become spaces, and what is over [`REASON_MAX`] bytes is
/// cut off between two characters.
#[must_use]
pub fn clip_reason(text: &str) -> String {
    let mut reason: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    reason.truncate(reason.floor_char_boundary(REASON_MAX));
    reason
}

/// What a worker says first. Descriptor: a pidfd of the worker's own process, so that the daemon can see that the
/// process that talks is the process whose death it will be told of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`HELLO_MAGIC`].
    pub magic: u64,
    /// [`CONTROL_VERSION`] of the worker's build.
    pub control_version: u32,
    /// [`crate::layout::LAYOUT_VERSION`] of the worker's build.
    pub layout_version: u32,
    /// [`crate::layout::LAYOUT_HASH`] of the worker's build.
    pub layout_hash: u64,
    /// Device to attach to; empty = the only one. At most [`NAME_MAX`] bytes.
    pub device: String,
    /// Free text for status output. At most [`NAME_MAX`] bytes.
    pub label: String,
}

/// Worker to daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerMessage {
    /// Attach. Descriptor: pidfd.
    Hello(Hello),
    /// Lease these queues, at most [`QUEUES_MAX`]; answered by one [`DaemonMessage::Lease`] or
    /// [`DaemonMessage::LeaseRefused`] each, unless the queue is released before.
    ClaimQueues {
        /// Names the claim, and the leases that come of it, in all that is said of them. The worker never uses a number
        /// twice on one connection: what is still on its way of a former lease must not be taken for a new one.
        claim: u64,
        /// Ring indexes.
        queues: Vec<u16>,
    },
    /// Give a queue back. The worker has stopped touching it. Without effect when it is not leased to this worker under
    /// this claim.
    ReleaseQueue {
        /// Ring index.
        queue: u16,
        /// Which lease of it ends.
        claim: u64,
    },
    /// All regions up to this memory-map generation are mapped, removed ones unmapped.
    Mapped {
        /// The generation.
        generation: u64,
    },
    /// The answer to [`DaemonMessage::Revoke`]: no memory of the guest is reachable any more.
    Revoked,
    /// The ring named an address that was denied, or was otherwise broken; the daemon signals the ring's error eventfd.
    QueueError {
        /// Ring index.
        queue: u16,
        /// For the log. At most [`REASON_MAX`] bytes, see [`clip_reason`].
        reason: String,
    },
}

/// A region of guest memory to map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Names the region until it is removed.
    pub id: u64,
    /// Where in the arena: targets of translations are relative to the arena. Page aligned.
    pub arena_offset: u64,
    /// Guest physical address, for the dirty log.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Offset in the descriptor.
    pub file_offset: u64,
}

/// The answer to a HELLO. Descriptors: table, worker segment, liveness page, doorbell eventfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Which worker this is, as the daemon names it in logs and status.
    pub worker: u32,
    /// Never used twice.
    pub incarnation: u64,
    /// Name of the device.
    pub device: String,
    /// Size of the table segment in bytes.
    pub table_size: u64,
    /// Size of the worker segment in bytes.
    pub segment_size: u64,
    /// Byte offset of the liveness word in its page.
    pub liveness_offset: u32,
    /// Address space to reserve for guest memory, in bytes.
    pub arena_size: u64,
    /// Longest a miss stays unanswered.
    pub miss_timeout_ms: u32,
    /// Rings the device has.
    pub queues: u16,
}

/// A queue that now belongs to the worker. Descriptors: kick, call, err, in this order, those that the flags name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLease {
    /// Ring index.
    pub queue: u16,
    /// The claim that this answers, or whose lease it updates.
    pub claim: u64,
    /// A kick descriptor comes along; without one the ring is to be polled, or is not set up yet.
    pub kick: bool,
    /// A call descriptor comes along; without one the driver polls.
    pub call: bool,
    /// An error descriptor comes along.
    pub err: bool,
}

/// Why a worker is not attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The builds do not fit.
    Layout {
        /// The daemon's version.
        version: u32,
        /// The daemon's hash.
        hash: u64,
    },
    /// No device of that name.
    NoSuchDevice,
    /// As many workers as the daemon was started for.
    Full,
    /// The pidfd is missing, or is not that of the process behind the socket.
    Pidfd,
    /// The first message was not a HELLO, or not a valid one.
    NotAWorker,
    /// This worker stalled before and may not come back.
    Banned,
    /// Out of memory or descriptors.
    Exhausted {
        /// Operating system's words. At most [`REASON_MAX`] bytes, see [`clip_reason`].
        reason: String,
    },
    /// The builds speak different versions of these messages.
    Control {
        /// The daemon's [`CONTROL_VERSION`].
        version: u32,
    },
}

/// Daemon to worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DaemonMessage {
    /// Attached.
    Welcome(Welcome),
    /// Not attached; the socket closes.
    Refused(Refusal),
    /// Map this. Descriptor: the region's memory.
    AddRegion(RegionInfo),
    /// Unmap that; no reader can reach it any more.
    RemoveRegion {
        /// Which.
        id: u64,
    },
    /// All changes up to this memory-map generation were sent. Answered by [`WorkerMessage::Mapped`].
    MemoryMap {
        /// The generation.
        generation: u64,
    },
    /// A queue now belongs to the worker, or one that does got other descriptors. To be ignored unless the worker has,
    /// or waits for, the queue under the claim that it names. Replaces what was sent before; when the call descriptor
    /// changed the worker signals the new one once.
    Lease(QueueLease),
    /// The queue was claimed but is another worker's, or does not exist; or it is taken back.
    LeaseRefused {
        /// Ring index.
        queue: u16,
        /// The claim that this answers, or whose lease ends.
        claim: u64,
        /// For the log. At most [`REASON_MAX`] bytes, see [`clip_reason`].
        reason: String,
    },
    /// Stop reaching guest memory now; answer [`WorkerMessage::Revoked`].
    Revoke,
}
