//! The radix tree of translations: an IOMMU page table in shared memory.
//!
//! # Shape
//!
//! Nodes of 512 words, 4 KiB each, nine address bits a level, above pages of 4 KiB. The root word holds the root's node
//! number and the tree's height, so a tree is only as high as its largest address needs: three levels reach 512 GiB.
//! Each word of a node is one [`entry`]: nothing, a child's node number, or a *leaf* with a target address and
//! permissions. A leaf on an upper level is a superpage and translates the whole range below it, as one run: an
//! identity map of a guest is a handful of words. Targets need only 4 KiB alignment, whatever the level, since they are
//! added to, not concatenated.
//!
//! # Why readers need no lock
//!
//! All a reader does is load: the root word, then one entry a level. Every change that a reader could notice is *one*
//! aligned 64-bit store:
//!
//! * a new leaf, or the end of one: a store to its entry;
//! * a subtree: it is built in nodes no reader can reach, then linked by one store to the parent's entry. Splitting a
//!   superpage is that: the 512 entries that say the same as the leaf, less what is taken away, then one store;
//! * the removal of a subtree: one store of 0 to the parent's entry;
//! * a higher tree: a new root whose entry 0 is the old root, then one store to the root word.
//!
//! So a reader sees the old state or the new one, each complete. Publishing stores are *release*, a reader's loads are
//! *acquire*: whoever sees a link sees what it links to.
//!
//! # Why a node can be used again
//!
//! A reader may have loaded the link to a node just before the link was removed, and may be reading the node now. A
//! node that was unlinked is therefore *retired* with the stamp of that moment and is reused only after a grace period
//! that began later ([`crate::epoch`]). Until then it keeps its content: a late reader finds the translation that was
//! valid when it pinned, which is what the daemon has promised not to acknowledge away from it yet.
//!
//! # Why no edit is long
//!
//! One thread of the daemon makes every edit and serves everybody else as well. So each call into the tree does a
//! bounded amount of work, however much the tree holds:
//!
//! * *By address.* What lies between the two edges of a range hangs below whole entries: at most two times 511 a level.
//!   One store takes each off with all below it. The same goes for a superpage that takes the place of a subtree.
//! * *What was taken off* has to be walked to find its nodes, and that may be long. But nobody waits for it: what makes
//!   a removal true for readers was the store. So roots of detached subtrees are written down with their stamps and
//!   walked later, a slice at a time. A node is free when it was walked and the grace period of its stamp has passed.
//!   An insert that finds too few free nodes walks first, as far as it needs.
//! * *By target* everything must be looked at. That goes in slices by itself, with an address as bookmark between them;
//!   it is done, and may be waited for by a grace period, after the last.
//! * *Eviction* looks at a window of the nodes and removes a bounded number.
//!
//! How much a slice is: [`SLICE_WORDS`].
//!
//! # What is promised about memory
//!
//! Removing never needs a node. When a superpage is to lose a part and no node is free to split it, the whole leaf
//! goes: this is a cache, and it may forget more than it was asked to, never less. Inserting needs at most three nodes
//! a level ([`Tree::nodes_needed`]), and asks for them beforehand.
//!
//! | file | |
//! | --- | --- |
//! | [`entry`] | what a word says |
//! | [`walk`] | the reader's lookup |
//! | [`near`] | nodes a reader comes back to |
//! | [`pool`] | free, used and retired nodes |
//! | [`edit`] | what the writer knows; insert, split |
//! | [`span`] | the entries of a node that a range touches |
//! | [`remove`] | remove by address |
//! | [`targets`] | remove by target, in slices |
//! | [`detached`] | subtrees that were taken off, and how they are put away |
//! | [`evict`] | make room |
//! | [`mod@slice`] | how much is done at a time |

pub mod detached;
pub mod edit;
pub mod entry;
pub mod evict;
pub mod near;
pub mod pool;
pub mod remove;
pub mod slice;
pub mod span;
pub mod targets;
#[cfg(all(test, not(loom)))]
pub(crate) mod testing;
pub mod walk;

pub use edit::{NeedsNodes, Tree, TreeView};
pub use near::NearNodes;
pub use slice::{Budget, SLICE_WORDS};
pub use targets::TargetRemoval;
pub use walk::{Leaf, lookup};

use crate::iova::PAGE_SHIFT;
use crate::layout::table::NODE_BITS;

/// Levels a tree of 64-bit addresses can have.
pub const HEIGHT_MAX: u32 = (u64::BITS - PAGE_SHIFT).div_ceil(NODE_BITS);

/// Address bits below an entry of `level` (0 = the lowest).
#[inline]
#[must_use]
pub const fn level_shift(level: u32) -> u32 {
    PAGE_SHIFT + NODE_BITS * level
}

/// Levels needed to reach `iova`.
#[must_use]
pub const fn height_for(iova: u64) -> u32 {
    let mut height = 1;
    while height < HEIGHT_MAX && iova >> level_shift(height) != 0 {
        height += 1;
    }
    height
}
