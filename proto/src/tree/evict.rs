//! Eviction: room for what is new, by removing what was not put in lately.

use super::edit::{Edit, Tree, TreeView, node_number};
use super::{HEIGHT_MAX, level_shift};
use crate::epoch::Stamp;
use crate::iova::IovaRange;

/// Inserts that eviction looks back on, unless that is more than half of the tree's nodes: a leaf that was asked for a
/// moment ago is about to be used.
const PROTECTED_INSERTS: u64 = 512;

/// Nodes that one call of eviction looks at, four times over at most: some 50 microseconds. More than those that
/// [`PROTECTED_INSERTS`] sparse inserts can have taken one after the other, so that others are among them.
const WINDOW: u32 = 16_384;

impl Tree {
    /// Removes nodes with all below them, in turn, until at least `wanted` nodes are retired or free. Those that were
    /// inserted into a moment ago go last; of the others, lowest-level ones go first. Looks at a window of nodes
    /// and then at the next: in a table that has no room, the first window holds enough.
    pub fn evict(&mut self, view: TreeView<'_>, stamp: Stamp, wanted: usize) -> Edit {
        let mut edit = Edit::default();
        let touched = node_number(self.pool.touched());
        let protected = PROTECTED_INSERTS.min(u64::from(touched) / 2);
        let window = touched.min(WINDOW);
        for _ in 0..touched.div_ceil(window.max(1)) {
            let before = self.evict_hand;
            // Upper nodes have their turn because a tree of superpages has no others.
            for (protect, upper) in [(true, false), (true, true), (false, false), (false, true)] {
                self.evict_hand = before;
                for _ in 0..window {
                    if self.pool.available() + self.pool.retired() + self.detached.len() >= wanted {
                        return edit;
                    }
                    self.evict_hand = (self.evict_hand + 1) % touched;
                    let info = *self.pool.info(self.evict_hand);
                    let recent = self.inserts.wrapping_sub(info.last_insert) < protected;
                    if !info.used || (info.level != 0) != upper || (protect && recent) {
                        continue;
                    }
                    let above = u32::from(info.level) + 1;
                    let span = if above < HEIGHT_MAX { (1 << level_shift(above)) - 1 } else { u64::MAX };
                    if let Some(range) = IovaRange::new(info.base, info.base | span) {
                        edit.unlinked += self.remove(view, stamp, range).unlinked;
                    }
                }
            }
        }
        edit
    }
}
