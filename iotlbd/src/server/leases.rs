//! Which worker owns which queue.

use crate::device::WorkerId;

/// One queue's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Whose the queue is.
    pub(crate) owner: WorkerId,
    /// The owner's number of the claim that it came of.
    pub(crate) claim: u64,
}

/// The queues of a device and their owners. First come, first served; a queue is free again when its owner gives it
/// back or is gone.
#[derive(Debug)]
pub(crate) struct Leases {
    leases: Vec<Option<Lease>>,
}

/// Why a queue is not leased.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LeaseError {
    /// The device has no such queue.
    #[error("the device has {queues} queues, there is no queue {queue}")]
    NoSuchQueue {
        /// Asked for.
        queue: u16,
        /// How many there are.
        queues: usize,
    },
    /// It is another worker's.
    #[error("queue {queue} belongs to worker {}", .owner.0)]
    Taken {
        /// Asked for.
        queue: u16,
        /// Whose it is.
        owner: WorkerId,
    },
}

impl Leases {
    pub(crate) fn new(queues: u16) -> Leases {
        Leases { leases: vec![None; usize::from(queues)] }
    }

    /// Gives `queue` to `worker`. If the worker has it already, the new claim takes the place of the former one.
    pub(crate) fn claim(&mut self, queue: u16, worker: WorkerId, claim: u64) -> Result<(), LeaseError> {
        let queues = self.leases.len();
        let lease = self.leases.get_mut(usize::from(queue)).ok_or(LeaseError::NoSuchQueue { queue, queues })?;
        match *lease {
            Some(Lease { owner, .. }) if owner != worker => Err(LeaseError::Taken { queue, owner }),
            _ => {
                *lease = Some(Lease { owner: worker, claim });
                Ok(())
            }
        }
    }

    /// Takes `queue` back from `worker`, if it has it under `claim`: the release of a former lease ends no later one.
    /// Returns whether it did.
    pub(crate) fn release(&mut self, queue: u16, worker: WorkerId, claim: u64) -> bool {
        match self.leases.get_mut(usize::from(queue)) {
            Some(lease) if *lease == Some(Lease { owner: worker, claim }) => {
                *lease = None;
                true
            }
            _ => false,
        }
    }

    /// Takes everything back from `worker`; returns what it was.
    pub(crate) fn release_all(&mut self, worker: WorkerId) -> Vec<u16> {
        let mut queues = Vec::new();
        for (queue, lease) in (0_u16..).zip(self.leases.iter_mut()) {
            if lease.is_some_and(|lease| lease.owner == worker) {
                *lease = None;
                queues.push(queue);
            }
        }
        queues
    }

    /// The queues of `worker`.
    pub(crate) fn owned(&self, worker: WorkerId) -> impl Iterator<Item = u16> {
        (0_u16..)
            .zip(&self.leases)
            .filter(move |(_, lease)| lease.is_some_and(|lease| lease.owner == worker))
            .map(|(queue, _)| queue)
    }

    /// The lease of `queue`, if it is leased.
    pub(crate) fn get(&self, queue: u16) -> Option<Lease> {
        self.leases.get(usize::from(queue)).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);

    #[test]
    fn first_come_first_served() {
        let mut leases = Leases::new(2);
        assert_eq!(leases.claim(0, A, 1), Ok(()));
        assert_eq!(leases.claim(0, B, 1), Err(LeaseError::Taken { queue: 0, owner: A }));
        assert_eq!(leases.claim(1, B, 9), Ok(()));
        assert_eq!(leases.claim(2, B, 1), Err(LeaseError::NoSuchQueue { queue: 2, queues: 2 }));
        assert_eq!(leases.get(0), Some(Lease { owner: A, claim: 1 }));
        assert_eq!(leases.get(1), Some(Lease { owner: B, claim: 9 }));
        assert_eq!(leases.get(9), None);
    }

    #[test]
    fn released_queues_can_be_claimed() {
        let mut leases = Leases::new(3);
        for queue in 0..3 {
            leases.claim(queue, A, 1).expect("free");
        }
        assert!(!leases.release(0, B, 1), "not its own");
        assert!(!leases.release(9, A, 1), "there is none");
        assert!(leases.release(0, A, 1));
        assert!(!leases.release(0, A, 1));
        assert_eq!(leases.claim(0, B, 1), Ok(()));
        assert_eq!(leases.release_all(A), [1, 2]);
        assert!(leases.release_all(A).is_empty());
        assert_eq!(leases.claim(2, B, 2), Ok(()));
    }

    #[test]
    fn a_release_ends_the_lease_that_it_names_only() {
        let mut leases = Leases::new(1);
        leases.claim(0, A, 1).expect("free");
        assert_eq!(leases.claim(0, A, 2), Ok(()), "again is no error");
        assert!(!leases.release(0, A, 1), "it has it under the other claim");
        assert_eq!(leases.get(0), Some(Lease { owner: A, claim: 2 }));
        assert!(leases.release(0, A, 2));
        assert_eq!(leases.get(0), None);
    }
}
