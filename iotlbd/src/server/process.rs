//! Which process a worker is, and what can be done to it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::fs::fstat;
use rustix::process::{Signal, pidfd_send_signal};

/// A process by its pidfd: never by its number, which every container counts from one.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
}

/// Why a worker's process cannot be watched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProcessError {
    /// None came with HELLO.
    #[error("no pidfd came along")]
    Missing,
    /// What came is no pidfd.
    #[error("the descriptor that came along is not a pidfd")]
    NotAPidfd,
    /// It is another process's.
    #[error("the pidfd is not that of the process that connected; a wrapper must not hold the connection")]
    Another,
    /// The peer cannot be named.
    #[error("the kernel does not name the process behind the socket: {0}")]
    Peer(io::Error),
}

/// The process that connected, as the kernel knows it. `Ok(None)`: the kernel has no `SO_PEERPIDFD` (before 6.5).
pub(crate) fn peer(socket: impl AsFd) -> Result<Option<OwnedFd>, ProcessError> {
    match getsockopt(&socket.as_fd(), sockopt::PeerPidfd) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(error) => Err(ProcessError::Peer(error.into())),
    }
}

impl Process {
    /// The process to watch: that behind the socket, if the pidfd that came with HELLO names the same one.
    pub(crate) fn verified(
        peer: Option<OwnedFd>,
        sent: Option<OwnedFd>,
        socket: impl AsFd,
    ) -> Result<Process, ProcessError> {
        let sent = sent.ok_or(ProcessError::Missing)?;
        let sent_pid = pid_of(sent.as_fd()).ok_or(ProcessError::NotAPidfd)?;
        let Some(peer) = peer else {
            // Without the kernel's word the numbers are all there is. 0: a process of another pid namespace.
            let credentials = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)
                .map_err(|error| ProcessError::Peer(error.into()))?;
            if credentials.pid() != 0 && sent_pid > 0 && i64::from(credentials.pid()) != sent_pid {
                return Err(ProcessError::Another);
            }
            return Ok(Process { pidfd: sent });
        };
        if !same(peer.as_fd(), sent.as_fd()) {
            return Err(ProcessError::Another);
        }
        Ok(Process { pidfd: peer })
    }

    /// Whether it has ended.
    pub(crate) fn is_dead(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// It is another user's, or in a pid namespace that is not below this one.
    pub(crate) fn kill(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.pidfd, Signal::KILL)?)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Whether two pidfds name one process. Since Linux 6.9 each process has an inode; before, all pidfds share one, and
/// the process numbers decide.
fn same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let (Ok(a_status), Ok(b_status)) = (fstat(a), fstat(b)) else { return false };
    (a_status.st_dev, a_status.st_ino) == (b_status.st_dev, b_status.st_ino) && pid_of(a) == pid_of(b)
}

/// The process number a pidfd shows here: 0 for a process of a foreign pid namespace, -1 for one that has ended.
/// `None`: no pidfd.
fn pid_of(fd: BorrowedFd<'_>) -> Option<i64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    fn own() -> OwnedFd {
        pidfd_open(getpid(), PidfdFlags::empty()).expect("pidfd of this process")
    }

    #[test]
    fn ones_own_pidfd_is_accepted() {
        let (a, _b) = UnixStream::pair().expect("pair");
        let known = peer(&a).expect("kernel answers");
        let process = Process::verified(known, Some(own()), &a).expect("the same process");
        assert!(!process.is_dead());
    }

    #[test]
    fn another_process_or_none_is_not() {
        let (a, _b) = UnixStream::pair().expect("pair");
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("starts");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("small")).expect("not 0");
        let other = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
        let wrong = Process::verified(peer(&a).expect("answers"), Some(other), &a);
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert!(matches!(wrong, Err(ProcessError::Another)));
        let missing = Process::verified(peer(&a).expect("answers"), None, &a);
        assert!(matches!(missing, Err(ProcessError::Missing)));
        let file = OwnedFd::from(fs::File::open("/dev/null").expect("opens"));
        let no_pidfd = Process::verified(peer(&a).expect("answers"), Some(file), &a);
        assert!(matches!(no_pidfd, Err(ProcessError::NotAPidfd)));
    }
}
