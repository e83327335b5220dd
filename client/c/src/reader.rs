//! A thread's right to pin.

use std::ptr::NonNull;

use iotlb_client::{Attachment, Guard, Reader, thread_pins};

use crate::attachment::iotlb_attachment;
use crate::handle::{give, release};
use crate::status::iotlb_status::{IOTLB_FULL, IOTLB_INVALID, IOTLB_OK, IOTLB_PINNED};
use crate::status::{Failure, iotlb_status, told};

/// One thread's right to pin. May move between threads while it is not pinned.
#[derive(Debug)]
pub struct iotlb_reader {
    /// Of a box that is freed with this. Borrowed by the guard for as long as there is one, alone otherwise.
    reader: NonNull<Reader>,
    /// The outermost pin.
    guard: Option<Guard<'static>>,
    /// Pins within it.
    inner: u32,
    attachment: Attachment,
    /// The process that has the reader's slot: a forked child does not.
    process: u32,
}

impl iotlb_reader {
    fn new(attachment: &iotlb_attachment) -> Result<iotlb_reader, Failure> {
        let reader = NonNull::from(Box::leak(Box::new(attachment.inner.reader()?)));
        let (attachment, process) = (attachment.inner.clone(), std::process::id());
        Ok(iotlb_reader { reader, guard: None, inner: 0, attachment, process })
    }

    /// What holds while it is pinned.
    pub(crate) fn guard(&self) -> Option<&Guard<'static>> {
        self.guard.as_ref()
    }

    /// The reader, for what may wait. `None`: it is pinned, or the thread is by another one.
    pub(crate) fn unpinned(&mut self) -> Option<&mut Reader> {
        if self.guard.is_some() || thread_pins::count() != 0 {
            return None;
        }
        // SAFETY: the box is freed when this is dropped, and not before. There is no guard that borrows it, and nobody
        // else while this borrows all.
        Some(unsafe { self.reader.as_mut() })
    }

    pub(crate) fn attachment(&self) -> &Attachment {
        &self.attachment
    }

    /// `otherwise`, unless the attachment is over.
    pub(crate) fn unless_over(&mut self, otherwise: iotlb_status) -> iotlb_status {
        if self.attachment.alive() {
            return otherwise;
        }
        // Which of the two ends it was, a pin says.
        self.unpinned().map_or(IOTLB_PINNED, |reader| reader.pin().map_or_else(iotlb_status::from, |_| otherwise))
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
        let guard = self.guard.take();
        if self.process != std::process::id() {
            // It would unpin in memory that a forked child has not got; its parent goes on with the slot.
            std::mem::forget(guard);
        } else {
            drop(guard);
        }
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
    let attachment = unsafe { attachment.as_ref() };
    let make = || iotlb_reader::new(attachment.ok_or_else(|| Failure::null("the attachment"))?);
    // SAFETY: the caller's promise.
    told(unsafe { give(reader, make) })
}

/// Releases a reader, in the thread that pinned it last. Its pin ends. May wait as iotlb_detach does.
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
/// IOTLB_OK; IOTLB_INVALID, IOTLB_DAEMON_DEAD, IOTLB_REVOKED, or IOTLB_FULL after four billion of them: then there is
/// nothing more to unpin than before, and nothing more of the guest may be touched.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_pin(reader: *mut iotlb_reader) -> iotlb_status {
    // SAFETY: the caller's promise.
    unsafe { reader.as_mut() }.map_or(IOTLB_INVALID, iotlb_reader::pin)
}

/// Ends a pin, in the thread that began it. Where there is none, nothing happens.
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

/// Adds what this reader counted to the worker's figures now, instead of every thousand lookups or so. Before a thread
/// goes idle, say.
///
/// # Safety
/// `reader` is NULL, or good and no other thread's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_flush_counters(reader: *mut iotlb_reader) {
    // SAFETY: the caller's promise.
    if let Some(reader) = unsafe { reader.as_mut() }.and_then(iotlb_reader::unpinned) {
        reader.flush_counters();
    }
}

// What the header says of threads: these may be used by several, those by one at a time.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    const fn moves<T: Send>() {}
    is_shared::<Attachment>();
    is_shared::<iotlb_client::Queue>();
    moves::<Reader>();
    moves::<iotlb_client::Ticket>();
};
