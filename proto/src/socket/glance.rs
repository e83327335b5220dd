//! A look at what waits in a socket, without taking it.
//!
//! What is looked at stays in the socket, so nothing is decided by looking: a message that is not whole yet, too large,
//! or of a kind that may come with descriptors is left to be received byte by byte. Handed out are IOTLB messages and
//! the replies to them, which are nearly all there is for hours. So a look asks for bytes and nothing else, which takes
//! the system three quarters of the time that it takes to say as well whether something comes with them.
//!
//! A descriptor that comes with an IOTLB message nevertheless is closed by the system when the message is taken, or by
//! the decoder, if the message came in pieces.
//!
//! What was handed out stays in the socket too, until the caller puts it away or much has come together. To take
//! bytes wakes up a peer that sleeps on its end. A front-end that shares the processor with whoever answers it runs as
//! soon as it is answered, and sleeps again, behind its next message, before the last one could be taken.
//!
//! The system keeps the place up to which bytes were looked at (`SO_PEEK_OFF`, socket(7)): a look brings only what is
//! new, and costs the same however much was handed out. That place counts from the first byte in the socket, and moves
//! with what is looked at and with what is taken. Invariant between calls, as long as nobody else uses the socket: it
//! is [`Glance::seen`].

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{GetSockOpt, MsgFlags, SetSockOpt, recv};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};

use super::payload::Payload;
use crate::vhost_user::header::{BACKEND_IOTLB_MSG, HEADER_LEN, Header, HeaderError, Incoming, RequestCode};
use crate::vhost_user::iotlb::IOTLB_LEN;

/// Bytes of most messages: those that are looked at one by one while a session lasts.
const MESSAGE_LEN: usize = HEADER_LEN + IOTLB_LEN;
/// With so many messages handed out and left in the socket, they are taken before anything else is looked at.
const TAKE_AT: usize = 24;
/// Messages that a look has room for behind those, as long as an IOTLB message or shorter. A front-end that pipelines
/// sends as many as it was asked for, and waits for the answers to all of them: those without room are answered apart.
const LOOK_MIN: usize = 32;
/// Bytes that were looked at and not taken, at most. Each message takes up 768 bytes or somewhat more of what the
/// peer's end may hold, by default 212,992, and that end counts as writable while three quarters of it are free: so
/// with these 55 messages it still is. Of messages without payload there may be more; a peer that waits for room has it
/// when they are put away.
const GLANCE_MAX: usize = (TAKE_AT - 1 + LOOK_MIN) * MESSAGE_LEN;

sockopt_impl!(
    /// Where the next look begins.
    PeekOffset, Both, libc::SOL_SOCKET, libc::SO_PEEK_OFF, i32
);

/// What is in the socket, and how much of it was handed out.
#[derive(Debug)]
pub(super) struct Glance {
    bytes: [u8; GLANCE_MAX],
    /// Bytes looked at, from the first in the socket.
    seen: usize,
    /// How many of these were handed out.
    handed_out: usize,
    /// And as how many messages.
    messages: usize,
}

/// Whether messages of this kind are handed out: those that have no descriptors.
fn is_of_bytes(header: &Header, incoming: Incoming) -> bool {
    match incoming {
        Incoming::Requests => header.request == RequestCode::IotlbMsg.number(),
        Incoming::Replies => header.request == BACKEND_IOTLB_MSG,
    }
}

impl Glance {
    /// For a socket that nobody has looked into yet.
    ///
    /// # Errors
    ///
    /// The system does not keep the place: nothing can be looked at.
    pub(super) fn new(socket: BorrowedFd<'_>) -> Result<Glance, Errno> {
        look_from(socket, 0)?;
        // To believe a system that accepts everything would mean to read each message again and again.
        if PeekOffset.get(&socket)? != 0 {
            return Err(Errno::ENOPROTOOPT);
        }
        Ok(Glance { bytes: [0; GLANCE_MAX], seen: 0, handed_out: 0, messages: 0 })
    }

    /// The next whole message, if one was seen. It counts as handed out.
    pub(super) fn next(&mut self, incoming: Incoming) -> Result<Option<(Header, Payload)>, HeaderError> {
        let Some((head, rest)) = self.rest().split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::parse(head, incoming)?;
        let Some(payload) = rest.get(..header.size as usize).filter(|_| is_of_bytes(&header, incoming)) else {
            return Ok(None);
        };
        let payload = Payload::copy_of(payload);
        self.handed_out += HEADER_LEN + payload.len();
        self.messages += 1;
        Ok(Some((header, payload)))
    }

    /// Whether [`Glance::next`] has a message.
    pub(super) fn has_message(&self, incoming: Incoming) -> bool {
        self.rest().split_first_chunk::<HEADER_LEN>().is_some_and(|(head, rest)| {
            Header::parse(head, incoming)
                .is_ok_and(|header| rest.len() >= header.size as usize && is_of_bytes(&header, incoming))
        })
    }

    /// Looks at what is there, behind what was handed out. Nothing is seen of the end: that is taken which was handed
    /// out, and [`Glance::next`] has no message.
    pub(super) fn look(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        // What was seen in part is looked at from its start, where there is room for all of it.
        let is_cut = self.seen > self.handed_out;
        if is_cut || self.messages >= TAKE_AT || GLANCE_MAX - self.seen < MESSAGE_LEN {
            self.take(socket)?;
        }
        loop {
            let room = &mut self.bytes[self.seen..];
            match recv(socket.as_raw_fd(), room, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return self.take(socket),
                Ok(count) => {
                    self.seen += count;
                    return Ok(());
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what was handed out from the socket. Nothing counts as seen then.
    pub(super) fn take(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        let looks_ahead = self.seen > self.handed_out;
        (self.seen, self.messages) = (0, 0);
        while self.handed_out > 0 {
            // Into the same place: what was seen is of no more use. No room for descriptors: there should be none with
            // these bytes, and if somebody else has read from the socket, those that come instead are dropped.
            let room = &mut self.bytes[..self.handed_out];
            match recv(socket.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(Errno::ECONNRESET),
                Ok(count) => self.handed_out -= count.min(self.handed_out),
                Err(Errno::EINTR) => {}
                // Somebody else has taken the bytes that were seen here: framing is lost.
                Err(Errno::EAGAIN) => return Err(Errno::EPROTO),
                Err(error) => return Err(error),
            }
        }
        if looks_ahead { look_from(socket, 0) } else { Ok(()) }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.handed_out.min(self.seen)..self.seen]
    }
}

/// Has the next look begin behind the first `bytes` bytes in the socket.
fn look_from(socket: BorrowedFd<'_>, bytes: usize) -> Result<(), Errno> {
    // GLANCE_MAX at most.
    let offset = i32::try_from(bytes).unwrap_or(i32::MAX);
    loop {
        match PeekOffset.set(&socket, &offset) {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}
