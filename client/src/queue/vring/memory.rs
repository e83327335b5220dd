//! What a ring needs from the memory under it, and the only code of the ring that touches guest bytes.

use std::ptr::NonNull;

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::sync::{AtomicU16, AtomicU64, Ordering};

use super::fault::{Broken, MissList, MissPlace, RingFault};
use crate::{Fault, Guard};

/// One memory of this process, unlike all others that it ever has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(u64);

impl Source {
    /// That of a memory which is made now.
    #[must_use]
    pub fn unique() -> Source {
        static SOURCES: AtomicU64 = AtomicU64::new(0);
        // Relaxed: only that each is another number counts. It does not wrap in any time that matters.
        Source(SOURCES.fetch_add(1, Ordering::Relaxed))
    }
}

/// What pointers kept across pins are keyed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    /// Which memory the others are the generations of.
    pub source: Source,
    /// Grows with everything that is taken away.
    pub removal: u64,
    /// Grows with every front-end session.
    pub session: u64,
    /// Grows with every change of a queue record.
    pub queue: u64,
}

/// Guest memory as it can be used while one pin lasts.
///
/// # Safety
///
/// Every piece given to `visit` must stay valid for reads, and for writes when `access` has them, for as long as
/// `self` is borrowed. It must stay valid longer, namely under a later value of the same source, for as long as
/// [`RingMemory::generations`] read *after* that value came into being still equal those read before the translation.
/// So nothing that a value keeps to translate faster may be older than the generations it last answered with.
/// Values that answer with the same [`Generations::source`] are of the same source: the other generations alone may be
/// equal for two places where the same memory, or other memory, is mapped.
pub unsafe trait RingMemory {
    /// Translates all of `len` bytes from `iova`, or nothing: pieces are visited in order of address, and what
    /// was visited before an error is to be forgotten.
    ///
    /// # Errors
    ///
    /// As [`Guard::translate`](crate::Guard::translate); the page named by [`Fault::Miss`] is the first missing one.
    fn translate_pieces(
        &self,
        iova: u64,
        len: u64,
        access: Access,
        visit: &mut dyn FnMut(RawPiece),
    ) -> Result<(), Fault>;

    /// The present generations.
    fn generations(&self) -> Generations;
}

// SAFETY: a translation holds while the guard lives, that is while the reader is pinned. It holds beyond the unpin
// until it is unlinked, and an unlink bumps the removal generation before the grace period that ends with the old
// mapping's end; a guard that pinned after the bump sees it. Nothing unlinked before a bump is translated after
// that bump was read: the load is an acquire, and `Guard::removal_generation` has the reader forget the nodes that it
// kept for its pin, so that each lookup afterwards begins at a root word loaded after it. The table that holds the
// generations may be the same for several attachments, of which each has an arena of its own: `Shared::new` gives each
// a source that is unique in this process, so equal generations are of the same arena, and while one of its guards
// lives, the arena does.
unsafe impl RingMemory for Guard<'_> {
    fn translate_pieces(
        &self,
        iova: u64,
        len: u64,
        access: Access,
        visit: &mut dyn FnMut(RawPiece),
    ) -> Result<(), Fault> {
        for segment in self.translate(iova, len, access)? {
            if let Some(ptr) = NonNull::new(segment.as_ptr()) {
                visit(RawPiece::new(ptr, segment.len()));
            }
        }
        Ok(())
    }

    fn generations(&self) -> Generations {
        Generations {
            source: self.source(),
            removal: self.removal_generation(),
            session: self.session_generation(),
            queue: self.queue_generation(),
        }
    }
}

/// Some bytes of guest memory in this process. Only an address: that it may be used is what the `unsafe` functions ask.
#[derive(Clone, Copy, Debug)]
pub struct RawPiece {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: an address without ownership. Whoever uses it promises, in each `unsafe` call, that it is valid at that time.
unsafe impl Send for RawPiece {}

impl RawPiece {
    /// `len` bytes from `ptr`.
    #[must_use]
    pub fn new(ptr: NonNull<u8>, len: usize) -> RawPiece {
        RawPiece { ptr, len }
    }

    /// Bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a piece is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    pub(super) fn address(&self) -> usize {
        self.ptr.as_ptr().addr()
    }

    /// Whether `next` begins where this one ends.
    pub(super) fn touches(&self, next: &RawPiece) -> bool {
        self.address().checked_add(self.len) == Some(next.address())
    }

    pub(super) fn grow(&mut self, by: usize) {
        self.len += by;
    }

    /// Copies bytes from `offset` out of the guest; how many is bounded by both sides.
    ///
    /// # Safety
    ///
    /// The piece is valid for reads.
    pub(super) unsafe fn copy_out(&self, offset: usize, to: &mut [u8]) -> usize {
        let count = self.len.saturating_sub(offset).min(to.len());
        if count > 0 {
            // SAFETY: `offset + count <= len`, the caller vouches for the piece, and `to` is private memory, so they do
            // not overlap. The guest may write at the same time: then the bytes are torn, which is its own loss, since
            // they are judged only after they arrived in `to`.
            unsafe {
                std::ptr::copy_nonoverlapping(self.ptr.as_ptr().add(offset).cast_const(), to.as_mut_ptr(), count)
            };
        }
        count
    }

    /// Copies bytes into the guest from `offset`; how many is bounded by both sides.
    ///
    /// # Safety
    ///
    /// The piece is valid for writes.
    pub(super) unsafe fn copy_in(&self, offset: usize, from: &[u8]) -> usize {
        let count = self.len.saturating_sub(offset).min(from.len());
        if count > 0 {
            // SAFETY: as in `copy_out`, with the directions swapped.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.ptr.as_ptr().add(offset), count) };
        }
        count
    }

    /// The u16 at `offset`.
    ///
    /// # Safety
    ///
    /// The piece is valid for reads, holds two bytes at `offset`, and they are aligned.
    pub(super) unsafe fn load_u16(&self, offset: usize, ordering: Ordering) -> u16 {
        debug_assert!(offset + 2 <= self.len && (self.address() + offset).is_multiple_of(2));
        // SAFETY: inside the piece and aligned, says the caller; the guest's concurrent stores are what the atomic is
        // for.
        let word = unsafe { AtomicU16::from_ptr(self.ptr.as_ptr().add(offset).cast()) };
        u16::from_le(word.load(ordering))
    }

    /// Stores the u16 at `offset`.
    ///
    /// # Safety
    ///
    /// As [`RawPiece::load_u16`], valid for writes.
    pub(super) unsafe fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) {
        debug_assert!(offset + 2 <= self.len && (self.address() + offset).is_multiple_of(2));
        // SAFETY: as in `load_u16`.
        let word = unsafe { AtomicU16::from_ptr(self.ptr.as_ptr().add(offset).cast()) };
        word.store(value.to_le(), ordering);
    }

    /// The descriptor at `offset`: two little-endian words, each read exactly once.
    ///
    /// # Safety
    ///
    /// The piece is valid for reads, holds 16 bytes at `offset`, and they are aligned to 8.
    pub(super) unsafe fn read_descriptor(&self, offset: usize) -> [u64; 2] {
        debug_assert!(offset + 16 <= self.len && (self.address() + offset).is_multiple_of(8));
        // SAFETY: inside the piece and aligned, says the caller; volatile, so it is read once and then only our copy
        // counts.
        unsafe {
            let at = self.ptr.as_ptr().add(offset).cast::<u64>();
            [u64::from_le(at.read_volatile()), u64::from_le(at.add(1).read_volatile())]
        }
    }

    /// Writes the used element at `offset`.
    ///
    /// # Safety
    ///
    /// The piece is valid for writes, holds 8 bytes at `offset`, and they are aligned to 4.
    pub(super) unsafe fn write_used(&self, offset: usize, id: u32, len: u32) {
        debug_assert!(offset + 8 <= self.len && (self.address() + offset).is_multiple_of(4));
        // SAFETY: inside the piece and aligned, says the caller.
        unsafe {
            let at = self.ptr.as_ptr().add(offset).cast::<u32>();
            at.write_volatile(id.to_le());
            at.add(1).write_volatile(len.to_le());
        }
    }
}

/// Translates a range for `place`; what is missing goes to `misses`, *all* of it, and the pieces go to `visit`.
///
/// `Ok(true)`: nothing is missing. `Ok(false)`: forget what was visited.
pub(super) fn translate_or_list<M: RingMemory + ?Sized>(
    memory: &M,
    iova: u64,
    len: u64,
    access: Access,
    place: MissPlace,
    misses: &mut MissList,
    visit: &mut dyn FnMut(RawPiece),
) -> Result<bool, RingFault> {
    let Some(range) = IovaRange::from_len(iova, len) else {
        return Err(Broken::Wrapped { iova, len }.into());
    };
    // From the first missing byte to the end of its page, as far as it is wanted.
    let missing = |iova| {
        let page = IovaRange::page_of(iova);
        IovaRange::new(iova, page.last().min(range.last())).unwrap_or(page)
    };
    // Neither empty nor wrapped, so an invalid one lies in memory that is not mapped here.
    let unmapped = || RingFault::Unmapped { iova, len, place };
    match memory.translate_pieces(iova, len, access, visit) {
        Ok(()) => return Ok(true),
        Err(Fault::Miss { iova, access }) => misses.push(missing(iova), access),
        Err(Fault::Remapping) => return Err(RingFault::Remapping),
        Err(Fault::Invalid) => return Err(unmapped()),
    }
    // The rare way: a translation stops at its first missing page, so step over that one and look at the rest.
    let mut at = range.first();
    while !misses.is_full() {
        match memory.translate_pieces(at, range.last() - at + 1, access, &mut |_| ()) {
            Ok(()) => break,
            Err(Fault::Miss { iova, access }) => {
                misses.push(missing(iova), access);
                let page = IovaRange::page_of(iova);
                if page.last() >= range.last() || page.last() < at {
                    break;
                }
                at = page.last() + 1;
            }
            Err(Fault::Remapping) => return Err(RingFault::Remapping),
            Err(Fault::Invalid) => return Err(unmapped()),
        }
    }
    Ok(false)
}
