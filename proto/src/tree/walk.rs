//! The reader's lookup: loads, one a level.
//!
//! [`lookup`] begins at the root word and finds every leaf. What nearly all lookups of a guest's driver are, a 4 KiB
//! page below 512 GiB near those before, goes a shorter way: the nodes of a few GiB that were looked into last are kept
//! ([`LastNodes`](crate::table::LastNodes)), or lowest nodes are ([`super::near`]), for as long as the pin lasts. Then
//! two loads are left, or one, and no loop.
//!
//! # Why a node may be kept for the length of a pin
//!
//! The node was found through the root word after the pin, as every lookup does; nothing limits how long a lookup may
//! take between two of its loads, except the end of the pin. So all that is promised to a slow lookup holds for a kept
//! node:
//!
//! * *It is not used for something else.* A node that is unlinked is reused after a grace period that began later, and
//!   that one waits for this pin.
//! * *What it yields may be used.* If node or leaf were unlinked meanwhile, the daemon has not acknowledged that to
//!   anybody yet, since this pin is older.
//! * *The tree grew.* Higher nodes were put above; this one still holds the addresses it held.
//! * *It was emptied, or unlinked and replaced by a new one.* Then it says what it said before, or "nothing" about
//!   leaves that a walk from the root would find. So a miss here means nothing yet: ask [`lookup`], which reads the
//!   root word again.
//!
//! The end of the pin limits that as well: what a kept node yields must not outlive it. Who keeps a pointer longer does
//! so under a removal generation, which promises that all removals up to it were seen. A node that was found before the
//! generation was read has not seen them: forget all kept nodes when it is read, and translate afterwards.

use super::{HEIGHT_MAX, entry, level_shift};
use crate::access::Access;
use crate::layout::table::{NODE_BITS, NODE_ENTRIES, Node};
use crate::sync::{AtomicU64, Ordering};
use crate::table::Translation;

/// A leaf as it was found: the entry, and how many address bits are below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    entry: u64,
    shift: u32,
}

impl Leaf {
    /// What is allowed.
    #[inline]
    #[must_use]
    pub const fn access(self) -> Access {
        entry::access(self.entry)
    }

    /// Arena offset of `iova`, which the leaf was found for.
    #[inline]
    #[must_use]
    pub const fn address(self, iova: u64) -> u64 {
        entry::target(self.entry).wrapping_add(iova & self.offset_mask())
    }

    /// Last address the leaf covers, for an `iova` it was found for.
    #[inline]
    #[must_use]
    pub const fn last(self, iova: u64) -> u64 {
        iova | self.offset_mask()
    }

    /// All of it, for an `iova` it was found for.
    #[inline]
    #[must_use]
    pub const fn translation(self, iova: u64) -> Translation {
        Translation {
            first: iova & !self.offset_mask(),
            last: self.last(iova),
            target: entry::target(self.entry),
            access: self.access(),
        }
    }

    #[inline]
    const fn offset_mask(self) -> u64 {
        (1 << self.shift) - 1
    }
}

/// Finds the leaf around `iova` in the tree with this root word. `None`: there is none. A root word or link that names
/// no node of this table (only a broken writer makes one) counts as nothing.
#[inline]
#[must_use]
pub fn lookup(root: u64, nodes: &[Node], iova: u64) -> Option<Leaf> {
    let height = entry::root_height(root);
    if height == 0 || height > HEIGHT_MAX {
        return None;
    }
    let mut shift = level_shift(height - 1);
    if height < HEIGHT_MAX && iova >> (shift + NODE_BITS) != 0 {
        return None;
    }
    let mut node = nodes.get(entry::root_node(root))?;
    loop {
        // Acquire pairs with the release in `edit`: the child a link names is complete.
        let found = node.entries[index(iova, shift)].load(Ordering::Acquire);
        if !entry::is_present(found) {
            return None;
        }
        if entry::is_leaf(found) {
            return Some(Leaf { entry: found, shift });
        }
        if shift == level_shift(0) {
            return None;
        }
        node = nodes.get(entry::child(found))?;
        shift -= NODE_BITS;
    }
}

/// The levels of the trees that have a short way: they reach 512 GiB.
const TOP_HEIGHT: u32 = 3;

/// The number of the GiB around `iova`.
#[inline(always)]
pub(crate) const fn gib_of(iova: u64) -> u64 {
    iova >> level_shift(2)
}

/// The number of the node of the GiB around `iova`, below a root word: that of the empty node, or past the end of
/// `nodes`, when there is none. `None`: the tree has another height.
pub(crate) fn middle_node(root: u64, nodes: &[Node], iova: u64) -> Option<usize> {
    let top = nodes.get(entry::root_node_if(root, TOP_HEIGHT))?;
    // Fits: the crate is for 64-bit targets only. Not masked: an address too high is past the end.
    #[allow(clippy::cast_possible_truncation)]
    let word = top.entries.get(gib_of(iova) as usize)?;
    // Acquire, here and below, as in `lookup`.
    Some(entry::child(word.load(Ordering::Acquire)))
}

/// The number of the lowest node around `iova`, below that of its GiB: as in [`middle_node`], when there is none.
#[inline(always)]
pub(crate) fn lowest_node(middle: &Node, iova: u64) -> usize {
    entry::child(middle.entries[index(iova, level_shift(1))].load(Ordering::Acquire))
}

/// The word of the 4 KiB page around `iova` in the lowest node with this number, if there is such a node.
#[inline(always)]
pub(crate) fn word_of(nodes: &[Node], lowest: usize, iova: u64) -> Option<&AtomicU64> {
    Some(&nodes.get(lowest)?.entries[index(iova, level_shift(0))])
}

/// The entry in a word of a lowest node, when it is a leaf that allows `access`.
#[inline(always)]
pub(super) fn leaf_in(word: &AtomicU64, access: Access) -> Option<u64> {
    // Acquire pairs with the release in `edit`: who sees an entry sees the memory-map generation it needs.
    let found = word.load(Ordering::Acquire);
    entry::is_leaf_for(found, access).then_some(found)
}

/// Position of `iova` in a node whose entries span `1 << shift` bytes.
#[inline]
pub(super) const fn index(iova: u64, shift: u32) -> usize {
    // Masked to NODE_BITS bits.
    #[allow(clippy::cast_possible_truncation)]
    {
        (iova >> shift) as usize & (NODE_ENTRIES - 1)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::tree::testing::{NO_LINKS, empty_node};

    #[test]
    fn a_broken_writer_leads_nowhere() {
        let nodes = [empty_node(), empty_node(), empty_node()];
        let entry_of = |root| {
            let lowest = lowest_node(nodes.get(middle_node(root, &nodes, 0)?)?, 0);
            word_of(&nodes, lowest, 0).map(|word| word.load(Ordering::Relaxed)).filter(|found| *found != entry::EMPTY)
        };
        assert_eq!((entry_of(entry::root(3, 3)), entry_of(entry::root(1, 2))), (None, None));
        for link in NO_LINKS {
            nodes[1].entries[0].store(link, Ordering::Relaxed);
            assert_eq!(entry_of(entry::root(1, 3)), None, "{link:#x}");
            nodes[1].entries[0].store(entry::link(2), Ordering::Relaxed);
            nodes[2].entries[0].store(link, Ordering::Relaxed);
            assert_eq!(entry_of(entry::root(1, 3)), None, "{link:#x}");
            nodes[2].entries[0].store(entry::EMPTY, Ordering::Relaxed);
        }
    }
}
