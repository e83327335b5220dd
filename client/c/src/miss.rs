//! Asking the daemon for what is not in the table. Whoever does so may wait, and must not be pinned.

use iotlb_client::{Attachment, ResolveError, Ticket};

use crate::access::access_of;
use crate::handle::{array, places, release};
use crate::reader::iotlb_reader;
use crate::status::iotlb_status;
use crate::status::iotlb_status::{IOTLB_FULL, IOTLB_INVALID, IOTLB_OK, IOTLB_PENDING, IOTLB_PINNED, IOTLB_TIMED_OUT};
use crate::translate::iotlb_range;

/// A request for translations that may be under way.
#[derive(Debug)]
pub struct iotlb_request {
    ticket: Ticket,
    /// Where the answer comes; goes after the ticket.
    _attachment: Attachment,
}

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
/// IOTLB_OK, IOTLB_INVALID, IOTLB_PINNED, IOTLB_TIMED_OUT, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_wait_mapped(reader: *mut iotlb_reader, timeout_ms: u32) -> iotlb_status {
    // SAFETY: the caller's promise.
    let Some(handle) = (unsafe { reader.as_mut() }) else { return IOTLB_INVALID };
    let Some(reader) = handle.unpinned() else { return IOTLB_PINNED };
    if reader.wait_mapped(timeout_ms) { IOTLB_OK } else { handle.unless_over(IOTLB_TIMED_OUT) }
}

/// Asks for `length` bytes from `iova`, at most 17 pages, without waiting: `*request`, or NULL there. Give it back with
/// iotlb_request_free. Not while the thread is pinned.
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
    let (range, mut posted) = (iotlb_range { iova, length }, 0);
    // SAFETY: the caller's promise; the rest are this function's own.
    match unsafe { iotlb_request_all(reader, &raw const range, 1, access, request, &raw mut posted) } {
        IOTLB_OK if posted == 0 => IOTLB_FULL,
        status => status,
    }
}

/// As iotlb_request_new for `count` ranges, with at most one wake-up of the daemon for all of them: it takes them up
/// together, so they go out in one batch. The first `*posted` of `requests` are good then, the others NULL: fewer than
/// `count` when there is no room for more, none when one of them makes no sense (IOTLB_INVALID).
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `ranges` and `requests` are good for `count` values, `posted` to be
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_all(
    reader: *mut iotlb_reader,
    ranges: *const iotlb_range,
    count: usize,
    access: u32,
    requests: *mut *mut iotlb_request,
    posted: *mut usize,
) -> iotlb_status {
    // SAFETY: the caller's promise, for all of them.
    let (reader, ranges, requests) = unsafe { (reader.as_mut(), array(ranges, count), places(requests, count)) };
    requests.iter_mut().for_each(|place| _ = place.write(std::ptr::null_mut()));
    if !posted.is_null() {
        // SAFETY: not null, and so the caller's promise holds.
        unsafe { posted.write(0) };
    }
    let (Some(handle), Some(access)) = (reader, access_of(access)) else { return IOTLB_INVALID };
    if posted.is_null() || ranges.len() != count || requests.len() != count {
        return IOTLB_INVALID;
    }
    let attachment = handle.attachment().clone();
    let Some(reader) = handle.unpinned() else { return IOTLB_PINNED };
    let tickets = match reader.request_all(ranges.iter().map(|range| (range.iova, range.length, access))) {
        Ok(tickets) => tickets,
        Err(error) => return error.into(),
    };
    // SAFETY: as above.
    unsafe { posted.write(tickets.len()) };
    for (place, ticket) in requests.iter_mut().zip(tickets) {
        let attachment = attachment.clone();
        place.write(Box::into_raw(Box::new(iotlb_request { ticket, _attachment: attachment })));
    }
    IOTLB_OK
}

/// What became of a request; the same again when asked again. Never blocks.
///
/// IOTLB_PENDING; IOTLB_OK: translate again, the table held the translation when the answer was given; IOTLB_DENIED,
/// IOTLB_TIMED_OUT, IOTLB_STOPPED, IOTLB_INVALID, IOTLB_PINNED, IOTLB_DAEMON_DEAD or IOTLB_REVOKED.
///
/// The request must have come of this reader's attachment.
///
/// # Safety
/// Both are NULL, or good and no other thread's; the request came of this reader's attachment.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_poll(reader: *mut iotlb_reader, request: *mut iotlb_request) -> iotlb_status {
    // SAFETY: the caller's promise, for both.
    let (Some(handle), Some(request)) = (unsafe { (reader.as_mut(), request.as_mut()) }) else { return IOTLB_INVALID };
    let Some(reader) = handle.unpinned() else { return IOTLB_PINNED };
    match reader.poll(&mut request.ticket) {
        Some(answer) => answer.into(),
        None => handle.unless_over(IOTLB_PENDING),
    }
}

/// Sleeps until a request is answered, or `timeout_ms` have passed: then it is IOTLB_PENDING.
///
/// As iotlb_request_poll.
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
    let (Some(handle), Some(request)) = (unsafe { (reader.as_mut(), request.as_mut()) }) else { return IOTLB_INVALID };
    let Some(reader) = handle.unpinned() else { return IOTLB_PINNED };
    match reader.wait(&mut request.ticket, timeout_ms) {
        Ok(answer) => answer.into(),
        // Of the wait, not of the request: that is still under way.
        Err(ResolveError::TimedOut) => IOTLB_PENDING,
        Err(error) => error.into(),
    }
}

/// Releases a request, answered or not. May wait as iotlb_detach does.
///
/// # Safety
/// `request` is NULL, or was given by this library and not released since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_request_free(request: *mut iotlb_request) {
    // SAFETY: the caller's promise.
    unsafe { release(request) }
}
