//! One word of a node, and the root word.
//!
//! ```text
//!  63  62  61  60                       9 8       0
//! | R | W | L | target / 8                         |      a leaf: L is set
//! | 0 | 0 | 0 | child node number                  |      a link
//! | 0                                              |      nothing
//! ```
//!
//! Made so that a lookup has little to do. A link is the number of a node, as it is, and no other word is as small as
//! one. Nothing is the number of [`NOTHING`], a node that is always empty: who follows it finds nothing at the end. Who
//! asks whether a leaf may be read or written need not ask whether it is one: no other word has these bits.

use crate::access::Access;
use crate::iova::PAGE_MASK;

/// Nothing here.
pub const EMPTY: u64 = 0;
/// The node that an [`EMPTY`] entry would link to: no entry is ever put into it.
pub const NOTHING: u32 = 0;

/// Bits above a target.
const FLAG_BITS: u32 = 3;
const LEAF: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
const READ: u64 = 1 << 63;

/// A leaf: `target` is page aligned.
#[inline]
#[must_use]
pub const fn leaf(target: u64, access: Access) -> u64 {
    (target & !PAGE_MASK) >> FLAG_BITS | LEAF | access_bits(access)
}

/// A link to a child node, which is not [`NOTHING`].
#[inline]
#[must_use]
pub const fn link(node: u32) -> u64 {
    node as u64
}

/// Whether there is a leaf or a child.
#[inline]
#[must_use]
pub const fn is_present(entry: u64) -> bool {
    entry != EMPTY
}

/// Whether an entry is a leaf.
#[inline]
#[must_use]
pub const fn is_leaf(entry: u64) -> bool {
    entry & LEAF != 0
}

/// Node number of a link, [`NOTHING`] of an empty entry, and of a leaf a number that no table has a node for. So one
/// comparison with the number of nodes tells whether there is somewhere to go on.
#[inline]
#[must_use]
pub const fn child(entry: u64) -> usize {
    // Fits: the crate is for 64-bit targets only.
    #[allow(clippy::cast_possible_truncation)]
    {
        entry as usize
    }
}

/// Whether the entry is a leaf that allows `access`.
#[inline]
#[must_use]
pub const fn is_leaf_for(entry: u64, access: Access) -> bool {
    let wanted = if access.is_none() { LEAF } else { access_bits(access) };
    entry & wanted == wanted
}

/// Target of a leaf: arena offset of its first byte.
#[inline]
#[must_use]
pub const fn target(entry: u64) -> u64 {
    entry << FLAG_BITS & !PAGE_MASK
}

/// Permissions of a leaf.
#[inline]
#[must_use]
pub const fn access(entry: u64) -> Access {
    match (entry & READ != 0, entry & WRITE != 0) {
        (false, false) => Access::NONE,
        (true, false) => Access::READ,
        (false, true) => Access::WRITE,
        (true, true) => Access::READ_WRITE,
    }
}

/// A number for the entry, so that the leaves of a run of targets lie between those of its first and last one, whatever
/// they allow, and empty entries below all.
#[inline]
#[must_use]
pub const fn by_target(entry: u64) -> u64 {
    entry.rotate_left(FLAG_BITS)
}

#[inline]
const fn access_bits(access: Access) -> u64 {
    let read = if access.allows(Access::READ) { READ } else { 0 };
    let write = if access.allows(Access::WRITE) { WRITE } else { 0 };
    read | write
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
        for node in [1, 4711, u32::MAX] {
            assert_eq!(child(link(node)), node as usize);
            assert!(is_present(link(node)) && !is_leaf(link(node)));
        }
        assert_eq!(child(EMPTY), NOTHING as usize);
        for access in [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE] {
            for target in [0, 0x1000, 0x7fff_f000, !PAGE_MASK] {
                assert!(child(leaf(target, access)) > u32::MAX as usize, "{target:#x} {access:?}");
            }
        }
    }

    #[test]
    fn a_leaf_says_what_it_was_made_of() {
        for given in [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE] {
            for to in [0, 0x1000, 0x7fff_f000, !PAGE_MASK] {
                let made = leaf(to | 0x123, given);
                assert!(is_present(made) && is_leaf(made));
                assert_eq!((target(made), access(made)), (to, given));
                assert!(by_target(made) > by_target(EMPTY));
                assert!((by_target(leaf(to, Access::NONE))..=to | PAGE_MASK).contains(&by_target(made)));
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
