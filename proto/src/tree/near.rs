//! Lowest nodes that one pin has met: for who comes back to the same few places, such as a ring's three parts and the
//! buffers around them.
//!
//! A node may be kept for the length of a pin, the lowest as well as the root ([`super::walk`] says why), and as there,
//! a miss below a kept node means nothing yet: it may have been replaced since. And as there, they are forgotten when
//! a removal generation is read.

use std::cell::Cell;

use super::entry::NOTHING;
use super::level_shift;
use super::walk::{leaf_in, lowest_node, middle_node, word_of};
use crate::access::Access;
use crate::layout::table::Node;

/// Nodes kept: a cache line of them. Each holds 2 MiB of addresses.
const KEPT: usize = 4;

/// No place has this number.
const NOWHERE: u64 = u64::MAX;

/// A node by the number of the 2 MiB it holds.
#[derive(Clone, Copy, Debug)]
struct Kept {
    place: u64,
    node: usize,
}

/// The nodes. Empty it when the pin ends.
#[derive(Debug)]
#[repr(align(64))]
pub struct NearNodes {
    kept: [Cell<Kept>; KEPT],
}

impl Default for NearNodes {
    fn default() -> Self {
        NearNodes { kept: [const { Cell::new(Kept { place: NOWHERE, node: 0 }) }; KEPT] }
    }
}

impl NearNodes {
    /// The entry of the page around `iova`, when its node is kept and it is a leaf that allows `access`.
    #[inline(always)]
    #[must_use]
    pub fn page(&self, nodes: &[Node], iova: u64, access: Access) -> Option<u64> {
        let kept = self.kept[slot(iova)].get();
        if kept.place != place(iova) {
            return None;
        }
        leaf_in(word_of(nodes, kept.node, iova)?, access)
    }

    /// Keeps the node around `iova`, below the root word as it is now. `false`: there is none in a tree of the usual
    /// height.
    #[inline]
    pub fn keep(&self, root: u64, nodes: &[Node], iova: u64) -> bool {
        let middle = middle_node(root, nodes, iova).and_then(|node| nodes.get(node));
        let node = middle.map(|middle| lowest_node(middle, iova));
        let node = node.filter(|node| *node != NOTHING as usize && *node < nodes.len());
        if let Some(node) = node {
            self.kept[slot(iova)].set(Kept { place: place(iova), node });
        }
        node.is_some()
    }

    /// Forgets all nodes.
    pub fn clear(&self) {
        for kept in &self.kept {
            kept.set(Kept { place: NOWHERE, node: 0 });
        }
    }
}

/// Number of the 2 MiB around `iova`.
#[inline]
const fn place(iova: u64) -> u64 {
    iova >> level_shift(1)
}

/// Where the node around `iova` is kept: neighbours do not take each other's place.
#[inline]
const fn slot(iova: u64) -> usize {
    // Masked.
    #[allow(clippy::cast_possible_truncation)]
    {
        place(iova) as usize & (KEPT - 1)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::iova::IovaRange;
    use crate::sync::Ordering;
    use crate::table::TableReader;
    use crate::tree::entry;
    use crate::tree::testing::{NO_LINKS, empty_node, insert, tables};

    const GIB: u64 = 1 << 30;
    const PLACE: u64 = 1 << 21;

    fn leaf(target: u64) -> Option<u64> {
        Some(entry::leaf(target, Access::READ))
    }

    fn page(reader: &TableReader, near: &NearNodes, iova: u64) -> Option<u64> {
        reader.page_near(near, iova, Access::READ)
    }

    #[test]
    fn a_kept_node_serves_its_place_and_no_other() {
        let (mut table, reader) = tables();
        let near = NearNodes::default();
        // One place more than are kept: the last takes the first one's slot.
        let places: Vec<u64> = (0..=KEPT as u64).map(|n| GIB + n * PLACE).collect();
        for (n, iova) in (1..).zip(&places) {
            insert(&mut table, *iova, n << 12);
        }
        for (n, iova) in (1..).zip(&places) {
            assert_eq!(page(&reader, &near, *iova), None, "not met yet");
            assert!(reader.keep_near(&near, *iova));
            assert_eq!(page(&reader, &near, *iova + 7), leaf(n << 12));
            assert_eq!(reader.page_near(&near, *iova, Access::WRITE), None);
            assert_eq!(page(&reader, &near, *iova + 4096), None);
        }
        assert_eq!(page(&reader, &near, places[0]), None, "its slot was taken");
        assert_eq!(page(&reader, &near, places[1]), leaf(2 << 12));
        near.clear();
        assert!(places.iter().all(|iova| page(&reader, &near, *iova).is_none()));
    }

    #[test]
    fn a_node_is_kept_where_the_usual_tree_has_one() {
        let (mut table, reader) = tables();
        let near = NearNodes::default();
        insert(&mut table, 0, 0x1000);
        assert!(!reader.keep_near(&near, 0), "not the usual tree");
        insert(&mut table, GIB, 0x2000);
        for nowhere in [2 * GIB, GIB + PLACE, 1 << 45, u64::MAX] {
            assert!(!reader.keep_near(&near, nowhere), "{nowhere:#x}");
            assert_eq!(page(&reader, &near, nowhere), None, "{nowhere:#x}");
        }
        // No entry for this page yet, but a node that will have it.
        assert!(reader.keep_near(&near, GIB + 4096));
        assert_eq!(page(&reader, &near, GIB + 4096), None);
        insert(&mut table, GIB + 4096, 0x3000);
        assert_eq!(page(&reader, &near, GIB + 4096), leaf(0x3000));
    }

    #[test]
    fn a_replaced_node_says_what_it_said_until_it_is_forgotten() {
        let (mut table, reader) = tables();
        let near = NearNodes::default();
        insert(&mut table, GIB, 0x2000);
        assert!(reader.keep_near(&near, GIB));
        table.remove(IovaRange::new(GIB, GIB + PLACE - 1).expect("a range"));
        insert(&mut table, GIB, 0x4000);
        // The removal is not acknowledged before this pin has ended.
        assert_eq!(page(&reader, &near, GIB), leaf(0x2000));
        near.clear();
        assert_eq!(page(&reader, &near, GIB), None);
        assert!(reader.keep_near(&near, GIB));
        assert_eq!(page(&reader, &near, GIB), leaf(0x4000));
    }

    #[test]
    fn a_broken_writer_leads_nowhere() {
        let nodes = [empty_node(), empty_node(), empty_node()];
        nodes[1].entries[0].store(entry::link(2), Ordering::Relaxed);
        for link in NO_LINKS {
            nodes[2].entries[0].store(link, Ordering::Relaxed);
            let near = NearNodes::default();
            assert!(!near.keep(entry::root(1, 3), &nodes, 0), "{link:#x}");
            assert_eq!(near.page(&nodes, 0, Access::NONE), None, "{link:#x}");
        }
    }
}
