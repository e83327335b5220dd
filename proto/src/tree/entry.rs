//! One word of a node, and the root word.
//!
//! ```text
//! 63                               12 11      4  3  2  1  0
//! | target page, or child node number | 0       |W |R |L |P |      P present, L leaf
//! ```

use crate::access::Access;
use crate::iova::{PAGE_MASK, PAGE_SHIFT};

/// Nothing here.
pub const EMPTY: u64 = 0;
const PRESENT: u64 = 1;
const LEAF: u64 = 2;
const ACCESS_SHIFT: u32 = 2;

/// A leaf: `target` is page aligned.
#[inline]
#[must_use]
pub const fn leaf(target: u64, access: Access) -> u64 {
    target & !PAGE_MASK | (access.bits() as u64) << ACCESS_SHIFT | LEAF | PRESENT
}

/// A link to a child node.
#[inline]
#[must_use]
pub const fn link(node: u32) -> u64 {
    (node as u64) << PAGE_SHIFT | PRESENT
}

/// Whether there is a leaf or a child.
#[inline]
#[must_use]
pub const fn is_present(entry: u64) -> bool {
    entry & PRESENT != 0
}

/// Whether a present entry is a leaf.
#[inline]
#[must_use]
pub const fn is_leaf(entry: u64) -> bool {
    entry & LEAF != 0
}

/// Node number of a link.
#[inline]
#[must_use]
pub const fn child(entry: u64) -> usize {
    // 52 bits fit a usize: the crate is for 64-bit targets only.
    #[allow(clippy::cast_possible_truncation)]
    {
        (entry >> PAGE_SHIFT) as usize
    }
}

/// Node number of a link; for everything else a number that no table has a node for. So one comparison with the number
/// of nodes tells whether there is a link and whether it can be followed.
#[inline]
#[must_use]
pub const fn child_if_link(entry: u64) -> usize {
    // The flags of a link are PRESENT alone, so none are left; any others become bits above 51 here.
    #[allow(clippy::cast_possible_truncation)]
    {
        entry.wrapping_sub(PRESENT).rotate_right(PAGE_SHIFT) as usize
    }
}

/// Whether the entry is a leaf that allows `access`.
#[inline]
#[must_use]
pub const fn is_leaf_for(entry: u64, access: Access) -> bool {
    let wanted = leaf(0, access);
    entry & wanted == wanted
}

/// Target of a leaf: arena offset of its first byte.
#[inline]
#[must_use]
pub const fn target(entry: u64) -> u64 {
    entry & !PAGE_MASK
}

/// Permissions of a leaf.
#[inline]
#[must_use]
pub const fn access(entry: u64) -> Access {
    match (entry >> ACCESS_SHIFT) & 3 {
        0 => Access::NONE,
        1 => Access::READ,
        2 => Access::WRITE,
        _ => Access::READ_WRITE,
    }
}

/// The root word of a tree with `height` levels, at least one.
#[must_use]
pub const fn root(node: u32, height: u32) -> u64 {
    (node as u64) << 8 | height as u64
}

/// Node number of a root word.
#[inline]
#[must_use]
pub const fn root_node(root: u64) -> usize {
    // 56 bits fit a usize.
    #[allow(clippy::cast_possible_truncation)]
    {
        (root >> 8) as usize
    }
}

/// Node number of a root word of that height, at most 255; for every other one a number that no table has a node for.
/// The twin of [`child_if_link`].
#[inline]
#[must_use]
pub const fn root_node_if(root: u64, height: u32) -> usize {
    // What is left of the height becomes bits above 55 here: none, when it is that height.
    #[allow(clippy::cast_possible_truncation)]
    {
        (root ^ height as u64).rotate_right(8) as usize
    }
}

/// Height in a root word; 0: the tree is empty.
#[inline]
#[must_use]
pub const fn root_height(root: u64) -> u32 {
    (root & 0xff) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_link_has_a_node_number() {
        for node in [0, 1, 4711, u32::MAX] {
            assert_eq!(child_if_link(link(node)), child(link(node)));
            for flags in (0..=PAGE_MASK).filter(|flags| *flags != PRESENT) {
                assert!(child_if_link(u64::from(node) << PAGE_SHIFT | flags) > u32::MAX as usize, "{node} {flags:#x}");
            }
        }
    }

    #[test]
    fn only_a_root_of_that_height_has_a_node_number() {
        for node in [0, 1, 4711, u32::MAX] {
            for height in 1..=6 {
                assert_eq!(root_node_if(root(node, height), height), root_node(root(node, height)));
                for other in (0..=255).filter(|other| *other != height) {
                    assert!(root_node_if(root(node, other), height) > u32::MAX as usize, "{node} {other} {height}");
                }
            }
        }
    }

    #[test]
    fn a_leaf_serves_what_it_allows() {
        let all = [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE];
        for (given, wanted) in all.into_iter().flat_map(|given| all.map(|wanted| (given, wanted))) {
            assert_eq!(is_leaf_for(leaf(0xffff_f000, given), wanted), given.allows(wanted));
            assert!(!is_leaf_for(link(7), wanted) && !is_leaf_for(EMPTY, wanted));
        }
    }
}
