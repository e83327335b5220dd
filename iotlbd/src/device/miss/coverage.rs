//! Whether the table has what somebody wants.

use iotlb_proto::access::Access;
use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SIZE};
use iotlb_proto::table::{TableWriter, Translation};

/// Where translations are looked up.
pub(in crate::device) trait Translations {
    /// The leaf around `iova`.
    fn leaf(&self, iova: u64) -> Option<Translation>;
}

impl Translations for TableWriter {
    fn leaf(&self, iova: u64) -> Option<Translation> {
        self.lookup(iova)
    }
}

/// Whether a range can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Coverage {
    /// All of it.
    Covered,
    /// There is nothing at this address.
    Absent(u64),
    /// The translation at this address does not allow the access.
    Forbidden(u64),
}

/// Looks a range up.
pub(in crate::device) fn coverage(table: &impl Translations, range: IovaRange, access: Access) -> Coverage {
    let mut at = range.first();
    loop {
        match table.leaf(at) {
            Some(leaf) if !leaf.access.allows(access) => return Coverage::Forbidden(at),
            Some(leaf) if leaf.last >= range.last() => return Coverage::Covered,
            Some(leaf) if leaf.last >= at => at = leaf.last + 1,
            _ => return Coverage::Absent(at),
        }
    }
}

/// The first bytes of the pages `range` touches.
pub(in crate::device) fn pages_of(range: IovaRange) -> impl Iterator<Item = u64> {
    let first = range.first() & !PAGE_MASK;
    let count = (range.page_aligned().len_minus_one()) / PAGE_SIZE;
    // `first + n * PAGE_SIZE` lies within `range.page_aligned()`, so it cannot wrap.
    (0..=count).map(move |n| first + n * PAGE_SIZE)
}
