//! Why attaching failed.

use std::io;

use iotlb_proto::control::message::CONTROL_VERSION;
use iotlb_proto::control::{ControlError, Refusal};
use iotlb_proto::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use iotlb_proto::liveness::LivenessError;
use iotlb_proto::shm::MemfdError;
use iotlb_proto::socket::address::AddressError;
use iotlb_proto::table::TableError;
use iotlb_proto::worker::SegmentError;

use crate::arena::ArenaError;
use crate::control::channel::ChannelError;

/// Descriptors of a WELCOME: table, worker segment, liveness page, doorbell.
pub(super) const WELCOME_FDS: usize = 4;

/// Why attaching failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Device name or label cannot be said: too long, or with control characters.
    #[error("choose another name: {0}")]
    Name(#[source] ControlError),
    /// The path is not usable, nobody listens there, or this user may not connect.
    #[error("{0}: is iotlbd running with this --control-socket, and may this user open it?")]
    Address(#[source] AddressError),
    /// The process cannot get a descriptor of itself.
    #[error(
        "pidfd_open of this process failed: the daemon needs the pidfd to notice the worker's death; allow it in \
         the container's seccomp profile (Linux 5.3 and later): {0}"
    )]
    Pidfd(#[source] io::Error),
    /// The control socket broke in the handshake.
    #[error("the handshake with the daemon failed: {0}")]
    Channel(#[from] ChannelError),
    /// Waiting on the socket failed.
    #[error("waiting for the daemon's answer failed: {0}")]
    Poll(#[source] io::Error),
    /// The daemon did not answer in time.
    #[error("the daemon did not answer within {timeout_ms} ms: is it busy or stopped?")]
    TimedOut {
        /// [`crate::AttachOptions::timeout_ms`].
        timeout_ms: u32,
    },
    /// The caller wanted no more; see [`crate::Attachment::connect_unless`].
    #[error("attaching was given up before the daemon answered")]
    Interrupted,
    /// The two builds do not fit.
    #[error(
        "builds do not fit: this worker has layout version {our_version} (hash {our_hash:#018x}), the daemon has \
         version {daemon_version} (hash {daemon_hash:#018x}): use binaries of one release"
    )]
    Layout {
        /// [`LAYOUT_VERSION`] of this build.
        our_version: u32,
        /// [`LAYOUT_HASH`] of this build.
        our_hash: u64,
        /// The daemon's version.
        daemon_version: u32,
        /// The daemon's hash.
        daemon_hash: u64,
    },
    /// The two builds speak different versions of the control messages.
    #[error(
        "builds do not fit: this worker speaks control version {our_version}, the daemon speaks {daemon_version}: use \
         binaries of one release"
    )]
    Control {
        /// [`CONTROL_VERSION`] of this build.
        our_version: u32,
        /// The daemon's version.
        daemon_version: u32,
    },
    /// There is no such device.
    #[error("the daemon has no device {device:?} (an empty name needs exactly one device)")]
    NoSuchDevice {
        /// What was asked for.
        device: String,
    },
    /// All places are taken.
    #[error("the daemon serves as many workers as it was started for")]
    Full,
    /// The daemon does not believe the pidfd.
    #[error("the daemon refused the pidfd: it must be that of the process that connected")]
    PidfdRefused,
    /// The daemon did not understand the hello.
    #[error("the daemon took this process for no worker")]
    NotAWorker,
    /// A worker that stalled before may not come back.
    #[error("the daemon refuses this worker because it stalled before")]
    Banned,
    /// The daemon is out of something.
    #[error("the daemon is out of resources: {reason}")]
    Exhausted {
        /// The daemon's words.
        reason: String,
    },
    /// The first message was something else.
    #[error("the daemon answered HELLO with an unexpected message")]
    Unexpected,
    /// Not the four descriptors that belong to WELCOME.
    #[error("the daemon sent {count} descriptors with WELCOME instead of {WELCOME_FDS}")]
    Descriptors {
        /// How many came.
        count: usize,
    },
    /// A number in WELCOME cannot be.
    #[error(
        "the daemon's WELCOME says {field} = {value}, which this build cannot use (it has layout version \
         {LAYOUT_VERSION}, hash {LAYOUT_HASH:#018x})"
    )]
    Welcome {
        /// Which number.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A descriptor is not the sealed memory it should be.
    #[error("descriptor of the {what} is not a sealed memory file of {size} bytes: {source}")]
    Seals {
        /// Which descriptor.
        what: &'static str,
        /// The size it should have, in bytes.
        size: u64,
        /// What is wrong.
        source: MemfdError,
    },
    /// The table is not usable.
    #[error("the table cannot be used: {0} (this build has layout version {LAYOUT_VERSION}, hash {LAYOUT_HASH:#018x})")]
    Table(#[source] TableError),
    /// The worker segment is not usable.
    #[error(
        "the worker segment cannot be used: {0} (this build has layout version {LAYOUT_VERSION}, hash \
         {LAYOUT_HASH:#018x})"
    )]
    Segment(#[source] SegmentError),
    /// The liveness page is not usable.
    #[error("the liveness page cannot be used: {0}")]
    Liveness(#[source] LivenessError),
    /// The doorbell is not an event descriptor.
    #[error("the doorbell cannot be used: {0}")]
    Doorbell(#[source] io::Error),
    /// No address space for guest memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// No event descriptor for this process.
    #[error("cannot create an event descriptor: {0}")]
    Events(#[source] io::Error),
    /// The control thread did not start.
    #[error("cannot start the control thread: {0}")]
    Thread(#[source] io::Error),
}

/// What the daemon's refusal means; `device` is what was asked for.
pub(super) fn refused(refusal: Refusal, device: &str) -> AttachError {
    match refusal {
        Refusal::Layout { version, hash } => AttachError::Layout {
            our_version: LAYOUT_VERSION,
            our_hash: LAYOUT_HASH,
            daemon_version: version,
            daemon_hash: hash,
        },
        Refusal::Control { version } => AttachError::Control { our_version: CONTROL_VERSION, daemon_version: version },
        Refusal::NoSuchDevice => AttachError::NoSuchDevice { device: device.to_owned() },
        Refusal::Full => AttachError::Full,
        Refusal::Pidfd => AttachError::PidfdRefused,
        Refusal::NotAWorker => AttachError::NotAWorker,
        Refusal::Banned => AttachError::Banned,
        Refusal::Exhausted { reason } => AttachError::Exhausted { reason },
    }
}
