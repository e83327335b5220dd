//! `vm_memory::GuestMemory` for a guard, addressed by I/O virtual address: `virtio_queue::Queue`, and everything else
//! that is generic over guest memory, runs over it without a copy and without allocation.
//!
//! A fault becomes [`Error::InvalidGuestAddress`] with the address that is missing. `virtio_queue` turns a fault in
//! the descriptor table into an empty chain it has popped already, and one in an indirect table into a shorter
//! chain: so resolve rings and tables before walking them, or rewind.

use std::iter::FusedIterator;

use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::Access;
use crate::guard::{Fault, Guard, Walk};

fn access_of(permissions: Permissions) -> Access {
    match permissions {
        Permissions::No => Access::NONE,
        Permissions::Read => Access::READ,
        Permissions::Write => Access::WRITE,
        Permissions::ReadWrite => Access::READ_WRITE,
    }
}

/// The volatile slices of a range, one a leaf of the table.
#[derive(Debug)]
struct Slices<'g> {
    /// `None` for an empty range, which has no slices and no fault.
    walk: Option<Walk<'g>>,
    guard: &'g Guard<'g>,
    start: GuestAddress,
}

impl<'g> Iterator for Slices<'g> {
    type Item = Result<VolatileSlice<'g>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        match self.walk.as_mut()?.next()? {
            Ok(segment) => Some(Ok(segment.volatile())),
            Err(fault) => {
                self.guard.reader().count_fault();
                Some(Err(Error::InvalidGuestAddress(match fault {
                    Fault::Miss { iova, .. } => GuestAddress(iova),
                    Fault::Remapping | Fault::Invalid => self.start,
                })))
            }
        }
    }
}

impl FusedIterator for Slices<'_> {}

impl<'g> GuestMemorySliceIterator<'g, ()> for Slices<'g> {}

impl GuestMemory for Guard<'_> {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        count == 0 || self.walk(addr.0, count as u64, access_of(access)).all(|piece| piece.is_ok())
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        self.reader().count_lookups(1);
        let walk = (count > 0).then(|| self.walk(addr.0, count as u64, access_of(access)));
        Ok(Slices { walk, guard: self, start: addr })
    }
}
