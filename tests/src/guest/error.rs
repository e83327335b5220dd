//! What can go wrong around a guest.

use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

/// Why a guest, or something around it, did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// A file of a Debian package is not there.
    #[error("{} is missing: run tests/packages.sh", .0.display())]
    Asset(PathBuf),
    /// A file or folder of the run could not be made.
    #[error("cannot make {}: {source}", path.display())]
    Make {
        /// What was to be made.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source} (run tests/packages.sh if it is not installed)")]
    Start {
        /// Its name.
        program: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A program that should have done its work and ended well did not.
    #[error("{program} failed, {status}: {output}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote.
        output: String,
    },
    /// A program ended that should be running.
    #[error("{program} ended by itself, {status}")]
    Ended {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The watchdog: something did not happen in time.
    #[error("{what}: not within {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The test could not enter a network namespace of its own.
    #[error("cannot enter a network namespace: {0} (the guest tests need root, or CAP_SYS_ADMIN and CAP_NET_ADMIN)")]
    Namespace(nix::Error),
    /// A connection to the guest, or a wait for something, failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A command in the guest ended with another status than 0.
    #[error("guest: `{command}` ended with status {status}: {output}")]
    Command {
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it wrote.
        output: String,
    },
    /// Something ran and showed the wrong thing.
    #[error("{0}")]
    Check(String),
}

impl GuestError {
    /// Names what was done when the system refused.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> GuestError {
        let what = what.into();
        move |source| GuestError::Io { what, source }
    }
}
