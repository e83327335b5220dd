//! vhost-user messages over an `AF_UNIX` stream, one whole message at a time, without ever waiting.
//!
//! A stream keeps no borders, but descriptors sit at a byte of it. So never more bytes are taken than belong to the
//! present message: first the header, then exactly as much payload as it announces. Whatever descriptors arrive with
//! any of these bytes are the message's.
//!
//! IOTLB messages and the replies to them, which is nearly all there is for hours, go another way: the socket's content
//! is looked at without being taken (`glance`), handed out message by message, and taken when much has come together,
//! or when the caller says so ([`MessageStream::put_away`]). That is less work, and the answer can be sent *before* the
//! question is taken: to take bytes out of a Unix socket wakes up a peer that sleeps on it, as there is room now, and a
//! peer that waits for an answer would wake up in vain. These messages have no descriptors; one that comes along is
//! closed.
//!
//! Messages out are sent at once, or put together ([`MessageStream::put`]) and sent in one go: to wake up a peer costs
//! more than to send it another message.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::PollFlags;

use super::address::{self, AddressError, Kind};
use super::ancillary;
use super::glance::Glance;
use super::payload::Payload;
use super::send_queue::SendQueue;
pub use super::send_queue::{OUTGOING_BYTES_MAX, OUTGOING_FDS_MAX};
use crate::vhost_user::header::{FDS_MAX, HEADER_LEN, Header, HeaderError, Incoming};

/// What [`MessageStream::receive`] found.
#[derive(Debug)]
pub enum Received {
    /// A whole message.
    Message {
        /// Its header, with a payload length that is `payload`'s.
        header: Header,
        /// Its payload.
        payload: Payload,
        /// The descriptors that came with it, close-on-exec, at most [`FDS_MAX`].
        fds: Vec<OwnedFd>,
    },
    /// No whole message yet. What has come of one is kept.
    WouldBlock,
    /// The peer has closed, between two messages.
    Closed,
}

/// Why a stream is of no more use. Unless a variant says otherwise, nothing can be received any more.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A header that makes no sense: where the next message starts is unknown.
    #[error("framing lost: {0}")]
    Header(#[from] HeaderError),
    /// More descriptors than a message may have. All of them were closed.
    #[error("framing lost: {count} descriptors with one message, at most {FDS_MAX} are accepted")]
    TooManyDescriptors {
        /// How many there were at least.
        count: usize,
    },
    /// The system could not deliver all descriptors (too many, or this process has none left). All were closed.
    #[error(
        "framing lost: descriptors of a message were cut off: too many, or this process is at its limit of open files"
    )]
    DescriptorsTruncated,
    /// The peer closed in the middle of a message.
    #[error("the peer closed the connection after {bytes} bytes of a message")]
    ClosedInMessage {
        /// Bytes that had come, header included.
        bytes: usize,
    },
    /// The peer has closed. From a blocking call, or when something was to be sent.
    #[error("the peer closed the connection")]
    Closed,
    /// An earlier call failed.
    #[error("the connection was given up after an earlier error")]
    Broken,
    /// Receiving failed.
    #[error("cannot receive: {0}")]
    Receive(#[source] io::Error),
    /// Sending failed.
    #[error("cannot send: {0}")]
    Send(#[source] io::Error),
    /// The peer does not read: too much waits to be sent already. The message was not taken; the stream is whole.
    #[error("the peer does not read: {bytes} bytes and {fds} descriptors wait to be sent")]
    OutgoingFull {
        /// Bytes that wait.
        bytes: usize,
        /// Descriptors that wait.
        fds: usize,
    },
    /// No bytes, or more descriptors than a message may have. The message was not taken; the stream is whole.
    #[error("cannot send {bytes} bytes with {fds} descriptors: 1 byte or more, and at most {FDS_MAX} descriptors")]
    Unsendable {
        /// Bytes of the message.
        bytes: usize,
        /// Descriptors of the message.
        fds: usize,
    },
    /// A blocking call has waited long enough. The stream is whole; the call may be repeated.
    #[error("nothing came or went within {timeout_ms} ms")]
    TimedOut {
        /// How long it waited.
        timeout_ms: u32,
    },
}

/// What has come of the message at hand.
#[derive(Debug, Default)]
struct Partial {
    head: [u8; HEADER_LEN],
    header: Option<Header>,
    /// As long as the header announces, once there is one.
    payload: Payload,
    /// Bytes filled: of `head` while there is no header, of `payload` after.
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl Partial {
    fn bytes(&self) -> usize {
        self.filled + if self.header.is_some() { HEADER_LEN } else { 0 }
    }
}

/// What it means that nothing could be seen in the socket, or taken from it; `None` when that went well.
fn unseen(result: Result<(), Errno>) -> Result<Option<Received>, StreamError> {
    match result {
        Ok(()) => Ok(None),
        Err(Errno::EAGAIN) => Ok(Some(Received::WouldBlock)),
        // The peer closed before it read everything that was sent to it.
        Err(Errno::ECONNRESET) => Ok(Some(Received::Closed)),
        Err(error) => Err(StreamError::Receive(error.into())),
    }
}

/// One end of a vhost-user channel.
#[derive(Debug)]
pub struct MessageStream {
    fd: OwnedFd,
    incoming: Incoming,
    /// `None`: the system cannot show what is in the socket and keep the place, so messages are received one by one.
    glance: Option<Box<Glance>>,
    partial: Partial,
    outgoing: SendQueue,
    broken: bool,
}

impl MessageStream {
    /// Takes a descriptor from anywhere: the command line, a front-end, a listener.
    ///
    /// # Errors
    ///
    /// It is not an `AF_UNIX` `SOCK_STREAM` socket, or one that listens. It is closed then.
    pub fn from_fd(fd: OwnedFd, incoming: Incoming) -> Result<MessageStream, AddressError> {
        address::check(&fd, Kind::Stream, false)?;
        Ok(MessageStream::new(fd, incoming))
    }

    /// Connects to a listener, waiting at most `timeout_ms`.
    ///
    /// # Errors
    ///
    /// The path is not usable, or nobody accepts there.
    pub fn connect(path: &Path, incoming: Incoming, timeout_ms: u32) -> Result<MessageStream, AddressError> {
        Ok(MessageStream::new(address::connect_to(path, Kind::Stream, timeout_ms)?, incoming))
    }

    fn new(fd: OwnedFd, incoming: Incoming) -> MessageStream {
        MessageStream {
            glance: Glance::new(fd.as_fd()).ok().map(Box::new),
            fd,
            incoming,
            partial: Partial::default(),
            outgoing: SendQueue::default(),
            broken: false,
        }
    }

    /// Receives at most one message, without waiting. To be called again until it says [`Received::WouldBlock`].
    ///
    /// # Errors
    ///
    /// The stream is of no more use; every descriptor that came with the message is closed. Later calls say
    /// [`StreamError::Broken`].
    pub fn receive(&mut self) -> Result<Received, StreamError> {
        if self.broken {
            return Err(StreamError::Broken);
        }
        let result = self.receive_step();
        if result.is_err() {
            self.give_up();
        }
        result
    }

    fn give_up(&mut self) {
        self.broken = true;
        self.glance = None;
        self.partial = Partial::default();
    }

    /// Takes from the socket what [`MessageStream::receive`] has returned already and left there. To be called before
    /// waiting for long: a peer whose socket has little room could wait for it in vain. And before waiting for input
    /// with anything that is not edge-triggered, which would report what is left.
    ///
    /// # Errors
    ///
    /// As [`MessageStream::receive`].
    pub fn put_away(&mut self) -> Result<(), StreamError> {
        let Some(glance) = &mut self.glance else { return Ok(()) };
        // What was seen and not returned yet is seen again.
        let taken = glance.take(self.fd.as_fd()).map_err(|error| StreamError::Receive(error.into()));
        if taken.is_err() {
            self.give_up();
        }
        taken
    }

    /// Whether [`MessageStream::receive`] has a message without asking the system.
    #[must_use]
    pub fn has_message(&self) -> bool {
        self.glance.as_ref().is_some_and(|glance| glance.has_message(self.incoming))
    }

    fn receive_step(&mut self) -> Result<Received, StreamError> {
        if self.partial.bytes() == 0
            && let Some(glance) = &mut self.glance
        {
            if let Some((header, payload)) = glance.next(self.incoming)? {
                return Ok(Received::Message { header, payload, fds: Vec::new() });
            }
            if let Some(end) = unseen(glance.look(self.fd.as_fd()))? {
                return Ok(end);
            }
            if let Some((header, payload)) = glance.next(self.incoming)? {
                return Ok(Received::Message { header, payload, fds: Vec::new() });
            }
            // What was handed out lies before what comes byte by byte.
            if let Some(end) = unseen(glance.take(self.fd.as_fd()))? {
                return Ok(end);
            }
        }
        self.receive_exactly()
    }

    /// A message that is large, in pieces or may have descriptors.
    fn receive_exactly(&mut self) -> Result<Received, StreamError> {
        let partial = &mut self.partial;
        loop {
            let (room, has_header) = match partial.header {
                None => (&mut partial.head[partial.filled..], false),
                Some(header) => {
                    if partial.filled == partial.payload.len() {
                        let Partial { payload, fds, .. } = std::mem::take(partial);
                        return Ok(Received::Message { header, payload, fds });
                    }
                    (&mut partial.payload[partial.filled..], true)
                }
            };
            let fragment = match ancillary::receive(self.fd.as_fd(), room) {
                Ok(fragment) => fragment,
                Err(Errno::EAGAIN) => return Ok(Received::WouldBlock),
                // As above.
                Err(Errno::ECONNRESET) => return closed(partial),
                Err(error) => return Err(StreamError::Receive(error.into())),
            };
            let count = partial.fds.len() + fragment.fds.len();
            if count > FDS_MAX {
                return Err(StreamError::TooManyDescriptors { count });
            }
            if fragment.control_truncated {
                return Err(StreamError::DescriptorsTruncated);
            }
            if fragment.len == 0 {
                return closed(partial);
            }
            partial.fds.extend(fragment.fds);
            partial.filled += fragment.len;
            if !has_header && partial.filled == HEADER_LEN {
                let header = Header::parse(&partial.head, self.incoming)?;
                partial.header = Some(header);
                partial.filled = 0;
                // At most PAYLOAD_MAX: the header was checked.
                partial.payload = Payload::zeroed(header.size as usize);
            }
        }
    }

    /// Receives one message, waiting at most `timeout_ms` for each part of it. For front-ends and tests: a back-end
    /// never waits for one peer.
    ///
    /// # Errors
    ///
    /// As [`MessageStream::receive`]; also [`StreamError::TimedOut`] and [`StreamError::Closed`].
    pub fn receive_blocking(&mut self, timeout_ms: u32) -> Result<(Header, Payload, Vec<OwnedFd>), StreamError> {
        let (mut came, mut since, mut was_last) = (0, Instant::now(), false);
        loop {
            match self.receive()? {
                Received::Message { header, payload, fds } => return Ok((header, payload, fds)),
                Received::Closed => return Err(StreamError::Closed),
                Received::WouldBlock => {
                    self.put_away()?;
                    if self.partial.bytes() > came {
                        (came, since, was_last) = (self.partial.bytes(), Instant::now(), false);
                    }
                    // Not the whole time again: a byte out of band counts as input and is never received.
                    let waited_ms = u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX);
                    let left_ms = timeout_ms.saturating_sub(waited_ms);
                    let readable = ancillary::wait(self.fd.as_fd(), PollFlags::POLLIN, left_ms);
                    if !readable.map_err(StreamError::Receive)? || was_last {
                        return Err(StreamError::TimedOut { timeout_ms });
                    }
                    was_last = left_ms == 0;
                }
            }
        }
    }

    /// Sends a message, or queues what of it the socket does not take now: then [`MessageStream::wants_write`], and
    /// [`MessageStream::flush`] is to be called when the socket is writable. Descriptors that must wait are duplicated.
    ///
    /// # Errors
    ///
    /// [`StreamError::OutgoingFull`] and [`StreamError::Unsendable`] leave the stream as it was; after any other the
    /// peer cannot be reached any more.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), StreamError> {
        if bytes.is_empty() || fds.len() > FDS_MAX {
            return Err(StreamError::Unsendable { bytes: bytes.len(), fds: fds.len() });
        }
        if self.broken {
            return Err(StreamError::Broken);
        }
        self.outgoing.check_room(bytes.len(), fds.len())?;
        let mut sent = 0;
        if self.outgoing.is_empty() {
            sent = match ancillary::send(self.fd.as_fd(), bytes, fds) {
                Ok(sent) => sent,
                Err(Errno::EAGAIN) => 0,
                Err(error) => return Err(self.send_failed(error)),
            };
            if sent == bytes.len() {
                return Ok(());
            }
        }
        // The descriptors go with the first byte.
        let mut waiting = Vec::new();
        if sent == 0 {
            for fd in fds {
                match fd.try_clone_to_owned() {
                    Ok(duplicate) => waiting.push(duplicate),
                    Err(error) => return Err(self.send_failed(Errno::try_from(error).unwrap_or(Errno::EIO))),
                }
            }
        }
        self.outgoing.push(&bytes[sent..], waiting);
        Ok(())
    }

    /// Puts a message without descriptors behind what waits to be sent: [`MessageStream::flush`] sends all of it in one
    /// go.
    ///
    /// # Errors
    ///
    /// As [`MessageStream::send`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        if bytes.is_empty() {
            return Err(StreamError::Unsendable { bytes: 0, fds: 0 });
        }
        if self.broken {
            return Err(StreamError::Broken);
        }
        self.outgoing.check_room(bytes.len(), 0)?;
        self.outgoing.put(bytes);
        Ok(())
    }

    /// Whether something waits to be sent, so that the socket's writability is of interest.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    ///
    /// The peer cannot be reached any more.
    pub fn flush(&mut self) -> Result<(), StreamError> {
        if self.broken && self.wants_write() {
            return Err(StreamError::Broken);
        }
        let sent = self.outgoing.flush(self.fd.as_fd());
        sent.map_err(|error| self.send_failed(error))
    }

    /// Sends a message, waiting at most `timeout_ms` whenever the peer does not read. For front-ends and tests.
    ///
    /// # Errors
    ///
    /// As [`MessageStream::send`]; also [`StreamError::TimedOut`]: the rest of the message then still waits to be sent.
    pub fn send_blocking(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], timeout_ms: u32) -> Result<(), StreamError> {
        self.send(bytes, fds)?;
        while self.wants_write() {
            if !ancillary::wait(self.fd.as_fd(), PollFlags::POLLOUT, timeout_ms).map_err(StreamError::Send)? {
                return Err(StreamError::TimedOut { timeout_ms });
            }
            self.flush()?;
        }
        Ok(())
    }

    fn send_failed(&mut self, error: Errno) -> StreamError {
        // What waits can never be sent; half a message must not be followed by another. What the peer has sent before
        // it went can still be received.
        self.outgoing.clear();
        match error {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => StreamError::Closed,
            error => {
                self.broken = true;
                StreamError::Send(error.into())
            }
        }
    }
}

fn closed(partial: &Partial) -> Result<Received, StreamError> {
    match partial.bytes() {
        0 => Ok(Received::Closed),
        bytes => Err(StreamError::ClosedInMessage { bytes }),
    }
}

impl Drop for MessageStream {
    fn drop(&mut self) {
        // A peer whose messages were not taken would see a reset instead of an end. An Err changes nothing.
        if let Some(glance) = &mut self.glance {
            let _ = glance.take(self.fd.as_fd());
        }
    }
}

impl AsFd for MessageStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A listening stream socket, for front-ends to connect to.
#[derive(Debug)]
pub struct StreamListener {
    fd: OwnedFd,
}

impl StreamListener {
    /// Listens at `path`. The socket file has `mode` (permission bits) and is not removed later. A file that is there
    /// already is an error, whatever it is.
    ///
    /// # Errors
    ///
    /// See [`AddressError`].
    pub fn bind(path: &Path, mode: u32) -> Result<StreamListener, AddressError> {
        Ok(StreamListener { fd: address::listen_at(path, Kind::Stream, mode)? })
    }

    /// Takes a socket that listens already, for instance from a supervisor.
    ///
    /// # Errors
    ///
    /// It is not a listening `AF_UNIX` `SOCK_STREAM` socket.
    pub fn from_fd(fd: OwnedFd) -> Result<StreamListener, AddressError> {
        address::check_listener(&fd, Kind::Stream)?;
        Ok(StreamListener { fd })
    }

    /// The next connection; `None` when none waits.
    ///
    /// # Errors
    ///
    /// The process is out of descriptors or memory; the connection still waits.
    pub fn accept(&self, incoming: Incoming) -> Result<Option<MessageStream>, AddressError> {
        Ok(address::accept_from(&self.fd)?.map(|fd| MessageStream::new(fd, incoming)))
    }
}

impl AsFd for StreamListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
