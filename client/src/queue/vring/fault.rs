//! Why a ring operation did not happen.

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::CELL_PAGES_MAX;

use crate::miss::pages;

/// Misses one fault lists at most: a quarter of the miss cells that all threads of a worker share.
pub(super) const MISSES_MAX: usize = 64;

/// Bytes to ask for, in at most [`CELL_PAGES_MAX`] pages, so that one request holds them. Not whole pages: a front-end
/// may have a translation for a part of one, and deny the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
    /// What the ring wants to do there.
    pub access: Access,
}

impl Miss {
    pub(super) fn of(range: IovaRange, access: Access) -> Miss {
        // In a few pages, so adding one does not overflow.
        Miss { iova: range.first(), len: range.len_minus_one() + 1, access }
    }

    /// The addresses.
    #[must_use]
    pub fn range(&self) -> IovaRange {
        // A miss is neither empty nor wraps, so the fall-back is never taken.
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

/// Collects what is missing; neighbours with the same access become one miss. Of several things in one page the first
/// is asked for: nearly always the whole page comes with it, and the rest is asked for after that otherwise.
#[derive(Debug, Default)]
pub(super) struct MissList {
    misses: Vec<Miss>,
    /// So many of them do not grow any more. `None`: what the next try needs is still being listed.
    sealed: Option<usize>,
}

impl MissList {
    /// Adds bytes of one page.
    pub(super) fn push(&mut self, bytes: IovaRange, access: Access) {
        let is_listed = |miss: &Miss| miss.range().page_aligned().covers(bytes) && miss.access.allows(access);
        if self.misses.iter().any(is_listed) {
            return;
        }
        if let Some(last) = self.misses[self.sealed.unwrap_or(0)..].last_mut()
            && last.access == access
            && let Some(both) = IovaRange::new(last.iova, bytes.last())
            && pages(both) <= CELL_PAGES_MAX
        {
            // What is needed must not be denied for what lies between. A wish that is denied says nothing, so pages
            // that are neighbours make one: buffers seldom fill theirs.
            let by_pages = |range: IovaRange| if self.sealed.is_some() { range.page_aligned() } else { range };
            let (end, begin) = (by_pages(last.range()).last(), by_pages(bytes).first());
            if end.checked_add(1) == Some(begin) {
                *last = Miss::of(both, access);
                return;
            }
        }
        if !self.is_full() {
            self.misses.push(Miss::of(bytes, access));
        }
    }

    /// What comes from now on becomes misses of its own: whoever waits for those before must not wait for it as well.
    pub(super) fn seal(&mut self) {
        self.sealed = Some(self.misses.len());
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
    use iotlb_proto::iova::PAGE_SIZE;

    use super::*;

    fn bytes(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).expect("in order")
    }

    fn found(list: MissList) -> Vec<IovaRange> {
        list.into_set(1, MissPlace::Tables).misses.iter().map(Miss::range).collect()
    }

    #[test]
    fn neighbours_are_one_miss_but_not_across_a_seal() {
        let mut list = MissList::default();
        for page in [4, 5, 6] {
            list.push(IovaRange::page_of(page * PAGE_SIZE), Access::READ);
        }
        list.seal();
        for page in [7, 5, 8] {
            list.push(IovaRange::page_of(page * PAGE_SIZE), Access::READ);
        }
        assert_eq!(found(list), [bytes(0x4000, 0x6fff), bytes(0x7000, 0x8fff)]);
    }

    #[test]
    fn what_is_needed_has_no_bytes_between_and_wishes_are_joined_by_pages() {
        let mut list = MissList::default();
        for _ in 0..2 {
            for (first, last) in
                [(0x1800, 0x1fff), (0x2000, 0x20ff), (0x2800, 0x28ff), (0x3000, 0x30ff), (0x4100, 0x41ff)]
            {
                list.push(bytes(first, last), Access::READ);
            }
            list.seal();
            for (first, last) in [(0x4800, 0x48ff), (0x8100, 0x81ff), (0x9100, 0x91ff), (0x9800, 0x98ff)] {
                list.push(bytes(first, last), Access::READ);
            }
        }
        let needed = [bytes(0x1800, 0x20ff), bytes(0x3000, 0x30ff), bytes(0x4100, 0x41ff)];
        assert_eq!(found(list), [&needed[..], &[bytes(0x8100, 0x91ff)]].concat());
    }

    #[test]
    fn one_request_holds_a_miss_that_begins_within_a_page() {
        let mut list = MissList::default();
        list.seal();
        for page in 0..2 * CELL_PAGES_MAX {
            list.push(bytes(page * PAGE_SIZE + 8, page * PAGE_SIZE + 15), Access::READ);
        }
        let end = CELL_PAGES_MAX * PAGE_SIZE;
        assert_eq!(found(list), [bytes(8, end - PAGE_SIZE + 15), bytes(end + 8, 2 * end - PAGE_SIZE + 15)]);
    }
}
