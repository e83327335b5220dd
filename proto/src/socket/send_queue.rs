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
    /// One that was sent, empty, for what comes next.
    spare: Vec<u8>,
}

impl SendQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sees to it that there is room for a message.
    ///
    /// # Errors
    ///
    /// [`StreamError::OutgoingFull`].
    pub(super) fn check_room(&self, bytes: usize, fds: usize) -> Result<(), StreamError> {
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
            // What was sent in part keeps its bytes until all have gone, so it must not grow: a peer that reads slowly
            // could have it never go.
            Some(last) if last.fds.is_empty() && last.sent == 0 => {
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_a_slow_reader_got_is_not_kept() {
        let (near, mut far) = UnixStream::pair().expect("a socket pair");
        near.set_nonblocking(true).expect("a socket");
        let mut queue = SendQueue::default();
        let message = [7; 20];
        // A reader that always leaves something to be sent.
        for _ in 0..200_000 {
            if queue.check_room(message.len(), 0).is_ok() {
                queue.put(&message);
            } else {
                far.read_exact(&mut [0; 4096]).expect("bytes are there");
            }
            queue.flush(near.as_fd()).expect("the peer lives");
        }
        let kept: usize = queue.queue.iter().map(|unsent| unsent.bytes.len()).sum();
        assert!(!queue.is_empty() && kept <= 2 * OUTGOING_BYTES_MAX, "{kept} bytes for {} to be sent", queue.bytes);
    }

    #[test]
    fn messages_that_wait_go_out_together_and_in_order() {
        let (near, mut far) = UnixStream::pair().expect("a socket pair");
        let mut queue = SendQueue::default();
        queue.put(b"one ");
        queue.push(b"with ", vec![near.try_clone().expect("a descriptor").into()]);
        queue.put(b"two ");
        queue.put(b"three");
        assert_eq!(queue.queue.len(), 3, "nothing joins what has descriptors");
        queue.flush(near.as_fd()).expect("the peer lives");
        assert_eq!((queue.is_empty(), queue.bytes, queue.fds), (true, 0, 0));
        let mut all = [0; 18];
        far.read_exact(&mut all).expect("bytes are there");
        assert_eq!(&all, b"one with two three");
    }
}
