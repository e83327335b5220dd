//! Shared mappings with a typed, safe face.
//!
//! Other processes store to this memory at any time, so it must never be seen through a reference to plain data. A
//! [`Mapping`] hands out references only to [`SharedWords`] types, which consist of atomics and nothing else.

use std::mem::{ManuallyDrop, align_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::layout::table::{Node, QueueRecordWords, SideCopy, TableHeader};
use crate::layout::worker::WorkerSegmentLayout;

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// `mmap`.
    #[error("cannot map {len} bytes of shared memory: {source}")]
    Map {
        /// Bytes.
        len: usize,
        /// The system's answer.
        source: std::io::Error,
    },
    /// `madvise`: a forked child must not inherit the mapping.
    #[error("cannot keep shared memory out of forked children and core dumps: {0}")]
    Advise(std::io::Error),
    /// An object would reach past the end of the mapping, or is not aligned in it.
    #[error("an object of {size} bytes does not fit at offset {offset} of a mapping of {len} bytes")]
    OutOfBounds {
        /// Where.
        offset: usize,
        /// How large.
        size: usize,
        /// The mapping.
        len: usize,
    },
}

/// Types that may be looked at while other processes store to them.
///
/// # Safety
/// The type consists of atomics (and arrays and `repr(C)` structs of atomics) only: every bit pattern is valid, and all
/// bytes but padding are inside an `UnsafeCell`.
pub unsafe trait SharedWords {}

// SAFETY: atomics only; see `layout::table`.
unsafe impl SharedWords for TableHeader {}
// SAFETY: atomics only.
unsafe impl SharedWords for QueueRecordWords {}
// SAFETY: atomics only.
unsafe impl SharedWords for SideCopy {}
// SAFETY: atomics only.
unsafe impl SharedWords for Node {}
// SAFETY: atomics only; see `layout::worker`.
unsafe impl SharedWords for WorkerSegmentLayout {}
// SAFETY: an atomic.
unsafe impl SharedWords for crate::sync::AtomicU32 {}
// SAFETY: an atomic.
unsafe impl SharedWords for crate::sync::AtomicU64 {}

/// A shared mapping of a whole memfd. Kept out of forked children (a child would go on using guest memory after its
/// parent's death was reported) and out of core dumps (a dump delays the death notice).
#[derive(Debug)]
pub struct Mapping {
    /// Dropped by hand.
    raw: ManuallyDrop<MmapRaw>,
    /// Number of the process that mapped it.
    process: u32,
}

impl Mapping {
    /// Maps `len` bytes of `fd` for reading and writing.
    ///
    /// # Errors
    /// `mmap` or `madvise` failed.
    pub fn read_write(fd: BorrowedFd<'_>, len: usize) -> Result<Mapping, MappingError> {
        let raw = MmapOptions::new().len(len).map_raw(fd.as_raw_fd());
        Mapping::new(raw, len)
    }

    /// Maps `len` bytes of `fd` for reading. A store through the words it hands out ends the process with SIGSEGV.
    ///
    /// # Errors
    /// `mmap` or `madvise` failed.
    pub fn read_only(fd: BorrowedFd<'_>, len: usize) -> Result<Mapping, MappingError> {
        let raw = MmapOptions::new().len(len).map_raw_read_only(fd.as_raw_fd());
        Mapping::new(raw, len)
    }

    fn new(raw: std::io::Result<MmapRaw>, len: usize) -> Result<Mapping, MappingError> {
        let raw = raw.map_err(|source| MappingError::Map { len, source })?;
        raw.advise(Advice::DontFork).map_err(MappingError::Advise)?;
        raw.advise(Advice::DontDump).map_err(MappingError::Advise)?;
        Ok(Mapping { raw: ManuallyDrop::new(raw), process: std::process::id() })
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len()
    }

    /// Whether nothing is mapped (never: an empty mapping cannot be made).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.len() == 0
    }

    /// The object at `offset`.
    ///
    /// # Errors
    /// It would reach past the end, or is not aligned.
    #[inline]
    pub fn object<T: SharedWords>(&self, offset: usize) -> Result<&T, MappingError> {
        Ok(&self.array::<T>(offset, 1)?[0])
    }

    /// The `count` objects from `offset`.
    ///
    /// # Errors
    /// They would reach past the end, or are not aligned.
    #[inline]
    pub fn array<T: SharedWords>(&self, offset: usize, count: usize) -> Result<&[T], MappingError> {
        let len = self.raw.len();
        let fits = count.checked_mul(size_of::<T>()).and_then(|size| size.checked_add(offset));
        match fits {
            Some(end) if end <= len && offset.is_multiple_of(align_of::<T>()) => {}
            _ => return Err(MappingError::OutOfBounds { offset, size: size_of::<T>(), len }),
        }
        // On a read-only mapping plain atomic loads of at most 8 bytes are loads to the machine.
        // SAFETY: `offset..offset + count * size` lies inside the mapping, which lives as long as `self`; mappings are
        // aligned to a page, the offset to `T`. `T` is atomics only, so neither other processes' stores nor other
        // references of this process can make the reference invalid.
        Ok(unsafe {
            std::slice::from_raw_parts(self.raw.as_mut_ptr().wrapping_add(offset).cast::<T>().cast_const(), count)
        })
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn address(&self) -> usize {
        self.raw.as_ptr().addr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A forked child has not got the mapping, and by now something else of its own may lie there.
        if std::process::id() == self.process {
            // SAFETY: here and nowhere else, and nothing looks at it afterwards.
            unsafe { ManuallyDrop::drop(&mut self.raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::shm::memfd;
    use crate::sync::{AtomicU64, Ordering};

    #[test]
    fn two_mappings_of_one_memfd_see_each_other() {
        let fd = memfd::create("test", 8192).expect("memfd");
        let writer = Mapping::read_write(fd.as_fd(), 8192).expect("map");
        let reader = Mapping::read_only(fd.as_fd(), 8192).expect("map");
        writer.object::<AtomicU64>(4096).expect("inside").store(77, Ordering::Release);
        assert_eq!(reader.object::<AtomicU64>(4096).expect("inside").load(Ordering::Acquire), 77);
    }

    #[test]
    fn nothing_outside_or_misaligned_is_handed_out() {
        let fd = memfd::create("test", 4096).expect("memfd");
        let map = Mapping::read_write(fd.as_fd(), 4096).expect("map");
        assert!(map.object::<AtomicU64>(4088).is_ok());
        assert!(map.object::<AtomicU64>(4089).is_err());
        assert!(map.object::<AtomicU64>(4092).is_err());
        assert!(map.array::<AtomicU64>(0, 513).is_err());
        assert!(map.array::<AtomicU64>(8, usize::MAX).is_err());
    }
}
