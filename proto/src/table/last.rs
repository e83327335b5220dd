//! The nodes of the GiB that a reader looked into last: what most lookups begin at.

use std::cell::Cell;
use std::mem::offset_of;

use crate::layout::table::Node;
use crate::shm::{SharedChoice, SharedObject, SharedSlice};
use crate::sync::AtomicU64;
use crate::tree::walk::{gib_of, lowest_node, middle_node, word_of};

/// Nodes kept. Linux hands out addresses below 4 GiB as long as there are any, so these are all that most guests use.
const KEPT: usize = 4;

/// No GiB has this number.
const NOWHERE: u64 = u64::MAX;

/// The nodes. They are good for as long as the pin under which they were found, no longer, and not for what is kept
/// under a removal generation read after they were found: see [`crate::tree::walk`].
///
/// Which GiB they are of lies on one line, wherever the reader is: each pin writes it with two stores of 16 bytes, and
/// one of these across the end of a page takes more than twice as long as the rest of the pin.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct LastNodes {
    gibs: [Cell<u64>; KEPT],
    nodes: SharedChoice<Node, KEPT>,
}

impl LastNodes {
    /// Of a table with these nodes, of which `nothing` is the one that is always empty.
    pub(super) fn new(nodes: SharedSlice<Node>, nothing: SharedObject<Node>) -> LastNodes {
        LastNodes { gibs: [const { Cell::new(NOWHERE) }; KEPT], nodes: SharedChoice::new(nodes, nothing) }
    }

    /// Whether `iova` lies in a GiB that was looked into, and whose node is kept.
    #[inline(always)]
    #[must_use]
    pub fn are_around(&self, iova: u64) -> bool {
        self.gibs[place_of(iova)].get() == gib_of(iova)
    }

    /// The word of the 4 KiB page around `iova`, which they [`LastNodes::are_around`], whatever it says. `None`: no
    /// such word here; ask [`TableReader::lookup_leaf`](super::TableReader::lookup_leaf).
    #[inline(always)]
    #[must_use]
    pub fn word(&self, iova: u64) -> Option<&AtomicU64> {
        debug_assert!(self.are_around(iova), "{iova:#x} is in none of {:x?}", self.gibs);
        word_of(self.nodes.all(), lowest_node(self.nodes.chosen(place_of(iova))?, iova), iova)
    }

    /// Keeps the node of the GiB around `iova` from now on. `root` is the root word as it is now.
    pub(super) fn keep(&self, root: u64, iova: u64) {
        self.gibs[place_of(iova)].set(gib_of(iova));
        self.nodes.choose(place_of(iova), middle_node(root, self.nodes.all(), iova));
    }

    /// Forgets them: when a pin begins, and when a removal generation is read.
    #[inline(always)]
    pub fn forget(&self) {
        for gib in &self.gibs {
            gib.set(NOWHERE);
        }
    }
}

const _: () = assert!(align_of::<LastNodes>() == 64 && offset_of!(LastNodes, gibs) == 0);

/// Where the node of the GiB around `iova` is kept.
#[inline(always)]
const fn place_of(iova: u64) -> usize {
    // Masked.
    #[allow(clippy::cast_possible_truncation)]
    {
        gib_of(iova) as usize & (KEPT - 1)
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
    fn page(reader: &TableReader, last: &LastNodes, iova: u64) -> Option<u64> {
        if !last.are_around(iova) {
            reader.keep_node(last, iova);
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
        let last = reader.last_nodes();
        assert_eq!(page(&reader, &last, 0), None, "one level is not the usual tree");
        insert(&mut table, GIB, TARGET);
        let found = |table: &TableWriter, last: &LastNodes| {
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
    fn they_serve_what_was_looked_into_and_nothing_else() {
        let (mut table, reader) = tables();
        for place in [1, 2, 3, 4, 511] {
            insert(&mut table, place * GIB, TARGET);
        }
        let last = reader.last_nodes();
        assert!(!last.are_around(0) && !last.are_around(u64::MAX), "nothing was looked into yet");
        for place in [1, 2, 3, 4, 511, 2, 3, 4, 1] {
            assert_eq!(page(&reader, &last, place * GIB), leaf(), "{place}");
            assert_eq!(page(&reader, &last, place * GIB + 4096), None, "{place}");
            for elsewhere in [0, 5 * GIB, 512 * GIB, 513 * GIB, u64::MAX] {
                assert!(!last.are_around(elsewhere), "{place} {elsewhere:#x}");
            }
        }
        let kept = [1, 2, 3, 4, 511].map(|place| last.are_around(place * GIB));
        assert_eq!(kept, [true, true, true, true, false], "511 has lost its place to 3");
        for nowhere in [0, 5 * GIB, 512 * GIB, 513 * GIB, u64::MAX] {
            assert_eq!(page(&reader, &last, nowhere), None, "{nowhere:#x}");
            assert!(last.are_around(nowhere), "it is not looked for again and again");
        }
        last.forget();
        assert!(![0, 2 * GIB, 3 * GIB, u64::MAX].iter().any(|iova| last.are_around(*iova)));
    }

    #[test]
    fn a_superpage_is_not_followed() {
        let (mut table, reader) = tables();
        insert(&mut table, 5 * GIB, TARGET);
        let whole = IovaRange::from_len(GIB, GIB).expect("a range");
        table.insert(whole, 0, Access::READ_WRITE).expect("there is room");
        let half = IovaRange::from_len(2 * GIB, 2 << 20).expect("a range");
        table.insert(half, 0, Access::READ_WRITE).expect("there is room");
        let last = reader.last_nodes();
        for iova in [GIB, GIB + (7 << 20), 2 * GIB, 2 * GIB + 4096] {
            assert_eq!(page(&reader, &last, iova), None, "{iova:#x}");
            assert!(table.memory().lookup_leaf(iova).is_some());
        }
    }
}
