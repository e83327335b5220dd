//! The control socket as this crate uses it: whole messages with their descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use iotlb_proto::control::{self, ControlError, DaemonMessage, WorkerMessage};
use iotlb_proto::socket::address::AddressError;
use iotlb_proto::socket::packet::{PacketError, PacketSocket, ReceivedPacket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest a message waits for room in the socket, in milliseconds. The daemon never waits for a worker, so a socket
/// that stays full this long belongs to a daemon that is stuck.
const SEND_TIMEOUT_MS: u32 = 5_000;

/// Why the control socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The socket failed, or carried something that is no message.
    #[error("control socket: {0}")]
    Packet(#[source] PacketError),
    /// The other side closed it.
    #[error("the daemon closed the control socket")]
    Closed,
    /// Bytes that are no message of this build.
    #[error("the daemon sent a message that this build cannot read: {0}")]
    Decode(#[source] ControlError),
    /// A message of ours does not fit.
    #[error("a message to the daemon does not fit: {0}")]
    Encode(#[source] ControlError),
}

impl From<PacketError> for ChannelError {
    fn from(error: PacketError) -> Self {
        match error {
            PacketError::Closed => ChannelError::Closed,
            error => ChannelError::Packet(error),
        }
    }
}

/// One end of a control connection. Messages may be sent from any thread: each is one packet.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: PacketSocket,
}

impl Channel {
    pub(crate) fn connect(path: &Path, timeout_ms: u32) -> Result<Channel, AddressError> {
        Ok(Channel { socket: PacketSocket::connect(path, timeout_ms)? })
    }

    pub(crate) fn from_socket(socket: OwnedFd) -> Result<Channel, AddressError> {
        Ok(Channel { socket: PacketSocket::from_fd(socket)? })
    }

    pub(crate) fn send(&self, message: &WorkerMessage, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = control::encode(message).map_err(ChannelError::Encode)?;
        Ok(self.socket.send_blocking(&bytes, fds, SEND_TIMEOUT_MS)?)
    }

    /// Sends without waiting. `false`: the socket has no room, and nothing was sent.
    pub(crate) fn try_send(&self, message: &WorkerMessage) -> Result<bool, ChannelError> {
        let bytes = control::encode(message).map_err(ChannelError::Encode)?;
        match self.socket.send(&bytes, &[]) {
            Err(PacketError::WouldBlock) => Ok(false),
            sent => Ok(sent.map(|()| true)?),
        }
    }

    /// Waits until the socket has room again, or for `timeout`. The system speaks of room only when most of it is free:
    /// a message may fit sooner.
    pub(crate) fn wait_for_room(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(self, PollFlags::OUT)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Tells the daemon that nothing of this attachment reaches guest memory, now or later. Without these words it
    /// would count the worker's slots, and keep its place and its queues, until the process ends.
    pub(crate) fn leave(&self) {
        // An Err means that the daemon is gone already, or let nobody in.
        let _ = self.send(&WorkerMessage::Revoked, &[]);
    }

    /// Tells the daemon that nobody is here any more, whoever still holds the descriptor.
    pub(crate) fn shut_down(&self) {
        // A socket that is not connected any more needs no shutting down.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
    }

    /// The next message, or `None` when there is none yet.
    pub(crate) fn receive(&self) -> Result<Option<(DaemonMessage, Vec<OwnedFd>)>, ChannelError> {
        match self.socket.receive()? {
            ReceivedPacket::Packet { bytes, fds } => {
                Ok(Some((control::decode(&bytes).map_err(ChannelError::Decode)?, fds)))
            }
            ReceivedPacket::WouldBlock => Ok(None),
            ReceivedPacket::Closed => Err(ChannelError::Closed),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
