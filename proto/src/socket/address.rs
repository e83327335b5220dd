//! Sockets with a path: binding, listening, connecting, and what a descriptor from elsewhere must be.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, connect, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};

use super::ancillary;

/// Longest socket path, in bytes: `sun_path` has 108, the last one is 0.
pub const PATH_MAX: usize = 107;
/// Connections that wait to be accepted. One front-end and some tens of workers: more is a flood.
const BACKLOG: i32 = 64;

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The path does not fit a socket address.
    #[error("socket path {} is {} bytes long; the system takes at most {PATH_MAX}: choose a shorter one",
        .path.display(), .path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// No path, or one with a zero byte.
    #[error("socket path {path:?} is empty or has a zero byte in it")]
    PathInvalid {
        /// The path.
        path: PathBuf,
    },
    /// A socket cannot be made.
    #[error("cannot make a socket: {source}")]
    Socket {
        /// Operating system's reason.
        source: io::Error,
    },
    /// The path cannot be bound.
    #[error("cannot listen at {}: {source}", .path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Operating system's reason.
        source: io::Error,
    },
    /// Nobody listens at the path, or it may not be reached.
    #[error("cannot connect to {}: {source}", .path.display())]
    Connect {
        /// The path.
        path: PathBuf,
        /// Operating system's reason.
        source: io::Error,
    },
    /// The other side did not accept in time.
    #[error("{} did not accept a connection within {timeout_ms} ms", .path.display())]
    ConnectTimedOut {
        /// The path.
        path: PathBuf,
        /// How long it was waited for.
        timeout_ms: u32,
    },
    /// A connection cannot be accepted.
    #[error("cannot accept a connection: {source}")]
    Accept {
        /// Operating system's reason.
        source: io::Error,
    },
    /// The descriptor is not a socket, or cannot be asked.
    #[error("descriptor {fd} is not a socket: {source}")]
    NotASocket {
        /// Its number.
        fd: i32,
        /// Operating system's reason.
        source: io::Error,
    },
    /// A socket of another family, type or state.
    #[error("descriptor {fd} is not {expected}")]
    WrongSocket {
        /// Its number.
        fd: i32,
        /// What is needed.
        expected: &'static str,
    },
}

/// What kind of socket is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `SOCK_STREAM`.
    Stream,
    /// `SOCK_SEQPACKET`.
    Packet,
}

impl Kind {
    fn sock_type(self) -> SockType {
        match self {
            Kind::Stream => SockType::Stream,
            Kind::Packet => SockType::SeqPacket,
        }
    }

    fn expected(self, listening: bool) -> &'static str {
        match (self, listening) {
            (Kind::Stream, false) => "a connected AF_UNIX SOCK_STREAM socket",
            (Kind::Stream, true) => "a listening AF_UNIX SOCK_STREAM socket",
            (Kind::Packet, false) => "a connected AF_UNIX SOCK_SEQPACKET socket",
            (Kind::Packet, true) => "a listening AF_UNIX SOCK_SEQPACKET socket",
        }
    }
}

fn address(path: &Path) -> Result<UnixAddr, AddressError> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(AddressError::PathInvalid { path: path.into() });
    }
    if bytes.len() > PATH_MAX {
        return Err(AddressError::PathTooLong { path: path.into() });
    }
    UnixAddr::new(path).map_err(|_| AddressError::PathInvalid { path: path.into() })
}

fn new_socket(kind: Kind) -> Result<OwnedFd, AddressError> {
    socket(AddressFamily::Unix, kind.sock_type(), SockFlag::SOCK_CLOEXEC, None)
        .map_err(|error| AddressError::Socket { source: error.into() })
}

/// Binds and listens. The socket file has `mode` when this returns, and never a wider one before.
pub(super) fn listen_at(path: &Path, kind: Kind, mode: u32) -> Result<OwnedFd, AddressError> {
    let address = address(path)?;
    let fd = new_socket(kind)?;
    let failed = |source: io::Error| AddressError::Bind { path: path.into(), source };
    // The file gets the socket's mode less the umask, so nobody slips in between; the second step adds what the umask
    // took away.
    let mode = Mode::from_bits_truncate(mode);
    fchmod(&fd, mode).map_err(|error| failed(error.into()))?;
    bind(fd.as_raw_fd(), &address).map_err(|error| failed(error.into()))?;
    fchmodat(AT_FDCWD, path, mode, FchmodatFlags::NoFollowSymlink).map_err(|error| failed(error.into()))?;
    let backlog = Backlog::new(BACKLOG).map_err(|error| failed(error.into()))?;
    listen(&fd, backlog).map_err(|error| failed(error.into()))?;
    set_nonblocking(&fd).map_err(|error| failed(error.into()))?;
    Ok(fd)
}

/// Connects, waiting at most `timeout_ms` (at least one) for a place in the listener's queue.
pub(super) fn connect_to(path: &Path, kind: Kind, timeout_ms: u32) -> Result<OwnedFd, AddressError> {
    let address = address(path)?;
    let fd = new_socket(kind)?;
    let start = Instant::now();
    // The kernel takes 0 for "for ever".
    let mut left_ms = timeout_ms.max(1);
    while left_ms > 0 {
        let timeout = TimeVal::milliseconds(i64::from(left_ms));
        setsockopt(&fd, sockopt::SendTimeout, &timeout)
            .map_err(|error| AddressError::Socket { source: error.into() })?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => return Ok(fd),
            // Not the whole time again: signals may come more often than that.
            Err(Errno::EINTR) => left_ms = ancillary::left_ms(start, timeout_ms),
            Err(Errno::EAGAIN) => break,
            Err(error) => return Err(AddressError::Connect { path: path.into(), source: error.into() }),
        }
    }
    Err(AddressError::ConnectTimedOut { path: path.into(), timeout_ms })
}

/// The next connection, close-on-exec; `None` when none waits.
pub(super) fn accept_from(listener: &OwnedFd) -> Result<Option<OwnedFd>, AddressError> {
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            Ok(number) => {
                // SAFETY: the kernel has just made this descriptor for this call, and nobody else knows its number.
                return Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }));
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(error) => return Err(AddressError::Accept { source: error.into() }),
        }
    }
}

/// Checks that a descriptor from outside is an `AF_UNIX` socket of that kind, listening or not, and makes it
/// close-on-exec.
pub(super) fn check(fd: &OwnedFd, kind: Kind, listening: bool) -> Result<(), AddressError> {
    let number = fd.as_raw_fd();
    let not_a_socket = |error: rustix::io::Errno| AddressError::NotASocket { fd: number, source: error.into() };
    let domain = socket_domain(fd).map_err(not_a_socket)?;
    let sock_type = socket_type(fd).map_err(not_a_socket)?;
    let listens = socket_acceptconn(fd).map_err(not_a_socket)?;
    let expected_type = match kind {
        Kind::Stream => rustix::net::SocketType::STREAM,
        Kind::Packet => rustix::net::SocketType::SEQPACKET,
    };
    if domain != rustix::net::AddressFamily::UNIX || sock_type != expected_type || listens != listening {
        return Err(AddressError::WrongSocket { fd: number, expected: kind.expected(listening) });
    }
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|error| AddressError::NotASocket { fd: number, source: error.into() })?;
    Ok(())
}

/// Takes a listening socket from a supervisor.
pub(super) fn check_listener(fd: &OwnedFd, kind: Kind) -> Result<(), AddressError> {
    check(fd, kind, true)?;
    set_nonblocking(fd).map_err(|error| AddressError::NotASocket { fd: fd.as_raw_fd(), source: error.into() })
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    use nix::fcntl::OFlag;
    let flags = OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
