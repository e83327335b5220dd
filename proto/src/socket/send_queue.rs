//! What waits to be sent on a stream: messages that were put together, and what of others the socket did not take.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::ancillary;
use super::stream::StreamError;
use crate::vhost_user::header::FDS_MAX;

/// Most bytes that wait to be sent. A peer that reads nothing for that long has stopped: 64 KiB are some 1,500 IOTLB
/// messages, on top of the 200 or so that fit the socket itself.
pub const OUTGOING_BYTES_MAX: usize = 64 * 1024;
/// Most descriptors that wait to be sent: a few memory tables.
pub const OUTGOING_FDS_MAX: usize = 4 * FDS_MAX;
/// A larger buffer is not kept for what comes next: answers that go out together are seldom more.
const SPARE_MAX: usize = 4096;

/// A message, the rest of one, or several that go out together.
#[derive(Debug)]
struct Unsent {
    bytes: Vec<u8>,
    sent: usize,
    /// Emptied when the first byte has gone.
    fds: Vec<OwnedFd>,
}

/// All that waits, in order.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    queue: VecDeque<Unsent>,
    bytes: usize,
    fds: usize,
    /// The buffer that was sent last, empty.
    spare: Vec<u8>,
}

impl SendQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether there is room for a message.
    ///
    /// # Errors
    ///
    /// [`StreamError::OutgoingFull`].
    pub(super) fn has_room(&self, bytes: usize, fds: usize) -> Result<(), StreamError> {
        if self.bytes + bytes <= OUTGOING_BYTES_MAX && self.fds + fds <= OUTGOING_FDS_MAX {
            return Ok(());
        }
        Err(StreamError::OutgoingFull { bytes: self.bytes, fds: self.fds })
    }

    /// Adds something that begins a message of its own or goes on with one that was sent in part. The descriptors go
    /// with its first byte.
    pub(super) fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.bytes += bytes.len();
        self.fds += fds.len();
        let mut buffer = std::mem::take(&mut self.spare);
        buffer.extend_from_slice(bytes);
        self.queue.push_back(Unsent { bytes: buffer, sent: 0, fds });
    }

    /// Adds a message without descriptors to what goes out in one call, if there is such.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        match self.queue.back_mut() {
            Some(last) if last.fds.is_empty() => {
                self.bytes += bytes.len();
                last.bytes.extend_from_slice(bytes);
            }
            _ => self.push(bytes, Vec::new()),
        }
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    ///
    /// Any but `EAGAIN`, after which the rest waits on.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<(), Errno> {
        while let Some(unsent) = self.queue.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = unsent.fds.iter().map(AsFd::as_fd).collect();
            let sent = match ancillary::send(socket, &unsent.bytes[unsent.sent..], &fds) {
                Ok(sent) => sent,
                Err(Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error),
            };
            unsent.sent += sent;
            self.bytes -= sent;
            if sent > 0 {
                self.fds -= unsent.fds.len();
                unsent.fds.clear();
            }
            if unsent.sent == unsent.bytes.len()
                && let Some(mut gone) = self.queue.pop_front()
                && gone.bytes.capacity() <= SPARE_MAX
            {
                gone.bytes.clear();
                self.spare = gone.bytes;
            }
        }
        Ok(())
    }

    /// Drops all of it.
    pub(super) fn clear(&mut self) {
        *self = SendQueue::default();
    }
}
