//! Removal by target: a memory region goes, and every leaf that leads into it.
//!
//! Nothing says where such leaves are, so all of the tree is looked at, in order of address and in slices. A
//! [`TargetRemoval`] remembers where the next slice goes on. It is an address and no node, so the tree may change
//! between slices; but what is inserted below it meanwhile is not looked at again.
//!
//! A node of the lowest level is counted before it is changed. All of it leads there: it is unlinked as a whole, with
//! one store to its parent, which is the usual case. Some of it: those entries are cleared. None: nothing is written.

use std::ops::RangeInclusive;

use super::edit::{Edit, Tree, TreeView, node_number};
use super::slice::Budget;
use super::walk::index;
use super::{entry, height_for, level_shift};
use crate::access::Access;
use crate::epoch::Stamp;
use crate::iova::PAGE_MASK;
use crate::layout::table::{NODE_ENTRIES, Node};
use crate::sync::{AtomicU64, Ordering};

/// How far a removal by target is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRemoval {
    targets: RangeInclusive<u64>,
    /// First address that was not looked at; `None`: all were.
    next: Option<u64>,
}

impl TargetRemoval {
    /// Of everything whose target overlaps `first..=last`; nothing is done yet.
    #[must_use]
    pub fn new(first: u64, last: u64) -> TargetRemoval {
        TargetRemoval { targets: first..=last, next: (first <= last).then_some(0) }
    }

    /// Whether all of the tree was looked at.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.next.is_none()
    }

    /// The targets that go.
    #[must_use]
    pub fn targets(&self) -> &RangeInclusive<u64> {
        &self.targets
    }

    /// Whether a leaf that covers `len_minus_one` bytes and one leads there.
    fn takes(&self, leaf: u64, len_minus_one: u64) -> bool {
        let first = entry::target(leaf);
        first <= *self.targets.end() && *self.targets.start() <= first.saturating_add(len_minus_one)
    }
}

/// One slice under way.
struct Slice<'a, 'm> {
    view: TreeView<'m>,
    stamp: Stamp,
    removal: &'a mut TargetRemoval,
    /// Where it began.
    from: u64,
    budget: &'a mut Budget,
    edit: Edit,
}

/// What is left of a node that was looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Left {
    Something,
    /// It can be unlinked. `dirty`: with its entries in it.
    Nothing {
        dirty: bool,
    },
}

impl Tree {
    /// Goes on with a removal by target, as far as the slice goes.
    pub fn remove_targets(
        &mut self,
        view: TreeView<'_>,
        stamp: Stamp,
        removal: &mut TargetRemoval,
        budget: &mut Budget,
    ) -> Edit {
        let Some(from) = removal.next.take() else { return Edit::default() };
        let root = view.root.load(Ordering::Relaxed);
        let height = entry::root_height(root);
        if height < height_for(from) {
            return Edit::default();
        }
        let node = node_number(entry::root_node(root));
        let mut slice = Slice { view, stamp, removal, from, budget, edit: Edit::default() };
        if let Left::Nothing { dirty } = self.remove_targets_below(&mut slice, node, height - 1, 0) {
            view.root.store(entry::EMPTY, Ordering::Release);
            self.pool.retire(node, stamp, dirty);
        }
        slice.edit
    }

    fn remove_targets_below(&mut self, slice: &mut Slice<'_, '_>, node: u32, level: u32, base: u64) -> Left {
        if level == 0 {
            return self.remove_lowest_targets(slice, node);
        }
        let shift = level_shift(level);
        let within = (1_u64 << shift) - 1;
        let start = if slice.from > base { index(slice.from, shift) } else { 0 };
        // The highest node has more entries than there are addresses.
        for (at, address) in (0..NODE_ENTRIES).zip(0..=u64::MAX >> shift).skip(start) {
            let first = base | address << shift;
            // Not before the first step of a slice: a step spends what it did, and the way down to it nothing.
            if slice.budget.is_spent() {
                slice.removal.next = Some(first);
                break;
            }
            let old = slice.view.load(node, at);
            if entry::is_present(old) && entry::is_leaf(old) {
                if slice.removal.takes(old, within) {
                    self.unlink(slice.view, node, at);
                    self.leaves -= 1;
                    slice.edit.unlinked += 1;
                }
            } else if entry::is_present(old) {
                let child = node_number(entry::child(old));
                if let Left::Nothing { dirty } = self.remove_targets_below(slice, child, level - 1, first) {
                    self.unlink(slice.view, node, at);
                    self.pool.retire(child, slice.stamp, dirty);
                }
            }
            if !slice.removal.is_done() {
                break;
            }
            slice.budget.spend(1);
        }
        if self.pool.info(node).live == 0 { Left::Nothing { dirty: false } } else { Left::Something }
    }

    fn remove_lowest_targets(&mut self, slice: &mut Slice<'_, '_>, node: u32) -> Left {
        slice.budget.spend(NODE_ENTRIES);
        let live = self.pool.info(node).live;
        let matching = count(&slice.view.nodes[node as usize], slice.removal);
        slice.edit.unlinked += u64::from(matching);
        self.leaves -= u64::from(matching);
        if matching == live {
            return Left::Nothing { dirty: true };
        }
        if matching > 0 {
            slice.budget.spend(NODE_ENTRIES);
            for at in 0..NODE_ENTRIES {
                let old = slice.view.load(node, at);
                if entry::is_present(old) && slice.removal.takes(old, PAGE_MASK) {
                    self.unlink(slice.view, node, at);
                }
            }
        }
        Left::Something
    }
}

/// Leaves of a lowest-level node that lead there.
fn count(node: &Node, removal: &TargetRemoval) -> u16 {
    // A subtraction and a comparison an entry, and no branch, since no processor could guess which entries match.
    let lowest = entry::by_target(entry::leaf(removal.targets.start() & !PAGE_MASK, Access::NONE));
    let width = (removal.targets.end() | PAGE_MASK) - lowest;
    // Relaxed: only this writer stores.
    let number = |word: &AtomicU64| entry::by_target(word.load(Ordering::Relaxed));
    node.entries.iter().map(|word| u16::from(number(word).wrapping_sub(lowest) <= width)).sum()
}
