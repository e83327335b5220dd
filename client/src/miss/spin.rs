//! How long a thread spins for an answer before it sleeps.
//!
//! To be woken up costs 5 to 30 microseconds, most where the processor is a virtual one that went to rest. Most answers
//! come soon: in less than that when front-end and daemon are awake, after two such wake-ups when both sleep. But where
//! processors are few, whoever spins may keep the one it waits for from running, and does so in vain when answers take
//! longer anyway. So a thread spins while that lately paid, tries again now and then when it did not, and lets others
//! run meanwhile.

use std::time::{Duration, Instant};

/// Longest spin. A miss for which daemon and front-end must be woken up first takes 50 to 80 microseconds on a virtual
/// machine: a spin that ends within them is paid for and brings nothing.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// From one yield to the next: a yield costs less than a microsecond while nobody wants the processor.
const YIELD_EVERY: Duration = Duration::from_micros(6);

/// A yield that took so long gave the processor to somebody who wants it for long: whoever is waited for may be next.
const CROWDED: Duration = Duration::from_micros(20);

/// After a spin in vain, so many waits go without; doubled each time.
const SKIP_MIN: u32 = 1;
/// The largest number of waits without a spin. Small enough that a change is noticed within some milliseconds.
const SKIP_MAX: u32 = 64;

/// What one thread knows of how soon answers come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    /// Waits that go without a spin before the next try.
    skip: u32,
    /// How many the next failure costs.
    penalty: u32,
}

impl Default for Spin {
    fn default() -> Spin {
        Spin { skip: 0, penalty: SKIP_MIN }
    }
}

impl Spin {
    /// The spin of the wait that begins now.
    pub(crate) fn begin(&self) -> Spinning {
        let started = Instant::now();
        Spinning { started, until: started + self.length(), yield_at: started + YIELD_EVERY }
    }

    fn length(&self) -> Duration {
        if self.is_due() { SPIN_MAX } else { Duration::ZERO }
    }

    /// Whether the next wait begins with a spin.
    pub(crate) fn is_due(&self) -> bool {
        self.skip == 0
    }

    /// There was no wait, because it would not have begun with a spin.
    pub(crate) fn went_without(&mut self) {
        self.skip = self.skip.saturating_sub(1);
    }

    /// The wait is over.
    pub(crate) fn answered(&mut self, spinning: &Spinning) {
        self.answered_after(spinning.started.elapsed());
    }

    fn answered_after(&mut self, waited: Duration) {
        if waited <= SPIN_MAX {
            // Soon enough for a spin, whether there was one or not.
            *self = Spin::default();
        } else if self.skip > 0 {
            self.skip -= 1;
        } else {
            self.skip = self.penalty;
            self.penalty = (self.penalty.saturating_mul(2)).min(SKIP_MAX);
        }
    }
}

/// One wait.
#[derive(Debug)]
pub(crate) struct Spinning {
    started: Instant,
    until: Instant,
    yield_at: Instant,
}

impl Spinning {
    /// Lets a moment pass; `false`: it is time to sleep.
    pub(crate) fn goes_on(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.until {
            return false;
        }
        if now >= self.yield_at {
            std::thread::yield_now();
            self.yielded(now, Instant::now());
        } else {
            std::hint::spin_loop();
        }
        true
    }

    /// A yield is over.
    fn yielded(&mut self, began: Instant, ended: Instant) {
        if ended - began > CROWDED {
            self.until = began;
        }
        self.yield_at = ended + YIELD_EVERY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spins_only_while_that_pays_and_tries_again_now_and_then() {
        let late = SPIN_MAX + Duration::from_nanos(1);
        let mut spin = Spin::default();
        for _ in 0..100 {
            assert_eq!(spin.length(), SPIN_MAX);
            spin.answered_after(SPIN_MAX);
        }
        let mut tries = 0;
        for _ in 0..10 * SKIP_MAX {
            tries += u32::from(spin.length() == SPIN_MAX);
            spin.answered_after(late);
        }
        assert!((4..32).contains(&tries), "{tries} tries");
        while spin.length() != SPIN_MAX {
            spin.answered_after(late);
        }
        spin.answered_after(SPIN_MAX);
        assert_eq!(spin.length(), SPIN_MAX, "one answer in time is enough");
    }

    #[test]
    fn who_does_not_wait_without_a_spin_tries_again_as_well() {
        let mut spin = Spin::default();
        let mut tries = 0;
        for _ in 0..10 * SKIP_MAX {
            if spin.is_due() {
                tries += 1;
                spin.answered_after(2 * SPIN_MAX);
            } else {
                spin.went_without();
            }
        }
        assert!((4..32).contains(&tries), "{tries} tries");
    }

    #[test]
    fn a_spin_ends_by_itself_and_where_others_want_the_processor() {
        let mut spin = Spin::default();
        let mut spinning = spin.begin();
        // Its own yields may end it too.
        let until = spinning.until;
        while spinning.goes_on() {}
        assert!(spinning.until <= until && Instant::now() >= spinning.until);

        let mut spinning = spin.begin();
        let now = spinning.started;
        (spinning.until, spinning.yield_at) = (now + Duration::from_secs(3600), now);
        spinning.yielded(now, now + CROWDED);
        assert_eq!(spinning.yield_at, now + CROWDED + YIELD_EVERY);
        assert!(spinning.until > Instant::now());
        spinning.yielded(now, now + CROWDED + Duration::from_nanos(1));
        assert!(!spinning.goes_on());

        spin.answered_after(2 * SPIN_MAX);
        assert!(!spin.begin().goes_on(), "it did not pay");
    }

    #[test]
    fn a_quick_answer_without_a_spin_counts_as_well() {
        let mut spin = Spin::default();
        spin.answered_after(2 * SPIN_MAX);
        assert_eq!(spin.length(), Duration::ZERO);
        spin.answered_after(SPIN_MAX);
        assert_eq!(spin.length(), SPIN_MAX);
    }
}
