//! The node of the GiB that a reader looked into last: what most lookups begin at.

use std::cell::Cell;

use crate::layout::table::Node;
use crate::shm::{SharedChoice, SharedSlice};
use crate::sync::AtomicU64;
use crate::tree::walk::{gib_of, lowest_node, middle_node, word_of};

/// No GiB has this number.
const NOWHERE: u64 = u64::MAX;

/// The node. It is good for as long as the pin under which it was found, no longer: see [`crate::tree::walk`].
#[derive(Debug)]
pub struct LastNode {
    gib: Cell<u64>,
    node: SharedChoice<Node>,
}

impl LastNode {
    /// Of a table with these nodes.
    pub(super) fn new(nodes: SharedSlice<Node>) -> LastNode {
        LastNode { gib: Cell::new(NOWHERE), node: SharedChoice::new(nodes) }
    }

    /// Whether `iova` lies in the GiB that was looked into last.
    #[inline(always)]
    #[must_use]
    pub fn is_around(&self, iova: u64) -> bool {
        gib_of(iova) == self.gib.get()
    }

    /// The word of the 4 KiB page around `iova`, which [`LastNode::is_around`], whatever it says. `None`: no such word
    /// here; ask [`TableReader::lookup_leaf`](super::TableReader::lookup_leaf).
    #[inline(always)]
    #[must_use]
    pub fn word(&self, iova: u64) -> Option<&AtomicU64> {
        debug_assert!(self.is_around(iova), "{iova:#x} is not in GiB {:#x}", self.gib.get());
        word_of(self.node.all(), lowest_node(self.node.chosen()?, iova), iova)
    }

    /// Begins at the GiB around `iova` from now on. `root` is the root word as it is now.
    pub(super) fn begin_at(&self, root: u64, iova: u64) {
        self.gib.set(gib_of(iova));
        self.node.choose(middle_node(root, self.node.all(), iova));
    }

    /// Forgets the node: when a pin begins.
    #[inline(always)]
    pub fn forget(&self) {
        self.gib.set(NOWHERE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;
    use crate::iova::IovaRange;
    use crate::sync::Ordering;
    use crate::table::{TableReader, TableWriter};
    use crate::tree::entry;
    use crate::tree::testing::{insert, tables};

    const GIB: u64 = 1 << 30;
    const TARGET: u64 = 0x5000;

    /// What the page around `iova` says there; `None` also where it says nothing.
    fn page(reader: &TableReader, last: &LastNode, iova: u64) -> Option<u64> {
        if !last.is_around(iova) {
            reader.begin_at(last, iova);
        }
        last.word(iova).map(|word| word.load(Ordering::Acquire)).filter(|found| entry::is_leaf(*found))
    }

    fn leaf() -> Option<u64> {
        Some(entry::leaf(TARGET, Access::READ))
    }

    #[test]
    fn a_kept_node_finds_what_it_held_and_never_anything_else() {
        let (mut table, reader) = tables();
        insert(&mut table, 0, TARGET);
        let last = reader.last_node();
        assert_eq!(page(&reader, &last, 0), None, "one level is not the usual tree");
        insert(&mut table, GIB, TARGET);
        let found = |table: &TableWriter, last: &LastNode| {
            (page(&reader, last, GIB + 7), table.memory().lookup_leaf(GIB).is_some())
        };
        assert_eq!(found(&table, &last), (leaf(), true));
        insert(&mut table, 1 << 45, TARGET);
        assert_eq!(found(&table, &last), (leaf(), true), "the tree grew");
        table.remove(IovaRange::page_of(GIB));
        assert_eq!(found(&table, &last), (None, false));
        table.clear();
        insert(&mut table, GIB, TARGET);
        assert_eq!(found(&table, &last), (None, true), "a new node, since no grace period has passed");
        last.forget();
        assert_eq!(found(&table, &last), (leaf(), true));
    }

    #[test]
    fn it_serves_one_gib_at_a_time() {
        let (mut table, reader) = tables();
        for place in [1, 2, 511] {
            insert(&mut table, place * GIB, TARGET);
        }
        let last = reader.last_node();
        assert!(!last.is_around(0) && !last.is_around(u64::MAX), "nothing was looked into yet");
        for place in [1, 2, 511, 2, 1] {
            assert_eq!(page(&reader, &last, place * GIB), leaf(), "{place}");
            assert_eq!(page(&reader, &last, place * GIB + 4096), None, "{place}");
            for elsewhere in [0, 3 * GIB, 512 * GIB, 513 * GIB, u64::MAX] {
                assert!(!last.is_around(elsewhere), "{place} {elsewhere:#x}");
            }
        }
        for nowhere in [0, 3 * GIB, 512 * GIB, 513 * GIB, u64::MAX] {
            assert_eq!(page(&reader, &last, nowhere), None, "{nowhere:#x}");
            assert!(last.is_around(nowhere), "it is not looked for again and again");
        }
        last.forget();
        assert!(!last.is_around(u64::MAX));
    }

    #[test]
    fn a_superpage_is_not_followed() {
        let (mut table, reader) = tables();
        insert(&mut table, 5 * GIB, TARGET);
        let whole = IovaRange::from_len(GIB, GIB).expect("a range");
        table.insert(whole, 0, Access::READ_WRITE).expect("there is room");
        let half = IovaRange::from_len(2 * GIB, 2 << 20).expect("a range");
        table.insert(half, 0, Access::READ_WRITE).expect("there is room");
        let last = reader.last_node();
        for iova in [GIB, GIB + (7 << 20), 2 * GIB, 2 * GIB + 4096] {
            assert_eq!(page(&reader, &last, iova), None, "{iova:#x}");
            assert!(table.memory().lookup_leaf(iova).is_some());
        }
    }
}
