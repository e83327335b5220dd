//! The reader's lookup: loads, one a level.
//!
//! [`lookup`] begins at the root word and finds every leaf. [`Top`] is the short way for what nearly all lookups of a
//! guest's driver are: a 4 KiB page below 512 GiB. It keeps the root node, so that three loads are left and no loop,
//! for as long as the pin lasts.
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

/// The levels of the trees that [`Top`] serves: they reach 512 GiB.
const TOP_HEIGHT: u32 = 3;

/// The root node of a tree of three levels; kept for the length of a pin. One word, since every pin stores it; so the
/// table's nodes are named again with each question.
#[derive(Clone, Copy, Debug)]
pub struct Top<'t> {
    /// `None`: the tree has another height.
    node: Option<&'t Node>,
}

impl<'t> Top<'t> {
    /// The root node that a root word names, which the pin found.
    #[inline(always)]
    #[must_use]
    pub fn new(root: u64, nodes: &'t [Node]) -> Top<'t> {
        Top { node: nodes.get(entry::root_node_if(root, TOP_HEIGHT)) }
    }

    /// The word of the 4 KiB page around `iova`, whatever it says. `None`: no such word here; ask [`lookup`]. `nodes`
    /// are those the root node is one of.
    #[inline(always)]
    #[must_use]
    pub fn word(self, nodes: &'t [Node], iova: u64) -> Option<&'t AtomicU64> {
        word_of(nodes, self.lowest(nodes, iova)?, iova)
    }

    /// The number of the lowest node around `iova`; `None`, or past the end of `nodes`, when there is none.
    #[inline(always)]
    pub(super) fn lowest(self, nodes: &[Node], iova: u64) -> Option<usize> {
        // Fits: the crate is for 64-bit targets only. Not masked: an address too high is past the end.
        #[allow(clippy::cast_possible_truncation)]
        let number = (iova >> level_shift(2)) as usize;
        // Acquire, here and below, as in `lookup`.
        let upper = self.node?.entries.get(number)?.load(Ordering::Acquire);
        let middle = &nodes.get(entry::child_if_link(upper))?.entries[index(iova, level_shift(1))];
        Some(entry::child_if_link(middle.load(Ordering::Acquire)))
    }

    /// The entry of the page around `iova`, when it is a leaf that allows `access`.
    #[inline(always)]
    #[must_use]
    pub fn page(self, nodes: &'t [Node], iova: u64, access: Access) -> Option<u64> {
        leaf_in(self.word(nodes, iova)?, access)
    }
}

/// The word of the 4 KiB page around `iova` in the lowest node with this number, if there is such a node.
#[inline(always)]
pub(super) fn word_of(nodes: &[Node], lowest: usize, iova: u64) -> Option<&AtomicU64> {
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
    use crate::iova::IovaRange;
    use crate::table::TableWriter;
    use crate::tree::testing::{NO_LINKS, empty_node, insert, tables};

    const PAGE: u64 = 1 << 30;
    const TARGET: u64 = 0x5000;

    #[test]
    fn a_kept_root_finds_what_it_held_and_never_anything_else() {
        let (mut table, reader) = tables();
        insert(&mut table, 0, TARGET);
        assert_eq!(reader.page(reader.top(reader.root()), 0, Access::READ), None, "one level is not the usual tree");
        insert(&mut table, PAGE, TARGET);
        let leaf = Some(entry::leaf(TARGET, Access::READ));
        let top = reader.top(reader.root());
        let found = |table: &TableWriter| {
            (reader.page(top, PAGE + 7, Access::READ), table.memory().lookup_leaf(PAGE).is_some())
        };
        assert_eq!(found(&table), (leaf, true));
        assert_eq!(reader.page(top, PAGE, Access::WRITE), None);
        insert(&mut table, 1 << 45, TARGET);
        assert_eq!(found(&table), (leaf, true), "the tree grew");
        assert_eq!((reader.page(top, 1 << 45, Access::READ), reader.page(top, u64::MAX, Access::READ)), (None, None));
        table.remove(IovaRange::page_of(PAGE));
        assert_eq!(found(&table), (None, false));
        table.clear();
        insert(&mut table, PAGE, TARGET);
        assert_eq!(found(&table), (None, true), "a new root, since no grace period has passed");
        assert_eq!(reader.page(reader.top(reader.root()), PAGE, Access::READ), leaf);
    }

    #[test]
    fn a_broken_writer_leads_nowhere() {
        let nodes = [empty_node(), empty_node()];
        assert_eq!(Top::new(entry::root(2, 3), &nodes).page(&nodes, 0, Access::NONE), None);
        for link in NO_LINKS {
            nodes[0].entries[0].store(link, Ordering::Relaxed);
            assert_eq!(Top::new(entry::root(0, 3), &nodes).page(&nodes, 0, Access::NONE), None, "{link:#x}");
            nodes[0].entries[0].store(entry::link(1), Ordering::Relaxed);
            nodes[1].entries[0].store(link, Ordering::Relaxed);
            assert_eq!(Top::new(entry::root(0, 3), &nodes).page(&nodes, 0, Access::NONE), None, "{link:#x}");
        }
    }
}
