//! When a peer that polls lets others run: in the same of its empty rounds as the daemon.

/// Empty rounds from one yield to the next: `LOOK_EVERY` of the daemon (`server/pace.rs`).
const EVERY: u32 = 8;
/// The round of these that yields: `LOOK_AT` there.
const AT: u32 = 5;

/// Where in the rhythm a peer is.
#[derive(Debug, Default)]
pub(super) struct Rhythm {
    rounds: u32,
}

impl Rhythm {
    /// There was work: the count starts anew.
    pub(super) fn worked(&mut self) {
        self.rounds = 0;
    }

    /// There was none; yields when it is time.
    pub(super) fn idle(&mut self) {
        let is_time = self.rounds % EVERY == AT;
        self.rounds = self.rounds.wrapping_add(1);
        if is_time {
            std::thread::yield_now();
        }
    }
}
