//! Address space of our own: the one place of this crate that maps and unmaps memory.
//!
//! The face is safe because a [`Reservation`] owns its whole range, only ever replaces mappings inside it, and hands
//! out no references: who turns [`Reservation::base`] into an access answers for that access.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Alignment of a reservation in bytes: that of the largest huge page in use, so that regions on 1 GiB `hugetlbfs`
/// pages can be mapped at any arena offset that is itself so aligned.
const ALIGNMENT: usize = 1 << 30;

/// A range of address space in which nothing is reachable until a file is mapped into it.
#[derive(Debug)]
pub(crate) struct Reservation {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a reservation is an address and a length; the system calls that use them may come from any thread.
unsafe impl Send for Reservation {}
// SAFETY: as above; no method gives access to the memory itself.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes (a multiple of the page size, not 0) that fault on every access.
    pub(crate) fn new(len: usize) -> io::Result<Reservation> {
        let padded = len.checked_add(ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free range, so nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), padded, ProtFlags::empty(), flags) }?;
        let head = start.addr().next_multiple_of(ALIGNMENT) - start.addr();
        let base = start.cast::<u8>().wrapping_add(head);
        let tail = padded - head - len;
        // What is left over on both sides only costs address space, so a failure to give it back is no error.
        if head > 0 {
            // SAFETY: `start..start + head` lies in the mapping made above and before the part that is kept.
            let _ = unsafe { munmap(start, head) };
        }
        if tail > 0 {
            // SAFETY: the `tail` bytes after the part that is kept lie in the mapping made above.
            let _ = unsafe { munmap(base.wrapping_add(len).cast::<c_void>(), tail) };
        }
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        let reservation = Reservation { base, len };
        reservation.keep_private(0, len)?;
        Ok(reservation)
    }

    /// First byte.
    #[inline]
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Makes `len` bytes of `file` from `file_offset` reachable at `offset`, shared, for reading and writing.
    /// Replaces what was there. The caller checked that the file is that long: an access past its end is a SIGBUS.
    pub(crate) fn map_file(&self, offset: usize, len: usize, file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
        let at = self.at(offset, len)?;
        // SAFETY: the range lies in this reservation, which nothing else maps into; guest memory carries no Rust
        // references that a replaced mapping could pull away.
        unsafe {
            mmap(at, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED, file, file_offset)
        }?;
        self.keep_private(offset, len).inspect_err(|_| {
            let _ = self.clear(offset, len);
        })
    }

    /// Makes `len` bytes at `offset` unreachable: every access faults from now on.
    pub(crate) fn clear(&self, offset: usize, len: usize) -> io::Result<()> {
        let at = self.at(offset, len)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as in `map_file`.
        unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
        self.keep_private(offset, len)
    }

    /// A forked child would keep writing guest memory after this process was reported dead, and a core dump of a
    /// guest's memory would delay that report by seconds.
    fn keep_private(&self, offset: usize, len: usize) -> io::Result<()> {
        let at = self.at(offset, len)?;
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump] {
            // SAFETY: the range is mapped and ours; neither advice changes its content for this process.
            unsafe { madvise(at, len, advice) }?;
        }
        Ok(())
    }

    fn at(&self, offset: usize, len: usize) -> io::Result<*mut c_void> {
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= self.len => Ok(self.base.as_ptr().wrapping_add(offset).cast()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is this reservation's own; the owner outlives everything that dereferences into it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}
