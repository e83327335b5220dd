//! The back-end channel: misses out, their acknowledgements in. The front-end reads it only when it has time, so
//! nothing here waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iotlb_proto::socket::{AddressError, MessageStream, Received, StreamError};
use iotlb_proto::vhost_user::{
    BACKEND_IOTLB_MSG, DecodeError, Incoming, IotlbMessage, backend_iotlb, decode_reply_u64,
};

/// Acknowledgements taken in one round: as many as misses are in flight at most.
const REPLIES_PER_ROUND: usize = 64;

/// Why the channel is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackEndError {
    /// The front-end closed it.
    #[error("the front-end closed it")]
    Closed,
    /// It failed, or its framing is lost, or the front-end does not read it.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Something else than an acknowledgement came as a reply.
    #[error("{0}")]
    Reply(#[from] DecodeError),
}

/// The channel.
#[derive(Debug)]
pub(crate) struct BackEnd {
    stream: MessageStream,
    /// Misses wait, and the poller was asked to report room for them.
    waits_for_room: bool,
    /// What was acknowledged, and not judged yet.
    replies: Vec<u64>,
}

impl BackEnd {
    /// Takes over the socket a front-end sent.
    pub(crate) fn new(fd: OwnedFd) -> Result<BackEnd, AddressError> {
        Ok(BackEnd {
            stream: MessageStream::from_fd(fd, Incoming::Replies)?,
            waits_for_room: false,
            replies: Vec::new(),
        })
    }

    /// Puts a message behind those that wait for [`BackEnd::flush`]. An error ends the channel.
    pub(crate) fn put(&mut self, message: &IotlbMessage, need_reply: bool) -> Result<(), BackEndError> {
        Ok(self.stream.put(&backend_iotlb(message, need_reply))?)
    }

    /// Sends what waits, as far as the socket takes it. An error ends the channel.
    pub(crate) fn flush(&mut self) -> Result<(), BackEndError> {
        Ok(self.stream.flush()?)
    }

    /// Nothing is expected soon: acknowledgements that were read are taken from the socket. An error ends the channel.
    pub(crate) fn put_away(&mut self) -> Result<(), BackEndError> {
        Ok(self.stream.put_away()?)
    }

    /// Whether the poller has to be told anew if room for misses matters, and what.
    pub(crate) fn room_matters(&mut self) -> Option<bool> {
        let wanted = self.stream.wants_write();
        let news = self.waits_for_room != wanted;
        self.waits_for_room = wanted;
        news.then_some(wanted)
    }

    /// Whether misses wait for room.
    pub(crate) fn waits_for_room(&self) -> bool {
        self.waits_for_room
    }

    /// Reads acknowledgements, and sends what waits. `Ok(true)`: that was all; `Ok(false)`: more may be there; or why
    /// the channel is over.
    pub(crate) fn receive(&mut self) -> Result<bool, BackEndError> {
        self.stream.flush()?;
        for _ in 0..REPLIES_PER_ROUND {
            match self.stream.receive()? {
                // Descriptors have no meaning here, and are closed.
                Received::Message { header, payload, .. } => {
                    self.replies.push(decode_reply_u64(BACKEND_IOTLB_MSG, header, &payload)?);
                }
                Received::WouldBlock => return Ok(true),
                Received::Closed => return Err(BackEndError::Closed),
            }
        }
        Ok(false)
    }

    /// Whether more were read than a front-end that plays by the rules can have sent: they need not be kept in order.
    pub(crate) fn has_too_many(&self) -> bool {
        self.replies.len() > REPLIES_PER_ROUND
    }

    /// Takes what was read.
    pub(crate) fn take_replies(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.replies)
    }
}

impl AsFd for BackEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
