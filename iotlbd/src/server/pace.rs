//! When the loop polls and when it sleeps.
//!
//! Going to sleep and being woken up costs more than most of what the loop does: a front-end that waits for an
//! acknowledgement, and a worker that waits for a miss, wait for that as well. So after work the loop looks again for a
//! short while before it sleeps, as long as work lately came that soon. An idle loop does not poll at all.

/// Longest time polled for more work. Being woken up costs 5 to 50 microseconds of latency, most where the processor
/// is a virtual one; what polling for longer than that could save is less than what it costs.
const WINDOW_MAX_NS: u64 = 50_000;
/// Shortest time polled: below it, the time it takes the front-end to take in the last answer is all there would be.
const WINDOW_MIN_NS: u64 = 8_000;
/// A yield that took this long gave the processor to somebody who wants it for long: this time the loop goes to sleep.
/// The next time it polls again, since whom it yielded to may be whom it waits for.
const CROWDED_NS: u64 = 20_000;
/// Rounds of polling from one yield and look at all descriptors to the next, while nothing comes. In between only those
/// are looked at where work is expected: the front-end's socket and the workers' cells. A yield and such a look cost as
/// much as the rest of a round, which would be added to half of all answers; eight rounds are some six microseconds.
const LOOK_EVERY: u32 = 8;
/// The round of these that yields. Not one of the first after work: whoever is awake and was answered just now has more
/// to say within three microseconds. Nor later: whoever waits for this processor, for the same reason, has waited long.
const LOOK_AT: u32 = 5;
/// Rounds without such a look at most, whatever comes: who keeps the loop at work must not hide all others from it. The
/// end of a worker is seen there, and the order to stop.
const UNSEEN_MAX: u32 = 32;

/// What to do when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Idle {
    /// Look again where work is expected.
    Poll,
    /// Let others run, then look again, at everything.
    PollAll,
    /// Sleep.
    Sleep,
}

/// How the loop waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Never sleeps.
    Busy,
    /// Polls for a while, then sleeps.
    Adaptive,
    /// Sleeps at once: on the only processor, whoever the loop waits for could not run.
    Sleepy,
}

/// What is known of when work comes.
#[derive(Debug)]
pub(crate) struct Pace {
    mode: Mode,
    /// How long to poll at present; 0: not at all.
    window_ns: u64,
    /// Since when there is nothing to do.
    idle_since_ns: Option<u64>,
    /// Others want the processor: no more polling until there was work.
    crowded: bool,
    /// Rounds polled since there was work.
    rounds: u32,
    /// Rounds since all descriptors were looked at.
    unseen: u32,
}

impl Pace {
    /// `cpus`: how many processors this process may keep busy.
    pub(crate) fn new(busy_poll: bool, cpus: usize) -> Pace {
        let mode = match (busy_poll, cpus) {
            (true, _) => Mode::Busy,
            (false, 0 | 1) => Mode::Sleepy,
            (false, _) => Mode::Adaptive,
        };
        Pace { mode, window_ns: 0, idle_since_ns: None, crowded: false, rounds: 0, unseen: 0 }
    }

    /// Whether the loop never sleeps.
    pub(crate) fn is_busy(&self) -> bool {
        self.mode == Mode::Busy
    }

    /// There was work.
    pub(crate) fn worked(&mut self, now_ns: u64) {
        self.crowded = false;
        self.rounds = 0;
        let Some(since) = self.idle_since_ns.take() else { return };
        let gap_ns = now_ns.saturating_sub(since);
        if gap_ns <= WINDOW_MAX_NS {
            // Twice the gap, so that a somewhat longer one is still met; it falls slowly, since gaps come mixed.
            let wanted = gap_ns.saturating_mul(2).min(WINDOW_MAX_NS);
            self.window_ns = wanted.max(self.window_ns - self.window_ns / 8).max(WINDOW_MIN_NS);
        } else {
            self.polled_in_vain();
        }
    }

    /// A yield took `yielded_ns`.
    pub(crate) fn yielded(&mut self, yielded_ns: u64) {
        self.crowded |= yielded_ns > CROWDED_NS;
    }

    /// There is nothing to do.
    pub(crate) fn idle(&mut self, now_ns: u64) -> Idle {
        let since = *self.idle_since_ns.get_or_insert(now_ns);
        let polls = match self.mode {
            Mode::Busy => true,
            Mode::Adaptive => !self.crowded && now_ns.saturating_sub(since) < self.window_ns,
            Mode::Sleepy => false,
        };
        if !polls {
            self.unseen = 0;
            return Idle::Sleep;
        }
        self.unseen += 1;
        let everything = self.rounds % LOOK_EVERY == LOOK_AT || self.unseen >= UNSEEN_MAX;
        self.rounds = self.rounds.wrapping_add(1);
        if !everything {
            return Idle::Poll;
        }
        self.unseen = 0;
        Idle::PollAll
    }

    fn polled_in_vain(&mut self) {
        self.window_ns /= 2;
        if self.window_ns < WINDOW_MIN_NS {
            self.window_ns = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Work at `at_ns` after the loop had nothing to do since `since_ns`.
    fn work(pace: &mut Pace, since_ns: u64, at_ns: u64) {
        pace.idle(since_ns);
        pace.worked(at_ns);
    }

    #[test]
    fn polls_only_while_work_comes_soon() {
        let mut pace = Pace::new(false, 2);
        assert_eq!(pace.idle(0), Idle::Sleep, "nothing is known yet");
        pace.worked(5_000);
        assert_ne!(pace.idle(6_000), Idle::Sleep);
        assert_ne!(pace.idle(6_000 + WINDOW_MIN_NS - 1), Idle::Sleep);
        let late = 6_000 + WINDOW_MAX_NS;
        assert_eq!(pace.idle(late), Idle::Sleep, "it polls for a bounded time");
        // Work that comes late again and again ends the polling.
        let mut at = late;
        for _ in 0..8 {
            pace.worked(at + 10 * WINDOW_MAX_NS);
            at += 10 * WINDOW_MAX_NS;
            pace.idle(at);
        }
        assert_eq!(pace.idle(at), Idle::Sleep);
    }

    #[test]
    fn the_window_follows_the_gaps_within_bounds() {
        let mut pace = Pace::new(false, 2);
        work(&mut pace, 0, 100);
        assert_eq!(pace.window_ns, WINDOW_MIN_NS);
        work(&mut pace, 1_000, 1_000 + WINDOW_MAX_NS);
        assert_eq!(pace.window_ns, WINDOW_MAX_NS);
        for _ in 0..100 {
            work(&mut pace, 0, 10);
        }
        assert_eq!(pace.window_ns, WINDOW_MIN_NS);
    }

    #[test]
    fn a_crowded_processor_is_left() {
        let mut pace = Pace::new(false, 2);
        work(&mut pace, 0, 1_000);
        pace.yielded(CROWDED_NS);
        assert_ne!(pace.idle(2_000), Idle::Sleep);
        pace.yielded(CROWDED_NS + 1);
        assert_eq!(pace.idle(2_100), Idle::Sleep);
        pace.worked(2_200);
        assert_ne!(pace.idle(2_300), Idle::Sleep, "for once only");
    }

    #[test]
    fn others_may_run_soon_after_work_and_now_and_then() {
        let mut pace = Pace::new(false, 2);
        for _ in 0..2 {
            work(&mut pace, 0, 1_000);
            let rounds: Vec<bool> = (0..2 * LOOK_EVERY + 1).map(|_| pace.idle(1_100) == Idle::PollAll).collect();
            let expected: Vec<bool> = (0..2 * LOOK_EVERY + 1).map(|n| [5, 13].contains(&n)).collect();
            assert_eq!(rounds, expected);
        }
    }

    #[test]
    fn work_in_every_round_does_not_hide_the_other_descriptors() {
        for busy_poll in [false, true] {
            let mut pace = Pace::new(busy_poll, 2);
            work(&mut pace, 0, 500);
            let looks = (1..=10 * u64::from(UNSEEN_MAX)).filter(|round| {
                let look = pace.idle(round * 1_000);
                assert_ne!(look, Idle::Sleep, "busy: {busy_poll}, round {round}");
                pace.worked(round * 1_000 + 500);
                look == Idle::PollAll
            });
            assert_eq!(looks.count(), 10, "busy: {busy_poll}");
        }
    }

    #[test]
    fn a_single_processor_is_never_polled_on_and_busy_polling_never_sleeps() {
        let mut pace = Pace::new(false, 1);
        work(&mut pace, 0, 10);
        assert_eq!(pace.idle(20), Idle::Sleep);
        let mut pace = Pace::new(true, 1);
        let looks: Vec<Idle> = (0..16).map(|round| pace.idle(round * 1_000_000_000)).collect();
        assert!(!looks.contains(&Idle::Sleep), "{looks:?}");
        assert!(looks.contains(&Idle::PollAll), "descriptors are forgotten: {looks:?}");
    }
}
