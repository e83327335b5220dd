//! Which thread runs on which processor: the same for ours and for the peer.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Two processors, if there are two.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// For whoever asks: front-end or worker.
    pub asker: Option<usize>,
    /// For whoever answers: the daemon, or its peer.
    pub answerer: Option<usize>,
}

impl Place {
    /// The first two processors of this process; on a single one everything stays where it is.
    #[must_use]
    pub fn find() -> Place {
        let set = current();
        let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
        match (allowed.next(), allowed.next()) {
            (Some(first), Some(second)) => Place { asker: Some(first), answerer: Some(second) },
            _ => Place { asker: None, answerer: None },
        }
    }
}

/// Where the calling thread may run.
#[must_use]
pub fn current() -> CpuSet {
    sched_getaffinity(None).unwrap_or_default()
}

/// Lets the calling thread run there again.
pub fn restore(set: &CpuSet) {
    // An Err costs steadiness, nothing else; here and below.
    let _ = sched_setaffinity(None, set);
}

/// Binds the calling thread.
pub fn bind(cpu: Option<usize>) {
    if let Some(cpu) = cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        restore(&set);
    }
}
