//! One end of a vhost-user socket: whole messages, and every wait with a watchdog.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use nix::sys::time::TimeSpec;

use super::SimError;
use super::wire::{HEADER_LEN, MessageHeader};

/// Longest body a back-end may send. Its longest real one is a device configuration, 12 + 256 bytes.
const BODY_MAX: usize = 4096;

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Header.
    pub header: MessageHeader,
    /// Body.
    pub body: Vec<u8>,
}

/// A vhost-user socket.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    timeout: Duration,
}

impl Channel {
    /// Every wait on `stream` ends after `timeout` with [`SimError::TimedOut`].
    #[must_use]
    pub fn new(stream: UnixStream, timeout: Duration) -> Channel {
        Channel { stream, timeout }
    }

    /// The watchdog's time.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Sends one message.
    pub fn send(
        &self,
        what: &'static str,
        header: MessageHeader,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SimError> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + body.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(body);
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let mut control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let deadline = Instant::now() + self.timeout;
        let mut sent = 0;
        while sent < bytes.len() {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            let rest = [IoSlice::new(&bytes[sent..])];
            match sendmsg::<()>(self.stream.as_raw_fd(), &rest, control, flags, None) {
                Ok(count) => {
                    sent += count;
                    // The descriptors went with the first byte.
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(what, PollFlags::POLLOUT, deadline)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(SimError::Closed { what }),
                Err(errno) => return Err(SimError::Send { what, source: errno.into() }),
            }
        }
        Ok(())
    }

    /// Receives one message; `what` names it in errors.
    pub fn receive(&self, what: &'static str) -> Result<Message, SimError> {
        let deadline = Instant::now() + self.timeout;
        let mut head = [0; HEADER_LEN];
        self.fill(what, &mut head, deadline)?;
        let header = MessageHeader::decode(&head);
        let size = header.size as usize;
        if size > BODY_MAX {
            return Err(SimError::Protocol { what: format!("{size} bytes of body in {what}") });
        }
        let mut body = vec![0; size];
        self.fill(what, &mut body, deadline)?;
        Ok(Message { header, body })
    }

    /// Whether a message, or the end of the stream, can be read at once.
    pub fn readable(&self) -> Result<bool, SimError> {
        let ready = poll_fds(&[self.as_fd()], Duration::ZERO)
            .map_err(|source| SimError::Receive { what: "a message", source })?;
        Ok(ready[0])
    }

    fn fill(&self, what: &'static str, bytes: &mut [u8], deadline: Instant) -> Result<(), SimError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match recv(self.stream.as_raw_fd(), &mut bytes[filled..], MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(SimError::Closed { what }),
                Ok(count) => filled += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(what, PollFlags::POLLIN, deadline)?,
                Err(errno) => return Err(SimError::Receive { what, source: errno.into() }),
            }
        }
        Ok(())
    }

    fn wait(&self, what: &'static str, events: PollFlags, deadline: Instant) -> Result<(), SimError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SimError::TimedOut { what, timeout_ms: self.timeout.as_millis() });
            }
            let mut fds = [PollFd::new(self.stream.as_fd(), events)];
            match ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(SimError::Receive { what, source: errno.into() }),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Waits until one of `fds` can be read (or is at its end), at most `timeout`; which of them. A signal ends the wait.
pub fn poll_fds(fds: &[BorrowedFd<'_>], timeout: Duration) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
    match ppoll(&mut polled, Some(TimeSpec::from_duration(timeout)), None) {
        Ok(_) => Ok(polled.iter().map(|fd| fd.any().unwrap_or(true)).collect()),
        Err(Errno::EINTR) => Ok(vec![false; fds.len()]),
        Err(errno) => Err(errno.into()),
    }
}
