//! A worker's control connection: a bounded queue out, whole messages in, never waiting.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iotlb_proto::control::{self, ControlError, DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::socket::{PacketError, PacketSocket};

use super::alarm::now_ns;
use super::turn::Turn;
use crate::device::Device;

/// Messages that wait for a worker to read. A table of guest memory and a lease for each queue are some hundred; a
/// worker that leaves more unread does not read.
const QUEUE_MAX: usize = 1024;

/// Descriptors sent and not yet received, per worker. The kernel bounds them for all connections of a user together, so
/// one worker that does not read must not use them up.
const FDS_IN_FLIGHT_MAX: usize = 64;

/// Fewer unread bytes than the kernel accounts for the smallest message: all was received.
const UNREAD_NOTHING: i32 = 128;

/// Something to send.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// As it stands.
    Message(DaemonMessage, Vec<Arc<OwnedFd>>),
    /// A queue's lease, with the descriptors it has when its turn comes.
    Lease {
        /// Ring index.
        queue: u16,
        /// The worker's claim that the lease came of.
        claim: u64,
    },
}

impl Outgoing {
    fn is_lease(&self, of: u16, under: u64) -> bool {
        matches!(self, Outgoing::Lease { queue, claim } if (*queue, *claim) == (of, under))
    }
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The other side closed it.
    #[error("the other side closed it")]
    Closed,
    /// Too much is unread.
    #[error("{QUEUE_MAX} messages are unread")]
    Overflow,
    /// What came is no message.
    #[error("what came is no message: {0}")]
    Garbage(ControlError),
    /// Descriptors came, and no message but HELLO has any.
    #[error("it sent descriptors, which only HELLO comes with")]
    Descriptors,
    /// A message of ours cannot be encoded.
    #[error("a message cannot be sent: {0}")]
    Encode(ControlError),
    /// The socket failed.
    #[error(transparent)]
    Socket(#[from] PacketError),
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Sent.
    Yes,
    /// Not sent: the other side has to read first.
    NoRoom,
    /// Not sent: too many descriptors of this user are on their way, to whomever.
    TryLater,
    /// Not sent: others have their turn until then, in ns.
    Rests(u64),
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Link {
    socket: PacketSocket,
    queue: VecDeque<Outgoing>,
    fds_in_flight: usize,
    turn: Turn,
    /// It was left without being read to the end.
    is_unread: bool,
    /// The worker was ordered to give up guest memory: what else there is to say is of no use to it.
    is_ordered: bool,
}

impl Link {
    pub(crate) fn new(socket: PacketSocket) -> Link {
        Link {
            socket,
            queue: VecDeque::new(),
            fds_in_flight: 0,
            turn: Turn::default(),
            is_unread: false,
            is_ordered: false,
        }
    }

    /// Queues a message.
    pub(crate) fn push(&mut self, message: Outgoing) -> Result<(), LinkError> {
        if self.is_ordered {
            return Ok(());
        }
        if let Outgoing::Lease { queue, claim } = message
            // A lease that waits already will go out with the newest descriptors.
            && self.queue.iter().any(|waiting| waiting.is_lease(queue, claim))
        {
            return Ok(());
        }
        if self.queue.len() >= QUEUE_MAX {
            return Err(LinkError::Overflow);
        }
        self.queue.push_back(message);
        Ok(())
    }

    /// Drops what was to be said of a lease: it is over, and by the time it went out the descriptors would be those of
    /// the next owner.
    pub(crate) fn withdraw(&mut self, queue: u16, claim: u64) {
        self.queue.retain(|waiting| !waiting.is_lease(queue, claim));
    }

    /// Orders the worker to give up guest memory, which ends a stall and, sooner or later, the connection. The order
    /// waits for nothing that the worker does not read, and neither it nor the answer for its turn: among hundreds of
    /// connections a rest can be longer than the time the worker has to follow. So the account begins anew, once, and
    /// nothing but the order is sent any more that would be put down to it.
    pub(crate) fn order_to_give_up(&mut self) {
        self.queue.clear();
        if !std::mem::replace(&mut self.is_ordered, true) {
            self.turn = Turn::default();
        }
        self.queue.push_back(Outgoing::Message(DaemonMessage::Revoke, Vec::new()));
    }

    /// Sends what there is room for, on one of `connections`. The rest goes when the socket reports room again; after
    /// [`Sent::TryLater`] and [`Sent::Rests`] it will not report that.
    pub(crate) fn flush(&mut self, device: &Device, connections: usize) -> Result<Sent, LinkError> {
        while let Some(next) = self.queue.front() {
            if let Some(until_ns) = self.turn.comes_ns(now_ns(), connections) {
                return Ok(Sent::Rests(until_ns));
            }
            let Link { socket, fds_in_flight, turn, .. } = self;
            let sent = match next {
                Outgoing::Message(message, fds) => {
                    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(|fd| fd.as_fd()).collect();
                    turn.spend(|| send(socket, fds_in_flight, message, &fds))?
                }
                Outgoing::Lease { queue, claim } => {
                    let [kick, call, err] = device.queue_descriptors(*queue);
                    let lease = QueueLease {
                        queue: *queue,
                        claim: *claim,
                        kick: kick.is_some(),
                        call: call.is_some(),
                        err: err.is_some(),
                    };
                    let fds: Vec<BorrowedFd<'_>> = [kick, call, err].into_iter().flatten().collect();
                    turn.spend(|| send(socket, fds_in_flight, &DaemonMessage::Lease(lease), &fds))?
                }
            };
            if sent != Sent::Yes {
                return Ok(sent);
            }
            self.queue.pop_front();
        }
        Ok(Sent::Yes)
    }

    /// The next message, if one is there. Descriptors are left where they are: they cost the daemon nothing there, and
    /// are closed with the socket.
    pub(crate) fn receive(&mut self) -> Result<Option<WorkerMessage>, LinkError> {
        self.is_unread = false;
        let Link { socket, turn, .. } = self;
        turn.spend(|| {
            if socket.brings_descriptors()? {
                return Err(LinkError::Descriptors);
            }
            receive(socket, &mut Vec::new())
        })
    }

    /// Whether it must not be read now, one of `connections`, and until when, in ns. It is not reported then.
    pub(crate) fn rests_until_ns(&mut self, connections: usize) -> Option<u64> {
        let until_ns = self.turn.comes_ns(now_ns(), connections);
        self.is_unread |= until_ns.is_some();
        until_ns
    }

    /// Whether it was not read because it rests.
    pub(crate) fn is_unread(&self) -> bool {
        self.is_unread
    }

    /// Has it rest for ever.
    #[cfg(test)]
    pub(crate) fn tire(&mut self) {
        self.turn.tire();
    }

    /// The socket, for who closes it, and the account. What was not sent is forgotten.
    pub(crate) fn into_parts(self) -> (OwnedFd, Turn) {
        (self.socket.into(), self.turn)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The next message on a socket, if one is there. Whatever comes of it, the descriptors that came are in `fds`.
pub(crate) fn receive(socket: &PacketSocket, fds: &mut Vec<OwnedFd>) -> Result<Option<WorkerMessage>, LinkError> {
    match socket.receive_into(fds) {
        Ok(Some(bytes)) => Ok(Some(control::decode(&bytes).map_err(LinkError::Garbage)?)),
        Ok(None) => Ok(None),
        Err(PacketError::Closed) => Err(LinkError::Closed),
        Err(error) => Err(error.into()),
    }
}

/// Sends one message on an empty connection, or not at all: for refusals.
pub(crate) fn send_once(socket: &PacketSocket, message: &DaemonMessage) {
    // An Err means that the worker went away or does not read: it learns from the closed connection.
    let _ = send(socket, &mut 0, message, &[]);
}

/// Sends one message, or not.
fn send(
    socket: &PacketSocket,
    in_flight: &mut usize,
    message: &DaemonMessage,
    fds: &[BorrowedFd<'_>],
) -> Result<Sent, LinkError> {
    if !fds.is_empty() && *in_flight + fds.len() > FDS_IN_FLIGHT_MAX {
        // Each message the worker takes is reported as room, so this is looked at again in time.
        if unread(socket.as_fd()) >= UNREAD_NOTHING {
            return Ok(Sent::NoRoom);
        }
        *in_flight = 0;
    }
    let bytes = control::encode(message).map_err(LinkError::Encode)?;
    match socket.send(&bytes, fds) {
        Ok(()) => {
            *in_flight += fds.len();
            Ok(Sent::Yes)
        }
        Err(PacketError::WouldBlock) => Ok(Sent::NoRoom),
        Err(PacketError::DescriptorsInFlight) => Ok(Sent::TryLater),
        Err(PacketError::Closed) => Err(LinkError::Closed),
        Err(error) => Err(error.into()),
    }
}

mod ioctl {
    nix::ioctl_read_bad!(unread, nix::libc::TIOCOUTQ, nix::libc::c_int);
}

/// What of all that was sent on `socket` the other side has not received yet, as the kernel accounts for it.
fn unread(socket: BorrowedFd<'_>) -> i32 {
    let mut bytes = 0;
    // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) writes one int to the address given; `bytes` is one, and
    // outlives the call. The descriptor is borrowed, hence open.
    match unsafe { ioctl::unread(socket.as_raw_fd(), &raw mut bytes) } {
        Ok(_) => bytes,
        // Cannot be for a unix socket; to wait would be for ever.
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn what_waits_of_a_lease_is_said_once_and_not_after_its_end() {
        let (ours, _theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("a socket pair");
        let mut link = Link::new(PacketSocket::from_fd(ours).expect("a packet socket"));
        for (queue, claim) in [(0, 1), (1, 1), (0, 1), (0, 2)] {
            link.push(Outgoing::Lease { queue, claim }).expect("room");
        }
        let waiting = |link: &Link| [(0, 1), (1, 1), (0, 2)].map(|(q, c)| link.queue.iter().any(|m| m.is_lease(q, c)));
        assert_eq!((link.queue.len(), waiting(&link)), (3, [true; 3]));
        link.withdraw(0, 1);
        assert_eq!((link.queue.len(), waiting(&link)), (2, [false, true, true]));
    }
}
