//! `vm_memory::GuestMemory` for a guard, addressed by I/O virtual address: `virtio_queue::Queue`, and everything else
//! that is generic over guest memory, runs over it without a copy and without allocation.
//!
//! A fault becomes [`Error::InvalidGuestAddress`] with the address that is missing. `virtio_queue` turns a fault in
//! the descriptor table into an empty chain it has popped already, and one in an indirect table into a shorter
//! chain: so resolve rings and tables before walking them, or rewind.

use std::iter::FusedIterator;

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

/// The slices of a range, one a page, or one a larger leaf where that is found. Neighbours are not joined: to know
/// them, the next page would have to be looked up before this one is handed out, and once more after it.
#[derive(Debug)]
struct Slices<'g> {
    guard: &'g Guard<'g>,
    /// Where the next slice begins.
    iova: u64,
    /// Bytes still to come; none after a fault. The range does not wrap.
    left: u64,
    access: Access,
}

impl<'g> Iterator for Slices<'g> {
    type Item = Result<VolatileSlice<'g>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let len = self.left.min(PAGE_SIZE - (self.iova & PAGE_MASK));
        let found = match self.guard.near(self.iova, len, self.access) {
            Some(segment) => Ok(segment),
            None => slow_piece(self.guard, self.iova, self.left, self.access),
        };
        match found {
            Ok(segment) => {
                let len = segment.len() as u64;
                self.left -= len;
                // Wraps only at the end of the space, and then nothing is left.
                self.iova = self.iova.wrapping_add(len);
                Some(Ok(segment.volatile()))
            }
            Err(missing) => {
                self.left = 0;
                Some(Err(Error::InvalidGuestAddress(missing)))
            }
        }
    }
}

/// The first piece of a range that is not empty, whatever leaf it lies under; or what is missing.
///
/// By value: an iterator whose address is taken lies in memory, where what was written in words and is moved in pairs
/// of them costs as much as a translation.
#[cold]
#[inline(never)]
fn slow_piece<'g>(
    guard: &'g Guard<'g>,
    iova: u64,
    left: u64,
    access: Access,
) -> std::result::Result<Segment<'g>, GuestAddress> {
    match guard.walk(iova, left, access).next() {
        Some(Ok(segment)) => Ok(segment),
        fault => {
            guard.reader().count_fault();
            Err(GuestAddress(match fault {
                Some(Err(Fault::Miss { iova, .. })) => iova,
                _ => iova,
            }))
        }
    }
}

impl FusedIterator for Slices<'_> {}

impl<'g> GuestMemorySliceIterator<'g, ()> for Slices<'g> {
    /// As the trait's own, which keeps a whole result aside for each slice: more than the translation costs.
    #[inline(always)]
    fn stop_on_error(mut self) -> Result<impl Iterator<Item = VolatileSlice<'g>>> {
        let first = self.next().transpose()?;
        Ok(UntilFault { first, rest: self })
    }
}

/// The slices of a range up to the first fault, which is not the first slice.
#[derive(Debug)]
struct UntilFault<'g> {
    first: Option<VolatileSlice<'g>>,
    rest: Slices<'g>,
}

impl<'g> Iterator for UntilFault<'g> {
    type Item = VolatileSlice<'g>;

    #[inline(always)]
    fn next(&mut self) -> Option<VolatileSlice<'g>> {
        // Spelled out: a closure in here is not always made a part of the caller.
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        match self.rest.next() {
            Some(Ok(slice)) => Some(slice),
            Some(Err(_)) | None => None,
        }
    }
}

impl GuestMemory for Guard<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    #[inline]
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let access = access_of(access);
        let (mut iova, mut left) = (addr.0, count as u64);
        // Whole pages, as far as that goes. It never wraps: no page is quick at the end of the space.
        while left > 0 {
            let len = left.min(PAGE_SIZE - (iova & PAGE_MASK));
            if self.quick(iova, len, access).is_none() {
                return self.walk(iova, left, access).all(|piece| piece.is_ok());
            }
            (iova, left) = (iova + len, left - len);
        }
        true
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        self.reader().count_lookups(1);
        let (iova, left) = (addr.0, count as u64);
        if left > 0 && iova.checked_add(left - 1).is_none() {
            self.reader().count_fault();
            return Err(Error::InvalidGuestAddress(addr));
        }
        Ok(Slices { guard: self, iova, left, access: access_of(access) })
    }
}
