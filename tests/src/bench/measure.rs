//! Interleaved measurement.
//!
//! Machines of two cores with unseen neighbours are noisy by factors. What holds up is the *ratio* of two medians that
//! were taken in turn: contestant A, B, C, A, B, C, and so on, each for a few milliseconds. The clock is that of the
//! thread's own processor time: what other programs take of a busy machine is no part of it.
//!
//! Where a round is shorter than a pass over the contestant's table, it finds what the others left of the cache: it
//! first goes over all of it, untimed ([`Contestant::after`]).

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Shortest time one round of one contestant should take: well above the clock's resolution and a scheduler tick's
/// jitter.
const ROUND: Duration = Duration::from_millis(4);

/// Something to be measured: runs its operation `count` times.
pub struct Contestant<'a> {
    name: &'static str,
    run: Box<dyn FnMut(u64) + 'a>,
    untimed: u64,
}

impl std::fmt::Debug for Contestant<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contestant").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<'a> Contestant<'a> {
    /// `run(n)` does the operation `n` times.
    pub fn new(name: &'static str, run: impl FnMut(u64) + 'a) -> Contestant<'a> {
        Contestant { name, run: Box::new(run), untimed: 0 }
    }

    /// Does so many operations untimed before each round: as many as it has places to visit, so that what a round finds
    /// in the caches is its own doing and nobody else's.
    #[must_use]
    pub fn after(self, untimed: u64) -> Contestant<'a> {
        Contestant { untimed, ..self }
    }
}

/// Time of one operation, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Median over the rounds.
    pub median_ns: f64,
    /// Best round.
    pub min_ns: f64,
}

/// Measures all contestants in turn, `rounds` times after a warm-up, and returns one sample each, in their order.
pub fn interleave(rounds: usize, contestants: &mut [Contestant<'_>]) -> Vec<Sample> {
    let counts: Vec<u64> = contestants.iter_mut().map(calibrate).collect();
    let mut times: Vec<Vec<f64>> = vec![Vec::with_capacity(rounds); contestants.len()];
    for _ in 0..rounds {
        for ((contestant, &count), times) in contestants.iter_mut().zip(&counts).zip(&mut times) {
            (contestant.run)(contestant.untimed);
            let start = thread_time();
            (contestant.run)(count);
            times.push(nanoseconds(thread_time().saturating_sub(start)) / count as f64);
        }
    }
    times.into_iter().map(sample).collect()
}

/// Processor time of the calling thread so far: for work that never waits.
#[must_use]
pub fn thread_time() -> Duration {
    // Neither is negative, and there are less than 10^9 ns.
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// Finds how many operations fill a round; warms caches and branch predictors on the way.
fn calibrate(contestant: &mut Contestant<'_>) -> u64 {
    let mut count = 64;
    loop {
        let start = thread_time();
        (contestant.run)(count);
        if thread_time().saturating_sub(start) >= ROUND || count >= 1 << 32 {
            return count;
        }
        count *= 2;
    }
}

/// The middle one; NaN of none.
#[must_use]
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median and minimum.
fn sample(times: Vec<f64>) -> Sample {
    let min_ns = times.iter().copied().min_by(f64::total_cmp).unwrap_or(f64::NAN);
    Sample { median_ns: median(times), min_ns }
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// A small generator for repeatable shuffles (xorshift64*): the benchmark must visit the same addresses in every run.
#[derive(Clone, Debug)]
pub struct Shuffle(u64);

impl Shuffle {
    /// From a seed, which must not be 0.
    #[must_use]
    pub fn new(seed: u64) -> Shuffle {
        Shuffle(seed.max(1))
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_u64() % limit
    }

    /// `0..count` in some order.
    #[must_use]
    pub fn permutation(&mut self, count: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..count).collect();
        for at in (1..order.len()).rev() {
            let other = usize::try_from(self.below(at as u64 + 1)).unwrap_or(0);
            order.swap(at, other);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(sample(vec![9.0, 1.0, 5.0]), Sample { median_ns: 5.0, min_ns: 1.0 });
    }

    #[test]
    fn a_permutation_has_every_number_once() {
        let mut order = Shuffle::new(7).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }
}
