//! Why a ring operation did not happen.

use iotlb_proto::access::Access;
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::layout::worker::CELL_PAGES_MAX;

/// Misses one fault lists at most: a quarter of the miss cells that all threads of a worker share.
pub(super) const MISSES_MAX: usize = 64;

/// Pages to ask for: at most [`CELL_PAGES_MAX`], so that one request holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// First address, page-aligned.
    pub iova: u64,
    /// Bytes, whole pages.
    pub len: u64,
    /// What the ring wants to do there.
    pub access: Access,
}

impl Miss {
    /// The addresses.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        // A miss is made from whole pages below 2^64, so the fall-back is never taken.
        IovaRange::from_len(self.iova, self.len).unwrap_or(IovaRange::page_of(self.iova))
    }
}

/// Where pages are missing, or lie in memory that this process could not map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissPlace {
    /// In the ring itself: nothing can be done before they are there.
    Tables,
    /// In a chain. After a denial, and where memory could not be mapped, the ring goes on behind it
    /// ([`Burst::reject_through`](super::Burst::reject_through)).
    Chain {
        /// Where it is in the available ring, counted as `avail.idx` is.
        position: u16,
    },
}

/// What is missing. `misses[..required]` stand in the way; the rest was seen in chains posted behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissSet {
    /// All of them, without doubles.
    pub misses: Vec<Miss>,
    /// How many the next try needs; the others are read-ahead.
    pub required: usize,
    /// What the required ones are for.
    pub place: MissPlace,
}

impl MissSet {
    /// Those that stand in the way.
    #[must_use]
    pub fn required(&self) -> &[Miss] {
        &self.misses[..self.required.min(self.misses.len())]
    }
}

/// What the driver did that no driver may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// Not a power of two, or zero.
    #[error("ring size {size} is not a power of two")]
    Size {
        /// As the front-end gave it.
        size: u16,
    },
    /// A table that is not aligned as section 2.7 asks, or that the IOMMU splits inside a word.
    #[error("the table at IOVA {iova:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Where the table is.
        iova: u64,
        /// What it must be aligned to.
        align: usize,
    },
    /// An address range that passes the end of the address space.
    #[error("{len} bytes at IOVA {iova:#x} pass the end of the address space")]
    Wrapped {
        /// Where it starts.
        iova: u64,
        /// How long it is.
        len: u64,
    },
    /// The driver claims more chains than the ring has entries.
    #[error("avail.idx {avail} is more than {size} ahead of {position}")]
    AvailIndex {
        /// As the driver wrote it.
        avail: u16,
        /// What the ring has completed.
        position: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A chain starts outside the descriptor table.
    #[error("chain head {head} is outside a ring of {size}")]
    Head {
        /// As the driver wrote it.
        head: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// `next` points outside its table.
    #[error("descriptor {next} is outside a table of {size}")]
    Next {
        /// As the driver wrote it.
        next: u16,
        /// Entries of the table.
        size: u16,
    },
    /// More descriptors than the table has, so `next` runs in a circle, or more than any driver needs.
    #[error("the chain from head {head} does not end, or has more than 1,024 descriptors")]
    Loop {
        /// Where the chain starts.
        head: u16,
    },
    /// INDIRECT where it is not allowed: not negotiated, nested, or together with NEXT.
    #[error("a descriptor of the chain from head {head} has INDIRECT where it is not allowed")]
    Indirect {
        /// Where the chain starts.
        head: u16,
    },
    /// The length of an indirect table.
    #[error("an indirect table of {len} bytes")]
    IndirectLength {
        /// As the driver wrote it.
        len: u32,
    },
    /// A buffer the device reads behind one it writes.
    #[error("the chain from head {head} has a readable buffer behind a writable one")]
    Order {
        /// Where the chain starts.
        head: u16,
    },
    /// More bytes than any driver posts for a packet.
    #[error("the chain from head {head} has more than {max} bytes")]
    TooLong {
        /// Where the chain starts.
        head: u16,
        /// The limit.
        max: u64,
    },
}

/// Why there is no chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// Pages are missing. Nothing was consumed: ask for them *after the unpin*, then try again.
    #[error("{} translations are missing", .0.misses.len())]
    Miss(MissSet),
    /// Something lies in memory that this process could not map (the log says why). The driver did nothing wrong, and
    /// other memory is there as ever: only what `place` says is of no use.
    #[error("{len} bytes at IOVA {iova:#x} lie in memory that this process could not map")]
    Unmapped {
        /// Where it starts.
        iova: u64,
        /// How long it is.
        len: u64,
        /// What it is for.
        place: MissPlace,
    },
    /// This process has not yet mapped the present memory map; wait unpinned, then try again.
    #[error("the memory map of the guest is changing")]
    Remapping,
    /// The ring is not started (or belongs to a session that ended) and may not be touched.
    #[error("the ring is stopped")]
    Stopped,
    /// The driver broke the rules; the ring rests until it is set up anew.
    #[error("the driver broke the ring: {0}")]
    Broken(#[from] Broken),
}

/// Collects missing pages; neighbours with the same access become one miss.
#[derive(Debug, Default)]
pub(super) struct MissList {
    misses: Vec<Miss>,
    /// So many of them do not grow any more.
    sealed: usize,
}

impl MissList {
    pub(super) fn push(&mut self, iova: u64, access: Access) {
        let page = IovaRange::page_of(iova);
        if self.misses.iter().any(|m| m.range().covers(page) && m.access.allows(access)) {
            return;
        }
        if let Some(last) = self.misses[self.sealed..].last_mut()
            && last.access == access
            && last.range().last().checked_add(1) == Some(page.first())
            && last.len < CELL_PAGES_MAX * PAGE_SIZE
        {
            last.len += PAGE_SIZE;
            return;
        }
        if !self.is_full() {
            self.misses.push(Miss { iova: page.first(), len: PAGE_SIZE, access });
        }
    }

    /// What comes from now on becomes misses of its own: whoever waits for those before must not wait for it as well.
    pub(super) fn seal(&mut self) {
        self.sealed = self.misses.len();
    }

    pub(super) fn is_full(&self) -> bool {
        self.misses.len() >= MISSES_MAX
    }

    pub(super) fn len(&self) -> usize {
        self.misses.len()
    }

    pub(super) fn into_set(self, required: usize, place: MissPlace) -> MissSet {
        MissSet { misses: self.misses, required, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_miss_but_not_across_a_seal() {
        let mut list = MissList::default();
        for page in [4, 5, 6] {
            list.push(page * PAGE_SIZE, Access::READ);
        }
        list.seal();
        for page in [7, 5, 8] {
            list.push(page * PAGE_SIZE, Access::READ);
        }
        let found = list.into_set(1, MissPlace::Tables).misses;
        let miss = |page, pages| Miss { iova: page * PAGE_SIZE, len: pages * PAGE_SIZE, access: Access::READ };
        assert_eq!(found, [miss(4, 3), miss(7, 2)]);
    }
}
