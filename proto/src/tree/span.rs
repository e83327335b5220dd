//! Runs of addresses, and the entries of a node that they touch.

use super::level_shift;
use super::walk::index;
use crate::access::Access;
use crate::iova::IovaRange;

/// A run of addresses and where it leads.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) range: IovaRange,
    pub(super) target: u64,
    pub(super) access: Access,
}

/// One entry of a node: its position and the addresses below it.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub(super) index: usize,
    pub(super) range: IovaRange,
}

impl Span {
    /// The entries of a node of `level` that the span touches, each with the part of the span inside. The span lies
    /// within the node.
    pub(super) fn slots(self, level: u32) -> impl Iterator<Item = (Slot, Span)> {
        let shift = level_shift(level);
        let mask = (1_u64 << shift) - 1;
        let mut next = Some(self.range.first());
        std::iter::from_fn(move || {
            let first = next?;
            let slot = IovaRange::new(first & !mask, first | mask)?;
            let last = slot.last().min(self.range.last());
            next = if last < self.range.last() { last.checked_add(1) } else { None };
            let part = Span {
                range: IovaRange::new(first, last)?,
                target: self.target.wrapping_add(first - self.range.first()),
                access: self.access,
            };
            Some((Slot { index: index(first, shift), range: slot }, part))
        })
    }
}
