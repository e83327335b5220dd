//! What a call came to.

use std::cell::RefCell;
#[cfg(test)]
use std::ffi::CStr;
use std::ffi::{CString, c_char};
use std::fmt::Display;

use iotlb_client::reader::PinError;
use iotlb_client::{AddressError, Answer, AttachError, ClaimError, Fault, ReaderError, RequestError, ResolveError};

/// What a call came to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum iotlb_status {
    /// It was done.
    IOTLB_OK = 0,
    /// The table has no such translation: unpin, then iotlb_resolve or iotlb_request_new.
    IOTLB_MISS = 1,
    /// The guest's memory map is changing: unpin, then iotlb_wait_mapped.
    IOTLB_REMAPPING = 2,
    /// An argument makes no sense: a range that is empty, wraps, is too long, or lies in memory that could not be
    /// mapped; an access of unknown bits, or of none; a null pointer; text that is not UTF-8.
    IOTLB_INVALID = 3,
    /// The front-end has no such translation, or none that allows the access.
    IOTLB_DENIED = 4,
    /// It did not happen in time.
    IOTLB_TIMED_OUT = 5,
    /// The device is not running: no front-end, all rings stopped, or the session ended.
    IOTLB_STOPPED = 6,
    /// There is no answer yet, or was none in the time that was given: it may still come.
    IOTLB_PENDING = 7,
    /// There is no room: in the array that was given, for another reader, request or pin of this worker, or for another
    /// worker of the daemon.
    IOTLB_FULL = 8,
    /// The calling thread holds a pin, on this device or another, and must not wait.
    IOTLB_PINNED = 9,
    /// The reader is not pinned.
    IOTLB_NOT_PINNED = 10,
    /// The daemon died: release everything and attach anew.
    IOTLB_DAEMON_DEAD = 11,
    /// The daemon took this worker's access away: release everything and attach anew.
    IOTLB_REVOKED = 12,
    /// The daemon, this process or the control socket's mode says no: iotlb_last_error has the reason.
    IOTLB_REFUSED = 13,
    /// The system failed, or the daemon does not fit: iotlb_last_error has the reason.
    IOTLB_FAILED = 14,
    /// Nobody listens at the control socket, or not yet: iotlb_last_error has the reason.
    IOTLB_NO_DAEMON = 15,
    /// The descriptor that stops an attach is readable.
    IOTLB_INTERRUPTED = 16,
}

use iotlb_status::{
    IOTLB_DAEMON_DEAD, IOTLB_DENIED, IOTLB_FAILED, IOTLB_FULL, IOTLB_INTERRUPTED, IOTLB_INVALID, IOTLB_MISS,
    IOTLB_NO_DAEMON, IOTLB_NOT_PINNED, IOTLB_OK, IOTLB_PENDING, IOTLB_PINNED, IOTLB_REFUSED, IOTLB_REMAPPING,
    IOTLB_REVOKED, IOTLB_STOPPED, IOTLB_TIMED_OUT,
};

/// What a status means, in a few words. The text is there for as long as the library is.
///
/// The argument is an integer, so that one that is no status can be asked about too.
#[unsafe(no_mangle)]
pub extern "C" fn iotlb_status_text(status: i32) -> *const c_char {
    let text = match status {
        _ if status == IOTLB_OK as i32 => c"done",
        _ if status == IOTLB_MISS as i32 => c"no such translation in the table",
        _ if status == IOTLB_REMAPPING as i32 => c"the guest's memory map is changing",
        _ if status == IOTLB_INVALID as i32 => c"an argument makes no sense",
        _ if status == IOTLB_DENIED as i32 => c"the front-end has no such translation",
        _ if status == IOTLB_TIMED_OUT as i32 => c"not in time",
        _ if status == IOTLB_STOPPED as i32 => c"the device is not running",
        _ if status == IOTLB_PENDING as i32 => c"no answer yet",
        _ if status == IOTLB_FULL as i32 => c"no room",
        _ if status == IOTLB_PINNED as i32 => c"a thread that holds a pin must not wait",
        _ if status == IOTLB_NOT_PINNED as i32 => c"the reader is not pinned",
        _ if status == IOTLB_DAEMON_DEAD as i32 => c"the daemon died: attach anew",
        _ if status == IOTLB_REVOKED as i32 => c"the daemon revoked this worker's access: attach anew",
        _ if status == IOTLB_REFUSED as i32 => c"refused",
        _ if status == IOTLB_FAILED as i32 => c"failed",
        _ if status == IOTLB_NO_DAEMON as i32 => c"nobody listens there",
        _ if status == IOTLB_INTERRUPTED as i32 => c"stopped by the caller",
        _ => c"no status of this library",
    };
    text.as_ptr()
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Why the last call of this thread failed that is documented to say so: what, where, and what to do. Empty when none
/// did. The text is there until the next one fails.
#[unsafe(no_mangle)]
pub extern "C" fn iotlb_last_error() -> *const c_char {
    // An Err: the thread is at its end, and has destroyed the text.
    LAST.try_with(|text| text.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// A failure and its reason.
#[derive(Debug)]
pub(crate) struct Failure {
    status: iotlb_status,
    reason: String,
}

impl Failure {
    pub(crate) fn of(status: iotlb_status, reason: &dyn Display) -> Failure {
        Failure { status, reason: reason.to_string() }
    }

    /// A pointer that must not be null is.
    pub(crate) fn null(what: &str) -> Failure {
        Failure::of(IOTLB_INVALID, &format_args!("{what} is NULL"))
    }

    /// Text that C gave is no text.
    pub(crate) fn not_utf8(what: &str) -> Failure {
        Failure::of(IOTLB_INVALID, &format_args!("{what} is not UTF-8"))
    }

    /// A log level that the header does not know.
    pub(crate) fn level(level: u32) -> Failure {
        Failure::of(IOTLB_INVALID, &format_args!("{level} is no log level: use one of iotlb_log_level"))
    }

    /// Something that may wait, and is not done while the thread is pinned.
    pub(crate) fn pinned() -> Failure {
        Failure::of(IOTLB_PINNED, &"this thread holds a pin: unpin first")
    }

    /// A descriptor that is none.
    pub(crate) fn descriptor(fd: i32) -> Failure {
        Failure::of(IOTLB_INVALID, &format_args!("{fd} is no open descriptor"))
    }

    /// Keeps the reason for [`iotlb_last_error`].
    fn told(self) -> iotlb_status {
        // No reason has a NUL, but for what a caller's text may have had, which cannot.
        let text = CString::new(self.reason.replace('\0', " ")).unwrap_or_default();
        // An Err: as there.
        let _ = LAST.try_with(|last| last.replace(text));
        self.status
    }
}

/// What C hears of it.
pub(crate) fn told(result: Result<(), Failure>) -> iotlb_status {
    result.map_or_else(Failure::told, |()| IOTLB_OK)
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Failure {
        let status = match error {
            AttachError::Name(_) => IOTLB_INVALID,
            AttachError::TimedOut { .. } | AttachError::Address(AddressError::ConnectTimedOut { .. }) => {
                IOTLB_TIMED_OUT
            }
            AttachError::Address(AddressError::Connect { ref source, .. }) => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ECONNREFUSED) => IOTLB_NO_DAEMON,
                Some(libc::EACCES | libc::EPERM) => IOTLB_REFUSED,
                // A path through a file, say, or a socket of another kind.
                _ => IOTLB_FAILED,
            },
            AttachError::Address(AddressError::PathTooLong { .. } | AddressError::PathInvalid { .. }) => IOTLB_INVALID,
            AttachError::Interrupted => IOTLB_INTERRUPTED,
            AttachError::Full => IOTLB_FULL,
            AttachError::NoSuchDevice { .. }
            | AttachError::PidfdRefused
            | AttachError::NotAWorker
            | AttachError::Banned
            | AttachError::Exhausted { .. } => IOTLB_REFUSED,
            _ => IOTLB_FAILED,
        };
        Failure::of(status, &error)
    }
}

impl From<ReaderError> for Failure {
    fn from(error: ReaderError) -> Failure {
        let status = match error {
            ReaderError::TooMany => IOTLB_FULL,
            ReaderError::DaemonDead => IOTLB_DAEMON_DEAD,
            ReaderError::Revoked => IOTLB_REVOKED,
            _ => IOTLB_FAILED,
        };
        Failure::of(status, &error)
    }
}

impl From<ClaimError> for Failure {
    fn from(error: ClaimError) -> Failure {
        let status = match error {
            ClaimError::Refused { .. } => IOTLB_REFUSED,
            ClaimError::TimedOut { .. } => IOTLB_TIMED_OUT,
            ClaimError::DaemonDead => IOTLB_DAEMON_DEAD,
            ClaimError::Revoked => IOTLB_REVOKED,
            _ => IOTLB_FAILED,
        };
        Failure::of(status, &error)
    }
}

// Of what goes wrong again and again, the status alone has to do.

impl From<PinError> for iotlb_status {
    fn from(error: PinError) -> iotlb_status {
        match error {
            PinError::DaemonDead => IOTLB_DAEMON_DEAD,
            PinError::Revoked => IOTLB_REVOKED,
        }
    }
}

impl From<RequestError> for iotlb_status {
    fn from(error: RequestError) -> iotlb_status {
        match error {
            RequestError::Full => IOTLB_FULL,
            RequestError::Invalid => IOTLB_INVALID,
            RequestError::DaemonDead => IOTLB_DAEMON_DEAD,
            RequestError::Revoked => IOTLB_REVOKED,
        }
    }
}

impl From<Fault> for iotlb_status {
    fn from(fault: Fault) -> iotlb_status {
        match fault {
            Fault::Miss { .. } => IOTLB_MISS,
            Fault::Remapping => IOTLB_REMAPPING,
            Fault::Invalid => IOTLB_INVALID,
        }
    }
}

impl From<ResolveError> for iotlb_status {
    fn from(error: ResolveError) -> iotlb_status {
        match error {
            ResolveError::Denied => IOTLB_DENIED,
            ResolveError::TimedOut => IOTLB_TIMED_OUT,
            ResolveError::Stopped => IOTLB_STOPPED,
            ResolveError::DaemonDead => IOTLB_DAEMON_DEAD,
            ResolveError::Revoked => IOTLB_REVOKED,
            ResolveError::Pinned => IOTLB_PINNED,
            ResolveError::Invalid => IOTLB_INVALID,
        }
    }
}

impl From<Answer> for iotlb_status {
    fn from(answer: Answer) -> iotlb_status {
        match answer {
            Answer::Resolved => IOTLB_OK,
            Answer::Denied => IOTLB_DENIED,
            Answer::TimedOut => IOTLB_TIMED_OUT,
            Answer::Stopped => IOTLB_STOPPED,
            Answer::Invalid => IOTLB_INVALID,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_text_of_its_own_and_others_have_one_too() {
        // SAFETY: the texts are constants.
        let text = |status: i32| unsafe { CStr::from_ptr(iotlb_status_text(status)) };
        let texts: Vec<&CStr> = (0..=IOTLB_INTERRUPTED as i32).map(text).collect();
        for (at, one) in texts.iter().enumerate() {
            assert!(!texts[..at].contains(one) && *one != text(-1), "{one:?}");
        }
        assert_eq!(text(IOTLB_INTERRUPTED as i32 + 1), text(-1));
    }

    #[test]
    fn only_where_nobody_listens_is_there_no_daemon() {
        let status = |errno| {
            let (path, source) = ("/run/control.sock".into(), std::io::Error::from_raw_os_error(errno));
            Failure::from(AttachError::Address(AddressError::Connect { path, source })).status
        };
        assert_eq!([libc::ENOENT, libc::ECONNREFUSED].map(status), [IOTLB_NO_DAEMON; 2]);
        assert_eq!([libc::EACCES, libc::EPERM].map(status), [IOTLB_REFUSED; 2]);
        assert_eq!([libc::EPROTOTYPE, libc::ENOTDIR, libc::ELOOP].map(status), [IOTLB_FAILED; 3]);
    }

    #[test]
    fn the_last_reason_is_kept_for_its_thread() {
        // SAFETY: the thread does not fail between the call and the copy.
        let last = || unsafe { CStr::from_ptr(iotlb_last_error()) }.to_str().expect("UTF-8").to_owned();
        assert_eq!(last(), "");
        assert_eq!(Failure::of(IOTLB_FAILED, &"one\0two").told(), IOTLB_FAILED);
        assert_eq!(last(), "one two");
        assert_eq!(Failure::null("the path").told(), IOTLB_INVALID);
        assert_eq!(last(), "the path is NULL");
        assert_eq!(std::thread::spawn(last).join().expect("no panic"), "");
    }
}
