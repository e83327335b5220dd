//! Pointers of C. What comes in is null or good: that is what the header asks of its callers, and all that can be
//! checked here is the null.

use std::ffi::{CStr, c_char};

use crate::status::{Failure, iotlb_status};

/// Gives a value to C, through `out`, which is not null. C gives it back to [`release`].
///
/// # Safety
/// `out` is null, or good to be written.
pub(crate) unsafe fn give<T>(out: *mut *mut T, value: Result<T, Failure>) -> iotlb_status {
    // SAFETY: the caller's promise.
    let Some(out) = (unsafe { out.as_mut() }) else {
        return Failure::null("the place for the result").told();
    };
    match value {
        Ok(value) => {
            *out = Box::into_raw(Box::new(value));
            iotlb_status::IOTLB_OK
        }
        Err(failure) => {
            *out = std::ptr::null_mut();
            failure.told()
        }
    }
}

/// Takes a value back and drops it. Null is nothing.
///
/// # Safety
/// `handle` is null, or came from [`give`] and was not released since; nobody uses it any more.
pub(crate) unsafe fn release<T>(handle: *mut T) {
    if !handle.is_null() {
        // SAFETY: it came from `Box::into_raw` in `give`, and this is the one time it comes back: the caller's promise.
        drop(unsafe { Box::from_raw(handle) });
    }
}

/// A string of C, which must be UTF-8; null is the empty one.
///
/// # Safety
/// `text` is null, or ends with a NUL and stays as it is while the result is used.
pub(crate) unsafe fn text<'a>(what: &'static str, text: *const c_char) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Ok("");
    }
    // SAFETY: not null, and so the caller's promise holds.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map_err(|_| Failure::not_utf8(what))
}

/// An array of C; null is the empty one.
///
/// # Safety
/// `first` is null, or good for `count` values that nobody writes while the result is used.
pub(crate) unsafe fn array<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: the caller's promise. C has no arrays of more than `isize::MAX` bytes.
    unsafe { std::slice::from_raw_parts(first, count) }
}

/// The same to be written.
///
/// # Safety
/// `first` is null, or good for `count` values that nobody else uses while the result is used.
pub(crate) unsafe fn array_mut<'a, T>(first: *mut T, count: usize) -> &'a mut [T] {
    if first.is_null() || count == 0 {
        return &mut [];
    }
    // SAFETY: as in `array`.
    unsafe { std::slice::from_raw_parts_mut(first, count) }
}
