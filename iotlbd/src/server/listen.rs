//! Sockets in the file system: a lock beside each, stale ones replaced, live ones left alone.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// Longest path a unix socket address holds, in bytes: `sun_path` less the final zero.
pub const PATH_MAX: usize = 107;

/// Connections that wait to be accepted. Few: a front-end comes alone, and workers are accepted at once.
const BACKLOG: i32 = 64;

/// Times the lock file is opened again because its former owner removed it at that moment.
const LOCK_ATTEMPTS: u32 = 16;

/// Why a socket cannot be had. Each message names the flag and the path.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Longer than an address can hold.
    #[error("{flag}={path}: the path has {length} bytes, a socket address holds {PATH_MAX}; use a shorter one")]
    TooLong {
        /// Which flag.
        flag: &'static str,
        /// Given.
        path: String,
        /// Its length.
        length: usize,
    },
    /// No directory to put it into.
    #[error("{flag}={path}: there is no directory {directory}; create it first")]
    NoDirectory {
        /// Which flag.
        flag: &'static str,
        /// Given.
        path: String,
        /// The missing one.
        directory: String,
    },
    /// Somebody else serves there.
    #[error("{flag}={path}: {by} is serving at this path; stop it or use another path")]
    InUse {
        /// Which flag.
        flag: &'static str,
        /// Given.
        path: String,
        /// Who.
        by: &'static str,
    },
    /// There is a file that is no socket.
    #[error("{flag}={path}: there is a file that is not a socket; remove it or use another path")]
    NotASocket {
        /// Which flag.
        flag: &'static str,
        /// Given.
        path: String,
    },
    /// A system call failed.
    #[error("{flag}={path}: cannot {step}: {source}")]
    System {
        /// Which flag.
        flag: &'static str,
        /// Given.
        path: String,
        /// What was tried.
        step: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
}

/// A listening unix socket with a name. Dropping it removes the name and the lock.
#[derive(Debug)]
pub struct NamedListener {
    fd: OwnedFd,
    path: PathBuf,
    /// Device and inode of the name: should somebody have put another socket in its place, that one is left alone.
    identity: (u64, u64),
    _lock: Lock,
}

impl NamedListener {
    /// Creates the socket at `path` with permission bits `mode`. `flag` is for error messages.
    ///
    /// # Errors
    /// The path is no good, or another process serves there.
    pub fn create(flag: &'static str, path: &Path, kind: SocketType, mode: u32) -> Result<NamedListener, ListenError> {
        let place = Place { flag, path };
        place.check()?;
        let lock = Lock::take(&place)?;
        place.remove_stale(kind)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::UNIX, kind, flags, None).map_err(|e| place.system("make a socket", e))?;
        // The name gets the permissions that the socket has when it is bound, less the umask. So they are right from
        // the first moment, and only ever widened afterwards.
        fchmod(&fd, Mode::from_raw_mode(mode)).map_err(|e| place.system("set the permissions", e))?;
        let address = SocketAddrUnix::new(path).map_err(|e| place.system("use the path", e))?;
        bind(&fd, &address).map_err(|e| place.system("create the socket", e))?;
        let status = fs::symlink_metadata(path).map_err(|e| place.system("look at the new socket", e))?;
        let listener = NamedListener { fd, path: path.to_owned(), identity: (status.dev(), status.ino()), _lock: lock };
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(|e| place.system("set the permissions", e))?;
        listen(&listener.fd, BACKLOG).map_err(|e| place.system("listen", e))?;
        Ok(listener)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for NamedListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for NamedListener {
    fn drop(&mut self) {
        remove_if_same(&self.path, self.identity);
    }
}

/// A path and the flag it came from.
struct Place<'a> {
    flag: &'static str,
    path: &'a Path,
}

impl Place<'_> {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn system(&self, step: &'static str, source: impl Into<io::Error>) -> ListenError {
        ListenError::System { flag: self.flag, path: self.name(), step, source: source.into() }
    }

    fn in_use(&self, by: &'static str) -> ListenError {
        ListenError::InUse { flag: self.flag, path: self.name(), by }
    }

    fn check(&self) -> Result<(), ListenError> {
        let length = self.path.as_os_str().len();
        if length > PATH_MAX {
            return Err(ListenError::TooLong { flag: self.flag, path: self.name(), length });
        }
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        if !directory.is_dir() {
            let directory = directory.display().to_string();
            return Err(ListenError::NoDirectory { flag: self.flag, path: self.name(), directory });
        }
        Ok(())
    }

    /// Removes a socket nobody listens on. Called with the lock held, so no other daemon of ours is about to listen.
    fn remove_stale(&self, kind: SocketType) -> Result<(), ListenError> {
        let status = match fs::symlink_metadata(self.path) {
            Ok(status) => status,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.system("look at the path", error)),
        };
        if !status.file_type().is_socket() {
            return Err(ListenError::NotASocket { flag: self.flag, path: self.name() });
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let probe = socket_with(AddressFamily::UNIX, kind, flags, None).map_err(|e| self.system("make a socket", e))?;
        let address = SocketAddrUnix::new(self.path).map_err(|e| self.system("use the path", e))?;
        match connect(&probe, &address) {
            Err(Errno::CONNREFUSED) => {}
            Err(Errno::NOENT) => return Ok(()),
            // AGAIN: its backlog is full; PROTOTYPE: a socket of another type listens. Both are alive.
            Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => return Err(self.in_use("another program")),
            Err(error) => return Err(self.system("find out whether somebody listens there", error)),
        }
        remove_if_same(self.path, (status.dev(), status.ino()));
        Ok(())
    }
}

/// `PATH.lock`, locked as long as the daemon lives.
#[derive(Debug)]
struct Lock {
    _file: File,
    path: PathBuf,
    identity: (u64, u64),
}

impl Lock {
    fn take(place: &Place<'_>) -> Result<Lock, ListenError> {
        let mut path = place.path.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        for _ in 0..LOCK_ATTEMPTS {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&path)
                .map_err(|e| place.system("open the lock file beside it", e))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Err(place.in_use("another iotlbd")),
                Err(error) => return Err(place.system("lock the lock file beside it", error)),
            }
            // Its former owner may have removed it between our open and our lock. Then we hold a lock on a file
            // without a name, and the next daemon would make, and lock, another.
            let ours = file.metadata().map_err(|e| place.system("look at the lock file beside it", e))?;
            let identity = (ours.dev(), ours.ino());
            match fs::symlink_metadata(&path) {
                Ok(named) if (named.dev(), named.ino()) == identity => return Ok(Lock { _file: file, path, identity }),
                _ => {}
            }
        }
        Err(place.in_use("another iotlbd (its lock file keeps changing)"))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the descriptor closes and with it the lock ends.
        remove_if_same(&self.path, self.identity);
    }
}

/// Removes `path` when it still is the file that was seen.
fn remove_if_same(path: &Path, identity: (u64, u64)) {
    if let Ok(status) = fs::symlink_metadata(path)
        && (status.dev(), status.ino()) == identity
    {
        // An Err leaves a stale socket behind, which the next start removes.
        let _ = fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn create(path: &Path) -> Result<NamedListener, ListenError> {
        NamedListener::create("--socket-path", path, SocketType::STREAM, 0o620)
    }

    #[test]
    fn created_with_its_mode_and_removed() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("s");
        let listener = create(&path).expect("creates");
        assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o620);
        UnixStream::connect(&path).expect("listens");
        drop(listener);
        assert_eq!(fs::read_dir(directory.path()).expect("readable").count(), 0, "socket or lock left behind");
    }

    #[test]
    fn a_second_one_is_refused_and_harms_nothing() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("s");
        let first = create(&path).expect("creates");
        let error = create(&path).expect_err("in use").to_string();
        assert!(error.contains("--socket-path") && error.contains("another iotlbd"), "{error}");
        UnixStream::connect(&path).expect("the first still listens");
        drop(first);
        create(&path).expect("free again");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("s");
        let other = UnixListener::bind(&path).expect("binds");
        let error = create(&path).expect_err("alive").to_string();
        assert!(error.contains("another program"), "{error}");
        let packets = NamedListener::create("--control-socket", &path, SocketType::SEQPACKET, 0o660);
        assert!(matches!(packets, Err(ListenError::InUse { .. })), "a live socket of another type");
        drop(other);
        assert!(path.exists(), "the name outlives the listener");
        create(&path).expect("replaces the stale socket");
    }

    #[test]
    fn paths_that_cannot_be() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let long = directory.path().join("x".repeat(PATH_MAX));
        let error = create(&long).expect_err("too long").to_string();
        assert!(error.contains("--socket-path") && error.contains("107"), "{error}");
        let error = create(&directory.path().join("no/s")).expect_err("no directory").to_string();
        assert!(error.contains("create it"), "{error}");
        let file = directory.path().join("file");
        fs::write(&file, "text").expect("writes");
        assert!(matches!(create(&file), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read(&file).expect("still there"), b"text");
    }
}
