//! One `recvmsg` and one `sendmsg` that cannot lose or leak a descriptor.
//!
//! Ready-made wrappers do not do here: when control data is truncated they hand out an error and the descriptors that
//! did arrive stay open without an owner, and a pidfd that comes because the *peer* set `SO_PASSPIDFD` (whoever made a
//! socket pair can, for both ends, at any time) is not taken out at all. So the control buffer is walked here, as
//! bytes.
//!
//! Every call says `MSG_DONTWAIT`: whether a shared file description blocks is also in the peer's hands.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

/// Bytes of a control message's header as the kernel writes it: length (`size_t`), level, type.
const CMSG_HEADER_LEN: usize = size_of::<usize>() + 2 * size_of::<i32>();
/// `SCM_PIDFD` of `linux/socket.h`.
const SCM_PIDFD: i32 = 4;
/// Room for control data, in 64-bit words. 2 KiB: the 253 descriptors that the system lets through at most need 1,032,
/// credentials and a pidfd, which the peer may have asked for, 56, and a security label has the rest. Far more than are
/// accepted: what there is no room for would be closed within the call, and to close a stranger's descriptor can take
/// for ever. So the caller gets all of them, to count and to close.
const CONTROL_WORDS: usize = 256;

/// What one `recvmsg` brought.
#[derive(Debug)]
pub(super) struct Fragment {
    /// Bytes written to the buffer.
    pub(super) len: usize,
    /// Descriptors, close-on-exec, in the order they were sent.
    pub(super) fds: Vec<OwnedFd>,
    /// The packet was longer than the buffer; the rest is gone.
    pub(super) data_truncated: bool,
    /// There was more control data than room for it; the rest is gone.
    pub(super) control_truncated: bool,
}

/// Receives into `buffer`, without waiting. A signal does not end the call.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Fragment, Errno> {
    // Words, so that the kernel finds the alignment that control headers need.
    let mut control = [0u64; CONTROL_WORDS];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all fields are integers and pointers, for which zeros are valid; some libcs have private padding, so
    // there is no other way to make one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    let received = loop {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control) as _;
        // SAFETY: `message` points at one iovec over `buffer`, exclusively borrowed and of the length said, and at
        // `control`, a local of the length said. The kernel writes within these lengths, and only during the call.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
        match Errno::result(received) {
            Err(Errno::EINTR) => {}
            other => break other?,
        }
    };
    #[allow(clippy::unnecessary_cast)] // a `size_t` in one libc, a `socklen_t` in another
    let control_len = (message.msg_controllen as usize).min(size_of_val(&control));
    let fds = descriptors(&control, control_len);
    Ok(Fragment {
        len: usize::try_from(received).unwrap_or(0).min(buffer.len()),
        fds,
        data_truncated: message.msg_flags & libc::MSG_TRUNC != 0,
        control_truncated: message.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Looks at what waits in the socket, without taking it and without waiting. Returns how many bytes that are, and
/// whether something comes with some of them: descriptors, which stay where they are, or what else the peer asked for.
pub(super) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<(usize, bool), Errno> {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let mut parts = [IoSliceMut::new(buffer)];
    loop {
        // No control buffer: the system then says "truncated" instead of installing descriptors.
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, None, flags) {
            Ok(message) => return Ok((message.bytes, message.flags.contains(MsgFlags::MSG_CTRUNC))),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Takes ownership of every descriptor in a control buffer that `recvmsg` has just filled with `len` bytes. Those of
/// `SCM_RIGHTS` are returned, all others closed.
fn descriptors(control: &[u64; CONTROL_WORDS], len: usize) -> Vec<OwnedFd> {
    if len == 0 {
        // As with nearly every message: nothing to copy.
        return Vec::new();
    }
    let mut bytes = [0u8; CONTROL_WORDS * size_of::<u64>()];
    for (chunk, word) in bytes.chunks_exact_mut(size_of::<u64>()).zip(control).take(len.div_ceil(size_of::<u64>())) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    let mut rest = &bytes[..len.min(bytes.len())];
    let mut fds = Vec::new();
    while let Some((header, _)) = rest.split_first_chunk::<CMSG_HEADER_LEN>() {
        let (cmsg_len, kind) = header.split_at(size_of::<usize>());
        let cmsg_len = usize::from_ne_bytes(cmsg_len.try_into().unwrap_or_default());
        let is = |wanted: i32| kind.split_at(4) == (&libc::SOL_SOCKET.to_ne_bytes(), &wanted.to_ne_bytes());
        if cmsg_len < CMSG_HEADER_LEN {
            break;
        }
        let data = &rest[CMSG_HEADER_LEN..cmsg_len.min(rest.len())];
        if is(libc::SCM_RIGHTS) || is(SCM_PIDFD) {
            for number in data.as_chunks::<{ size_of::<RawFd>() }>().0 {
                let number = RawFd::from_ne_bytes(*number);
                // An `SCM_PIDFD` carries -1 or an errno when there was no pidfd to be had.
                if number < 0 {
                    continue;
                }
                // SAFETY: the kernel has installed this descriptor for this message. Nothing else knows its number, and
                // the buffer is walked once, so it gets one owner.
                let fd = unsafe { OwnedFd::from_raw_fd(number) };
                if is(libc::SCM_RIGHTS) {
                    fds.push(fd);
                }
            }
        }
        let Some(next) = cmsg_len.checked_next_multiple_of(size_of::<usize>()) else { break };
        rest = rest.get(next..).unwrap_or_default();
    }
    fds
}

/// Sends `bytes` with `fds`, without waiting and without `SIGPIPE`; says how many bytes went. The descriptors go with
/// the first byte.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        let sent = if numbers.is_empty() {
            // The system has less to look at.
            nix::sys::socket::send(socket.as_raw_fd(), bytes, flags)
        } else {
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None)
        };
        match sent {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// Waits until `socket` is readable (or writable), its peer is gone, or `timeout_ms` has passed; `false` for the
/// latter. A signal does not end the call, nor make it longer.
pub(super) fn wait(socket: BorrowedFd<'_>, events: nix::poll::PollFlags, timeout_ms: u32) -> io::Result<bool> {
    use nix::poll::{PollFd, PollTimeout, poll};
    let start = Instant::now();
    let mut left = timeout_ms;
    loop {
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket, events)], timeout) {
            Err(Errno::EINTR) => left = left_ms(start, timeout_ms),
            Ok(ready) => return Ok(ready > 0),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What is left of `timeout_ms` that began at `start`.
pub(super) fn left_ms(start: Instant, timeout_ms: u32) -> u32 {
    timeout_ms.saturating_sub(u32::try_from(start.elapsed().as_millis()).unwrap_or(u32::MAX))
}
