//! The signals that end the daemon, as a descriptor.
//!
//! SIGTERM and SIGINT always do. SIGHUP and SIGQUIT do unless they are ignored when the program starts: so says
//! `nohup`, or a script of what it puts in the background, that they are not for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use iotlb_proto::signals::stop_set;
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What one signal is in its descriptor, in bytes. Its number comes first, in four.
const RECORD_LEN: usize = 128;
/// Signals that can wait in the descriptor: one of each kind.
const RECORDS_MAX: usize = 4;

/// Blocks the signals that end the daemon in the calling thread, and the threads it starts from now on, and returns a
/// descriptor that is readable when one came. Call it before the first thread is started.
///
/// # Errors
/// The operating system refuses.
pub fn stop_signals() -> io::Result<OwnedFd> {
    let signals = stop_set();
    signals.thread_block()?;
    let fd = SignalFd::with_flags(&signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // SignalFd has no way to give up its descriptor, and a duplicate reads the same signals.
    fd.as_fd().try_clone_to_owned()
}

/// Takes what is there out of the stop descriptor, so that what comes next is seen. Returns whether it counts as being
/// told, so that the second time ends the wait for workers: all does but SIGHUP. Who closes a terminal or logs out has
/// that sent twice (by the system and by the shell), or together with SIGTERM, and did not ask for haste.
pub(super) fn take(stop: impl AsFd) -> bool {
    let mut records = [0; RECORD_LEN * RECORDS_MAX];
    // What else it may be (a pipe, an eventfd) is read in vain, or once.
    let len = rustix::io::read(stop, &mut records).unwrap_or(0);
    let (records, rest) = records[..len].as_chunks::<RECORD_LEN>();
    let hang_up = (Signal::SIGHUP as u32).to_ne_bytes();
    records.is_empty() || !rest.is_empty() || !records.iter().all(|record| record.starts_with(&hang_up))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_hang_up_does_not_count() {
        let record = |signal: Signal| {
            let mut record = [0; RECORD_LEN];
            record[..4].copy_from_slice(&(signal as u32).to_ne_bytes());
            record
        };
        let took = |bytes: &[u8]| {
            let (reader, writer) = std::io::pipe().expect("pipe");
            rustix::io::write(&writer, bytes).expect("room");
            drop(writer);
            take(reader)
        };
        assert!(!took(&record(Signal::SIGHUP)));
        assert!(took(&record(Signal::SIGTERM)));
        assert!(took(&[record(Signal::SIGHUP), record(Signal::SIGTERM)].concat()));
        // Somebody's pipe, which says what it says by its end or by any byte.
        assert!(took(&[]));
        assert!(took(&[1]));
    }
}
