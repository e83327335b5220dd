//! Eventfds of other processes: are they real, and how to signal one without ever blocking.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread;

/// Signals that wait for the thread. More than there are rings would not tell the front-end anything new.
const PENDING_MAX: usize = 16;

/// Whether `fd` is an eventfd.
pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

/// Signals eventfds that other processes hold as well.
///
/// Whoever else holds one can clear its O_NONBLOCK and fill its counter at any moment, and a write then blocks for
/// good. So a thread of its own writes: all that can hang is that thread, and then signals are dropped.
#[derive(Debug, Default)]
pub(crate) struct Signaller {
    thread: Option<SyncSender<OwnedFd>>,
}

impl Signaller {
    /// Signals `fd` some time soon. Returns whether it is on its way.
    pub(crate) fn signal(&mut self, fd: OwnedFd) -> bool {
        if !is_eventfd(fd.as_fd()) {
            return false;
        }
        let sender = match &self.thread {
            Some(sender) => sender,
            None => match start() {
                Some(sender) => self.thread.insert(sender),
                None => return false,
            },
        };
        match sender.try_send(fd) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => false,
            Err(TrySendError::Disconnected(_)) => {
                self.thread = None;
                false
            }
        }
    }
}

fn start() -> Option<SyncSender<OwnedFd>> {
    let (sender, receiver) = sync_channel::<OwnedFd>(PENDING_MAX);
    let run = move || {
        for fd in receiver {
            // An Err means that the counter is full, and a full counter is a signal that was not taken yet.
            let _ = rustix::io::write(&fd, &1_u64.to_ne_bytes());
        }
    };
    thread::Builder::new().name(String::from("iotlbd-signal")).spawn(run).ok().map(|_| sender)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

    #[test]
    fn only_eventfds_are_eventfds() {
        let real = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        assert!(is_eventfd(real.as_fd()));
        let file = fs::File::open("/dev/null").expect("opens");
        assert!(!is_eventfd(file.as_fd()));
        let (reader, _writer) = std::io::pipe().expect("pipe");
        assert!(!is_eventfd(reader.as_fd()));
    }

    #[test]
    fn a_full_blocking_eventfd_does_not_hang_the_caller() {
        let full = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("fills");
        let mut signaller = Signaller::default();
        let sent = (0..100).filter(|_| signaller.signal(full.try_clone().expect("duplicates"))).count();
        assert!((1..=PENDING_MAX + 1).contains(&sent), "{sent} on their way");
        // Empties the counter, which is full and so cannot block the read; the thread goes on and ends with its sender.
        let mut value = [0; 8];
        rustix::io::read(&full, &mut value).expect("reads");
    }

    #[test]
    fn a_signal_arrives() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
        assert!(Signaller::default().signal(fd.try_clone().expect("duplicates")));
        let watchdog = Timespec { tv_sec: 30, tv_nsec: 0 };
        let mut watched = [PollFd::new(&fd, PollFlags::IN)];
        assert_eq!(poll(&mut watched, Some(&watchdog)).expect("polls"), 1);
    }
}
