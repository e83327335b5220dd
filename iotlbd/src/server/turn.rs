//! How much of the loop's time connections on the control socket may take.
//!
//! A packet that is sent or taken wakes up all that watch the other end, and a worker can have millions of epoll
//! entries watch its own: then a call into the kernel takes as long as thousands of others do. Nothing tells the daemon
//! beforehand, and nothing ends a call. So it is what a connection took that counts: past a slice it rests for a
//! multiple of that, and the loop is everybody else's.
//!
//! The time is that of the processor. A call during which others ran, on a machine with more to do than it can, took no
//! longer than any: it must not cost an honest worker anything. For the same reason nothing worse comes of it than a
//! rest: what takes long is served, slowly, and a connection that was closed would leave its queues without a worker.
//!
//! Connections that have not said HELLO yet have one account together, and a sixteenth of the time. What a connection
//! that ends still had to rest is put down to it as well: else whoever comes again would begin anew each time.
//!
//! Once in its life a connection begins anew before its time: when its worker is ordered to give up guest memory.

use rustix::time::{ClockId, clock_gettime};

use super::alarm::now_ns;

/// What a connection may take in one go: some hundred calls.
pub(super) const SLICE_NS: u64 = 1_000_000;
/// All connections of workers together have one part in so many of the loop's time, when each takes all it can.
const SHARE: u64 = 16;

/// One connection's account.
#[derive(Debug, Default)]
pub(super) struct Turn {
    spent_ns: u64,
    /// When all is forgotten. Past a slice: when the rest is over, which begins with the end of the call that went too
    /// far, whenever somebody asks.
    until_ns: u64,
    /// How many shared the loop when it was asked last.
    connections: usize,
}

impl Turn {
    /// When it is the connection's turn, one of `connections`; `None`: it is.
    pub(super) fn comes_ns(&mut self, now_ns: u64, connections: usize) -> Option<u64> {
        self.connections = connections;
        if now_ns >= self.until_ns {
            *self = Turn { spent_ns: 0, until_ns: now_ns.saturating_add(rest_ns(SLICE_NS, connections)), connections };
        }
        (self.spent_ns > SLICE_NS).then_some(self.until_ns)
    }

    /// Does what the connection needs, on its account.
    pub(super) fn spend<T>(&mut self, call: impl FnOnce() -> T) -> T {
        let before_ns = processor_ns();
        let result = call();
        self.charge(processor_ns().saturating_sub(before_ns), now_ns);
        result
    }

    /// Rests for a connection that is over and has not rested yet.
    pub(super) fn take_over(&mut self, other: &Turn, now_ns: u64) {
        if other.spent_ns > SLICE_NS && now_ns < other.until_ns {
            // An account that ran out would be forgotten with what is added.
            let connections = self.connections;
            self.comes_ns(now_ns, connections);
            self.charge(other.spent_ns, || now_ns);
        }
    }

    fn charge(&mut self, ns: u64, now_ns: impl FnOnce() -> u64) {
        self.spent_ns = self.spent_ns.saturating_add(ns);
        if self.spent_ns > SLICE_NS {
            self.until_ns = now_ns().saturating_add(rest_ns(self.spent_ns, self.connections));
        }
    }

    /// From here on it is not its turn any more.
    #[cfg(test)]
    pub(super) fn tire(&mut self) {
        self.charge(u64::MAX, || 0);
    }
}

fn rest_ns(spent_ns: u64, connections: usize) -> u64 {
    let connections = u64::try_from(connections.max(1)).unwrap_or(u64::MAX);
    spent_ns.saturating_mul(SHARE).saturating_mul(connections)
}

/// What this thread has run, in nanoseconds.
fn processor_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Never negative.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_followed_by_a_rest() {
        let mut turn = Turn::default();
        assert_eq!(turn.comes_ns(1000, 2), None);
        turn.charge(SLICE_NS + 1, || 5000);
        let comes_ns = turn.comes_ns(6000, 2).expect("a rest");
        assert_eq!(comes_ns, 5000 + 2 * SHARE * (SLICE_NS + 1));
        assert_eq!(turn.comes_ns(comes_ns - 1, 2), Some(comes_ns), "to ask again is no reason for more");
        assert_eq!(turn.comes_ns(comes_ns, 2), None);
        turn.charge(4 * SLICE_NS, || comes_ns);
        let longer_ns = turn.comes_ns(comes_ns, 2).expect("a rest") - comes_ns;
        assert_eq!(longer_ns, 8 * SHARE * SLICE_NS, "as long as it took, and more");
    }

    #[test]
    fn a_call_that_takes_longer_than_the_account_lasts_is_not_forgotten() {
        let mut turn = Turn::default();
        assert_eq!(turn.comes_ns(0, 1), None);
        let took_ns = rest_ns(SLICE_NS, 1) * 10;
        turn.charge(took_ns, || took_ns);
        assert_eq!(turn.comes_ns(took_ns, 1), Some(took_ns + SHARE * took_ns));
    }

    #[test]
    fn who_is_left_alone_after_a_slice_has_rested() {
        let mut turn = Turn::default();
        assert_eq!(turn.comes_ns(0, 1), None);
        turn.charge(2 * SLICE_NS, || 0);
        assert_eq!(turn.comes_ns(2 * SHARE * SLICE_NS, 1), None);
    }

    #[test]
    fn who_takes_little_never_rests() {
        let mut turn = Turn::default();
        for n in 0..1000 {
            turn.charge(SLICE_NS / 4, || unreachable!("it is no slice"));
            // Half of what is its share of all that passes.
            assert_eq!(turn.comes_ns(n * rest_ns(SLICE_NS / 2, 1), 1), None);
        }
    }

    #[test]
    fn what_a_call_runs_is_charged() {
        let mut turn = Turn::default();
        assert_eq!(turn.comes_ns(0, 1), None);
        let since_ns = processor_ns();
        turn.spend(|| while processor_ns() < since_ns + SLICE_NS {});
        // It began after `since_ns` was read, so a little may be missing.
        turn.charge(SLICE_NS, || 0);
        assert!(turn.comes_ns(0, 1).is_some());
    }
}
