//! Pointers of C. What comes in is null or good: that is what the header asks of its callers, and all that can be
//! checked here is the null.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::status::Failure;

/// Gives what `make` makes to C, through `out`; null there if it makes nothing. C gives it back to [`release`]. With
/// `out` null nothing is made.
///
/// # Safety
/// `out` is null, or good to be written.
pub(crate) unsafe fn give<T>(out: *mut *mut T, make: impl FnOnce() -> Result<T, Failure>) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::null("the place for the result"));
    }
    let made = make().map(|value| Box::into_raw(Box::new(value)));
    // SAFETY: not null, and so the caller's promise holds. What was there is not looked at.
    unsafe { out.write(*made.as_ref().unwrap_or(&std::ptr::null_mut())) };
    made.map(|_| ())
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

/// An array of C; null is the empty one. One that no memory holds is cut to what memory could hold: who needs all of it
/// compares the lengths.
///
/// # Safety
/// `first` is null, or good for `count` values that nobody writes while the result is used.
pub(crate) unsafe fn array<'a, T>(first: *const T, count: usize) -> &'a [T] {
    if first.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise; the length is cut to what a slice may have.
    unsafe { std::slice::from_raw_parts(first, count.min(most::<T>())) }
}

/// The same to be written. What is there is not looked at.
///
/// # Safety
/// `first` is null, or good for `count` values that nobody else uses while the result is used.
pub(crate) unsafe fn places<'a, T>(first: *mut T, count: usize) -> &'a mut [MaybeUninit<T>] {
    if first.is_null() {
        return &mut [];
    }
    // SAFETY: as in `array`; whatever is there is a `MaybeUninit`.
    unsafe { std::slice::from_raw_parts_mut(first.cast(), count.min(most::<T>())) }
}

/// How many values a slice may have.
fn most<T>() -> usize {
    isize::MAX.unsigned_abs() / size_of::<T>().max(1)
}
