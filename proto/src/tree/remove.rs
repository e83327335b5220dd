//! Removal by address. It looks into the nodes at the two edges of the range and takes off whole subtrees between them,
//! so it is short whatever the range holds; what was taken off is put away later ([`super::detached`]).

use super::edit::{Edit, Tree, TreeView, node_number};
use super::span::Span;
use super::walk::index;
use super::{HEIGHT_MAX, entry, height_for, level_shift};
use crate::access::Access;
use crate::epoch::Stamp;
use crate::iova::{IovaRange, PAGE_MASK};
use crate::sync::{AtomicU64, Ordering, prefetch_to_store};

impl Tree {
    /// As [`Tree::remove`] of the one page `range`, when it is a leaf of the lowest level and not the last one of its
    /// node, or nothing is there at all. `None`: not so, nothing was changed. `next` is what is stored after a removal.
    pub fn remove_page(&mut self, view: TreeView<'_>, next: &AtomicU64, range: IovaRange) -> Option<Edit> {
        if range.len_minus_one() != PAGE_MASK {
            return None;
        }
        let root = view.root.load(Ordering::Relaxed);
        let mut level = entry::root_height(root);
        if level == 0 || height_for(range.first()) > level {
            return Some(Edit::default());
        }
        let mut node = node_number(entry::root_node(root));
        loop {
            level -= 1;
            let index = index(range.first(), level_shift(level));
            let old = view.load(node, index);
            if !entry::is_present(old) {
                return Some(Edit::default());
            }
            if !entry::is_leaf(old) {
                node = node_number(entry::child(old));
                continue;
            }
            if level != 0 || self.pool.info(node).live < 2 {
                return None;
            }
            // Both lines are with those who read, and one store is done after the other: so their ways here overlap.
            prefetch_to_store(next);
            self.unlink(view, node, index);
            self.leaves -= 1;
            return Some(Edit { unlinked: 1 });
        }
    }

    /// Removes every leaf that `range` touches, or the touched pages of it. Returns what was unlinked; never fails.
    pub fn remove(&mut self, view: TreeView<'_>, stamp: Stamp, range: IovaRange) -> Edit {
        let mut edit = Edit::default();
        let root = view.root.load(Ordering::Relaxed);
        let height = entry::root_height(root);
        if height == 0 {
            return edit;
        }
        let reach = if height == HEIGHT_MAX { u64::MAX } else { (1 << level_shift(height)) - 1 };
        let node = node_number(entry::root_node(root));
        if range.covers(IovaRange::ALL) || (range.first() == 0 && range.last() >= reach) {
            view.root.store(0, Ordering::Release);
            edit.unlinked = self.detach(stamp, node, height - 1);
            return edit;
        }
        let Some(range) = IovaRange::new(range.first(), range.last().min(reach)) else { return edit };
        self.remove_below(view, stamp, &mut edit, node, height - 1, range);
        if self.pool.info(node).live == 0 {
            view.root.store(0, Ordering::Release);
            self.pool.retire(node, stamp, false);
        }
        edit
    }

    fn remove_below(
        &mut self,
        view: TreeView<'_>,
        stamp: Stamp,
        edit: &mut Edit,
        node: u32,
        level: u32,
        range: IovaRange,
    ) {
        let span = Span { range, target: 0, access: Access::NONE };
        for (slot, part) in span.slots(level) {
            let old = view.load(node, slot.index);
            if !entry::is_present(old) {
                continue;
            }
            let whole = part.range == slot.range;
            if entry::is_leaf(old) {
                edit.unlinked += 1;
                // Both edges of the range may lie in this leaf, each with a path down.
                if !whole
                    && level > 0
                    && self.pool.available() >= 2 * level as usize
                    && let Some(child) = self.pool.allocate(view.nodes, level - 1, slot.range.first())
                {
                    self.fill(view, child, level - 1, old);
                    let mut within = Edit::default();
                    self.remove_below(view, stamp, &mut within, child, level - 1, part.range);
                    if self.pool.info(child).live > 0 {
                        view.store(node, slot.index, entry::link(child));
                        continue;
                    }
                    self.pool.retire(child, stamp, false);
                    // The leaf itself is taken off below; `fill` counted its parts instead of it.
                    self.leaves += 1;
                }
                self.unlink(view, node, slot.index);
                self.leaves -= 1;
            } else {
                let child = node_number(entry::child(old));
                if whole {
                    self.unlink(view, node, slot.index);
                    edit.unlinked += self.detach(stamp, child, level - 1);
                } else {
                    self.remove_below(view, stamp, edit, child, level - 1, part.range);
                    if self.pool.info(child).live == 0 {
                        self.unlink(view, node, slot.index);
                        self.pool.retire(child, stamp, false);
                    }
                }
            }
        }
    }

    pub(super) fn unlink(&mut self, view: TreeView<'_>, node: u32, index: usize) {
        view.store(node, index, entry::EMPTY);
        self.pool.info_mut(node).live -= 1;
    }
}
