//! SIGTERM and SIGINT as a descriptor.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Blocks SIGTERM and SIGINT in the calling thread, and the threads it starts from now on, and returns a descriptor
/// that is readable when one came. Call it before the first thread is started.
///
/// # Errors
/// The operating system refuses.
pub fn stop_signals() -> io::Result<OwnedFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // SignalFd has no way to give up its descriptor, and a duplicate reads the same signals.
    fd.as_fd().try_clone_to_owned()
}
