//! The connection to a device.

use std::ffi::{OsStr, c_char, c_int};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use iotlb_client::{AttachOptions, Attachment};

use crate::handle::{give, release, text};
use crate::status::{Failure, iotlb_status};

/// A worker's connection to one device. When the daemon dies, or this worker's access is revoked, it is over for good:
/// release everything that came of it, and attach anew.
#[derive(Debug)]
pub struct iotlb_attachment(pub(crate) Attachment);

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
/// IOTLB_OK, IOTLB_INVALID, IOTLB_TIMED_OUT, IOTLB_FULL, IOTLB_REFUSED or IOTLB_FAILED; iotlb_last_error has the
/// reason.
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
    unsafe { give(attachment, connect(control_socket, options)) }
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
    // SAFETY: the caller's promise, for all of them.
    unsafe { give(attachment, adopt(socket, options)) }
}

/// Releases an attachment. The device is left when its last reader, request and queue are released as well.
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
    unsafe { attachment.as_ref() }.is_some_and(|attachment| attachment.0.alive())
}

/// A descriptor to be polled, and nothing else: readable, until iotlb_clear_events, once a leased queue got other
/// descriptors or the attachment's state changed. It belongs to the attachment. -1 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_events_fd(attachment: *const iotlb_attachment) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(-1, |attachment| attachment.0.events().as_raw_fd())
}

/// Makes that descriptor unreadable until the next change. Clear first, then look at what changed.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_clear_events(attachment: *const iotlb_attachment) {
    // SAFETY: the caller's promise.
    if let Some(attachment) = unsafe { attachment.as_ref() } {
        attachment.0.clear_events();
    }
}

/// How many rings the device has; 0 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_count(attachment: *const iotlb_attachment) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(0, |attachment| attachment.0.queue_count())
}

/// What the daemon calls this worker in its log; 0 for NULL.
///
/// # Safety
/// `attachment` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_worker_id(attachment: *const iotlb_attachment) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { attachment.as_ref() }.map_or(0, |attachment| attachment.0.worker())
}

/// # Safety
/// As [`iotlb_attach`].
unsafe fn connect(
    control_socket: *const c_char,
    options: *const iotlb_attach_options,
) -> Result<iotlb_attachment, Failure> {
    if control_socket.is_null() {
        return Err(Failure::null("the path of the control socket"));
    }
    // SAFETY: the caller's promise.
    let (path, options) = unsafe { (std::ffi::CStr::from_ptr(control_socket), options_of(options)?) };
    Ok(iotlb_attachment(Attachment::connect(Path::new(OsStr::from_bytes(path.to_bytes())), &options)?))
}

/// # Safety
/// As [`iotlb_attach_socket`].
unsafe fn adopt(socket: c_int, options: *const iotlb_attach_options) -> Result<iotlb_attachment, Failure> {
    // SAFETY: asking is harmless whatever the number is.
    if socket < 0 || unsafe { libc::fcntl(socket, libc::F_GETFD) } < 0 {
        return Err(Failure::descriptor(socket));
    }
    // SAFETY: it is open, and by the caller's promise nobody else's. From here on it is closed in any case.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the caller's promise.
    let options = unsafe { options_of(options) }?;
    Ok(iotlb_attachment(Attachment::from_socket(socket, &options)?))
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
