//! Which process a worker is, and what can be done to it.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::fs::{fstat, fstatfs};
use rustix::process::{Signal, pidfd_send_signal};

use super::poller::is_readable;

/// The file system of pidfds that have an inode each (`PID_FS_MAGIC` of `linux/magic.h`).
const PIDFS_MAGIC: i64 = 0x5049_4446;
/// What the kernel says of a pidfd fits many times.
const FDINFO_MAX: u64 = 4096;

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
    /// It cannot be kept.
    #[error("the pidfd cannot be duplicated: {0}")]
    Copy(io::Error),
    /// The peer cannot be named.
    #[error("the kernel does not name the process behind the socket: {0}")]
    Peer(io::Error),
}

impl ProcessError {
    /// Whether there was no room for the pidfd, in this process or on the machine: that says nothing about the peer.
    pub(crate) fn is_exhausted(&self) -> bool {
        let ProcessError::Peer(error) = self else { return false };
        matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM))
    }
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
        sent: Option<BorrowedFd<'_>>,
        socket: impl AsFd,
    ) -> Result<Process, ProcessError> {
        let sent = sent.ok_or(ProcessError::Missing)?;
        if !is_pidfd(sent) {
            return Err(ProcessError::NotAPidfd);
        }
        let Some(peer) = peer else {
            let sent_pid = pid_of(sent).ok_or(ProcessError::NotAPidfd)?;
            // Without the kernel's word the numbers are all there is. 0: a process of another pid namespace.
            let credentials = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)
                .map_err(|error| ProcessError::Peer(error.into()))?;
            if credentials.pid() != 0 && sent_pid > 0 && i64::from(credentials.pid()) != sent_pid {
                return Err(ProcessError::Another);
            }
            return Ok(Process { pidfd: sent.try_clone_to_owned().map_err(ProcessError::Copy)? });
        };
        if !same(peer.as_fd(), sent) {
            return Err(ProcessError::Another);
        }
        Ok(Process { pidfd: peer })
    }

    /// Whatever process, for tests.
    #[cfg(test)]
    pub(crate) fn unverified(pidfd: OwnedFd) -> Process {
        Process { pidfd }
    }

    /// The descriptor, for who closes it: it may be the worker's own.
    pub(crate) fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// Whether it has ended.
    pub(crate) fn is_dead(&self) -> bool {
        is_readable(&self.pidfd)
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

/// Whether a peer's pidfd and what came with HELLO name one process. Since Linux 6.9 each process has an inode of its
/// own; before, all pidfds share one, and the process numbers decide.
fn same(peer: BorrowedFd<'_>, sent: BorrowedFd<'_>) -> bool {
    let (Ok(a), Ok(b)) = (fstat(peer), fstat(sent)) else { return false };
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
        && (fstatfs(peer).is_ok_and(|system| system.f_type == PIDFS_MAGIC) || pid_of(peer) == pid_of(sent))
}

/// Whether `fd` is a pidfd, by its name: nothing else can be asked of what a stranger sent before it is known what that
/// is. The file system of a stranger answers `fstat` when it likes, and the text about an epoll set waits for a lock
/// that whoever sleeps in the set may hold.
fn is_pidfd(fd: BorrowedFd<'_>) -> bool {
    // Linux 6.9.0 says `pidfd:[123]`, all others the first. The name of a file starts with a slash.
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).is_ok_and(|name| {
        let name = name.as_os_str().as_bytes();
        name == b"anon_inode:[pidfd]" || name.starts_with(b"pidfd:[")
    })
}

/// The process number a pidfd shows here: 0 for a process of a foreign pid namespace, -1 for one that has ended.
/// `None`: there is none where it should be.
///
/// Only for a kernel that does not tell processes apart by inodes: the locks on a descriptor are listed before the
/// number, and the kernel puts the whole list together, however little of it is read.
fn pid_of(pidfd: BorrowedFd<'_>) -> Option<i64> {
    let mut bytes = Vec::new();
    let info = fs::File::open(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    info.take(FDINFO_MAX).read_to_end(&mut bytes).ok()?;
    let line = str::from_utf8(&bytes).ok()?.lines().find_map(|line| line.strip_prefix("Pid:"))?;
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
        let process = Process::verified(known, Some(own().as_fd()), &a).expect("the same process");
        assert!(!process.is_dead());
    }

    #[test]
    fn another_process_or_none_is_not() {
        let (a, _b) = UnixStream::pair().expect("pair");
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("starts");
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("small")).expect("not 0");
        let other = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
        let wrong = Process::verified(peer(&a).expect("answers"), Some(other.as_fd()), &a);
        child.kill().expect("killed");
        child.wait().expect("ended");
        assert!(matches!(wrong, Err(ProcessError::Another)));
        let missing = Process::verified(peer(&a).expect("answers"), None, &a);
        assert!(matches!(missing, Err(ProcessError::Missing)));
        let file = OwnedFd::from(fs::File::open("/dev/null").expect("opens"));
        let no_pidfd = Process::verified(peer(&a).expect("answers"), Some(file.as_fd()), &a);
        assert!(matches!(no_pidfd, Err(ProcessError::NotAPidfd)));
    }

    #[test]
    fn a_kernel_that_does_not_name_the_peer_leaves_its_number() {
        let (a, _b) = UnixStream::pair().expect("pair");
        Process::verified(None, Some(own().as_fd()), &a).expect("the same number");
        let init = pidfd_open(Pid::INIT, PidfdFlags::empty()).expect("pidfd");
        assert!(matches!(Process::verified(None, Some(init.as_fd()), &a), Err(ProcessError::Another)));
        assert_eq!(pid_of(own().as_fd()), Some(i64::from(getpid().as_raw_pid())));
    }
}
