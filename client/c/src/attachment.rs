//! The connection to a device.

use std::ffi::{CStr, CString, OsStr, c_char, c_int};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use iotlb_client::{AttachOptions, Attachment};

use crate::handle::{give, release, text};
use crate::status::{Failure, iotlb_status, told};

/// A worker's connection to one device. When the daemon dies, or this worker's access is revoked, it is over for good:
/// release everything that came of it, and attach anew.
#[derive(Debug)]
pub struct iotlb_attachment {
    pub(crate) inner: Attachment,
    /// The device's name.
    device: CString,
}

impl iotlb_attachment {
    fn of(inner: Attachment) -> iotlb_attachment {
        // No name has a NUL: the codec refuses control characters.
        let device = CString::new(inner.device()).unwrap_or_default();
        iotlb_attachment { inner, device }
    }
}

/// How to attach. What is zero has its default.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct iotlb_attach_options {
    /// Device to attach to, at most 64 bytes of UTF-8; NULL or empty: the only one.
    pub device: *const c_char,
    /// Free text for the daemon's log, at most 64 bytes of UTF-8; NULL: none.
    pub label: *const c_char,
    /// Longest that connecting and the handshake may take together, in milliseconds; 0: 5,000.
    pub timeout_ms: u32,
}

/// Connects to the daemon's control socket and attaches. `options` may be NULL. The attachment, or NULL, is in
/// `*attachment` then; give it back with iotlb_detach.
///
/// The library starts a thread for each attachment, in which all signals are blocked.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_NO_DAEMON, IOTLB_TIMED_OUT, IOTLB_FULL, IOTLB_REFUSED or IOTLB_FAILED;
/// iotlb_last_error has the reason.
///
/// # Safety
/// The pointers are good; `control_socket` and the options' texts end with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_attach(
    control_socket: *const c_char,
    options: *const iotlb_attach_options,
    attachment: *mut *mut iotlb_attachment,
) -> iotlb_status {
    // SAFETY: the caller's promise, for all of them.
    told(unsafe { give(attachment, || connect(None, control_socket, options)) })
}

/// As iotlb_attach, but gives up with IOTLB_INTERRUPTED as soon as `stop` is readable: a descriptor of signals, say. It
/// is only polled.
///
/// # Safety
/// As iotlb_attach; `stop` stays open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_attach_unless(
    stop: c_int,
    control_socket: *const c_char,
    options: *const iotlb_attach_options,
    attachment: *mut *mut iotlb_attachment,
) -> iotlb_status {
    // SAFETY: the caller's promise, for all of them.
    told(unsafe { give(attachment, || connect(Some(stop), control_socket, options)) })
}

/// As iotlb_attach, over a SOCK_SEQPACKET socket that is connected already: one that was inherited, say. The socket
/// belongs to the library from then on, whatever comes of it.
///
/// # Safety
/// As iotlb_attach; nobody else uses or closes the descriptor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_attach_socket(
    socket: c_int,
    options: *const iotlb_attach_options,
    attachment: *mut *mut iotlb_attachment,
) -> iotlb_status {
    // Before all else, so that it is closed whatever comes; what is wrong with it is said where the result has a place.
    let socket = owned(socket);
    // SAFETY: the caller's promise, for all of them.
    told(unsafe { give(attachment, || adopt(socket?, options)) })
}

/// Releases an attachment. The device is left when its last reader, request and queue are released as well; whoever
/// releases the last of all these may wait for a moment, so not while pinned.
///
/// # Safety
/// `attachment` is NULL, or was given by this library and not released since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_detach(attachment: *mut iotlb_attachment) {
    // SAFETY: the caller's promise.
    unsafe { release(attachment) }
}

/// Whether the daemon lives and has not revoked this worker's access. No system call.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_alive(attachment: *const iotlb_attachment) -> bool {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.is_some_and(|attachment| attachment.inner.alive())
}

/// A descriptor to be polled, and nothing else: readable, until iotlb_clear_events, once a leased queue got other
/// descriptors or the attachment's state changed. It belongs to the attachment. -1 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_events_fd(attachment: *const iotlb_attachment) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(-1, |attachment| attachment.inner.events().as_raw_fd())
}

/// Makes that descriptor unreadable until the next change. Clear first, then look at what changed.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_clear_events(attachment: *const iotlb_attachment) {
    // SAFETY: the caller's promise.
    if let Some(attachment) = unsafe { attachment.as_ref() } {
        attachment.inner.clear_events();
    }
}

/// How many rings the device has; 0 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_count(attachment: *const iotlb_attachment) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(0, |attachment| attachment.inner.queue_count())
}

/// What the daemon calls this worker in its log; 0 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_worker_id(attachment: *const iotlb_attachment) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(0, |attachment| attachment.inner.worker())
}

/// The device's name, which is there until the attachment is released; empty for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_device(attachment: *const iotlb_attachment) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(c"".as_ptr(), |attachment| attachment.device.as_ptr())
}

/// # Safety
/// As [`iotlb_attach_unless`].
unsafe fn connect(
    stop: Option<c_int>,
    control_socket: *const c_char,
    options: *const iotlb_attach_options,
) -> Result<iotlb_attachment, Failure> {
    if control_socket.is_null() {
        return Err(Failure::null("the path of the control socket"));
    }
    // SAFETY: the caller's promise.
    let (path, options) = unsafe { (CStr::from_ptr(control_socket), options_of(options)?) };
    let path = Path::new(OsStr::from_bytes(path.to_bytes()));
    let attached = match stop {
        None => Attachment::connect(path, &options),
        Some(stop) => {
            is_open(stop)?;
            // SAFETY: it is open, and stays so by the caller's promise.
            Attachment::connect_unless(unsafe { BorrowedFd::borrow_raw(stop) }, path, &options)
        }
    };
    Ok(iotlb_attachment::of(attached?))
}

fn is_open(fd: c_int) -> Result<(), Failure> {
    // SAFETY: asking is harmless whatever the number is.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 { Err(Failure::descriptor(fd)) } else { Ok(()) }
}

/// Takes a descriptor that is the library's from now on.
fn owned(fd: c_int) -> Result<OwnedFd, Failure> {
    is_open(fd)?;
    // SAFETY: it is open, and by the promise of `iotlb_attach_socket`'s caller nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `options` is null or good, and so are its texts.
unsafe fn adopt(socket: OwnedFd, options: *const iotlb_attach_options) -> Result<iotlb_attachment, Failure> {
    // SAFETY: the caller's promise.
    let options = unsafe { options_of(options) }?;
    Ok(iotlb_attachment::of(Attachment::from_socket(socket, &options)?))
}

/// # Safety
/// `options` is null or good, and so are its texts.
unsafe fn options_of(options: *const iotlb_attach_options) -> Result<AttachOptions, Failure> {
    let mut all = AttachOptions::default();
    // SAFETY: the caller's promise.
    let Some(given) = (unsafe { options.as_ref() }) else { return Ok(all) };
    // SAFETY: the caller's promise.
    let (device, label) = unsafe { (text("the device name", given.device)?, text("the label", given.label)?) };
    (all.device, all.label) = (device.to_owned(), label.to_owned());
    if given.timeout_ms != 0 {
        all.timeout_ms = given.timeout_ms;
    }
    Ok(all)
}
