//! Which nodes are free, used and retired. All of it is the writer's private memory.

use std::collections::VecDeque;

use super::entry::NOTHING;
use super::slice::Budget;
use crate::epoch::{Grace, Stamp};
use crate::layout::table::Node;
use crate::sync::Ordering;

/// The first node that is used, after [`NOTHING`].
const FIRST_NODE: usize = NOTHING as usize + 1;

/// What freeing one node counts for in a slice: a number moves from one list to another.
const RECLAIM_WORDS: usize = 4;

/// What the writer knows of one node.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NodeInfo {
    /// First address the node covers.
    pub(super) base: u64,
    /// Value of the insert counter when an entry was last put in; eviction spares recent ones.
    pub(super) last_insert: u64,
    /// Entries that are present.
    pub(super) live: u16,
    /// Level, 0 = the lowest.
    pub(super) level: u8,
    /// Reachable, or being built.
    pub(super) used: bool,
    /// Holds old entries that must be cleared before it is used again.
    pub(super) dirty: bool,
}

/// The nodes of a table.
#[derive(Debug)]
pub(super) struct Pool {
    /// Nodes `0..infos.len()` were used at least once, but for [`NOTHING`], which never is; the others are untouched
    /// zeros, and cost no memory yet.
    infos: Vec<NodeInfo>,
    /// [`NOTHING`] counted.
    total: u32,
    /// Last in, first out: what was used last is warm.
    free: Vec<u32>,
    /// In the order they came, which is that of their stamps but for what was detached earlier and put away late.
    retired: VecDeque<(Stamp, u32)>,
}

impl Pool {
    pub(super) fn new(total: u32) -> Pool {
        Pool { infos: vec![NodeInfo::default(); FIRST_NODE], total, free: Vec::new(), retired: VecDeque::new() }
    }

    /// Nodes that can be used at all.
    pub(super) fn total(&self) -> usize {
        (self.total as usize).saturating_sub(FIRST_NODE)
    }

    /// Nodes that can be allocated now.
    pub(super) fn available(&self) -> usize {
        self.free.len() + (self.total as usize).saturating_sub(self.infos.len())
    }

    pub(super) fn retired(&self) -> usize {
        self.retired.len()
    }

    /// Nodes with smaller numbers were used at least once.
    pub(super) fn touched(&self) -> usize {
        self.infos.len()
    }

    pub(super) fn info(&self, node: u32) -> &NodeInfo {
        &self.infos[node as usize]
    }

    pub(super) fn info_mut(&mut self, node: u32) -> &mut NodeInfo {
        &mut self.infos[node as usize]
    }

    /// An empty node that no reader can reach.
    pub(super) fn allocate(&mut self, nodes: &[Node], level: u32, base: u64) -> Option<u32> {
        let node = match self.free.pop() {
            Some(node) => node,
            None if self.infos.len() < self.total as usize => {
                let node = u32::try_from(self.infos.len()).ok()?;
                self.infos.push(NodeInfo::default());
                node
            }
            None => return None,
        };
        let info = &mut self.infos[node as usize];
        if info.dirty {
            for entry in &nodes[node as usize].entries {
                // Relaxed: the link that publishes the node is a release store.
                entry.store(0, Ordering::Relaxed);
            }
        }
        // At most HEIGHT_MAX, below 256.
        let level = u8::try_from(level).unwrap_or(u8::MAX);
        *info = NodeInfo { base, level, used: true, ..NodeInfo::default() };
        Some(node)
    }

    /// A node that was reachable until now. `dirty`: entries were left in it.
    pub(super) fn retire(&mut self, node: u32, stamp: Stamp, dirty: bool) {
        let info = &mut self.infos[node as usize];
        info.used = false;
        info.dirty = dirty;
        self.retired.push_back((stamp, node));
    }

    /// A node that was reachable until `stamp`, some time ago. Entries were left in it.
    pub(super) fn put_away(&mut self, node: u32, stamp: Stamp, grace: &Grace) {
        if grace.has_passed(stamp) {
            let info = &mut self.infos[node as usize];
            info.used = false;
            info.dirty = true;
            self.free.push(node);
        } else {
            self.retire(node, stamp, true);
        }
    }

    /// Whether [`Pool::reclaim`] would free something.
    pub(super) fn has_reclaimable(&self, grace: &Grace) -> bool {
        self.retired.front().is_some_and(|&(stamp, _)| grace.has_passed(stamp))
    }

    /// Frees what readers can no longer reach.
    pub(super) fn reclaim(&mut self, grace: &Grace, budget: &mut Budget) {
        while !budget.is_spent() && self.has_reclaimable(grace) {
            if let Some((_, node)) = self.retired.pop_front() {
                self.free.push(node);
            }
            budget.spend(RECLAIM_WORDS);
        }
    }
}
