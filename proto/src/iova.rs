//! I/O virtual address ranges that cannot overflow.
//!
//! A front-end names ranges as start and size, and "everything" has several spellings on the wire, one of which
//! does not fit a 64-bit end. So ranges are kept with an *inclusive* last address from the door inwards.

use std::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// The smallest translation unit the table stores in its tree, in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The bits of an address below the page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;

/// A non-empty range of addresses, `first..=last`. It can hold the whole 64-bit space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// Every address there is.
    pub const ALL: IovaRange = IovaRange { first: 0, last: u64::MAX };

    /// `first..=last`, or `None` when `last` lies before `first`.
    #[must_use]
    pub const fn new(first: u64, last: u64) -> Option<IovaRange> {
        if first <= last { Some(IovaRange { first, last }) } else { None }
    }

    /// The `len` bytes from `first`; `None` when there are none, or when they would pass the end of the space.
    #[must_use]
    pub const fn from_len(first: u64, len: u64) -> Option<IovaRange> {
        if len == 0 {
            return None;
        }
        match first.checked_add(len - 1) {
            Some(last) => Some(IovaRange { first, last }),
            None => None,
        }
    }

    /// The range an INVALIDATE message names. Size 0 and every size that wraps mean "to the end of the space":
    /// front-ends spell whole-space flushes as `{0, 0}`, `{0, 2^64 - 1}` and `{x, 2^64 - x}`.
    #[must_use]
    pub const fn from_invalidate(iova: u64, size: u64) -> IovaRange {
        if iova == 0 && size == u64::MAX {
            return IovaRange::ALL;
        }
        match IovaRange::from_len(iova, size) {
            Some(range) => range,
            None => IovaRange { first: iova, last: u64::MAX },
        }
    }

    /// The page around `iova`.
    #[must_use]
    pub const fn page_of(iova: u64) -> IovaRange {
        IovaRange { first: iova & !PAGE_MASK, last: iova | PAGE_MASK }
    }

    /// The first address.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// The last address, itself part of the range.
    #[must_use]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// How many bytes the range holds, less one (the whole space does not fit a `u64`).
    #[must_use]
    pub const fn len_minus_one(self) -> u64 {
        self.last - self.first
    }

    /// Whether `iova` is inside.
    #[must_use]
    pub const fn contains(self, iova: u64) -> bool {
        self.first <= iova && iova <= self.last
    }

    /// Whether all of `other` is inside.
    #[must_use]
    pub const fn covers(self, other: IovaRange) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether any address is in both.
    #[must_use]
    pub const fn overlaps(self, other: IovaRange) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// What both have in common.
    #[must_use]
    pub fn intersection(self, other: IovaRange) -> Option<IovaRange> {
        IovaRange::new(self.first.max(other.first), self.last.min(other.last))
    }

    /// The smallest range of whole pages around this one.
    #[must_use]
    pub const fn page_aligned(self) -> IovaRange {
        IovaRange { first: self.first & !PAGE_MASK, last: self.last | PAGE_MASK }
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.first, self.last)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_everything_reaches_the_last_byte() {
        assert_eq!(IovaRange::from_invalidate(0, 0), IovaRange::ALL);
        assert_eq!(IovaRange::from_invalidate(0, u64::MAX), IovaRange::ALL);
        let tail = IovaRange::from_invalidate(0xfef0_0000, 0xffff_ffff_0110_0000);
        assert_eq!((tail.first(), tail.last()), (0xfef0_0000, u64::MAX));
        let wrapped = IovaRange::from_invalidate(0x5000, u64::MAX);
        assert_eq!((wrapped.first(), wrapped.last()), (0x5000, u64::MAX));
    }

    #[test]
    fn ordinary_sizes_are_taken_literally() {
        let one = IovaRange::from_invalidate(0x1000, 0x1000);
        assert_eq!((one.first(), one.last()), (0x1000, 0x1fff));
        let head = IovaRange::from_invalidate(0, 0xfee0_0000);
        assert_eq!((head.first(), head.last()), (0, 0xfedf_ffff));
    }

    #[test]
    fn a_length_may_end_at_the_top_but_not_pass_it() {
        assert_eq!(IovaRange::from_len(u64::MAX, 1).map(IovaRange::last), Some(u64::MAX));
        assert_eq!(IovaRange::from_len(u64::MAX, 2), None);
        assert_eq!(IovaRange::from_len(7, 0), None);
    }

    #[test]
    fn set_operations() {
        let a = IovaRange::new(10, 20).expect("ordered");
        let b = IovaRange::new(20, 30).expect("ordered");
        assert!(a.overlaps(b) && b.overlaps(a) && !a.covers(b));
        assert_eq!(a.intersection(b), IovaRange::new(20, 20));
        assert_eq!(a.intersection(IovaRange::new(21, 30).expect("ordered")), None);
        assert!(IovaRange::ALL.covers(a));
        assert_eq!(IovaRange::new(2, 1), None);
    }
}
