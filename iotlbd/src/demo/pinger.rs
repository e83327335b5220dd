//! `iotlbd demo-front-end`: a front-end that pings echo workers through a running daemon.
//!
//! Each packet lies in a page of its own under an IOVA of its own, and is unmapped when the device returns it:
//! strictly, or lazily with a flush of everything after some dozens.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use iotlb_proto::iova::PAGE_SIZE;
use serde_json::{Value, json};

use super::{EXIT_FAILED, EXIT_STALE};
use crate::sim::{FrontEnd, FrontEndOptions, Guest, PingSummary, SimError, Unmapping, VirtioNet};

/// Guest memory: rings, receive buffers and packets of every pair fit many times.
const PAGES_PER_PAIR: u64 = 512;
/// Guest memory begins here, so that a guest address is never an offset by accident.
const GUEST_ADDRESS: u64 = 0x1_0000_0000;

/// Flags of the hidden subcommand.
#[derive(Clone, Debug, clap::Args)]
pub struct PingerOptions {
    /// The daemon's front-end socket
    #[arg(long, value_name = "PATH")]
    pub socket_path: PathBuf,
    /// Echo requests to send
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub pings: u64,
    /// Queue pairs to drive, 1 to 128
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub queue_pairs: u16,
    /// Unmap lazily
    #[arg(long)]
    pub lazy: bool,
    /// Longest wait for one answer
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    pub timeout_ms: u64,
}

/// Pings and prints one JSON object: exit status 0 when every answer was right, 1 when one was wrong or missing, 2 when
/// there was nothing to ping.
#[must_use]
pub fn run(options: &PingerOptions) -> ExitCode {
    let started = Instant::now();
    match ping(options) {
        Ok((summary, stats)) => {
            let right = summary.received == options.pings && summary.wrong == 0 && summary.missing == 0;
            let text = as_json(options, &summary, &stats, started.elapsed());
            if writeln!(io::stdout(), "{text}").is_err() {
                return ExitCode::from(EXIT_FAILED);
            }
            if right { ExitCode::SUCCESS } else { ExitCode::from(EXIT_STALE) }
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "iotlbd demo-front-end: {error}");
            let wrong = matches!(error, SimError::Ring { .. } | SimError::Protocol { .. });
            ExitCode::from(if wrong { EXIT_STALE } else { EXIT_FAILED })
        }
    }
}

fn ping(options: &PingerOptions) -> Result<(PingSummary, crate::sim::IotlbStats), SimError> {
    let pairs = options.queue_pairs;
    let guest = Guest::new(GUEST_ADDRESS, PAGES_PER_PAIR * u64::from(pairs) * PAGE_SIZE)?;
    let timeout = Duration::from_millis(options.timeout_ms);
    let session = FrontEndOptions { queue_pairs: pairs, timeout, ..FrontEndOptions::default() };
    let mut front_end = FrontEnd::connect(&options.socket_path, guest, session)?;
    let mut net = VirtioNet::start(&mut front_end, if options.lazy { Unmapping::Lazy } else { Unmapping::Strict })?;
    let summary = net.ping(&mut front_end, options.pings, timeout)?;
    front_end.stop()?;
    net.check_free_pages(&front_end.guest)?;
    Ok((summary, front_end.stats))
}

fn as_json(options: &PingerOptions, summary: &PingSummary, stats: &crate::sim::IotlbStats, elapsed: Duration) -> Value {
    use super::report::Percentiles;
    json!({
        "seconds": elapsed.as_secs_f64(),
        "queue_pairs": options.queue_pairs,
        "lazy": options.lazy,
        "sent": summary.sent,
        "received": summary.received,
        "wrong": summary.wrong,
        "missing": summary.missing,
        "misses": stats.misses,
        "denied": stats.denied,
        "updates": stats.updates,
        "invalidations": stats.invalidations,
        "round_trip_ns": Percentiles::of(&summary.round_trip_ns),
        "drain_latency_ns": Percentiles::of(&stats.drain_ns),
    })
}
