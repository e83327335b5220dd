//! How much of a long edit is done at a time.

use crate::layout::table::NODE_ENTRIES;

/// Words of the table that one slice of a long edit looks at: 256 KiB, some 30 microseconds from memory, and 100 on a
/// machine that has a bad day. Everything else that the event loop serves waits that long; coming round again costs it
/// a microsecond or two, so smaller slices would begin to cost more than they are for.
pub const SLICE_WORDS: usize = 1 << 15;

/// What putting one node away counts for. It takes a few cold lines of the writer's own memory, which is as much time
/// as that many words in a row.
pub(super) const NODE_WORDS: usize = 32;

/// What a slice may still do. Looked at before each step and not inside one, so that every slice gets somewhere; the
/// longest step is a node whose children are all put away.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    left: usize,
}

impl Budget {
    /// A slice of `words`.
    #[must_use]
    pub fn new(words: usize) -> Budget {
        Budget { left: words.max(1) }
    }

    /// Whether the slice is over.
    pub(super) fn is_spent(self) -> bool {
        self.left == 0
    }

    pub(super) fn spend(&mut self, words: usize) {
        self.left = self.left.saturating_sub(words);
    }
}

// A slice of the usual size can put away all children of a node and more.
const _: () = assert!(SLICE_WORDS > NODE_ENTRIES * NODE_WORDS);
