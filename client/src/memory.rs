//! `vm_memory::GuestMemory` for a guard, addressed by I/O virtual address: `virtio_queue::Queue`, and everything else
//! that is generic over guest memory, runs over it without a copy and without allocation.
//!
//! A fault becomes [`Error::InvalidGuestAddress`] with the address that is missing. `virtio_queue` turns a fault in
//! the descriptor table into an empty chain it has popped already, and one in an indirect table into a shorter
//! chain: so resolve rings and tables before walking them, or rewind.

use std::iter::FusedIterator;
use std::result;

use iotlb_proto::iova::{PAGE_MASK, PAGE_SIZE};
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::Access;
use crate::guard::{Fault, Guard};
use crate::segments::Segment;

#[inline]
fn access_of(permissions: Permissions) -> Access {
    match permissions {
        Permissions::No => Access::NONE,
        Permissions::Read => Access::READ,
        Permissions::Write => Access::WRITE,
        Permissions::ReadWrite => Access::READ_WRITE,
    }
}

/// The pieces of a range, one a page, or one a larger leaf where that is found. Neighbours are not joined: to know
/// them, the next page would have to be looked up before this one is handed out, and once more after it.
#[derive(Debug)]
struct Slices<'g> {
    guard: &'g Guard<'g>,
    /// Where the next piece begins.
    iova: u64,
    /// Bytes still to come; none after a fault. The range does not wrap.
    left: u64,
    access: Access,
}

impl<'g> Slices<'g> {
    /// `None` when the range wraps.
    #[inline(always)]
    fn over(guard: &'g Guard<'g>, addr: GuestAddress, count: usize, access: Permissions) -> Option<Slices<'g>> {
        let (iova, left) = (addr.0, count as u64);
        iova.checked_add(left.saturating_sub(1))?;
        Some(Slices { guard, iova, left, access: access_of(access) })
    }

    #[inline(always)]
    fn piece(&mut self) -> Option<result::Result<Segment<'g>, Fault>> {
        if self.left == 0 {
            return None;
        }
        let len = self.left.min(PAGE_SIZE - (self.iova & PAGE_MASK));
        Some(match self.guard.quick(self.iova, len, self.access) {
            Some(segment) => {
                self.pass(len);
                Ok(segment)
            }
            None => self.piece_slowly(),
        })
    }

    /// The next piece, whatever it is; only when there is one.
    #[cold]
    #[inline(never)]
    fn piece_slowly(&mut self) -> result::Result<Segment<'g>, Fault> {
        let piece = self.guard.walk(self.iova, self.left, self.access).next().unwrap_or(Err(Fault::Invalid));
        self.pass(piece.map_or(self.left, |segment| segment.len() as u64));
        piece
    }

    #[inline(always)]
    fn pass(&mut self, len: u64) {
        self.left -= len;
        // Wraps only at the end of the space, and then nothing is left.
        self.iova = self.iova.wrapping_add(len);
    }
}

impl<'g> Iterator for Slices<'g> {
    type Item = Result<VolatileSlice<'g>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let len = self.left.min(PAGE_SIZE - (self.iova & PAGE_MASK));
        match self.guard.quick(self.iova, len, self.access) {
            Some(segment) => {
                self.pass(len);
                Some(Ok(segment.volatile()))
            }
            None => Some(self.next_slowly()),
        }
    }
}

impl<'g> Slices<'g> {
    #[cold]
    #[inline(never)]
    fn next_slowly(&mut self) -> Result<VolatileSlice<'g>> {
        let start = self.iova;
        self.piece_slowly().map(|segment| segment.volatile()).map_err(|fault| error(self.guard, start, fault))
    }
}

impl FusedIterator for Slices<'_> {}

impl<'g> GuestMemorySliceIterator<'g, ()> for Slices<'g> {}

/// Counts the fault of a piece that begins at `start`, in the trait's words.
#[cold]
#[inline(never)]
fn error(guard: &Guard<'_>, start: u64, fault: Fault) -> Error {
    guard.reader().count_fault();
    Error::InvalidGuestAddress(GuestAddress(match fault {
        Fault::Miss { iova, .. } => iova,
        Fault::Remapping | Fault::Invalid => start,
    }))
}

impl GuestMemory for Guard<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let Some(mut slices) = Slices::over(self, addr, count, access) else { return false };
        std::iter::from_fn(|| slices.piece()).all(|piece| piece.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        self.reader().count_lookups(1);
        Slices::over(self, addr, count, access).ok_or_else(|| error(self, addr.0, Fault::Invalid))
    }
}
