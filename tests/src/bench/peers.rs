//! What others translate with, filled with the same pages.

use std::collections::BTreeMap;
use std::sync::RwLock;

use vm_memory::iommu::{Iotlb, MappedRange};
use vm_memory::{GuestAddress, Permissions};

/// One page: where it is seen, and where it leads.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// I/O virtual address, page aligned.
    pub iova: u64,
    /// Guest address, page aligned.
    pub target: u64,
}

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// The same as a length.
const PAGE_LEN: usize = 4096;

/// `vm_memory::Iotlb` as its users keep it: behind a reader-writer lock.
#[derive(Debug)]
pub struct VmMemory(pub RwLock<Iotlb>);

impl VmMemory {
    /// Filled with `pages`.
    #[must_use]
    pub fn with(pages: &[Page]) -> VmMemory {
        let mut iotlb = Iotlb::new();
        for page in pages {
            iotlb
                .set_mapping(GuestAddress(page.iova), GuestAddress(page.target), PAGE_LEN, Permissions::ReadWrite)
                .expect("a whole page far from the end of the address space");
        }
        VmMemory(RwLock::new(iotlb))
    }

    /// One lookup under a lock that is taken for it.
    #[inline]
    pub fn lookup_locked(&self, iova: u64, len: usize) -> u64 {
        let guard = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        lookup(&guard, iova, len)
    }
}

/// One lookup in an `Iotlb`; 0 when it misses.
#[inline]
pub fn lookup(iotlb: &Iotlb, iova: u64, len: usize) -> u64 {
    match Iotlb::lookup(iotlb, GuestAddress(iova), len, Permissions::Read) {
        Ok(mut ranges) => ranges.next().map_or(0, |MappedRange { base, .. }| base.0),
        Err(_) => 0,
    }
}

/// A plain ordered map of pages behind a reader-writer lock: what one would write in an afternoon.
#[derive(Debug)]
pub struct Ordered(pub RwLock<BTreeMap<u64, u64>>);

impl Ordered {
    /// Filled with `pages`.
    #[must_use]
    pub fn with(pages: &[Page]) -> Ordered {
        Ordered(RwLock::new(pages.iter().map(|page| (page.iova, page.target)).collect()))
    }

    /// One lookup under a lock that is taken for it.
    #[inline]
    pub fn lookup_locked(&self, iova: u64) -> u64 {
        let guard = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        guard.range(..=iova).next_back().map_or(0, |(first, target)| target + (iova - first))
    }
}
