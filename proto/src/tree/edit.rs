//! The writer's side of the tree: what it knows, and insertion. The [module](super) says why it is safe.

use super::detached::Detached;
use super::pool::Pool;
use super::span::Span;
use super::walk::index;
use super::{HEIGHT_MAX, entry, height_for, level_shift};
use crate::access::Access;
use crate::epoch::Stamp;
use crate::iova::{IovaRange, PAGE_MASK, PAGE_SHIFT};
use crate::layout::table::{NODE_ENTRIES, Node};
use crate::sync::{AtomicU64, Ordering};
use crate::table::Translation;

/// Where the tree's shared words are.
#[derive(Clone, Copy, Debug)]
pub struct TreeView<'m> {
    /// The root word.
    pub root: &'m AtomicU64,
    /// All nodes.
    pub nodes: &'m [Node],
}

impl TreeView<'_> {
    pub(super) fn load(&self, node: u32, index: usize) -> u64 {
        // Relaxed: only this writer stores.
        self.nodes[node as usize].entries[index].load(Ordering::Relaxed)
    }

    pub(super) fn store(&self, node: u32, index: usize, entry: u64) {
        // Release pairs with the acquire in `walk::lookup`: what the entry links to is complete.
        self.nodes[node as usize].entries[index].store(entry, Ordering::Release);
    }
}

/// Too few free nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsNodes;

/// What an edit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Leaves taken away or replaced, a whole subtree counted by the entries of its topmost node. More than 0: a grace
    /// period is due.
    pub unlinked: u64,
}

/// The writer's knowledge of a tree.
#[derive(Debug)]
pub struct Tree {
    pub(super) pool: Pool,
    pub(super) leaves: u64,
    pub(super) inserts: u64,
    pub(super) evict_hand: u32,
    /// Subtrees that were taken off and are still to be put away.
    pub(super) detached: Vec<Detached>,
}

impl Tree {
    /// A tree without entries over `nodes` nodes, all zero.
    #[must_use]
    pub fn new(nodes: u32) -> Tree {
        Tree { pool: Pool::new(nodes), leaves: 0, inserts: 0, evict_hand: 0, detached: Vec::new() }
    }

    /// Leaves in the tree, and in what was taken off and is not put away yet.
    #[must_use]
    pub fn leaves(&self) -> u64 {
        self.leaves
    }

    /// Nodes free, waiting for a grace period, and in all.
    #[must_use]
    pub fn nodes(&self) -> (usize, usize, usize) {
        (self.pool.available(), self.pool.retired(), self.pool.total())
    }

    /// Nodes that inserting anything up to `last` can take: a path or a split at each of the two edges of the range,
    /// and the levels the tree grows by. A path is as long as the tree is high, however low `last` is. `cuts` counts
    /// the pages that are removed before the insert: each may split a superpage.
    #[must_use]
    pub fn nodes_needed(&self, view: TreeView<'_>, last: u64, cuts: usize) -> usize {
        let height = entry::root_height(view.root.load(Ordering::Relaxed)).max(height_for(last));
        (3 + cuts) * height as usize
    }

    /// Maps the pages `range` (whole pages) to `target` and the addresses that follow it, replacing what was there.
    /// `stamp` is the present epoch's.
    ///
    /// # Errors
    /// Fewer nodes are free than [`Tree::nodes_needed`]; nothing was changed.
    pub fn insert(
        &mut self,
        view: TreeView<'_>,
        stamp: Stamp,
        range: IovaRange,
        target: u64,
        access: Access,
    ) -> Result<Edit, NeedsNodes> {
        if self.pool.available() < self.nodes_needed(view, range.last(), 0) {
            return Err(NeedsNodes);
        }
        self.inserts += 1;
        let (root, height) = self.grow(view, range.last())?;
        let mut edit = Edit::default();
        let leaf = Span { range, target, access };
        self.insert_below(view, stamp, &mut edit, root, height - 1, leaf)?;
        Ok(edit)
    }

    /// As [`Tree::insert`] of the one page `range`, when a node of the lowest level is there for it: the usual case, in
    /// one walk. `None`: not so, nothing was changed.
    pub fn insert_page(&mut self, view: TreeView<'_>, range: IovaRange, target: u64, access: Access) -> Option<Edit> {
        if range.len_minus_one() != PAGE_MASK {
            return None;
        }
        let new = entry::leaf(target, access);
        let (path, index) = self.path_to_lowest(view, range.first())?;
        let node = path[0];
        let old = view.load(node, index);
        let mut edit = Edit::default();
        if old == new {
            return Some(edit);
        }
        self.inserts += 1;
        let height = entry::root_height(view.root.load(Ordering::Relaxed)) as usize;
        for &node in path.iter().take(height) {
            self.pool.info_mut(node).last_insert = self.inserts;
        }
        view.store(node, index, new);
        if !entry::is_present(old) {
            self.pool.info_mut(node).live += 1;
            self.leaves += 1;
        } else if entry::target(old) != entry::target(new) || !access.allows(entry::access(old)) {
            edit.unlinked = 1;
        }
        Some(edit)
    }

    /// The nodes around `iova` by level, as many as the tree is high, and the position in the lowest. `None`: not all
    /// are there.
    fn path_to_lowest(&self, view: TreeView<'_>, iova: u64) -> Option<([u32; HEIGHT_MAX as usize], usize)> {
        let root = view.root.load(Ordering::Relaxed);
        let mut level = entry::root_height(root);
        if level == 0 || height_for(iova) > level {
            return None;
        }
        let mut path = [0; HEIGHT_MAX as usize];
        let mut node = node_number(entry::root_node(root));
        loop {
            level -= 1;
            path[level as usize] = node;
            let index = index(iova, level_shift(level));
            if level == 0 {
                return Some((path, index));
            }
            let found = view.load(node, index);
            if !entry::is_present(found) || entry::is_leaf(found) {
                return None;
            }
            node = node_number(entry::child(found));
        }
    }

    /// Calls `each` for every leaf in order of address.
    pub fn for_each(&self, view: TreeView<'_>, mut each: impl FnMut(Translation)) {
        let root = view.root.load(Ordering::Relaxed);
        let height = entry::root_height(root);
        if height != 0 {
            visit(view, node_number(entry::root_node(root)), height - 1, 0, &mut each);
        }
    }

    /// Makes the tree high enough for `last`; returns root node and height.
    fn grow(&mut self, view: TreeView<'_>, last: u64) -> Result<(u32, u32), NeedsNodes> {
        let wanted = height_for(last);
        let root = view.root.load(Ordering::Relaxed);
        let mut height = entry::root_height(root);
        if height == 0 {
            let node = self.pool.allocate(view.nodes, wanted - 1, 0).ok_or(NeedsNodes)?;
            view.root.store(entry::root(node, wanted), Ordering::Release);
            return Ok((node, wanted));
        }
        let mut node = node_number(entry::root_node(root));
        while height < wanted {
            let above = self.pool.allocate(view.nodes, height, 0).ok_or(NeedsNodes)?;
            view.store(above, 0, entry::link(node));
            self.pool.info_mut(above).live = 1;
            node = above;
            height += 1;
            // Release pairs with the acquire load of the root word: the old tree hangs below the new root already.
            view.root.store(entry::root(node, height), Ordering::Release);
        }
        Ok((node, height))
    }

    fn insert_below(
        &mut self,
        view: TreeView<'_>,
        stamp: Stamp,
        edit: &mut Edit,
        node: u32,
        level: u32,
        span: Span,
    ) -> Result<(), NeedsNodes> {
        self.pool.info_mut(node).last_insert = self.inserts;
        for (slot, part) in span.slots(level) {
            let old = view.load(node, slot.index);
            if part.range == slot.range {
                let new = entry::leaf(part.target, part.access);
                if old == new {
                    continue;
                }
                view.store(node, slot.index, new);
                if !entry::is_present(old) {
                    self.pool.info_mut(node).live += 1;
                    self.leaves += 1;
                } else if !entry::is_leaf(old) {
                    edit.unlinked += self.detach(stamp, node_number(entry::child(old)), level - 1);
                    self.leaves += 1;
                } else if entry::target(old) != part.target || !part.access.allows(entry::access(old)) {
                    edit.unlinked += 1;
                }
                continue;
            }
            if entry::is_present(old) && !entry::is_leaf(old) {
                self.insert_below(view, stamp, edit, node_number(entry::child(old)), level - 1, part)?;
                continue;
            }
            let split = entry::is_present(old);
            let inside = part.range.first() - slot.range.first();
            if split && entry::target(old).wrapping_add(inside) == part.target && entry::access(old) == part.access {
                continue;
            }
            let child = self.pool.allocate(view.nodes, level - 1, slot.range.first()).ok_or(NeedsNodes)?;
            if split {
                self.fill(view, child, level - 1, old);
            } else {
                self.pool.info_mut(node).live += 1;
            }
            // Nobody can reach the child yet, so what is replaced in it counts once, for the leaf it stands for.
            let mut within = Edit::default();
            self.insert_below(view, stamp, &mut within, child, level - 1, part)?;
            edit.unlinked += u64::from(split);
            view.store(node, slot.index, entry::link(child));
        }
        Ok(())
    }

    /// Fills a private node with leaves that say the same as `leaf`, one level up.
    pub(super) fn fill(&mut self, view: TreeView<'_>, node: u32, level: u32, leaf: u64) {
        let step = 1_u64 << level_shift(level);
        let mut target = entry::target(leaf);
        for index in 0..NODE_ENTRIES {
            view.store(node, index, entry::leaf(target, entry::access(leaf)));
            target = target.wrapping_add(step);
        }
        // 512, or 2 in models.
        self.pool.info_mut(node).live = u16::try_from(NODE_ENTRIES).unwrap_or(u16::MAX);
        self.leaves += NODE_ENTRIES as u64 - 1;
    }
}

fn visit(view: TreeView<'_>, node: u32, level: u32, base: u64, each: &mut impl FnMut(Translation)) {
    let shift = level_shift(level);
    for (index, address) in (0..NODE_ENTRIES).zip(0_u64..) {
        let found = view.load(node, index);
        if !entry::is_present(found) {
            continue;
        }
        let first = base | address << shift;
        if entry::is_leaf(found) {
            let last = first | ((1_u64 << shift) - 1);
            each(Translation { first, last, target: entry::target(found), access: entry::access(found) });
        } else if level > 0 {
            visit(view, node_number(entry::child(found)), level - 1, first, each);
        }
    }
}

/// Node numbers in the writer's own links are its pool's, which counts in `u32`.
pub(super) fn node_number(node: usize) -> u32 {
    debug_assert!(u32::try_from(node).is_ok());
    u32::try_from(node).unwrap_or(u32::MAX)
}

const _: () = assert!(PAGE_SHIFT == 12);
