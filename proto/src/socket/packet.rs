//! Control messages over `AF_UNIX` `SOCK_SEQPACKET`: the system keeps the borders, so a bad packet is one bad packet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, setsockopt, socketpair, sockopt};
use nix::{setsockopt_impl, sockopt_impl};

use super::address::{self, AddressError, Kind};
use super::ancillary;
use crate::control::MESSAGE_MAX;

/// Most descriptors with one packet. A WELCOME has four; the rest is head room.
pub const PACKET_FDS_MAX: usize = 8;

/// `SO_PASSPIDFD` of `asm-generic/socket.h`.
const SO_PASSPIDFD: i32 = 76;

sockopt_impl!(
    /// Whether a pidfd of the sender comes along.
    PassPidfd, SetOnly, libc::SOL_SOCKET, SO_PASSPIDFD, bool
);
sockopt_impl!(
    /// Whether the sender's security label does.
    PassSecurity, SetOnly, libc::SOL_SOCKET, libc::SO_PASSSEC, bool
);

/// What [`PacketSocket::receive`] found.
#[derive(Debug)]
pub enum ReceivedPacket {
    /// A packet, at most [`MESSAGE_MAX`] bytes, not empty.
    Packet {
        /// Its bytes.
        bytes: Vec<u8>,
        /// The descriptors that came with it, close-on-exec, at most [`PACKET_FDS_MAX`].
        fds: Vec<OwnedFd>,
    },
    /// Nothing there.
    WouldBlock,
    /// The peer has closed, or has sent an empty packet, which looks the same.
    Closed,
}

/// Why a packet was not received or sent. [`PacketSocket::receive`] has closed all descriptors of a received one.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The packet is longer than any control message.
    #[error("packet of more than {MESSAGE_MAX} bytes")]
    TooLong,
    /// More descriptors than any control message has.
    #[error("{count} descriptors with one packet, at most {PACKET_FDS_MAX} are accepted")]
    TooManyDescriptors {
        /// How many there were at least.
        count: usize,
    },
    /// The system could not deliver all descriptors.
    #[error("descriptors of a packet were cut off: too many, or this process is at its limit of open files")]
    DescriptorsTruncated,
    /// The peer does not read; the packet was not sent.
    #[error("the peer does not read: its queue is full")]
    WouldBlock,
    /// Too many descriptors of this user are on their way and not yet received; the packet was not sent.
    #[error("too many descriptors are on their way and not received yet")]
    DescriptorsInFlight,
    /// No bytes, too many of them, or too many descriptors; the packet was not sent.
    #[error(
        "cannot send {bytes} bytes with {fds} descriptors: 1 to {MESSAGE_MAX} bytes, at most {PACKET_FDS_MAX} \
        descriptors"
    )]
    Unsendable {
        /// Bytes of the packet.
        bytes: usize,
        /// Descriptors of the packet.
        fds: usize,
    },
    /// The peer has closed. From a blocking call or [`PacketSocket::receive_into`], or when something was to be sent.
    #[error("the peer closed the connection")]
    Closed,
    /// A blocking call has waited long enough.
    #[error("nothing came or went within {timeout_ms} ms")]
    TimedOut {
        /// How long it waited.
        timeout_ms: u32,
    },
    /// Receiving failed.
    #[error("cannot receive: {0}")]
    Receive(#[source] io::Error),
    /// Sending failed.
    #[error("cannot send: {0}")]
    Send(#[source] io::Error),
    /// The process behind the socket is gone already.
    #[error("the process behind the socket is gone")]
    PeerGone,
    /// The kernel cannot say who the peer is.
    #[error("cannot ask for the process behind the socket (SO_PEERPIDFD needs Linux 6.5): {0}")]
    Peer(#[source] io::Error),
}

/// One end of a control connection.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Connects to a listener, waiting at most `timeout_ms`.
    ///
    /// # Errors
    ///
    /// The path is not usable, or nobody accepts there.
    pub fn connect(path: &Path, timeout_ms: u32) -> Result<PacketSocket, AddressError> {
        Ok(PacketSocket { fd: address::connect_to(path, Kind::Packet, timeout_ms)? })
    }

    /// Takes a descriptor from anywhere.
    ///
    /// # Errors
    ///
    /// It is not an `AF_UNIX` `SOCK_SEQPACKET` socket, or one that listens. It is closed then.
    pub fn from_fd(fd: OwnedFd) -> Result<PacketSocket, AddressError> {
        address::check(&fd, Kind::Packet, false)?;
        Ok(PacketSocket { fd })
    }

    /// Two connected ends.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors or memory.
    pub fn pair() -> Result<(PacketSocket, PacketSocket), AddressError> {
        let (one, two) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        )
        .map_err(|error| AddressError::Socket { source: error.into() })?;
        Ok((PacketSocket { fd: one }, PacketSocket { fd: two }))
    }

    /// Receives one packet, without waiting.
    ///
    /// # Errors
    ///
    /// See [`PacketError`]. The next packet can still be received, but a peer that sends such things is not to be
    /// trusted.
    pub fn receive(&self) -> Result<ReceivedPacket, PacketError> {
        let mut fds = Vec::new();
        match self.receive_into(&mut fds) {
            Ok(Some(bytes)) => Ok(ReceivedPacket::Packet { bytes, fds }),
            Ok(None) => Ok(ReceivedPacket::WouldBlock),
            Err(PacketError::Closed) => Ok(ReceivedPacket::Closed),
            Err(error) => Err(error),
        }
    }

    /// Receives one packet, without waiting; `None`: nothing there. All descriptors that came are put into `fds`, those
    /// of a packet that is refused as well: to close what a stranger sent can take as long as the stranger likes, so
    /// who must not wait has others close it.
    ///
    /// # Errors
    ///
    /// As [`PacketSocket::receive`]; also [`PacketError::Closed`].
    pub fn receive_into(&self, fds: &mut Vec<OwnedFd>) -> Result<Option<Vec<u8>>, PacketError> {
        let mut buffer = [0; MESSAGE_MAX];
        let mut received = ancillary::receive(self.fd.as_fd(), &mut buffer);
        if received.as_ref().is_err_and(|error| *error == Errno::ECONNRESET) {
            // The peer closed before it read everything. The system says so once, and before it hands out what the peer
            // had sent until then.
            received = ancillary::receive(self.fd.as_fd(), &mut buffer);
        }
        let fragment = match received {
            Ok(fragment) => fragment,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(Errno::ECONNRESET) => return Err(PacketError::Closed),
            Err(error) => return Err(PacketError::Receive(error.into())),
        };
        let count = fragment.fds.len();
        fds.extend(fragment.fds);
        if fragment.data_truncated {
            return Err(PacketError::TooLong);
        }
        if count > PACKET_FDS_MAX {
            return Err(PacketError::TooManyDescriptors { count });
        }
        if fragment.control_truncated {
            return Err(PacketError::DescriptorsTruncated);
        }
        if fragment.len == 0 {
            return Err(PacketError::Closed);
        }
        Ok(Some(buffer[..fragment.len].to_vec()))
    }

    /// Whether descriptors come with the next packet. They stay where they are. After
    /// [`PacketSocket::take_descriptors_only`]: credentials would count as well.
    ///
    /// # Errors
    ///
    /// [`PacketError::Receive`].
    pub fn brings_descriptors(&self) -> Result<bool, PacketError> {
        match ancillary::peek(self.fd.as_fd(), &mut [0]) {
            Ok((_, brings)) => Ok(brings),
            Err(Errno::EAGAIN | Errno::ECONNRESET) => Ok(false),
            Err(error) => Err(PacketError::Receive(error.into())),
        }
    }

    /// Has nothing come along with packets but descriptors. An accepted socket has from its listener, which a
    /// supervisor may have made, whether credentials do.
    pub fn take_descriptors_only(&self) {
        // An Err means a kernel without the option: it cannot be on.
        let _ = setsockopt(&self.fd, sockopt::PassCred, &false);
        let _ = setsockopt(&self.fd, PassPidfd, &false);
        let _ = setsockopt(&self.fd, PassSecurity, &false);
    }

    /// Sends one packet, without waiting: whole, or not at all.
    ///
    /// # Errors
    ///
    /// After [`PacketError::WouldBlock`] and [`PacketError::DescriptorsInFlight`] the packet may be sent again later.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
        if bytes.is_empty() || bytes.len() > MESSAGE_MAX || fds.len() > PACKET_FDS_MAX {
            return Err(PacketError::Unsendable { bytes: bytes.len(), fds: fds.len() });
        }
        match ancillary::send(self.fd.as_fd(), bytes, fds) {
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN) => Err(PacketError::WouldBlock),
            Err(Errno::ETOOMANYREFS) => Err(PacketError::DescriptorsInFlight),
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => Err(PacketError::Closed),
            Err(error) => Err(PacketError::Send(error.into())),
        }
    }

    /// Receives one packet, waiting at most `timeout_ms`.
    ///
    /// # Errors
    ///
    /// As [`PacketSocket::receive`]; also [`PacketError::TimedOut`] and [`PacketError::Closed`].
    pub fn receive_blocking(&self, timeout_ms: u32) -> Result<(Vec<u8>, Vec<OwnedFd>), PacketError> {
        loop {
            match self.receive()? {
                ReceivedPacket::Packet { bytes, fds } => return Ok((bytes, fds)),
                ReceivedPacket::Closed => return Err(PacketError::Closed),
                ReceivedPacket::WouldBlock => {
                    if !ancillary::wait(self.fd.as_fd(), PollFlags::POLLIN, timeout_ms).map_err(PacketError::Receive)? {
                        return Err(PacketError::TimedOut { timeout_ms });
                    }
                }
            }
        }
    }

    /// Sends one packet, waiting at most `timeout_ms` while the peer does not read.
    ///
    /// # Errors
    ///
    /// As [`PacketSocket::send`], with [`PacketError::TimedOut`] in place of [`PacketError::WouldBlock`].
    pub fn send_blocking(&self, bytes: &[u8], fds: &[BorrowedFd<'_>], timeout_ms: u32) -> Result<(), PacketError> {
        loop {
            match self.send(bytes, fds) {
                Err(PacketError::WouldBlock) => {
                    if !ancillary::wait(self.fd.as_fd(), PollFlags::POLLOUT, timeout_ms).map_err(PacketError::Send)? {
                        return Err(PacketError::TimedOut { timeout_ms });
                    }
                }
                other => return other,
            }
        }
    }

    /// A pidfd of the process that connected (or, at the connecting end, that listens). It works where the peer's pid
    /// means nothing here, in another pid namespace.
    ///
    /// # Errors
    ///
    /// [`PacketError::PeerGone`] when that process is dead and reaped, [`PacketError::Peer`] before Linux 6.5.
    pub fn peer_pidfd(&self) -> Result<OwnedFd, PacketError> {
        getsockopt(&self.fd, sockopt::PeerPidfd).map_err(|error| match error {
            Errno::ESRCH | Errno::ENODATA | Errno::EINVAL => PacketError::PeerGone,
            error => PacketError::Peer(error.into()),
        })
    }

    /// The user the peer ran as when it connected.
    ///
    /// # Errors
    ///
    /// The system does not know.
    pub fn peer_uid(&self) -> Result<u32, PacketError> {
        let credentials =
            getsockopt(&self.fd, sockopt::PeerCredentials).map_err(|error| PacketError::Peer(error.into()))?;
        Ok(credentials.uid())
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> OwnedFd {
        socket.fd
    }
}

/// A listening control socket, for workers to connect to.
#[derive(Debug)]
pub struct PacketListener {
    fd: OwnedFd,
}

impl PacketListener {
    /// Listens at `path`. The socket file has `mode` (permission bits) and is not removed later. A file that is there
    /// already is an error, whatever it is.
    ///
    /// # Errors
    ///
    /// See [`AddressError`].
    pub fn bind(path: &Path, mode: u32) -> Result<PacketListener, AddressError> {
        Ok(PacketListener { fd: address::listen_at(path, Kind::Packet, mode)? })
    }

    /// Takes a socket that listens already, for instance from a supervisor.
    ///
    /// # Errors
    ///
    /// It is not a listening `AF_UNIX` `SOCK_SEQPACKET` socket.
    pub fn from_fd(fd: OwnedFd) -> Result<PacketListener, AddressError> {
        address::check_listener(&fd, Kind::Packet)?;
        Ok(PacketListener { fd })
    }

    /// The next connection; `None` when none waits.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors or memory; the connection still waits.
    pub fn accept(&self) -> Result<Option<PacketSocket>, AddressError> {
        Ok(address::accept_from(&self.fd)?.map(|fd| PacketSocket { fd }))
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
