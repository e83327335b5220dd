//! The simulated vIOMMU: which guest page an IOVA names now, and which IOVAs the guest may hand out.

use std::collections::BTreeMap;

use iotlb_proto::access::Access;
use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SIZE};

use super::SimError;

/// First address of the window that interrupts use on x86; no IOVA lies in it, and lazy flushes leave it out.
pub const INTERRUPT_WINDOW: u64 = 0xfee0_0000;
/// First address behind that window.
pub const INTERRUPT_WINDOW_END: u64 = 0xfef0_0000;

/// A page the guest mapped for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedPage {
    /// Guest physical address of the page.
    pub page: u64,
    /// What the guest allows.
    pub access: Access,
}

/// The vIOMMU's page table, one entry a 4 KiB page.
#[derive(Debug, Default)]
pub struct Viommu {
    pages: BTreeMap<u64, MappedPage>,
}

impl Viommu {
    /// Maps one page. An IOVA that is mapped already must be unmapped and invalidated first, as an IOMMU driver does.
    pub fn map(&mut self, iova: u64, page: u64, access: Access) -> Result<(), SimError> {
        if iova & PAGE_MASK != 0 || page & PAGE_MASK != 0 {
            return Err(SimError::Usage { what: format!("mapping {iova:#x} to {page:#x} is not page aligned") });
        }
        if self.pages.contains_key(&iova) {
            return Err(SimError::Usage { what: format!("IOVA {iova:#x} is mapped already") });
        }
        self.pages.insert(iova, MappedPage { page, access });
        Ok(())
    }

    /// Takes one page out of the page table. The device may go on using it until the invalidation is acknowledged.
    pub fn unmap(&mut self, iova: u64) -> Result<MappedPage, SimError> {
        self.pages
            .remove(&iova)
            .ok_or_else(|| SimError::Usage { what: format!("IOVA {iova:#x} is not mapped, cannot be unmapped") })
    }

    /// What the page table says about the page around `iova`.
    #[must_use]
    pub fn walk(&self, iova: u64) -> Option<MappedPage> {
        self.pages.get(&(iova & !PAGE_MASK)).copied()
    }

    /// Mapped pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

/// Hands out IOVAs, the one that was freed last first: a guest's IOVA caches reuse as quickly.
#[derive(Debug)]
pub struct IovaSpace {
    free: Vec<u64>,
}

impl IovaSpace {
    /// `pages` page-sized IOVAs on both sides of the interrupt window, so that both ranges of a lazy flush matter.
    #[must_use]
    pub fn new(pages: u64) -> IovaSpace {
        let below = (1..=pages / 2).map(|n| INTERRUPT_WINDOW - n * PAGE_SIZE);
        let above = (0..pages - pages / 2).map(|n| INTERRUPT_WINDOW_END + n * PAGE_SIZE);
        let mut free: Vec<u64> = below.chain(above).collect();
        free.sort_by_key(|iova| iova.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        IovaSpace { free }
    }

    /// A free IOVA.
    pub fn allocate(&mut self) -> Result<u64, SimError> {
        self.free.pop().ok_or(SimError::OutOfIovas)
    }

    /// Gives an IOVA back, once no device can use it any more.
    pub fn release(&mut self, iova: u64) {
        self.free.push(iova);
    }
}

/// The two messages of a lazy flush as an Intel vIOMMU sends it: everything but the interrupt window. The first range
/// ends at 2^64, so its end does not fit 64 bits.
pub const LAZY_FLUSH: [(u64, u64); 2] =
    [(INTERRUPT_WINDOW_END, INTERRUPT_WINDOW_END.wrapping_neg()), (0, INTERRUPT_WINDOW)];

/// Whether a lazy flush reaches `iova`.
#[must_use]
pub fn lazy_flush_covers(iova: u64) -> bool {
    LAZY_FLUSH.iter().any(|&(first, size)| IovaRange::from_invalidate(first, size).contains(iova))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iovas_lie_on_both_sides_of_the_window_and_every_flush_reaches_them() {
        let mut space = IovaSpace::new(512);
        let mut sides = [0, 0];
        for _ in 0..512 {
            let iova = space.allocate().expect("512 of them");
            assert!(lazy_flush_covers(iova) && lazy_flush_covers(iova | PAGE_MASK));
            sides[usize::from(iova > INTERRUPT_WINDOW)] += 1;
        }
        assert_eq!(sides, [256, 256]);
        assert!(matches!(space.allocate(), Err(SimError::OutOfIovas)));
        assert!(!lazy_flush_covers(INTERRUPT_WINDOW));
        assert_eq!(LAZY_FLUSH, [(0xfef0_0000, 0xffff_ffff_0110_0000), (0, 0xfee0_0000)]);
    }

    #[test]
    fn a_page_is_mapped_once() {
        let mut iommu = Viommu::default();
        iommu.map(0x1000, 0x7000, Access::READ).expect("free");
        assert!(iommu.map(0x1000, 0x8000, Access::READ).is_err());
        assert_eq!(iommu.walk(0x1fff).map(|mapped| mapped.page), Some(0x7000));
        assert_eq!(iommu.walk(0x2000), None);
        iommu.unmap(0x1000).expect("mapped");
        assert!(iommu.unmap(0x1000).is_err());
    }
}
