//! A look at what waits in a socket, without taking it.
//!
//! What is looked at stays in the socket, so nothing is decided by looking: a message that is not whole yet, too large,
//! or comes with descriptors is left to be received byte by byte.
//!
//! What was handed out stays in the socket too, as long as the caller wishes and there is room to look at more. To take
//! bytes wakes up a peer that sleeps on its end. A front-end that shares the processor with whoever answers it runs as
//! soon as it is answered, and sleeps again, behind its next message, before the last one could be taken.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::ancillary;
use crate::vhost_user::header::{HEADER_LEN, Header, HeaderError, Incoming};
use crate::vhost_user::iotlb::IOTLB_LEN;

/// Bytes of most messages: those that are looked at one by one while a session lasts.
const MESSAGE_LEN: usize = HEADER_LEN + IOTLB_LEN;
/// Bytes looked at: a front-end that sends many IOTLB messages in one go, or one after the other without a pause, has
/// this many of them handed out before any is taken. All are looked at anew each time, so more would cost more.
const GLANCE_MAX: usize = 16 * MESSAGE_LEN;

/// What is in the socket, and how much of it was handed out.
#[derive(Debug)]
pub(super) struct Glance {
    bytes: [u8; GLANCE_MAX],
    seen: usize,
    handed_out: usize,
}

/// What is in the socket.
enum Seen {
    /// Bytes, or the end.
    Bytes,
    /// Bytes with something that comes with them.
    Descriptors,
    Nothing,
}

impl Default for Glance {
    fn default() -> Glance {
        Glance { bytes: [0; GLANCE_MAX], seen: 0, handed_out: 0 }
    }
}

impl Glance {
    /// The next whole message, if one was seen. It counts as handed out.
    pub(super) fn next(&mut self, incoming: Incoming) -> Result<Option<(Header, Vec<u8>)>, HeaderError> {
        let Some((head, rest)) = self.rest().split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::parse(head, incoming)?;
        let Some(payload) = rest.get(..header.size as usize) else { return Ok(None) };
        let payload = payload.to_vec();
        self.handed_out += HEADER_LEN + payload.len();
        Ok(Some((header, payload)))
    }

    /// Whether [`Glance::next`] has a message.
    pub(super) fn has_message(&self, incoming: Incoming) -> bool {
        self.rest().split_first_chunk::<HEADER_LEN>().is_some_and(|(head, rest)| {
            Header::parse(head, incoming).is_ok_and(|header| rest.len() >= header.size as usize)
        })
    }

    /// Looks at what is there, behind what was handed out. Nothing is seen of what may have descriptors with it, nor of
    /// the end.
    ///
    /// Where nothing follows, what was handed out is taken; with `keep` it stays, and the answer is `EAGAIN`.
    pub(super) fn look(&mut self, socket: BorrowedFd<'_>, keep: bool) -> Result<(), Errno> {
        if GLANCE_MAX - self.handed_out < MESSAGE_LEN {
            self.take(socket)?;
        }
        if self.handed_out > 0 {
            match self.peek(socket)? {
                Seen::Bytes if self.seen > self.handed_out => return Ok(()),
                Seen::Bytes if self.seen == self.handed_out && keep => return Err(Errno::EAGAIN),
                // Somebody else has taken the bytes that were seen here: framing is lost.
                Seen::Nothing => return Err(Errno::EPROTO),
                Seen::Bytes | Seen::Descriptors => self.take(socket)?,
            }
        }
        match self.peek(socket)? {
            Seen::Bytes | Seen::Descriptors => Ok(()),
            Seen::Nothing => Err(Errno::EAGAIN),
        }
    }

    /// Whether some of what was handed out is still in the socket.
    pub(super) fn is_kept(&self) -> bool {
        self.handed_out > 0
    }

    /// Takes what was handed out from the socket. Nothing counts as seen then.
    pub(super) fn take(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        self.seen = 0;
        while self.handed_out > 0 {
            // Into the same place: what was seen is of no more use. No room for descriptors: there are none with these
            // bytes, and if somebody else has read from the socket meanwhile, those that come instead are dropped.
            let room = &mut self.bytes[..self.handed_out];
            match recv(socket.as_raw_fd(), room, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => return Err(Errno::ECONNRESET),
                Ok(count) => self.handed_out -= count.min(self.handed_out),
                Err(Errno::EINTR) => {}
                // As in `look`.
                Err(Errno::EAGAIN) => return Err(Errno::EPROTO),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn peek(&mut self, socket: BorrowedFd<'_>) -> Result<Seen, Errno> {
        self.seen = 0;
        match ancillary::peek(socket, &mut self.bytes) {
            Ok((_, true)) => Ok(Seen::Descriptors),
            Ok((count, false)) => {
                self.seen = count;
                Ok(Seen::Bytes)
            }
            Err(Errno::EAGAIN) => Ok(Seen::Nothing),
            Err(error) => Err(error),
        }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.handed_out.min(self.seen)..self.seen]
    }
}
