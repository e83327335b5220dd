//! Many translations at once: the words of all of them are asked for before the first is read.
//!
//! One lookup in a table that is not in the cache waits for its leaf's line. The processor works on as many lookups at
//! a time as its window of unfinished instructions holds, and on fewer when the caller does something with each result.
//! Here the lines are on their way together, whatever the caller does afterwards. Only the lowest level is prefetched:
//! the levels above have 512 times fewer words, which stay in the cache.

use iotlb_proto::sync::{AtomicU64, Ordering, prefetch};
use iotlb_proto::tree::entry;

use crate::Access;
use crate::guard::Guard;
use crate::segments::Segment;

/// Lines asked for at once: about as many as a core can wait for.
const GROUP: usize = 32;

impl Guard<'_> {
    /// Puts what [`Guard::translate_one`] yields for each `(iova, len)` into `out`, in order, and returns how many came
    /// out as one piece. For those that did not, [`Guard::translate`] tells pieces from faults. Goes on to the end of
    /// the shorter of the two.
    pub fn translate_burst<'g>(
        &'g self,
        requests: &[(u64, u64)],
        access: Access,
        out: &mut [Option<Segment<'g>>],
    ) -> usize {
        let mut whole = 0;
        for (requests, out) in requests.chunks(GROUP).zip(out.chunks_mut(GROUP)) {
            let mut words: [Option<&AtomicU64>; GROUP] = [None; GROUP];
            for (word, &(iova, _)) in words.iter_mut().zip(requests) {
                *word = self.page_word(iova);
                if let Some(word) = word {
                    prefetch(word);
                }
            }
            for ((out, &(iova, len)), word) in out.iter_mut().zip(requests).zip(words) {
                // Acquire pairs with the release in the writer's `edit`: the entry's memory map comes with it.
                let found = word.map(|word| word.load(Ordering::Acquire));
                *out = match found.filter(|leaf| entry::is_leaf_for(*leaf, access)) {
                    Some(leaf) => self.within_page(leaf, iova, len),
                    None => None,
                };
                *out = out.or_else(|| self.within_leaf(iova, len, access));
                whole += usize::from(out.is_some());
            }
        }
        self.reader().count_lookups(requests.len().min(out.len()) as u64);
        whole
    }
}
