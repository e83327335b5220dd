//! Descriptors that were handed in: by `--fd`, or by a parent process that keeps sockets alive across servers.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};

/// A front-end socket that was handed in.
#[derive(Debug)]
pub enum FrontEndSocket {
    /// Front-ends connect to it.
    Listener(OwnedFd),
    /// The front-end is connected already. The server ends when this connection does.
    Connection(OwnedFd),
}

/// Why a descriptor is of no use.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// Not open.
    #[error("the descriptor is not open in this process; was it passed on (without close-on-exec)?")]
    NotOpen,
    /// Not one that came from outside.
    #[error("the descriptor was not passed on: this process opened it itself; name one that was")]
    Own,
    /// Not a unix socket of the right type.
    #[error("the descriptor is not a unix {expected} socket")]
    WrongKind {
        /// What it should be.
        expected: &'static str,
    },
    /// Neither listening nor connected.
    #[error("the socket is neither listening nor connected; pass one that is")]
    NotConnected,
    /// A system call failed.
    #[error("the descriptor cannot be prepared: {0}")]
    System(#[from] io::Error),
}

impl FrontEndSocket {
    /// Takes over descriptor `fd`. Call it before this process opens any descriptor: a number
    /// that was not passed on is then refused as not open.
    ///
    /// # Errors
    /// It is not open, was opened here, or is not a unix stream socket.
    pub fn from_raw(fd: RawFd) -> Result<FrontEndSocket, InheritError> {
        // SAFETY: the number is only borrowed for this check. Whoever runs the program says with `--fd` that the
        // descriptor is ours; that it is open at all is what the call finds out.
        let open = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        // What is closed in programs that are started was not there when this one was. All that is opened here is so.
        if fcntl_getfd(open).map_err(|_| InheritError::NotOpen)?.contains(FdFlags::CLOEXEC) {
            return Err(InheritError::Own);
        }
        // SAFETY: open, as just seen, and handed over for good by whoever gave `--fd`; nothing else in this process
        // owns it, because it was there before the process began, as its flag tells.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        FrontEndSocket::from_fd(fd)
    }

    /// Takes over an owned descriptor.
    ///
    /// # Errors
    /// It is not a unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<FrontEndSocket, InheritError> {
        let expected = "stream";
        if socket_domain(&fd).ok() != Some(AddressFamily::UNIX) || socket_type(&fd).ok() != Some(SocketType::STREAM) {
            return Err(InheritError::WrongKind { expected });
        }
        let listens = socket_acceptconn(&fd).map_err(io::Error::from)?;
        if !listens && getpeername(&fd) == Err(Errno::NOTCONN) {
            return Err(InheritError::NotConnected);
        }
        prepare(&fd)?;
        if listens { Ok(FrontEndSocket::Listener(fd)) } else { Ok(FrontEndSocket::Connection(fd)) }
    }
}

/// Makes a descriptor fit for the event loop: non-blocking, and closed in programs that are started.
pub(crate) fn prepare(fd: impl AsFd) -> io::Result<()> {
    let fd = fd.as_fd();
    fcntl_setfd(fd, fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_of_our_own_is_refused_and_stays_open() {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let refused = FrontEndSocket::from_raw(ours.as_raw_fd());
        assert!(matches!(refused, Err(InheritError::Own)), "{refused:?}");
        rustix::io::write(&theirs, b"x").expect("the other end is open");
    }
}
