//! What a lookup finds.

use crate::access::Access;

/// One leaf of the tree, or one byte-granular range: `first..=last` translate to `target + (iova - first)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First address covered.
    pub first: u64,
    /// Last address covered, inclusive.
    pub last: u64,
    /// Arena offset of `first`.
    pub target: u64,
    /// What is allowed.
    pub access: Access,
}

impl Translation {
    /// Arena offset of `iova`, which must be covered.
    #[inline]
    #[must_use]
    pub const fn address(&self, iova: u64) -> u64 {
        self.target.wrapping_add(iova.wrapping_sub(self.first))
    }
}
