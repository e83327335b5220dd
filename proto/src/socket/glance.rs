//! A look at what waits in a socket, without taking it.
//!
//! What is looked at stays in the socket, so nothing is decided by looking: a message that is not whole yet, too large,
//! or comes with descriptors is left to be received byte by byte.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::ancillary;
use crate::vhost_user::header::{HEADER_LEN, Header, HeaderError, Incoming};
use crate::vhost_user::iotlb::IOTLB_LEN;

/// Bytes looked at: a front-end that sends many IOTLB messages in one go has this many of them handed out at a time.
const GLANCE_MAX: usize = 16 * (HEADER_LEN + IOTLB_LEN);

/// What is in the socket, and how much of it was handed out.
#[derive(Debug)]
pub(super) struct Glance {
    bytes: [u8; GLANCE_MAX],
    seen: usize,
    handed_out: usize,
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
    pub(super) fn has_message(&self) -> bool {
        self.rest().split_first_chunk::<HEADER_LEN>().is_some_and(|(head, rest)| {
            // Of either kind; whether it is of the right one is found out when it is taken.
            let parsed = Header::parse(head, Incoming::Requests).or_else(|_| Header::parse(head, Incoming::Replies));
            parsed.is_ok_and(|header| rest.len() >= header.size as usize)
        })
    }

    /// Takes what was handed out from the socket.
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
                // Somebody else has taken the bytes that were seen here: framing is lost.
                Err(Errno::EAGAIN) => return Err(Errno::EPROTO),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Looks at what is there. Nothing is seen of what may have descriptors with it, nor of the end.
    pub(super) fn look(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        (self.seen, self.handed_out) = (0, 0);
        let (count, descriptors) = ancillary::peek(socket, &mut self.bytes)?;
        if !descriptors {
            self.seen = count;
        }
        Ok(())
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.handed_out.min(self.seen)..self.seen]
    }
}
