//! What a server is told before it starts.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use iotlb_proto::layout::table::segment_size;
use iotlb_proto::table::memory::{NODES_MAX, NODES_MIN};

use super::inherit::FrontEndSocket;

/// Most queue pairs: what QEMU drives over one socket.
pub const QUEUE_PAIRS_MAX: u16 = 128;
/// Smallest table in bytes: all but the nodes, and the fewest nodes that a table has.
pub const TABLE_SIZE_MIN: u64 = segment_size(NODES_MIN).expect("64 nodes are far from 2^64 bytes") as u64;
/// Largest table in bytes. At 512 entries a node this holds 2^31 pages, 8 TiB of guest memory in 4 KiB entries.
pub const TABLE_SIZE_MAX: u64 = 16 << 30;
/// Most workers a daemon can be told to take. Each costs a segment, a pidfd, a socket and a doorbell, and the scan of
/// its slots in each grace period.
pub const MAX_WORKERS_LIMIT: u16 = 1024;

// It is told in KiB, and the largest one has no more nodes than a table can.
const _: () = assert!(TABLE_SIZE_MIN.is_multiple_of(1 << 10));
const _: () = assert!(TABLE_SIZE_MAX <= segment_size(NODES_MAX).expect("16 GiB") as u64);

/// How a server is to run.
#[derive(Debug)]
pub struct ServerConfig {
    /// What is served.
    pub device: DeviceKind,
    /// Name of the device, for workers that ask for one by name.
    pub device_name: String,
    /// Where the front-end comes from.
    pub front_end: FrontEndSource,
    /// Where workers attach.
    pub control_path: PathBuf,
    /// Permission bits of the control socket.
    pub control_mode: u32,
    /// A listening control socket that was handed in; `control_path` is then not touched.
    pub control_listener: Option<OwnedFd>,
    /// Bytes of the table segment.
    pub table_size: u64,
    /// Address space a worker reserves for guest memory, in bytes. Reserving costs nothing, and guests place memory and
    /// device windows in the first few TiB of their address space.
    pub arena_size: u64,
    /// Longest a miss stays unanswered.
    pub miss_timeout_ms: u32,
    /// What happens to workers that hold a reply back.
    pub stall: StallPolicy,
    /// Workers at a time, those included that lost their connection and still live.
    pub max_workers: usize,
    /// The loop never sleeps: it takes one processor for itself, and no worker ever makes a system call for a miss.
    pub busy_poll: bool,
    /// Where figures are written after each session and at the end.
    pub stats: Option<PathBuf>,
    /// The processor that the loop's thread is bound to.
    pub cpu: Option<usize>,
}

impl ServerConfig {
    /// The usual settings for a device.
    #[must_use]
    pub fn new(device: DeviceKind, front_end: FrontEndSource, control_path: PathBuf) -> ServerConfig {
        ServerConfig {
            device,
            device_name: String::from("net0"),
            front_end,
            control_path,
            control_mode: 0o660,
            control_listener: None,
            table_size: 16 << 20,
            arena_size: 4 << 40,
            miss_timeout_ms: 400,
            stall: StallPolicy::default(),
            max_workers: 64,
            busy_poll: false,
            stats: None,
            cpu: None,
        }
    }
}

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// virtio-net.
    Net {
        /// 1 to [`QUEUE_PAIRS_MAX`].
        queue_pairs: u16,
    },
}

/// Where the front-end comes from.
#[derive(Debug)]
pub enum FrontEndSource {
    /// A socket is created here.
    Path {
        /// Where.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A socket was handed in.
    Inherited(FrontEndSocket),
    /// None: only workers can come. Also what is left here when a server took the source.
    Taken,
}

/// What happens, and when, to a worker that a reply to the front-end waits for. A guest waits for that reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StallPolicy {
    /// It is reported.
    pub report_ms: u32,
    /// It is told to give up guest memory.
    pub revoke_ms: u32,
    /// It is killed, where the daemon may.
    pub kill_ms: u32,
}

impl Default for StallPolicy {
    fn default() -> StallPolicy {
        StallPolicy { report_ms: 100, revoke_ms: 1000, kill_ms: 5000 }
    }
}
