//! A worker process of the demo: pins, translates bursts, and watches that nothing it reads changes hands.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_client::{
    Access, AttachError, AttachOptions, Attachment, Fault, PinError, Reader, ReaderError, ResolveError, Segment,
};
use iotlb_proto::sync::{AtomicU32, Ordering};

use super::oracle::{DIRECTORY_IOVA, GHOSTS, Random, SLOTS, Stamps, Verdict, load_word};
use super::report::WorkerReport;
use crate::sim::guest::PAGE_WORDS;
use crate::sim::iotlb::nanoseconds_since;

/// Lookups in one pin.
const BURST: usize = 32;
/// How often the words of a burst are read again before the pin ends.
const ROUNDS: usize = 4;
/// Spins between two rounds: a few microseconds in which a page may be taken away.
const SPINS: usize = 100;
/// One lookup in so many goes to an IOVA that was unmapped lately.
const GHOST_ONE_IN: u64 = 16;
/// Bursts between two looks at the clock and at other processes that want the processor.
const BURSTS_PER_TURN: usize = 16;
/// Time between two reports.
const REPORT_EVERY: Duration = Duration::from_millis(100);
/// Longest wait for one miss or for a new memory map.
const MISS_TIMEOUT_MS: u32 = 2_000;
/// Miss latencies in one report; further ones are not recorded.
const LATENCIES_MAX: usize = 1 << 14;

/// Flags of the hidden subcommand.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerOptions {
    /// Where the daemon takes workers
    #[arg(long)]
    pub control_socket: PathBuf,
    /// What the daemon shows as this worker's name
    #[arg(long, default_value = "demo")]
    pub label: String,
    /// Key of the stamps
    #[arg(long)]
    pub key: u64,
    /// Start of the random numbers
    #[arg(long)]
    pub seed: u64,
}

/// Why a worker gave up.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No attachment.
    #[error("cannot attach: {0}")]
    Attach(#[from] AttachError),
    /// No reader.
    #[error("cannot read the table: {0}")]
    Reader(#[from] ReaderError),
    /// The daemon is gone or wants this worker to be.
    #[error("cannot pin: {0}")]
    Pin(#[from] PinError),
    /// A miss failed for good.
    #[error("cannot resolve {iova:#x}: {source}")]
    Resolve {
        /// What.
        iova: u64,
        /// Why.
        source: ResolveError,
    },
    /// A guest page was not where it must be.
    #[error("a fault that cannot be: {0:?}")]
    Fault(Fault),
    /// The demo does not read any more.
    #[error("cannot report: {0}")]
    Report(#[from] io::Error),
}

/// Runs a worker until its standard input ends.
#[must_use]
pub fn run(options: &WorkerOptions) -> ExitCode {
    match work(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing is left to do when standard error is gone too.
            let _ = writeln!(io::stderr(), "{}: {error}", options.label);
            ExitCode::FAILURE
        }
    }
}

fn work(options: &WorkerOptions) -> Result<(), WorkerError> {
    let stop = stop_flag();
    let attach = AttachOptions { label: options.label.clone(), ..AttachOptions::default() };
    let attachment = Attachment::connect(&options.control_socket, &attach)?;
    let mut worker = Worker {
        reader: attachment.reader()?,
        _attachment: attachment,
        stamps: Stamps::new(options.key),
        random: Random::new(options.seed),
        report: WorkerReport::default(),
    };
    worker.send_report()?;
    let mut reported = Instant::now();
    // Partner: the thread that waits for the end of standard input. Nothing else is passed by this flag.
    while stop.load(Ordering::Relaxed) == 0 {
        for _ in 0..BURSTS_PER_TURN {
            worker.burst()?;
        }
        if reported.elapsed() >= REPORT_EVERY {
            worker.send_report()?;
            reported = Instant::now();
        }
        std::thread::yield_now();
    }
    worker.report.last = true;
    worker.send_report()?;
    Ok(())
}

/// A flag that turns 1 when standard input ends: the demo is done, or dead.
fn stop_flag() -> Arc<AtomicU32> {
    let stop = Arc::new(AtomicU32::new(0));
    let flag = Arc::clone(&stop);
    std::thread::spawn(move || {
        let mut byte = [0];
        while matches!(io::stdin().read(&mut byte), Ok(1)) {}
        flag.store(1, Ordering::Relaxed);
    });
    stop
}

struct Worker {
    reader: Reader,
    /// Held: a worker that drops it leaves.
    _attachment: Attachment,
    stamps: Stamps,
    random: Random,
    report: WorkerReport,
}

/// What a burst left to do after its pin.
#[derive(Default)]
struct Leftovers {
    /// Pages to ask for.
    missing: Vec<u64>,
    /// The memory map changed.
    remapping: bool,
    hits: u64,
    misses: u64,
    stale: u64,
}

impl Worker {
    fn burst(&mut self) -> Result<(), WorkerError> {
        let left = pinned_burst(&self.reader, self.stamps, &mut self.random)?;
        self.report.hits += left.hits;
        self.report.misses += left.misses;
        self.report.lookups += left.hits + left.misses;
        if left.stale != 0 {
            self.report.stale_reads += left.stale;
        }
        if left.remapping {
            self.reader.wait_mapped(MISS_TIMEOUT_MS);
        }
        for iova in left.missing {
            self.resolve(iova)?;
        }
        Ok(())
    }

    fn resolve(&mut self, iova: u64) -> Result<(), WorkerError> {
        let asked = Instant::now();
        match self.reader.resolve(iova, 8, Access::READ, MISS_TIMEOUT_MS) {
            Ok(()) => {
                if self.report.miss_ns.len() < LATENCIES_MAX {
                    self.report.miss_ns.push(nanoseconds_since(asked));
                }
            }
            // The guest unmapped the page between our look at the directory and the front-end's at its page table.
            Err(ResolveError::Denied) => self.report.denied += 1,
            Err(ResolveError::TimedOut) => self.report.timed_out += 1,
            // The guest reboots. Nothing tells a worker without queues when it is back, so look again.
            Err(ResolveError::Stopped) => std::thread::yield_now(),
            Err(source) => return Err(WorkerError::Resolve { iova, source }),
        }
        Ok(())
    }

    fn send_report(&mut self) -> io::Result<()> {
        let mut line = serde_json::to_vec(&self.report)?;
        line.push(b'\n');
        self.report.miss_ns.clear();
        let mut out = io::stdout().lock();
        out.write_all(&line)?;
        out.flush()
    }
}

/// One pin: translate, read, read again, compare.
fn pinned_burst(reader: &Reader, stamps: Stamps, random: &mut Random) -> Result<Leftovers, WorkerError> {
    let mut left = Leftovers::default();
    let guard = reader.pin()?;
    let translate = |iova: u64, len: u64, left: &mut Leftovers| match guard.translate(iova, len, Access::READ) {
        Ok(mut segments) => Ok(segments.next()),
        Err(Fault::Miss { iova, .. }) => {
            left.misses += 1;
            // Asked for once a burst, however often it was looked up.
            if !left.missing.contains(&iova) {
                left.missing.push(iova);
            }
            Ok(None)
        }
        Err(Fault::Remapping) => {
            left.remapping = true;
            Ok(None)
        }
        Err(fault) => Err(WorkerError::Fault(fault)),
    };
    let Some(directory) = translate(DIRECTORY_IOVA, (SLOTS + GHOSTS) * 8, &mut left)? else { return Ok(left) };
    let mut held: [Option<(Segment<'_>, u64, u64)>; BURST] = [None; BURST];
    for entry in &mut held {
        let place = if random.below(GHOST_ONE_IN) == 0 { SLOTS + random.below(GHOSTS) } else { random.below(SLOTS) };
        let iova = usize::try_from(place * 8).ok().and_then(|offset| load_word(&directory, offset)).unwrap_or(0);
        if iova == 0 {
            continue;
        }
        let offset = random.below(PAGE_WORDS) * 8;
        let Some(segment) = translate(iova + offset, 8, &mut left)? else { continue };
        left.hits += 1;
        let Some(word) = load_word(&segment, 0) else { continue };
        match stamps.judge(iova, word) {
            Verdict::Mapped(_) => *entry = Some((segment, iova, word)),
            Verdict::Poison | Verdict::Foreign => left.stale += 1,
        }
    }
    // What was right must stay the same, mapping generation included, until the pin ends.
    for _ in 0..ROUNDS {
        for _ in 0..SPINS {
            std::hint::spin_loop();
        }
        for entry in &mut held {
            if let Some((segment, _, word)) = entry
                && load_word(segment, 0) != Some(*word)
            {
                left.stale += 1;
                *entry = None;
            }
        }
    }
    Ok(left)
}
