//! A thread's right to pin.

use std::ptr::NonNull;

use iotlb_client::{Guard, Reader};

use crate::attachment::iotlb_attachment;
use crate::handle::{give, release};
use crate::status::iotlb_status::{IOTLB_FULL, IOTLB_INVALID, IOTLB_OK};
use crate::status::{Failure, iotlb_status};

/// One thread's right to pin. May move between threads while it is not pinned.
#[derive(Debug)]
pub struct iotlb_reader {
    /// Of a box that is freed with this. Borrowed by the guard for as long as there is one, alone otherwise.
    reader: NonNull<Reader>,
    /// The outermost pin.
    guard: Option<Guard<'static>>,
    /// Pins within it.
    inner: u32,
}

impl iotlb_reader {
    fn new(attachment: &iotlb_attachment) -> Result<iotlb_reader, Failure> {
        let reader = NonNull::from(Box::leak(Box::new(attachment.0.reader()?)));
        Ok(iotlb_reader { reader, guard: None, inner: 0 })
    }

    /// What holds while it is pinned.
    pub(crate) fn guard(&self) -> Option<&Guard<'static>> {
        self.guard.as_ref()
    }

    /// The reader, for what may wait. `None`: it is pinned.
    pub(crate) fn unpinned(&mut self) -> Option<&mut Reader> {
        if self.guard.is_some() {
            return None;
        }
        // SAFETY: the box is freed when this is dropped, and not before. There is no guard that borrows it, and nobody
        // else while this borrows all.
        Some(unsafe { self.reader.as_mut() })
    }

    fn pin(&mut self) -> iotlb_status {
        // SAFETY: a guard is dropped before the box is freed (`Drop`), and while it is there nothing borrows the reader
        // for writing (`unpinned`). The guards that are handed out borrow this.
        let reader: &'static Reader = unsafe { self.reader.as_ref() };
        let guard = match reader.pin() {
            Ok(guard) => guard,
            Err(error) => return error.into(),
        };
        if self.guard.is_none() {
            self.guard = Some(guard);
        } else if let Some(inner) = self.inner.checked_add(1) {
            // The outermost one holds; this one has seen whether the daemon lives, and goes.
            self.inner = inner;
        } else {
            return IOTLB_FULL;
        }
        IOTLB_OK
    }

    fn unpin(&mut self) {
        match self.inner.checked_sub(1) {
            Some(inner) => self.inner = inner,
            None => self.guard = None,
        }
    }
}

impl Drop for iotlb_reader {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: `new` leaked the box, this is the one time it is taken back, and the guard that borrowed it is gone.
        drop(unsafe { Box::from_raw(self.reader.as_ptr()) });
    }
}

/// Makes a reader of an attachment, for one thread: `*reader`, or NULL there. Give it back with iotlb_reader_free.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_FULL when all 64 of this worker are taken, IOTLB_DAEMON_DEAD or IOTLB_REVOKED;
/// iotlb_last_error has the reason.
///
/// # Safety
/// `attachment` is NULL or good; `reader` is NULL or good to be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_reader_new(
    attachment: *const iotlb_attachment,
    reader: *mut *mut iotlb_reader,
) -> iotlb_status {
    // SAFETY: the caller's promise.
    let attachment = unsafe { attachment.as_ref() }.ok_or_else(|| Failure::null("the attachment"));
    // SAFETY: the caller's promise.
    unsafe { give(reader, attachment.and_then(iotlb_reader::new)) }
}

/// Releases a reader, in the thread that pinned it last. Its pin ends.
///
/// # Safety
/// `reader` is NULL, or was given by this library and not released since.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_reader_free(reader: *mut iotlb_reader) {
    // SAFETY: the caller's promise.
    unsafe { release(reader) }
}

/// Pins: until iotlb_unpin, everything a translation yields stays what it was. No system call, no lock. Pins nest, and
/// the outermost counts. Pin for a burst, not for a program.
///
/// IOTLB_OK, IOTLB_INVALID, IOTLB_DAEMON_DEAD or IOTLB_REVOKED; when it is not IOTLB_OK there is nothing to unpin, and
/// nothing of the guest may be touched.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_pin(reader: *mut iotlb_reader) -> iotlb_status {
    // SAFETY: the caller's promise.
    unsafe { reader.as_mut() }.map_or(IOTLB_INVALID, iotlb_reader::pin)
}

/// Ends a pin, in the thread that began it.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_unpin(reader: *mut iotlb_reader) {
    // SAFETY: the caller's promise.
    if let Some(reader) = unsafe { reader.as_mut() } {
        reader.unpin();
    }
}
