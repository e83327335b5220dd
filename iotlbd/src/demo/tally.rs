//! Counters of the whole demo over time: totals for the summary, rates for the live view.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::load::Phase;
use super::report::{Percentiles, WorkerReport};
use super::view::{Snapshot, WorkerRow};
use crate::sim::IotlbStats;
use crate::sim::iotlb::latency_histogram;

/// Rates are averages over this time.
const RATE_SPAN: Duration = Duration::from_secs(1);
/// Bars kept for the picture of the past: more than the widest terminal shows.
const HISTORY_MAX: usize = 512;

/// What the front-end thread publishes.
#[derive(Clone, Debug)]
pub struct LoadFigures {
    /// IOTLB counters and histograms.
    pub stats: IotlbStats,
    /// Whole-space flushes.
    pub flushes: u64,
    /// Device resets.
    pub reboots: u64,
    /// What the guest does.
    pub phase: Phase,
}

impl Default for LoadFigures {
    fn default() -> LoadFigures {
        LoadFigures { stats: IotlbStats::new(), flushes: 0, reboots: 0, phase: Phase::Strict }
    }
}

/// A worker as the demo knows it.
#[derive(Clone, Debug)]
pub struct WorkerFigures {
    /// Its name.
    pub name: String,
    /// Its process number.
    pub pid: u32,
    /// The newest report, without latencies; `None` before the first.
    pub report: Option<WorkerReport>,
    /// All latencies it reported, in ns.
    pub miss_ns: Histogram<u64>,
}

impl WorkerFigures {
    /// Nothing reported yet.
    #[must_use]
    pub fn new(name: String, pid: u32) -> WorkerFigures {
        WorkerFigures { name, pid, report: None, miss_ns: latency_histogram() }
    }

    /// Takes a report in.
    pub fn take(&mut self, mut report: WorkerReport) {
        for latency in report.miss_ns.drain(..) {
            self.miss_ns.saturating_record(latency);
        }
        self.report = Some(report);
    }

    /// The newest report, or zeros.
    #[must_use]
    pub fn newest(&self) -> WorkerReport {
        self.report.clone().unwrap_or_default()
    }
}

#[derive(Clone, Debug)]
struct Sample {
    at: Instant,
    workers: Vec<WorkerReport>,
    updates: u64,
    invalidations: u64,
}

/// Turns counters into rates.
#[derive(Debug)]
pub struct Tally {
    started: Instant,
    total: Duration,
    samples: VecDeque<Sample>,
    history: VecDeque<u64>,
}

impl Tally {
    /// Time runs from `started`, for `total`.
    #[must_use]
    pub fn new(started: Instant, total: Duration) -> Tally {
        Tally { started, total, samples: VecDeque::new(), history: VecDeque::new() }
    }

    /// Takes the counters of `now` in and says what to show.
    pub fn sample(&mut self, now: Instant, workers: &[WorkerFigures], load: &LoadFigures) -> Snapshot {
        let newest = Sample {
            at: now,
            workers: workers.iter().map(WorkerFigures::newest).collect(),
            updates: load.stats.updates,
            invalidations: load.stats.invalidations,
        };
        while self.samples.len() > 1 && self.samples.get(1).is_some_and(|sample| sample.at + RATE_SPAN <= now) {
            self.samples.pop_front();
        }
        let oldest = self.samples.front().unwrap_or(&newest).clone();
        let span = now.saturating_duration_since(oldest.at);
        let mut miss_ns = latency_histogram();
        let mut rows = Vec::new();
        for (index, worker) in workers.iter().enumerate() {
            // Adding fails only for values that do not fit; these histograms grow.
            let _ = miss_ns.add(&worker.miss_ns);
            let (new, old) = (&newest.workers[index], oldest.workers.get(index).cloned().unwrap_or_default());
            rows.push(WorkerRow {
                name: worker.name.clone(),
                pid: worker.pid,
                lookups: rate(new.lookups, old.lookups, span),
                hits: rate(new.hits, old.hits, span),
                misses: rate(new.misses, old.misses, span),
                denied: new.denied,
                stale_reads: new.stale_reads,
            });
        }
        let sum = |field: fn(&WorkerRow) -> u64| rows.iter().map(field).sum();
        let lookups = sum(|row| row.lookups);
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(lookups);
        self.samples.push_back(newest);
        Snapshot {
            elapsed: now.saturating_duration_since(self.started),
            total: self.total,
            phase: load.phase,
            lookups,
            hits: sum(|row| row.hits),
            misses: sum(|row| row.misses),
            updates: rate(load.stats.updates, oldest.updates, span),
            invalidations: rate(load.stats.invalidations, oldest.invalidations, span),
            stale_reads: sum(|row| row.stale_reads),
            drain_ns: Percentiles::of(&load.stats.drain_ns),
            miss_ns: Percentiles::of(&miss_ns),
            history: self.history.iter().copied().collect(),
            workers: rows,
        }
    }
}

/// Growth per second.
fn rate(new: u64, old: u64, span: Duration) -> u64 {
    let growth = u128::from(new.saturating_sub(old)) * 1_000_000_000;
    growth.checked_div(span.as_nanos()).and_then(|rate| u64::try_from(rate).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_last_second() {
        let start = Instant::now();
        let mut tally = Tally::new(start, Duration::from_secs(10));
        let mut worker = WorkerFigures::new("worker-0".to_owned(), 7);
        let mut load = LoadFigures::default();
        let mut last = None;
        // 1,000 lookups and 10 invalidations in each of 30 tenths of a second, then ten times as many.
        for tenth in 0..=45_u32 {
            let step = if tenth <= 30 { 1 } else { 10 };
            let mut report = worker.newest();
            report.lookups += 1_000 * step;
            report.hits += 900 * step;
            report.misses += 100 * step;
            report.miss_ns = vec![5_000];
            worker.take(report);
            load.stats.invalidations += 10 * step;
            let now = start + Duration::from_millis(100) * tenth;
            last = Some(tally.sample(now, std::slice::from_ref(&worker), &load));
        }
        let last = last.expect("46 samples");
        assert_eq!((last.lookups, last.hits, last.misses), (100_000, 90_000, 10_000));
        assert_eq!(last.invalidations, 1_000);
        assert_eq!(last.elapsed, Duration::from_millis(4_500));
        assert_eq!(last.history.len(), 46);
        assert_eq!(last.history[0], 0);
        assert!((5_000..5_100).contains(&last.miss_ns.p50));
        assert_eq!(worker.miss_ns.len(), 46);
    }
}
