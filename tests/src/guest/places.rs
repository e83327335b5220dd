//! Which processor does what, where that is not left to the system.

use std::path::Path;

use rustix::process::Pid;

use super::GuestError;
use crate::processors::{bind_thread, first_two};

/// Two processors: with fewer there is nothing to choose, and what more are good for was not measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// For the rest of the emulator, among it the front-end, and for the daemon: of these two one sleeps while the
    /// other works.
    pub front_end: usize,
    /// For the guest's processor, which a thread of the emulator plays, and for the workers.
    pub guest: usize,
}

impl Places {
    /// The first two processors that this thread may use; none if there is only one.
    #[must_use]
    pub fn find() -> Option<Places> {
        first_two().map(|(front_end, guest)| Places { front_end, guest })
    }
}

/// Puts each thread of a process where `place` says, by the thread's name. Threads that come later stay where the one
/// is that starts them.
///
/// # Errors
/// There is no such process, or the system refuses.
pub(super) fn put(process: u32, mut place: impl FnMut(&str) -> usize) -> Result<(), GuestError> {
    let error = || GuestError::io("putting threads on their processors");
    for entry in Path::new("/proc").join(process.to_string()).join("task").read_dir().map_err(error())? {
        let thread = entry.map_err(error())?.path();
        let number = thread.file_name().and_then(|name| name.to_str()?.parse().ok()).and_then(Pid::from_raw);
        // A thread that has no name any more has ended.
        let (Some(number), Ok(name)) = (number, std::fs::read_to_string(thread.join("comm"))) else { continue };
        match bind_thread(number, place(&name)) {
            Err(ended) if ended.raw_os_error() == Some(libc::ESRCH) => {}
            bound => bound.map_err(error())?,
        }
    }
    Ok(())
}
