//! The daemon's look at the slots of all readers, which ends a grace period.

use std::hint::{black_box, spin_loop};
use std::thread::Thread;

use iotlb_proto::epoch;
use iotlb_proto::layout::worker::SLOT_CAPACITY;
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering};
use iotlb_proto::worker::WorkerSegment;

use super::drain::transfer_ns;
use super::place::Place;
use super::{Outcome, median_ns, time_ns};
use crate::bench::measure::{Contestant, interleave};
use crate::bench::report::{Row, Target};
use crate::processors::bind;

const ROUNDS: usize = 31;
/// Readers of many processes.
const PROCESSES: usize = 1_000;
/// Workers whose threads are looked at, 64 a worker.
const WORKERS: usize = 16;
/// What an idle reader may cost, in nanoseconds.
const IDLE_NS: f64 = 10.0;
/// The epoch that is waited for, and pinned by those who read.
const EPOCH: u64 = 2;
/// Blocks of active readers, in turn with idle ones and with line transfers.
const BLOCKS: usize = 20;
/// Scans in a block.
const SCANS: u32 = 2_000;

/// Adds the rows.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place) -> Outcome {
    eprintln!("daemon: looks at readers");
    bind(place.asker);
    idle(rows)?;
    if place.answerer.is_none() {
        eprintln!("daemon: LEFT OUT: readers at work take a second processor, and here is one");
        return Ok(());
    }
    active(rows, place)
}

/// `count` segments with `slots` readers each.
fn segments(count: usize, slots: usize) -> Result<Vec<WorkerSegment>, Box<dyn std::error::Error>> {
    (0..count)
        .map(|number| {
            let (segment, _fd) = WorkerSegment::create(incarnation(number))?;
            segment.announce(slots);
            Ok(segment)
        })
        .collect()
}

/// An incarnation as a daemon gives them out, which are hashes; the same ones in each run.
pub(in crate::bench) fn incarnation(number: usize) -> u64 {
    (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

fn scan(segments: &[WorkerSegment]) -> bool {
    segments.iter().all(|segment| segment.is_drained(black_box(EPOCH)))
}

fn idle(rows: &mut Vec<Row>) -> Outcome {
    let (threads, processes) = (segments(WORKERS, SLOT_CAPACITY)?, segments(PROCESSES, 1)?);
    let scans = |segments: &[WorkerSegment], count: u64| {
        for _ in 0..count {
            black_box(scan(segments));
        }
    };
    let samples = interleave(
        ROUNDS,
        &mut [
            Contestant::new("threads", |count| scans(&threads, count)),
            Contestant::new("processes", |count| scans(&processes, count)),
        ],
    );
    let mut push = |name: &str, scan: f64, readers: usize| {
        let limit = Target::CostsAtMost(1.0);
        rows.push(Row::new(name, "ns", scan / readers as f64, IDLE_NS, "the limit of 10 ns", limit));
    };
    push("grace scan, per idle reader of 1,024", samples[0].median_ns, WORKERS * SLOT_CAPACITY);
    push("grace scan, per idle reader of 1,000, a process each", samples[1].median_ns, PROCESSES);
    Ok(())
}

/// Readers that pin and unpin all the time: each of their lines has to come from another processor. Their pins are in
/// the new epoch, so that the scan waits for nobody and what is left is its own work.
fn active(rows: &mut Vec<Row>, place: &Place) -> Outcome {
    let segment = &segments(1, SLOT_CAPACITY)?[..];
    let readers = Readers::default();
    let (mut idle, mut active, mut transfers) = (Vec::new(), Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| readers.run(&segment[0], place.answerer));
        for _ in 0..BLOCKS {
            for _ in 0..SCANS {
                idle.push(time_ns(|| black_box(scan(segment))).0);
            }
            readers.wake(AT_WORK, thread.thread());
            for _ in 0..SCANS {
                // A reader that did nothing since the last scan has left its line here.
                readers.wait_for_all();
                active.push(time_ns(|| black_box(scan(segment))).0);
            }
            readers.wake(REST, thread.thread());
            transfer_ns(place, &mut transfers);
        }
        readers.wake(END, thread.thread());
    });
    let (idle, active) = (median_ns(&mut idle), median_ns(&mut active));
    let each = (active - idle) / SLOT_CAPACITY as f64;
    let (name, limit) = ("grace scan, per active reader, beyond an idle one", Target::CostsAtMost(1.0));
    rows.push(Row::new(name, "ns", each, median_ns(&mut transfers), "1 line transfer", limit));
    Ok(())
}

/// Readers that one thread plays in turn.
#[derive(Default)]
struct Readers {
    state: AtomicU32,
    /// How often each of them has pinned and unpinned.
    rounds: AtomicU64,
}

/// Nobody pins.
const REST: u32 = 0;
/// All pin, in turn.
const AT_WORK: u32 = 1;
/// The thread ends.
const END: u32 = 2;

impl Readers {
    fn run(&self, segment: &WorkerSegment, cpu: Option<usize>) {
        bind(cpu);
        let epoch_word = AtomicU64::new(EPOCH);
        loop {
            // Relaxed: nothing comes with these words; here and below.
            match self.state.load(Ordering::Relaxed) {
                REST => std::thread::park(),
                AT_WORK => {
                    for slot in &segment.slots {
                        epoch::pin(&slot.word, &epoch_word);
                        epoch::unpin(&slot.word);
                    }
                    self.rounds.fetch_add(1, Ordering::Relaxed);
                }
                _ => return,
            }
        }
    }

    fn wake(&self, state: u32, thread: &Thread) {
        self.state.store(state, Ordering::Relaxed);
        thread.unpark();
    }

    /// Waits until all have pinned and unpinned: the round that is under way may be half over.
    fn wait_for_all(&self) {
        let before = self.rounds.load(Ordering::Relaxed);
        while self.rounds.load(Ordering::Relaxed).wrapping_sub(before) < 2 {
            spin_loop();
        }
    }
}
