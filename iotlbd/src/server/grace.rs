//! Waiting for readers: when to look at their slots again.

/// How long the loop spins before it goes to sleep over a grace period. A pinned burst of lookups takes about this
/// long, and going to sleep and waking up costs as much.
const SPIN_NS: u64 = 8_000;
/// First pause between two looks at the slots. A reader that unpins rings the doorbell when it sees that the daemon
/// sleeps; it looks without a fence, so it can miss that, and the daemon looks again by itself.
const PAUSE_MIN_NS: u64 = 50_000;
/// Longest pause: what a missed doorbell can cost a guest that has waited for long already.
const PAUSE_MAX_NS: u64 = 5_000_000;

/// The wait for one grace period.
#[derive(Debug, Default)]
pub(crate) struct GraceWait {
    current: Option<Wait>,
}

#[derive(Debug)]
struct Wait {
    target: u64,
    spin_until_ns: u64,
    pause_ns: u64,
    next_look_ns: u64,
    asleep: bool,
}

/// What to do while readers hold a grace period back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// Look again at once.
    Spin,
    /// Ask readers to ring (`writer_sleeps`), look once more, then sleep.
    FallAsleep,
    /// Sleep on.
    Sleep,
}

impl GraceWait {
    /// Readers hold back the grace period `target`.
    pub(crate) fn held(&mut self, target: u64, now_ns: u64) -> Pause {
        // A grace period that grew while it was waited for goes on as the same wait: the guest waits all along.
        let wait = self.current.get_or_insert(Wait {
            target,
            spin_until_ns: now_ns.saturating_add(SPIN_NS),
            pause_ns: PAUSE_MIN_NS,
            next_look_ns: now_ns,
            asleep: false,
        });
        wait.target = target;
        if !wait.asleep {
            if now_ns < wait.spin_until_ns {
                return Pause::Spin;
            }
            wait.asleep = true;
            wait.next_look_ns = now_ns.saturating_add(wait.pause_ns);
            return Pause::FallAsleep;
        }
        if now_ns >= wait.next_look_ns {
            wait.pause_ns = wait.pause_ns.saturating_mul(2).min(PAUSE_MAX_NS);
            wait.next_look_ns = now_ns.saturating_add(wait.pause_ns);
        }
        Pause::Sleep
    }

    /// Nothing is waited for any more. Returns whether readers were asked to ring.
    pub(crate) fn over(&mut self) -> bool {
        self.current.take().is_some_and(|wait| wait.asleep)
    }

    /// When to look again at the latest.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        self.current.as_ref().filter(|wait| wait.asleep).map(|wait| wait.next_look_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_then_sleeps_with_growing_pauses() {
        let mut wait = GraceWait::default();
        assert_eq!(wait.held(7, 1000), Pause::Spin);
        assert_eq!(wait.deadline_ns(), None);
        let mut now = 1000 + SPIN_NS;
        assert_eq!(wait.held(7, now), Pause::FallAsleep);
        let mut last_pause = 0;
        for _ in 0..20 {
            let next = wait.deadline_ns().expect("asleep");
            let pause = next - now;
            assert!(pause >= last_pause && pause <= PAUSE_MAX_NS, "{pause} after {last_pause}");
            last_pause = pause;
            now = next;
            assert_eq!(wait.held(7, now), Pause::Sleep);
        }
        assert_eq!(last_pause, PAUSE_MAX_NS);
        assert!(wait.over());
        assert!(!wait.over());
        assert_eq!(wait.deadline_ns(), None);
    }

    #[test]
    fn an_early_wake_up_does_not_move_the_next_look() {
        let mut wait = GraceWait::default();
        wait.held(1, 0);
        wait.held(1, SPIN_NS);
        let next = wait.deadline_ns();
        assert_eq!(wait.held(2, SPIN_NS + 1), Pause::Sleep);
        assert_eq!(wait.deadline_ns(), next);
    }

    #[test]
    fn a_short_wait_never_asks_readers_to_ring() {
        let mut wait = GraceWait::default();
        assert_eq!(wait.held(1, 0), Pause::Spin);
        assert!(!wait.over());
    }
}
