//! Leased virtqueues.

use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::IntoRawFd;

use iotlb_client::{Queue, QueueRecord, thread_pins};

use crate::attachment::iotlb_attachment;
use crate::handle::{array, places, release};
use crate::status::iotlb_status::IOTLB_FAILED;
use crate::status::{Failure, iotlb_status, told};

/// A queue that this worker serves, until it is released, the daemon takes it back, or the attachment is over.
#[derive(Debug)]
pub struct iotlb_queue(Queue);

/// A ring as the front-end set it up. Its addresses are I/O virtual ones: translate them under the pin.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct iotlb_queue_record {
    /// I/O virtual address of the descriptor table.
    pub desc: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
    /// Session that the record belongs to: see iotlb_session_generation.
    pub session_generation: u64,
    /// Number of descriptors.
    pub size: u16,
    /// Available index to start from when the used ring's own index cannot be read.
    pub base: u16,
    /// The ring may be touched.
    pub started: bool,
    /// The ring is enabled: a started ring that is not discards what the guest sends and takes nothing to receive.
    pub enabled: bool,
}

impl From<QueueRecord> for iotlb_queue_record {
    fn from(record: QueueRecord) -> iotlb_queue_record {
        let QueueRecord { started, enabled, size, desc, avail, used, base, session_generation } = record;
        iotlb_queue_record { desc, avail, used, session_generation, size, base, started, enabled }
    }
}

/// Leases `count` queues, all of them or none: `claimed` has room for so many, in the order of `queues`. Give each back
/// with iotlb_queue_release. `timeout_ms` is for all of it, whatever the daemon does; after an IOTLB_TIMED_OUT the
/// queues may be claimed anew at once.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_PINNED, IOTLB_REFUSED, IOTLB_TIMED_OUT, IOTLB_DAEMON_DEAD, IOTLB_REVOKED or
/// IOTLB_FAILED; iotlb_last_error has the reason.
///
/// # Safety
/// `attachment` is NULL or good; `queues` is good for `count` numbers, `claimed` for as many handles.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_claim_queues(
    attachment: *const iotlb_attachment,
    queues: *const u16,
    count: usize,
    timeout_ms: u32,
    claimed: *mut *mut iotlb_queue,
) -> iotlb_status {
    // SAFETY: the caller's promise, for all of them.
    let (attachment, queues, places) = unsafe { (attachment.as_ref(), array(queues, count), places(claimed, count)) };
    places.iter_mut().for_each(|place| _ = place.write(std::ptr::null_mut()));
    told(claim(attachment, queues, timeout_ms, places, count))
}

fn claim(
    attachment: Option<&iotlb_attachment>,
    queues: &[u16],
    timeout_ms: u32,
    places: &mut [MaybeUninit<*mut iotlb_queue>],
    count: usize,
) -> Result<(), Failure> {
    let attachment = attachment.ok_or_else(|| Failure::null("the attachment"))?;
    if queues.len() != count || places.len() != count {
        return Err(Failure::null("an array of queues"));
    }
    if thread_pins::count() != 0 {
        return Err(Failure::pinned());
    }
    let leased = attachment.inner.claim_queues(queues, timeout_ms)?;
    for (place, queue) in places.iter_mut().zip(leased) {
        place.write(Box::into_raw(Box::new(iotlb_queue(queue))));
    }
    Ok(())
}

/// Gives a queue back. The caller has stopped touching the ring. Does not wait for the daemon to read that; but may
/// wait as iotlb_detach does, so not while pinned.
///
/// # Safety
/// `queue` is NULL, or was given by this library and not released since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_release(queue: *mut iotlb_queue) {
    // SAFETY: the caller's promise.
    unsafe { release(queue) }
}

/// The ring's index; 0 for NULL.
///
/// # Safety
/// `queue` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_index(queue: *const iotlb_queue) -> u16 {
    // SAFETY: the caller's promise.
    unsafe { queue.as_ref() }.map_or(0, |queue| queue.0.index())
}

/// A duplicate, the caller's to close, of the descriptor that becomes readable when the driver made buffers available,
/// to `*kick`; -1 there when there is none: the ring is not set up yet, or is to be polled. Ask again when
/// iotlb_queue_descriptors_generation has grown.
///
/// IOTLB_OK, IOTLB_INVALID, or IOTLB_FAILED when this process has no descriptor left; iotlb_last_error has the reason.
///
/// # Safety
/// `queue` is NULL or good; `kick` is NULL or good to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_kick_fd(queue: *const iotlb_queue, kick: *mut c_int) -> iotlb_status {
    if kick.is_null() {
        return told(Err(Failure::null("the place for the descriptor")));
    }
    // SAFETY: the caller's promise.
    let duplicate = match unsafe { queue.as_ref() } {
        None => Err(Failure::null("the queue")),
        Some(queue) => match queue.0.kick().map(|kick| kick.try_clone()) {
            None => Ok(-1),
            Some(Ok(duplicate)) => Ok(duplicate.into_raw_fd()),
            Some(Err(error)) => Err(Failure::of(IOTLB_FAILED, &format_args!("no duplicate of the kick: {error}"))),
        },
    };
    // SAFETY: not null, and so the caller's promise holds.
    unsafe { kick.write(*duplicate.as_ref().unwrap_or(&-1)) };
    told(duplicate.map(|_| ()))
}

/// Grows whenever the queue's descriptors were replaced; 0 for NULL.
///
/// # Safety
/// `queue` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_descriptors_generation(queue: *const iotlb_queue) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { queue.as_ref() }.map_or(0, |queue| queue.0.descriptors_generation())
}

/// Interrupts the driver. Call it inside the pin under which the used ring was written: a stopped ring must not
/// interrupt. False when there is no call descriptor (the driver polls) or it is broken.
///
/// Does not wait for who reads the descriptor, unless somebody means it to: whoever else has it, the front-end or a
/// worker that had the queue before, can make it block and fill its counter, and then this sleeps until the counter is
/// read. A pin that lasts so long has this worker revoked, as any other.
///
/// # Safety
/// `queue` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_signal_call(queue: *const iotlb_queue) -> bool {
    // SAFETY: the caller's promise.
    unsafe { queue.as_ref() }.is_some_and(|queue| queue.0.signal_call())
}

/// Reports that the ring is broken, or names an address that was denied. The daemon logs the reason and signals the
/// ring's error descriptor. Not while pinned.
///
/// # Safety
/// `queue` is NULL or good; `reason` is NULL or ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_signal_error(queue: *const iotlb_queue, reason: *const c_char) {
    // SAFETY: the caller's promise.
    let Some(queue) = (unsafe { queue.as_ref() }) else { return };
    // SAFETY: the caller's promise.
    let reason = if reason.is_null() { c"" } else { unsafe { CStr::from_ptr(reason) } };
    queue.0.signal_error(&reason.to_string_lossy());
}

/// Notes how far the available ring was completely processed, for a successor that cannot read the used ring.
///
/// # Safety
/// `queue` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_set_progress(queue: *const iotlb_queue, avail_index: u16) {
    // SAFETY: the caller's promise.
    if let Some(queue) = unsafe { queue.as_ref() } {
        queue.0.set_progress(avail_index);
    }
}

/// Whether the queue still belongs to this worker. False after the daemon took it back, or died.
///
/// # Safety
/// `queue` is NULL or good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_held(queue: *const iotlb_queue) -> bool {
    // SAFETY: the caller's promise.
    unsafe { queue.as_ref() }.is_some_and(|queue| queue.0.held())
}
