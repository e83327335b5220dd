//! Subtrees that were taken off, and how they are put away.
//!
//! One store takes a subtree off, however much it holds; to find its nodes takes a walk over it. The walk is nothing
//! that anybody waits for: no reader that pins from now on comes here, and one that pinned earlier finds what it always
//! found, since a detached subtree keeps its content. So the root is only written down, with the stamp of that moment,
//! and [`Tree::tidy`] walks later, a slice at a time. A node is free when it was walked *and* the grace period of its
//! stamp has passed, in whichever order; before that nobody writes to it.

use super::edit::{Tree, TreeView, node_number};
use super::entry;
use super::slice::{Budget, NODE_WORDS};
use crate::epoch::{Grace, Stamp};
use crate::layout::table::NODE_ENTRIES;

/// The root of a detached subtree. Not of the lowest level: such a node has nothing below it and is retired at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Detached {
    /// When it was taken off.
    stamp: Stamp,
    node: u32,
    level: u32,
}

impl Tree {
    /// Takes note that the subtree at `node` was taken off. Returns the entries of its topmost node, at least 1.
    pub(super) fn detach(&mut self, stamp: Stamp, node: u32, level: u32) -> u64 {
        let live = u64::from(self.pool.info(node).live);
        if level == 0 {
            self.leaves -= live;
            self.pool.retire(node, stamp, true);
        } else {
            self.detached.push(Detached { stamp, node, level });
        }
        live
    }

    /// Whether detached subtrees are still to be walked.
    #[must_use]
    pub fn has_detached(&self) -> bool {
        !self.detached.is_empty()
    }

    /// Whether nodes can be freed that readers can no longer reach.
    #[must_use]
    pub fn has_reclaimable(&self, grace: &Grace) -> bool {
        self.pool.has_reclaimable(grace)
    }

    /// Whether [`Tree::tidy`] has nothing to do.
    #[must_use]
    pub fn is_tidy(&self, grace: &Grace) -> bool {
        !self.has_detached() && !self.has_reclaimable(grace)
    }

    /// Frees nodes that readers can no longer reach, then puts detached subtrees away, as far as the slice goes.
    pub fn tidy(&mut self, view: TreeView<'_>, grace: &Grace, budget: &mut Budget) {
        self.pool.reclaim(grace, budget);
        while !budget.is_spent()
            && let Some(detached) = self.detached.pop()
        {
            self.put_children_away(view, grace, detached, budget);
            self.pool.put_away(detached.node, detached.stamp, grace);
        }
    }

    /// Puts the lowest-level children of a detached node away; those of upper levels are detached on their own now.
    fn put_children_away(&mut self, view: TreeView<'_>, grace: &Grace, detached: Detached, budget: &mut Budget) {
        let Detached { stamp, node, level } = detached;
        let mut left = self.pool.info(node).live;
        budget.spend(NODE_ENTRIES + NODE_WORDS);
        for index in 0..NODE_ENTRIES {
            if left == 0 {
                break;
            }
            let old = view.load(node, index);
            if !entry::is_present(old) {
                continue;
            }
            left -= 1;
            if entry::is_leaf(old) {
                self.leaves -= 1;
                continue;
            }
            let child = node_number(entry::child(old));
            budget.spend(NODE_WORDS);
            if level == 1 {
                self.leaves -= u64::from(self.pool.info(child).live);
                self.pool.put_away(child, stamp, grace);
            } else {
                self.detached.push(Detached { stamp, node: child, level: level - 1 });
            }
        }
    }
}
