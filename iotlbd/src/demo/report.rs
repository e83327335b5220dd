//! What worker processes tell the demo, and what the demo tells its user in the end.

use std::fmt;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::tally::LoadFigures;

/// One line of JSON on a worker's standard output. The counters have counted since the worker started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// Translations asked for.
    pub lookups: u64,
    /// Of these, answered from the table.
    pub hits: u64,
    /// Of these, not in the table.
    pub misses: u64,
    /// Misses the front-end had no translation for.
    pub denied: u64,
    /// Misses that were not answered in time.
    pub timed_out: u64,
    /// Pins in which a page changed hands.
    pub stale_reads: u64,
    /// How long each miss answered with a translation took since the last report, in ns.
    pub miss_ns: Vec<u64>,
    /// The worker stops after this report.
    pub last: bool,
}

/// Two points of a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    /// Half of all values are at most this.
    pub p50: u64,
    /// 99 of 100 values are at most this.
    pub p99: u64,
}

impl Percentiles {
    /// Of a histogram; zeros when it is empty.
    #[must_use]
    pub fn of(histogram: &Histogram<u64>) -> Percentiles {
        Percentiles { p50: histogram.value_at_quantile(0.5), p99: histogram.value_at_quantile(0.99) }
    }
}

/// The result of a demo run, as `--json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How long the workers ran.
    pub seconds: f64,
    /// Worker processes.
    pub workers: usize,
    /// What the random numbers started from.
    pub seed: u64,
    /// Translations asked for by all workers.
    pub lookups: u64,
    /// Of these, answered from the table.
    pub hits: u64,
    /// Of these, not in the table.
    pub misses: u64,
    /// Misses the front-end had no translation for.
    pub denied: u64,
    /// Misses that were not answered in time.
    pub timed_out: u64,
    /// Miss messages the front-end got; several workers' misses for one page are one message.
    pub front_end_misses: u64,
    /// Translations the front-end sent.
    pub updates: u64,
    /// Invalidations the front-end sent and the daemon acknowledged.
    pub invalidations: u64,
    /// Of these, whole-space flushes (two messages each).
    pub flushes: u64,
    /// Device resets, each of which takes every page away.
    pub reboots: u64,
    /// Pins in which a worker saw a page that had been taken away: must be 0.
    pub stale_reads: u64,
    /// From a worker's question to its answer.
    pub miss_latency_ns: Percentiles,
    /// From INVALIDATE to its acknowledgement.
    pub drain_latency_ns: Percentiles,
}

impl Summary {
    /// Adds everything up.
    #[must_use]
    pub fn new(
        seconds: f64,
        seed: u64,
        workers: &[WorkerReport],
        miss_ns: &Histogram<u64>,
        load: &LoadFigures,
    ) -> Summary {
        let front_end = &load.stats;
        let sum = |field: fn(&WorkerReport) -> u64| workers.iter().map(field).sum();
        Summary {
            seconds: (seconds * 1000.0).round() / 1000.0,
            workers: workers.len(),
            seed,
            lookups: sum(|worker| worker.lookups),
            hits: sum(|worker| worker.hits),
            misses: sum(|worker| worker.misses),
            denied: sum(|worker| worker.denied),
            timed_out: sum(|worker| worker.timed_out),
            front_end_misses: front_end.misses,
            updates: front_end.updates,
            invalidations: front_end.invalidations,
            flushes: load.flushes,
            reboots: load.reboots,
            stale_reads: sum(|worker| worker.stale_reads),
            miss_latency_ns: Percentiles::of(miss_ns),
            drain_latency_ns: Percentiles::of(&front_end.drain_ns),
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "iotlbd demo: {:.1} s, {} workers, seed {}", self.seconds, self.workers, self.seed)?;
        let ratio = percent(self.hits, self.lookups);
        writeln!(f, "  lookups        {:>12}   hits {ratio}", count(self.lookups))?;
        writeln!(
            f,
            "  misses         {:>12}   p50 {}, p99 {}",
            count(self.misses),
            nanoseconds(self.miss_latency_ns.p50),
            nanoseconds(self.miss_latency_ns.p99)
        )?;
        writeln!(f, "  updates        {:>12}", count(self.updates))?;
        writeln!(
            f,
            "  invalidations  {:>12}   drained in p50 {}, p99 {}",
            count(self.invalidations),
            nanoseconds(self.drain_latency_ns.p50),
            nanoseconds(self.drain_latency_ns.p99)
        )?;
        let verdict = if self.stale_reads == 0 { "no worker saw a page that was taken away" } else { "BROKEN" };
        write!(f, "  stale reads    {:>12}   {verdict}", count(self.stale_reads))
    }
}

/// A number with a comma every three digits.
#[must_use]
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place != 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time with the unit that keeps it short.
#[must_use]
pub fn nanoseconds(time: u64) -> String {
    match time {
        0 => "-".to_owned(),
        1..1_000 => format!("{time} ns"),
        1_000..1_000_000 => format!("{}.{} µs", time / 1_000, time % 1_000 / 100),
        1_000_000..1_000_000_000 => format!("{}.{} ms", time / 1_000_000, time % 1_000_000 / 100_000),
        _ => format!("{}.{} s", time / 1_000_000_000, time % 1_000_000_000 / 100_000_000),
    }
}

/// A part as a percentage with two decimals, rounded down so that 100 means all.
#[must_use]
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let hundredths = u128::from(part) * 10_000 / u128::from(whole);
    format!("{}.{:02} %", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(nanoseconds(0), "-");
        assert_eq!(nanoseconds(950), "950 ns");
        assert_eq!(nanoseconds(12_340), "12.3 µs");
        assert_eq!(nanoseconds(2_050_000), "2.0 ms");
        assert_eq!(nanoseconds(3_000_000_000), "3.0 s");
        assert_eq!(percent(99_999, 100_000), "99.99 %");
        assert_eq!(percent(3, 3), "100.00 %");
        assert_eq!(percent(0, 0), "-");
    }

    #[test]
    fn a_summary_adds_up_and_keeps_its_field_names() {
        let worker = WorkerReport { lookups: 10, hits: 7, misses: 3, stale_reads: 1, ..WorkerReport::default() };
        let mut load = LoadFigures::default();
        load.stats.invalidations = 5;
        load.stats.drain_ns.saturating_record(1000);
        let histogram = crate::sim::iotlb::latency_histogram();
        let summary = Summary::new(1.5, 3, &[worker.clone(), worker], &histogram, &load);
        let json = serde_json::to_value(&summary).expect("plain data");
        for (field, value) in [("lookups", 20), ("hits", 14), ("misses", 6), ("stale_reads", 2), ("invalidations", 5)] {
            assert_eq!(json[field], value, "{field}");
        }
        assert_eq!(json["seconds"], 1.5);
        assert_eq!(json["workers"], 2);
        assert!(json["drain_latency_ns"]["p50"].as_u64().is_some_and(|p50| (1000..1020).contains(&p50)));
        assert_eq!(json["miss_latency_ns"]["p99"], 0);
        assert!(summary.to_string().contains("BROKEN"));
    }
}
