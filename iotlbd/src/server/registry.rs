//! The workers of a device.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use super::config::StallPolicy;
use super::stall::Step;
use super::worker::Worker;
use crate::device::WorkerId;

/// All workers whose slots count.
#[derive(Debug)]
pub(crate) struct Registry {
    workers: BTreeMap<u32, Worker>,
    next_id: u32,
    capacity: usize,
    random: RandomState,
    incarnations: u64,
}

impl Registry {
    pub(crate) fn new(capacity: usize) -> Registry {
        Registry { workers: BTreeMap::new(), next_id: 0, capacity, random: RandomState::new(), incarnations: 0 }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.workers.len() >= self.capacity
    }

    pub(crate) fn len(&self) -> usize {
        self.workers.len()
    }

    /// A name no worker has. Numbers come again after 2^32 workers only, long after all that spoke of the old one is
    /// done.
    pub(crate) fn next_id(&mut self) -> WorkerId {
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.wrapping_add(1);
            if !self.workers.contains_key(&id) {
                return WorkerId(id);
            }
        }
    }

    /// 64 bits nobody can guess: a keyed hash of a counter, with a key from the operating system.
    pub(crate) fn next_incarnation(&mut self) -> u64 {
        self.incarnations = self.incarnations.wrapping_add(1);
        self.random.hash_one(self.incarnations)
    }

    /// From here on its slots count.
    pub(crate) fn insert(&mut self, worker: Worker) {
        self.workers.insert(worker.id.0, worker);
    }

    pub(crate) fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&id.0)
    }

    /// From here on its slots do not count any more.
    pub(crate) fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        self.workers.remove(&id.0)
    }

    pub(crate) fn ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().map(WorkerId).collect()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.workers.values_mut()
    }

    /// Whether every slot of every worker has let the grace period `target` pass.
    pub(crate) fn is_drained(&mut self, target: u64) -> bool {
        let mut all = true;
        for worker in self.workers.values_mut() {
            // Also behind one that is pinned: that this one was free must not stay unseen.
            all &= worker.lets_pass(target);
        }
        all
    }

    /// While the grace period `target` is held back: the steps that are due, and how long they were waited for in ms.
    pub(crate) fn stalled(&mut self, target: u64, now_ns: u64, policy: &StallPolicy) -> Vec<(WorkerId, Step, u64)> {
        let mut steps = Vec::new();
        for worker in self.workers.values_mut() {
            if worker.lets_pass(target) {
                worker.stall.over();
                continue;
            }
            while let Some((step, held_ms)) = worker.stall.held(now_ns, policy) {
                steps.push((worker.id, step, held_ms));
            }
        }
        steps
    }

    /// No grace period is held back any more. Returns the reported ones that let go.
    pub(crate) fn drained(&mut self) -> Vec<WorkerId> {
        self.workers.values_mut().filter_map(|worker| worker.stall.over().then_some(worker.id)).collect()
    }

    /// When [`Registry::stalled`] has something to say next.
    pub(crate) fn stall_deadline_ns(&self, policy: &StallPolicy) -> Option<u64> {
        self.workers.values().filter_map(|worker| worker.stall.deadline_ns(policy)).min()
    }
}
