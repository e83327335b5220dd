//! Signals through event descriptors, without waiting for the other side.
//!
//! That holds as long as nobody who has the same description undoes what [`adopt`] did: whether it blocks belongs to
//! the description, not to the descriptor. A write to a counter that is full would then sleep until somebody reads it,
//! and the system has no write to an event descriptor that says by itself not to wait. What this process or the daemon
//! made for the two of them nobody else has. A ring's call the front-end has, and each worker that had the queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};

/// A new event descriptor of this process.
pub(crate) fn create() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds one. `true` when the other side will see a signal: also when the counter was full already.
#[inline]
pub(crate) fn signal(fd: BorrowedFd<'_>) -> bool {
    loop {
        match rustix::io::write(fd, &1_u64.to_ne_bytes()) {
            Ok(_) => return true,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return errno == rustix::io::Errno::AGAIN,
        }
    }
}

/// As [`signal`], but looks first whether it would have to wait. A system call more, for who must not be caught by a
/// descriptor that was made to block. Only somebody who fills the counter just after the look still can; and a
/// front-end whose descriptor is something else, slow to be looked at, as it could also be slow to be closed.
pub(crate) fn signal_if_room(fd: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    match poll(&mut fds, Some(&now)) {
        // The counter is full, which is a signal.
        Ok(0) => true,
        // Also when the look failed: no counter is full but by somebody's doing.
        Ok(_) | Err(_) => signal(fd),
    }
}

/// Takes what is there.
pub(crate) fn clear(fd: BorrowedFd<'_>) {
    let mut counter = [0_u8; 8];
    // Nothing to take is as good as taken.
    let _ = rustix::io::read(fd, &mut counter);
}

/// Makes a received descriptor fit for [`signal`]: it must be no file, socket or pipe (a write of eight bytes into
/// one would do harm), and must not block. The latter others can undo.
pub(crate) fn adopt(fd: &OwnedFd) -> io::Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    // Event descriptors share an inode without a file type.
    if FileType::from_raw_mode(stat.st_mode) != FileType::Unknown {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an event descriptor"));
    }
    let flags = rustix::fs::fcntl_getfl(fd.as_fd())?;
    if !flags.contains(OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(fd.as_fd(), flags | OFlags::NONBLOCK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_counter_counts_as_signalled_and_never_blocks() {
        let fd = create().expect("an eventfd");
        rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).expect("the counter takes it");
        assert!(signal(fd.as_fd()));
        clear(fd.as_fd());
        clear(fd.as_fd());
    }

    #[test]
    fn only_event_descriptors_are_adopted() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        assert!(adopt(&OwnedFd::from(one)).is_err());
        let blocking = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        adopt(&blocking).expect("an event descriptor");
        assert!(rustix::fs::fcntl_getfl(&blocking).expect("flags").contains(OFlags::NONBLOCK));
    }
}
