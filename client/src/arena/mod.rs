//! All of the guest's memory in one piece of address space.
//!
//! Targets of translations are offsets in the arena, so a worker's address is one addition. The daemon says where each
//! memory region lies; between regions, and everywhere after a revocation, an access faults.

mod map;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use iotlb_proto::control::RegionInfo;
use iotlb_proto::iova::PAGE_MASK;
use iotlb_proto::sync::{AtomicU32, Ordering};
use map::{Reservation, unit_of};

/// Largest arena that is accepted, in bytes: a quarter of the user half of a 48-bit address space. No guest comes near.
const ARENA_MAX: u64 = 1 << 45;

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The daemon named a size that cannot be.
    #[error(
        "the daemon asks for {size:#x} bytes of address space for guest memory: not whole pages from 1 to \
         {ARENA_MAX:#x} bytes"
    )]
    Size {
        /// What it named.
        size: u64,
    },
    /// The address space is too small or limited (`ulimit -v`).
    #[error(
        "cannot reserve {size:#x} bytes of address space for guest memory: raise the address space limit (ulimit -v)"
    )]
    Reserve {
        /// How much was wanted.
        size: u64,
        /// The system's reason.
        source: io::Error,
    },
}

/// Why a region was not mapped. Translations into it are refused as [`Fault::Invalid`](crate::Fault::Invalid).
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegionError {
    #[error("a number is not a multiple of the page size, or the size is 0")]
    Alignment,
    #[error("its place, in the arena or in its file, is not a multiple of {page:#x} bytes, the file's huge pages")]
    HugeAlignment { page: u64 },
    #[error("it passes the end of the arena ({arena:#x} bytes)")]
    Bounds { arena: u64 },
    #[error("it overlaps region {other}")]
    Overlap { other: u64 },
    #[error("region {0} exists already")]
    Duplicate(u64),
    #[error(
        "its memory is {actual:#x} bytes long but must reach {needed:#x}: touching the rest would kill this process"
    )]
    Short { actual: u64, needed: u64 },
    #[error("it came with {count} descriptors instead of one")]
    Descriptors { count: usize },
    #[error("fstat: {0}")]
    Stat(#[source] io::Error),
    #[error("fstatfs: {0}")]
    PageSize(#[source] io::Error),
    #[error("mmap: {0}")]
    Map(#[source] io::Error),
    #[error("access was revoked")]
    Revoked,
}

#[derive(Clone, Copy, Debug)]
struct Placed {
    id: u64,
    offset: u64,
    size: u64,
    /// What is mapped there: `size`, and the rest of its last huge page.
    span: u64,
    mapped: bool,
}

#[derive(Debug, Default)]
struct Regions {
    placed: Vec<Placed>,
    revoked: bool,
}

/// Where an arena is, for who asks with each lookup. An arena stays where it is; whoever uses the address keeps it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// First byte.
    pub(crate) base: NonNull<u8>,
    /// Bytes.
    pub(crate) size: u64,
}

// SAFETY: an address and a number, with which nothing can be done that is not unsafe by itself.
unsafe impl Send for Span {}

/// The arena of one attachment. Changed by the control thread only.
#[derive(Debug)]
pub(crate) struct Arena {
    memory: Reservation,
    regions: Mutex<Regions>,
    /// How many regions could not be mapped, and one for ever once address space was lost. While it is not 0 every
    /// translation is compared with the regions.
    refused: AtomicU32,
}

impl Arena {
    pub(crate) fn new(size: u64) -> Result<Arena, ArenaError> {
        let len = match usize::try_from(size) {
            Ok(len) if size > 0 && size & PAGE_MASK == 0 && size <= ARENA_MAX => len,
            _ => return Err(ArenaError::Size { size }),
        };
        let memory = Reservation::new(len).map_err(|source| ArenaError::Reserve { size, source })?;
        Ok(Arena { memory, regions: Mutex::default(), refused: AtomicU32::new(0) })
    }

    /// Where it is.
    pub(crate) fn span(&self) -> Span {
        Span { base: self.memory.base(), size: self.size() }
    }

    /// Bytes.
    #[inline]
    pub(crate) fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Whether every region the daemon named is mapped, and nothing in between is anybody else's.
    #[inline]
    pub(crate) fn is_complete(&self) -> bool {
        // Acquire pairs with the release in `settle`; what makes a region usable at all is the mapped generation.
        self.refused.load(Ordering::Acquire) == 0
    }

    /// Whether `len` bytes at `offset` lie in mapped regions. Takes a lock: only for an incomplete arena.
    pub(crate) fn is_mapped(&self, offset: u64, len: u64) -> bool {
        let regions = self.lock();
        let mut at = offset;
        let Some(end) = offset.checked_add(len) else { return false };
        while at < end {
            let Some(here) = regions.placed.iter().find(|p| p.mapped && p.offset <= at && at < p.offset + p.size)
            else {
                return false;
            };
            at = here.offset + here.size;
        }
        true
    }

    /// Maps a region, of the one file that came with it.
    pub(crate) fn add(&self, info: &RegionInfo, files: &[OwnedFd]) -> Result<(), RegionError> {
        let mut regions = self.lock();
        let result = self.check_and_map(&regions, info, files);
        match &result {
            // A second region of the same name must not hide the first.
            Err(RegionError::Duplicate(_) | RegionError::Revoked) => {}
            _ => {
                regions.placed.push(Placed {
                    id: info.id,
                    offset: info.arena_offset,
                    size: info.size,
                    span: *result.as_ref().unwrap_or(&info.size),
                    mapped: result.is_ok(),
                });
            }
        }
        self.settle(&regions);
        result.map(|_| ())
    }

    /// Returns how many bytes are mapped. Of a file on huge pages that are whole ones, as the daemon, which keeps the
    /// room behind a region free, expects; a region need not end with one.
    fn check_and_map(&self, regions: &Regions, info: &RegionInfo, files: &[OwnedFd]) -> Result<u64, RegionError> {
        if regions.revoked {
            return Err(RegionError::Revoked);
        }
        if regions.placed.iter().any(|placed| placed.id == info.id) {
            return Err(RegionError::Duplicate(info.id));
        }
        if info.size == 0 || (info.size | info.arena_offset | info.file_offset) & PAGE_MASK != 0 {
            return Err(RegionError::Alignment);
        }
        let [file] = files else { return Err(RegionError::Descriptors { count: files.len() }) };
        let page = unit_of(file.as_fd()).map_err(RegionError::PageSize)?;
        if (info.arena_offset | info.file_offset) & (page - 1) != 0 {
            return Err(RegionError::HugeAlignment { page });
        }
        let span = info.size.checked_next_multiple_of(page);
        let end = span.and_then(|span| info.arena_offset.checked_add(span)).filter(|end| *end <= self.size());
        let (Some(span), Some(end)) = (span, end) else { return Err(RegionError::Bounds { arena: self.size() }) };
        let overlaps = |p: &&Placed| p.mapped && p.offset < end && info.arena_offset < p.offset + p.span;
        if let Some(other) = regions.placed.iter().find(overlaps) {
            return Err(RegionError::Overlap { other: other.id });
        }
        let stat = rustix::fs::fstat(file).map_err(|e| RegionError::Stat(e.into()))?;
        let actual = u64::try_from(stat.st_size).unwrap_or(0);
        // All of the span: files on huge pages have no part of one.
        let needed = info.file_offset.saturating_add(span);
        if actual < needed {
            return Err(RegionError::Short { actual, needed });
        }
        let (offset, len) = self.checked_usize(info.arena_offset, span)?;
        self.memory.map_file(offset, len, file.as_fd(), info.file_offset).map_err(RegionError::Map)?;
        Ok(span)
    }

    /// Unmaps a region; unknown ones are none of the worker's business.
    pub(crate) fn remove(&self, id: u64) -> Result<(), RegionError> {
        let mut regions = self.lock();
        if let Some(index) = regions.placed.iter().position(|placed| placed.id == id) {
            let placed = regions.placed[index];
            if placed.mapped && !regions.revoked {
                let (offset, len) = self.checked_usize(placed.offset, placed.span)?;
                self.memory.clear(offset, len).map_err(RegionError::Map)?;
            }
            regions.placed.swap_remove(index);
        }
        self.settle(&regions);
        Ok(())
    }

    /// Makes all guest memory unreachable for good.
    pub(crate) fn revoke(&self) -> io::Result<()> {
        let mut regions = self.lock();
        regions.revoked = true;
        self.memory.clear(0, self.memory.len())?;
        regions.placed.clear();
        self.settle(&regions);
        Ok(())
    }

    fn settle(&self, regions: &Regions) {
        let refused = regions.placed.iter().filter(|placed| !placed.mapped).count();
        let refused = refused + usize::from(!self.memory.is_whole());
        // Release pairs with the acquire in `is_complete`.
        self.refused.store(u32::try_from(refused).unwrap_or(u32::MAX), Ordering::Release);
    }

    fn checked_usize(&self, offset: u64, size: u64) -> Result<(usize, usize), RegionError> {
        match (usize::try_from(offset), usize::try_from(size)) {
            (Ok(offset), Ok(size)) => Ok((offset, size)),
            _ => Err(RegionError::Bounds { arena: self.size() }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Regions> {
        // The lists are valid between any two statements, so a panic elsewhere does not spoil them.
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::shm::memfd;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn region(id: u64, arena_offset: u64, size: u64) -> RegionInfo {
        RegionInfo { id, arena_offset, guest_address: arena_offset, size, file_offset: 0 }
    }

    #[test]
    fn regions_that_do_not_fit_are_refused_each_for_its_reason() {
        let arena = Arena::new(SIZE).expect("an arena");
        let file = [memfd::create("guest", 0x10_000).expect("a memfd")];
        arena.add(&region(1, 0x10_000, 0x10_000), &file).expect("fits");
        let error = |info: RegionInfo| {
            let error = arena.add(&info, &file).expect_err("does not fit");
            assert_eq!(arena.is_complete(), matches!(error, RegionError::Duplicate(_)));
            if info.id != 1 {
                arena.remove(info.id).expect("removed");
            }
            assert!(arena.is_complete() && arena.is_mapped(0x10_000, 0x10_000));
            error
        };
        assert!(matches!(error(region(2, 0x30_001, 0x1000)), RegionError::Alignment));
        assert!(matches!(error(region(2, 0x30_000, 0)), RegionError::Alignment));
        assert!(matches!(error(region(2, 0x30_000, 0x1001)), RegionError::Alignment));
        assert!(matches!(error(RegionInfo { file_offset: 1, ..region(2, 0x30_000, 0x1000) }), RegionError::Alignment));
        assert!(matches!(error(region(2, SIZE - 0x1000, 0x2000)), RegionError::Bounds { arena: SIZE }));
        assert!(matches!(error(region(2, u64::MAX - 0xfff, 0x1000)), RegionError::Bounds { .. }));
        assert!(matches!(error(region(2, 0x1_f000, 0x2000)), RegionError::Overlap { other: 1 }));
        assert!(matches!(error(region(2, 0, SIZE)), RegionError::Overlap { other: 1 }));
        assert!(matches!(error(region(1, 0x30_000, 0x1000)), RegionError::Duplicate(1)));
        assert!(matches!(
            error(region(2, 0x30_000, 0x11_000)),
            RegionError::Short { actual: 0x10_000, needed: 0x11_000 }
        ));
        let far = RegionInfo { file_offset: u64::MAX - 0xfff, ..region(2, 0x30_000, 0x1000) };
        assert!(matches!(error(far), RegionError::Short { .. }));
    }

    #[test]
    fn ranges_over_several_regions_and_over_holes() {
        let arena = Arena::new(SIZE).expect("an arena");
        let file = [memfd::create("guest", 0x10_000).expect("a memfd")];
        for (id, offset) in [(1, 0), (2, 0x10_000), (3, 0x30_000)] {
            arena.add(&region(id, offset, 0x10_000), &file).expect("fits");
        }
        assert!(arena.is_mapped(0x8000, 0x10_000));
        assert!(!arena.is_mapped(0x1_ffff, 2));
        assert!(!arena.is_mapped(u64::MAX, 2));
        arena.remove(2).expect("removed");
        assert!(!arena.is_mapped(0x8000, 0x10_000) && arena.is_mapped(0x8000, 0x8000));
        arena.revoke().expect("revoked");
        assert!(!arena.is_mapped(0, 1));
        assert!(matches!(arena.add(&region(9, 0, 0x1000), &file), Err(RegionError::Revoked)));
    }
}
