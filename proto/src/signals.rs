//! The signals that end a program of ours, the same for the daemon, its demo and the reference worker.

use std::mem::MaybeUninit;

use nix::sys::signal::{SigSet, Signal};

/// SIGTERM and SIGINT; SIGHUP and SIGQUIT unless they are ignored, as `nohup` has it, or a script for what it puts in
/// the background. An ignored one must not be in the set: once it is blocked, a descriptor reports it like any other.
#[must_use]
pub fn stop_set() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    for signal in [Signal::SIGHUP, Signal::SIGQUIT] {
        if !is_ignored(signal) {
            signals.add(signal);
        }
    }
    signals
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call changes nothing and only writes the present one to the address given;
    // `action` is one, and outlives the call.
    let asked = unsafe { libc::sigaction(signal as libc::c_int, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call succeeded, so all of it was written.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
