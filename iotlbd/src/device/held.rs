//! Misses of a session without IOMMU that cannot be answered yet. While the map of guest memory changes nobody can
//! judge them. And a part of the map that was evicted, because the table is small, is published again for one of them
//! at a time: each evicts others, which whoever asked for it should have used by then.

use std::collections::BTreeMap;
use std::ops::Bound;

use iotlb_proto::iova::IovaRange;
use iotlb_proto::worker::MissRequest;

use super::WorkerId;

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) worker: WorkerId,
    pub(super) cell: u16,
    pub(super) request: MissRequest,
    /// What it asks for was published since. The answer is to look again, even if that is gone once more: else one that
    /// has no room with what belongs to it would be tried for ever.
    pub(super) published: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct HeldMisses {
    /// One a cell: a worker that posts again has dropped the earlier one.
    misses: BTreeMap<(WorkerId, u16), Held>,
    served_last: Option<(WorkerId, u16)>,
}

impl HeldMisses {
    pub(super) fn is_empty(&self) -> bool {
        self.misses.is_empty()
    }

    pub(super) fn insert(&mut self, held: Held) {
        self.misses.insert((held.worker, held.cell), held);
    }

    /// A worker is gone.
    pub(super) fn worker_gone(&mut self, worker: WorkerId) {
        self.misses.retain(|(holder, _), _| *holder != worker);
    }

    /// Takes all out, to be judged.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Held> + use<> {
        std::mem::take(&mut self.misses).into_values()
    }

    /// What is to be published next. All have their turn, however often somebody asks.
    pub(super) fn publish_next(&mut self) -> Option<IovaRange> {
        let after = self.served_last.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.misses.range((after, Bound::Unbounded)).next().map(|(key, _)| *key);
        let key = next.or_else(|| self.misses.keys().next().copied())?;
        let held = self.misses.get_mut(&key)?;
        self.served_last = Some(key);
        held.published = true;
        Some(held.request.range)
    }
}
