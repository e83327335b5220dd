//! Asking the daemon for what is not in the table.
//!
//! A miss costs a few stores into the worker's segment, and a doorbell only when the daemon says that it sleeps.
//! [`Reader::request`](crate::Reader::request) and [`Reader::poll`](crate::Reader::poll) never block;
//! [`Reader::resolve`](crate::Reader::resolve) does.

pub(crate) mod cells;
mod resolve;
mod spin;
mod ticket;

use iotlb_proto::iova::{IovaRange, PAGE_SHIFT};
use iotlb_proto::layout::worker::CELL_PAGES_MAX;

pub(crate) use resolve::resolve;
pub(crate) use spin::{Spin, Spinning};
pub use ticket::Ticket;

use crate::reader::PinError;
use crate::shared::Down;

/// Why a range could not be made available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The front-end has no translation for a part of it, or none that allows the access.
    #[error("the front-end has no such translation")]
    Denied,
    /// No answer in time, or the translations went away as fast as they came.
    #[error("no translation in time")]
    TimedOut,
    /// The device is not running: no front-end, all rings stopped, or the session ended.
    #[error("the device is not running")]
    Stopped,
    /// The daemon died: attach anew.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away: attach anew.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
    /// The calling thread holds a pin, on this device or another, or a guard of the reader was forgotten. What it would
    /// wait for might wait for the pin.
    #[error("a thread that holds a pin must not wait")]
    Pinned,
    /// The range is empty or wraps, no access is wanted, or the memory could not be mapped.
    #[error("the range is empty, wraps, or lies in memory that could not be mapped, or no access is wanted")]
    Invalid,
}

impl From<Down> for ResolveError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => ResolveError::DaemonDead,
            Down::Revoked => ResolveError::Revoked,
        }
    }
}

impl From<PinError> for ResolveError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::DaemonDead => ResolveError::DaemonDead,
            PinError::Revoked => ResolveError::Revoked,
        }
    }
}

/// Why a request was not posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// As many requests are outstanding as there are cells: poll some of them first.
    #[error("too many requests are outstanding: poll some of them first")]
    Full,
    /// The range is empty, wraps or has more than [`CELL_PAGES_MAX`] pages, or no access is wanted.
    #[error("the range is empty, wraps or has more than {CELL_PAGES_MAX} pages, or no access is wanted")]
    Invalid,
    /// The daemon died: attach anew.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away: attach anew.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
}

impl From<Down> for RequestError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => RequestError::DaemonDead,
            Down::Revoked => RequestError::Revoked,
        }
    }
}

/// Pages that a range touches.
pub(crate) fn pages(range: IovaRange) -> u64 {
    (range.last() >> PAGE_SHIFT) - (range.first() >> PAGE_SHIFT) + 1
}
