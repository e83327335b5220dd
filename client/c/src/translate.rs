//! What may be done under a pin.

use std::ffi::c_void;

use iotlb_client::{Access, Fault, Guard, Segment};
use vm_memory::VolatileSlice;

use crate::access::access_of;
use crate::handle::{array, places};
use crate::queue::iotlb_queue_record;
use crate::reader::iotlb_reader;
use crate::status::iotlb_status;
use crate::status::iotlb_status::{IOTLB_FULL, IOTLB_INVALID, IOTLB_NOT_PINNED, IOTLB_OK};

/// Addresses translated in one go; more go piece by piece.
const BURST: usize = 32;

/// A piece of guest memory: good until the pin ends.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct iotlb_segment {
    /// Address of the first byte in this process.
    pub address: *mut c_void,
    /// Bytes; not 0.
    pub length: usize,
}

/// A range of I/O virtual addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct iotlb_range {
    /// The first.
    pub iova: u64,
    /// How many.
    pub length: u64,
}

/// What an IOTLB_MISS lacks.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct iotlb_fault {
    /// First address that is missing.
    pub iova: u64,
    /// The access that was wanted: IOTLB_READ, IOTLB_WRITE or both.
    pub access: u32,
}

/// Where `length` bytes from `iova` are, if the device may access them like that: all of them, or none. Contiguous
/// addresses need not be contiguous memory, so there can be several pieces. The first `capacity` of them go to
/// `segments`, and how many there are to `*count`, which is 0 when there is a fault. With access 0: whether and where
/// there is any translation.
///
/// IOTLB_OK; IOTLB_FULL when there are more pieces than `capacity`; IOTLB_MISS, with what is missing in `*fault` unless
/// that is NULL; IOTLB_REMAPPING; IOTLB_INVALID; IOTLB_NOT_PINNED.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `segments` is good for `capacity` of them; `count` is good to be
/// written, and so is `fault` unless it is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_translate(
    reader: *const iotlb_reader,
    iova: u64,
    length: u64,
    access: u32,
    segments: *mut iotlb_segment,
    capacity: usize,
    count: *mut usize,
    fault: *mut iotlb_fault,
) -> iotlb_status {
    if count.is_null() {
        return IOTLB_INVALID;
    }
    // SAFETY: the caller's promise, for all of them.
    let (reader, segments) = unsafe { (reader.as_ref(), places(segments, capacity)) };
    let (mut pieces, mut room) = (0, segments.iter_mut());
    let status = match (reader.map(iotlb_reader::guard), access_of(access)) {
        (None, _) | (_, None) => IOTLB_INVALID,
        (Some(None), _) => IOTLB_NOT_PINNED,
        (Some(Some(guard)), Some(access)) => match guard.translate(iova, length, access) {
            // SAFETY: the caller's promise.
            Err(found) => unsafe { tell(fault, found) },
            Ok(found) => {
                let mut status = IOTLB_OK;
                for piece in found {
                    pieces += 1;
                    match room.next() {
                        Some(place) => {
                            place.write(iotlb_segment { address: piece.as_ptr().cast(), length: piece.len() });
                        }
                        None => status = IOTLB_FULL,
                    }
                }
                status
            }
        },
    };
    // SAFETY: not null, and so the caller's promise holds.
    unsafe { count.write(pieces) };
    status
}

/// Where `length` bytes from `iova` are, when they are one piece and the device may access them like that. NULL says
/// nothing but that, or that the reader is not pinned: iotlb_translate tells which.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_translate_one(
    reader: *const iotlb_reader,
    iova: u64,
    length: u64,
    access: u32,
) -> *mut c_void {
    // SAFETY: the caller's promise.
    let guard = unsafe { reader.as_ref() }.and_then(|reader| reader.guard());
    let (Some(guard), Some(access)) = (guard, access_of(access)) else { return std::ptr::null_mut() };
    address(guard.translate_one(iova, length, access))
}

/// The same for `count` ranges, whose translations are fetched from memory at the same time: faster than one by one in
/// a table that is not in the cache. What iotlb_translate_one returns for each goes to `addresses`, in order. Returns
/// how many are not NULL.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `ranges` and `addresses` are good for `count` values.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_translate_burst(
    reader: *const iotlb_reader,
    ranges: *const iotlb_range,
    count: usize,
    access: u32,
    addresses: *mut *mut c_void,
) -> usize {
    // SAFETY: the caller's promise, for all of them.
    let (guard, ranges, addresses) = unsafe {
        let guard = reader.as_ref().and_then(|reader| reader.guard());
        (guard, array(ranges, count), places(addresses, count))
    };
    let (Some(guard), Some(access)) = (guard, access_of(access)) else {
        addresses.iter_mut().for_each(|place| _ = place.write(std::ptr::null_mut()));
        return 0;
    };
    let mut found = 0;
    for (ranges, addresses) in ranges.chunks(BURST).zip(addresses.chunks_mut(BURST)) {
        let (mut requests, mut pieces) = ([(0, 0); BURST], [None; BURST]);
        for (request, range) in requests.iter_mut().zip(ranges) {
            *request = (range.iova, range.length);
        }
        found += guard.translate_burst(&requests[..ranges.len()], access, &mut pieces[..ranges.len()]);
        for (place, piece) in addresses.iter_mut().zip(pieces) {
            place.write(address(piece));
        }
    }
    found
}

/// Copies `length` bytes from `iova` on to `buffer`. Nothing is copied when there is a fault; see iotlb_translate. The
/// guest may write meanwhile, so its bytes can be a mixture.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `buffer` is good for `length` bytes; `fault` is NULL or good to be
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_copy_from(
    reader: *const iotlb_reader,
    iova: u64,
    buffer: *mut c_void,
    length: usize,
    fault: *mut iotlb_fault,
) -> iotlb_status {
    let from_guest = |guest: VolatileSlice<'_>, ours: VolatileSlice<'_>| guest.copy_to_volatile_slice(ours);
    // SAFETY: the caller's promise, for all of them.
    unsafe { copy(reader, (iova, Access::READ), (buffer, length), fault, from_guest) }
}

/// Copies `length` bytes from `buffer` to `iova` and on. Nothing is copied when there is a fault; see iotlb_translate.
///
/// # Safety
/// As iotlb_copy_from.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_copy_to(
    reader: *const iotlb_reader,
    iova: u64,
    buffer: *const c_void,
    length: usize,
    fault: *mut iotlb_fault,
) -> iotlb_status {
    let to_guest = |guest: VolatileSlice<'_>, ours: VolatileSlice<'_>| ours.copy_to_volatile_slice(guest);
    // SAFETY: the caller's promise, for all of them. The buffer is only read.
    unsafe { copy(reader, (iova, Access::WRITE), (buffer.cast_mut(), length), fault, to_guest) }
}

/// Both copies. What C has in its buffer, or has not, is nothing that Rust may have a reference to; and it may be the
/// guest's memory itself.
///
/// # Safety
/// As iotlb_copy_from, but for what `one` does with a piece of the buffer.
unsafe fn copy(
    reader: *const iotlb_reader,
    (iova, access): (u64, Access),
    (buffer, length): (*mut c_void, usize),
    fault: *mut iotlb_fault,
    one: impl Fn(VolatileSlice<'_>, VolatileSlice<'_>),
) -> iotlb_status {
    // SAFETY: the caller's promise.
    let Some(reader) = (unsafe { reader.as_ref() }) else { return IOTLB_INVALID };
    let Some(guard) = reader.guard() else { return IOTLB_NOT_PINNED };
    if length == 0 {
        return IOTLB_OK;
    }
    if buffer.is_null() {
        return IOTLB_INVALID;
    }
    let pieces = match guard.translate(iova, length as u64, access) {
        Ok(pieces) => pieces,
        // SAFETY: the caller's promise.
        Err(found) => return unsafe { tell(fault, found) },
    };
    let mut at = 0;
    for piece in pieces {
        // SAFETY: the pieces are `length` bytes together, and so many the buffer is good for by the caller's promise.
        let ours = unsafe { VolatileSlice::new(buffer.cast::<u8>().add(at), piece.len()) };
        one(piece.volatile(), ours);
        at += piece.len();
    }
    IOTLB_OK
}

/// Grows with every translation that was taken away. An address that is kept across pins is void when it changed, and
/// with its attachment. Ask *before* the translation that yields the address, and the same reader. 0 when the reader is
/// not pinned.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_removal_generation(reader: *const iotlb_reader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { under_pin(reader, |guard| guard.removal_generation()) }
}

/// Grows with every front-end session and device reset. 0 when the reader is not pinned.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_session_generation(reader: *const iotlb_reader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { under_pin(reader, |guard| guard.session_generation()) }
}

/// Grows whenever a queue record changed. 0 when the reader is not pinned.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_queue_generation(reader: *const iotlb_reader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { under_pin(reader, |guard| guard.queue_generation()) }
}

/// Virtio feature bits that the driver acknowledged; 0 before it did, or when the reader is not pinned.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_acked_features(reader: *const iotlb_reader) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { under_pin(reader, |guard| guard.acked_features()) }
}

/// Whether the device runs; false when the reader is not pinned.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_running(reader: *const iotlb_reader) -> bool {
    // SAFETY: the caller's promise.
    unsafe { under_pin(reader, |guard| guard.running()) }
}

/// A ring as the front-end set it up, to `*record`. It counts for this pin.
///
/// IOTLB_OK, IOTLB_INVALID for an index no device has, IOTLB_NOT_PINNED.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's; `record` is NULL or good to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_get_queue_record(
    reader: *const iotlb_reader,
    queue: u16,
    record: *mut iotlb_queue_record,
) -> iotlb_status {
    // SAFETY: the caller's promise.
    let Some(reader) = (unsafe { reader.as_ref() }) else { return IOTLB_INVALID };
    let Some(guard) = reader.guard() else { return IOTLB_NOT_PINNED };
    let Some(found) = guard.queue_record(queue).filter(|_| !record.is_null()) else { return IOTLB_INVALID };
    // SAFETY: not null, and so the caller's promise holds.
    unsafe { record.write(found.into()) };
    IOTLB_OK
}

fn address(piece: Option<Segment<'_>>) -> *mut c_void {
    piece.map_or(std::ptr::null_mut(), |piece| piece.as_ptr().cast())
}

/// What `ask` says under the reader's pin, or nothing.
///
/// # Safety
/// `reader` is null, or good and no other thread's.
unsafe fn under_pin<T: Default>(reader: *const iotlb_reader, ask: impl FnOnce(&Guard<'_>) -> T) -> T {
    // SAFETY: the caller's promise.
    unsafe { reader.as_ref() }.and_then(|reader| reader.guard()).map_or_else(T::default, ask)
}

/// Says what is missing, unless nobody wants to know.
///
/// # Safety
/// `place` is null or good to be written.
unsafe fn tell(place: *mut iotlb_fault, fault: Fault) -> iotlb_status {
    if let (Fault::Miss { iova, access }, false) = (fault, place.is_null()) {
        // SAFETY: not null, and so the caller's promise holds.
        unsafe { place.write(iotlb_fault { iova, access: u32::from(access.bits()) }) };
    }
    fault.into()
}
