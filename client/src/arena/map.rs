//! Address space of our own: the one place of this crate that maps and unmaps memory.
//!
//! The face is safe because a [`Reservation`] owns its whole range but for what it lost, only ever replaces mappings of
//! its own, and hands out no references: who turns [`Reservation::base`] into an access answers for that access.
//!
//! Where a mapping is to replace another, Linux takes the old one away before it asks the file. A file that refuses
//! leaves a hole, and the next mapping that anybody in this process makes may land there. So a file is asked elsewhere
//! first. If it refuses after all, the hole is closed; if somebody was faster, the place is lost and left alone.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iotlb_proto::iova::PAGE_SIZE;
use rustix::fs::{FsWord, fstatfs};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

/// Alignment of a reservation in bytes: that of the largest huge page in use, so that regions on 1 GiB `hugetlbfs`
/// pages can be mapped at any arena offset that is itself so aligned.
const ALIGNMENT: usize = 1 << 30;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: FsWord = 0x9584_58f6;

/// What may be done with a file that is mapped.
const FILE_ACCESS: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// A mapping of guest memory. Nothing is set aside for it: on `hugetlbfs` the first shared mapping without NORESERVE
/// takes huge pages for all of it out of the host's pool, whatever the front-end, whose memory it is, wants there. One
/// that populates memory as it goes maps without a reserve, and may have been given fewer pages than the file is long.
const SHARED: MapFlags = MapFlags::SHARED.union(MapFlags::NORESERVE);

/// A mapping that only keeps its place.
const NOTHING: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

/// A range of address space in which nothing is reachable until a file is mapped into it.
#[derive(Debug)]
pub(crate) struct Reservation {
    base: NonNull<u8>,
    len: usize,
    /// Ranges of offsets that may be somebody else's by now, by order. Nothing is mapped or unmapped there any more.
    lost: Mutex<Vec<Range<usize>>>,
    /// Number of the process that reserved it.
    process: u32,
}

// SAFETY: a reservation is an address and numbers; the system calls that use them may come from any thread.
unsafe impl Send for Reservation {}
// SAFETY: as above; no method gives access to the memory itself.
unsafe impl Sync for Reservation {}

impl Reservation {
    /// Reserves `len` bytes (a multiple of the page size, not 0) that fault on every access.
    pub(crate) fn new(len: usize) -> io::Result<Reservation> {
        let padded = len.checked_add(ALIGNMENT).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the kernel chooses a free range, so nothing that exists is replaced.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), padded, ProtFlags::empty(), NOTHING) }?;
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
        let reservation = Reservation { base, len, lost: Mutex::default(), process: std::process::id() };
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

    /// Whether all of it is still its own.
    pub(crate) fn is_whole(&self) -> bool {
        self.lost().is_empty()
    }

    /// Makes `len` bytes of `file` from `file_offset` reachable at `offset`, shared, for reading and writing.
    /// Replaces what was there, unless the file cannot be mapped like that. `len` is a multiple of the file's
    /// [`unit_of`]. The caller checked that the file is that long: an access past its end is a SIGBUS.
    pub(crate) fn map_file(&self, offset: usize, len: usize, file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
        let at = self.at(offset, len)?;
        // The kernel would map more than `len`: over what lies behind, which may not even be in the reservation.
        if !(len as u64).is_multiple_of(unit_of(file)?) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a part of a huge page cannot be mapped"));
        }
        if self.kept(offset, len).first() != Some(&(offset..offset + len)) {
            let reason = "the place was lost when an mmap failed half way; restart this worker";
            return Err(io::Error::new(io::ErrorKind::AddrInUse, reason));
        }
        try_elsewhere(len, file, file_offset)?;
        // SAFETY: the range lies in this reservation and was never lost, so nothing else maps into it; it is not lost
        // meanwhile either, because the arena holds its lock for one mapping at a time. Guest memory carries no Rust
        // references that a replaced mapping could pull away.
        let mapped = unsafe { mmap(at, len, FILE_ACCESS, SHARED | MapFlags::FIXED, file, file_offset) };
        mapped.inspect_err(|_| self.put_back(offset, len))?;
        self.keep_private(offset, len).inspect_err(|_| {
            let _ = self.clear(offset, len);
        })
    }

    /// Closes the hole that a failed mapping may have left, or gives the range up when it cannot tell that nobody else
    /// uses it.
    fn put_back(&self, offset: usize, len: usize) {
        let Ok(at) = self.at(offset, len) else { return };
        let flags = NOTHING | MapFlags::FIXED_NOREPLACE;
        // SAFETY: nothing that exists is replaced.
        match unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) } {
            Ok(there) if there == at => {
                // Nothing is reachable there, so a child that has it, and a dump, are no worse off.
                let _ = self.keep_private(offset, len);
                return;
            }
            // A system that does not know the flag takes the address for a wish.
            Ok(elsewhere) => {
                // SAFETY: made above, and nobody else knows of it.
                let _ = unsafe { munmap(elsewhere, len) };
            }
            // Most likely EEXIST. Whether that is somebody else's, or still our own, nobody says.
            Err(_) => {}
        }
        let mut lost = self.lost();
        let place = lost.partition_point(|range| range.start < offset);
        lost.insert(place, offset..offset + len);
    }

    /// Makes `len` bytes at `offset` unreachable: every access faults from now on, but to what was lost.
    pub(crate) fn clear(&self, offset: usize, len: usize) -> io::Result<()> {
        self.at(offset, len)?;
        // All of it, also behind a part that fails.
        let mut result = Ok(());
        for kept in self.kept(offset, len) {
            result = result.and(self.clear_kept(&kept));
        }
        result
    }

    fn clear_kept(&self, kept: &Range<usize>) -> io::Result<()> {
        let at = self.at(kept.start, kept.len())?;
        // SAFETY: as in `map_file`. There is no file that could refuse.
        unsafe { mmap_anonymous(at, kept.len(), ProtFlags::empty(), NOTHING | MapFlags::FIXED) }?;
        self.keep_private(kept.start, kept.len())
    }

    /// What is left of a range that lies in the reservation.
    fn kept(&self, offset: usize, len: usize) -> Vec<Range<usize>> {
        let (mut at, end) = (offset, offset + len);
        let mut kept = Vec::new();
        for lost in self.lost().iter().filter(|lost| lost.start < end && offset < lost.end) {
            kept.push(at..lost.start.max(at));
            at = lost.end.min(end);
        }
        kept.push(at..end);
        kept.retain(|range| !range.is_empty());
        kept
    }

    fn lost(&self) -> MutexGuard<'_, Vec<Range<usize>>> {
        // The list is valid between any two statements, so a panic elsewhere does not spoil it.
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
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
        // A forked child has not got the range: what is there by now is something else. Nor may it wait for the lock,
        // which a thread may have held that it has not got either.
        if std::process::id() != self.process {
            return;
        }
        for kept in self.kept(0, self.len) {
            let at = self.base.as_ptr().wrapping_add(kept.start).cast();
            // SAFETY: what was not lost is this reservation's own; the owner outlives everything that dereferences
            // into it.
            let _ = unsafe { munmap(at, kept.len()) };
        }
    }
}

/// What mappings of a file consist of, in bytes. Of a file on huge pages the kernel maps whole ones: it rounds the
/// length up by itself, in `mmap` only. Asked to unmap, replace or advise a part of one, it refuses, and the mapping
/// stays. The block size alone does not tell: a `tmpfs` that likes huge pages names them too, and maps small ones.
pub(crate) fn unit_of(file: BorrowedFd<'_>) -> io::Result<u64> {
    let system = fstatfs(file)?;
    let unit = if system.f_type == HUGETLBFS_MAGIC { u64::try_from(system.f_bsize).unwrap_or(0) } else { PAGE_SIZE };
    if unit.is_power_of_two() { Ok(unit) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Maps the file where the kernel likes, and unmaps it again. What makes a file refuse (a seal, an offset inside a huge
/// page) is seen here, where nothing is taken away before. A region is mapped rarely and nothing is touched, so this is
/// cheap. As much address space again is taken for a moment. `len` is a multiple of [`unit_of`] the file.
fn try_elsewhere(len: usize, file: BorrowedFd<'_>, file_offset: u64) -> io::Result<()> {
    // SAFETY: the kernel chooses a free range, so nothing that exists is replaced.
    let at = unsafe { mmap(ptr::null_mut(), len, FILE_ACCESS, SHARED, file, file_offset) }?;
    // SAFETY: made above, and nobody else knows of it.
    unsafe { munmap(at, len) }?;
    Ok(())
}

#[cfg(test)]
mod tests;
