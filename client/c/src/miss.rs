//! Asking the daemon for what is not in the table. Whoever does so may wait, and must not be pinned.

use iotlb_client::Ticket;

use crate::access::access_of;
use crate::handle::{give, release};
use crate::reader::iotlb_reader;
use crate::status::iotlb_status::{IOTLB_INVALID, IOTLB_OK, IOTLB_PENDING, IOTLB_PINNED, IOTLB_TIMED_OUT};
use crate::status::{Failure, iotlb_status};

/// A request for translations that may be under way.
#[derive(Debug)]
pub struct iotlb_request(Ticket);

/// Makes sure that `length` bytes from `iova` are in the table with `access`, by asking the daemon for what is missing.
/// Blocks: spins for a moment while that pays, then sleeps. Any length; asks for all that is missing at once.
///
/// That all is there when this returns does not mean that it still is at the next pin: translate, and resolve again on
/// an IOTLB_MISS.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_DENIED, IOTLB_TIMED_OUT, IOTLB_STOPPED, IOTLB_DAEMON_DEAD, IOTLB_REVOKED;
/// IOTLB_PINNED when the calling thread holds a pin on any device: what it waits for might wait for the pin.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_resolve(
    reader: *mut iotlb_reader,
    iova: u64,
    length: u64,
    access: u32,
    timeout_ms: u32,
) -> iotlb_status {
    // SAFETY: the caller's promise.
    let (Some(reader), Some(access)) = (unsafe { reader.as_mut() }, access_of(access)) else { return IOTLB_INVALID };
    let Some(reader) = reader.unpinned() else { return IOTLB_PINNED };
    reader.resolve(iova, length, access, timeout_ms).map_or_else(iotlb_status::from, |()| IOTLB_OK)
}

/// Waits until this process has mapped all memory that the table may point into: what to do after IOTLB_REMAPPING.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_PINNED, or IOTLB_TIMED_OUT, also when the attachment is over.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_wait_mapped(reader: *mut iotlb_reader, timeout_ms: u32) -> iotlb_status {
    // SAFETY: the caller's promise.
    let Some(reader) = (unsafe { reader.as_mut() }) else { return IOTLB_INVALID };
    let Some(reader) = reader.unpinned() else { return IOTLB_PINNED };
    if reader.wait_mapped(timeout_ms) { IOTLB_OK } else { IOTLB_TIMED_OUT }
}

/// Asks for `length` bytes from `iova`, at most 17 pages, without waiting: `*request`, or NULL there. Give it back with
/// iotlb_request_free. Not while the reader is pinned.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_FULL, IOTLB_PINNED, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `request` is NULL or good to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_new(
    reader: *mut iotlb_reader,
    iova: u64,
    length: u64,
    access: u32,
    request: *mut *mut iotlb_request,
) -> iotlb_status {
    // SAFETY: the caller's promise.
    let posted = match unsafe { reader.as_mut() } {
        None => Err(Failure::null("the reader")),
        Some(reader) => match (access_of(access), reader.unpinned()) {
            (None, _) => Err(Failure::access(access)),
            (_, None) => Err(Failure::pinned()),
            (Some(access), Some(reader)) => reader.request(iova, length, access).map_err(Failure::from),
        },
    };
    // SAFETY: the caller's promise.
    unsafe { give(request, posted.map(iotlb_request)) }
}

/// What became of a request; the same again when asked again. Never blocks.
///
/// IOTLB_PENDING; IOTLB_OK: translate again, the table held the translation when the answer was given; IOTLB_DENIED,
/// IOTLB_TIMED_OUT, IOTLB_STOPPED, IOTLB_INVALID, IOTLB_PINNED.
///
/// # Safety
/// Both are NULL, or good and no other thread's; the request came of this reader's attachment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_poll(reader: *mut iotlb_reader, request: *mut iotlb_request) -> iotlb_status {
    // SAFETY: the caller's promise, for both.
    let (Some(reader), Some(request)) = (unsafe { (reader.as_mut(), request.as_mut()) }) else { return IOTLB_INVALID };
    let Some(reader) = reader.unpinned() else { return IOTLB_PINNED };
    reader.poll(&mut request.0).map_or(IOTLB_PENDING, iotlb_status::from)
}

/// Sleeps until a request is answered, or `timeout_ms` have passed.
///
/// As iotlb_request_poll, IOTLB_DAEMON_DEAD and IOTLB_REVOKED.
///
/// # Safety
/// As iotlb_request_poll.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_wait(
    reader: *mut iotlb_reader,
    request: *mut iotlb_request,
    timeout_ms: u32,
) -> iotlb_status {
    // SAFETY: the caller's promise, for both.
    let (Some(reader), Some(request)) = (unsafe { (reader.as_mut(), request.as_mut()) }) else { return IOTLB_INVALID };
    let Some(reader) = reader.unpinned() else { return IOTLB_PINNED };
    reader.wait(&mut request.0, timeout_ms).map_or_else(iotlb_status::from, iotlb_status::from)
}

/// Releases a request, answered or not.
///
/// # Safety
/// `request` is NULL, or was given by this library and not released since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_free(request: *mut iotlb_request) {
    // SAFETY: the caller's promise.
    unsafe { release(request) }
}
