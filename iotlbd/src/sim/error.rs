//! What can go wrong in the simulated front-end.

use std::io;
use std::path::PathBuf;

/// Why a step of the simulated front-end failed. A time-out is always an error: no wait is endless.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The daemon's socket could not be reached.
    #[error(
        "cannot connect to {path}: {source}; is the daemon running with this --socket-path?",
        path = path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Operating system's words.
        source: io::Error,
    },
    /// The socket for the daemon to connect to could not be made.
    #[error("cannot listen on {path}: {source}", path = path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Operating system's words.
        source: io::Error,
    },
    /// A system call on behalf of the guest failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Operating system's words.
        source: io::Error,
    },
    /// A message could not be sent.
    #[error("cannot send {what}: {source}")]
    Send {
        /// The message.
        what: &'static str,
        /// Operating system's words.
        source: io::Error,
    },
    /// A message could not be received.
    #[error("cannot receive {what}: {source}")]
    Receive {
        /// What was waited for.
        what: &'static str,
        /// Operating system's words.
        source: io::Error,
    },
    /// The other side closed the connection.
    #[error("the daemon closed the connection while the front-end waited for {what}; its log says why")]
    Closed {
        /// What was waited for.
        what: &'static str,
    },
    /// The watchdog fired.
    #[error("nothing came within {timeout_ms} ms while the front-end waited for {what}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long, in ms.
        timeout_ms: u128,
    },
    /// The other side broke the protocol.
    #[error("protocol violation by the daemon: {what}")]
    Protocol {
        /// What came.
        what: String,
    },
    /// A request was answered with an error.
    #[error("the daemon refused {what} with status {value}")]
    Refused {
        /// The request.
        what: &'static str,
        /// Its answer.
        value: u64,
    },
    /// The daemon does not offer what the test needs.
    #[error("the daemon does not offer {what}")]
    Missing {
        /// The feature.
        what: &'static str,
    },
    /// The caller asked for something that makes no sense.
    #[error("wrong use of the simulator: {what}")]
    Usage {
        /// What.
        what: String,
    },
    /// The guest has no free page left.
    #[error("the simulated guest has no free page left")]
    OutOfPages,
    /// The vIOMMU has no free IOVA left.
    #[error("the simulated guest has no free IOVA left")]
    OutOfIovas,
    /// A device wrote something impossible into a ring, or sent a wrong packet.
    #[error("wrong answer on ring {queue}: {what}")]
    Ring {
        /// Which ring.
        queue: u16,
        /// What.
        what: String,
    },
}
