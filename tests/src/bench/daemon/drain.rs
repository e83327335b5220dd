//! Taking a page away: how long until no reader can use it any more.
//!
//! The reader is a worker of its own on another processor, which looks up in pinned bursts as a datapath does, and
//! whose pages are those that go, one every few microseconds. The limit is a burst of the same kind, and two transfers
//! of a line.

use std::hint::{black_box, spin_loop};
use std::path::Path;
use std::time::{Duration, Instant};

use iotlb_client::{Access, AttachError, AttachOptions, Attachment, Reader};
use iotlb_proto::iova::IovaRange;
use iotlb_proto::sync::{AtomicU64, Ordering};

use super::by_hand::ByHand;
use super::place::Place;
use super::{Outcome, median_ns, time_ns};
use crate::bench::child::{Helper, order};
use crate::bench::groups::{BURST, hit, visits};
use crate::bench::measure::{median, thread_time};
use crate::bench::peers::Page;
use crate::bench::report::{Row, Target};
use crate::bench::rig;
use crate::processors::bind;

/// Live pages.
const PAGES: u64 = 2_048;
/// Drains, bursts and line transfers are measured in so many blocks, in turn.
const BLOCKS: usize = 20;
/// Pages taken away in a block.
const TAKES: usize = 1_000;
/// Shortest time between two: no front-end sends messages that are answered faster than that. Without it the reader
/// would still wait for the lines that the last one took from it, and its bursts be no bursts like those of the limit.
const GAP: Duration = Duration::from_micros(3);
/// The gap varies by this, which is longer than a burst, so that takes meet bursts everywhere.
const GAP_VARIES_NS: u64 = 509;
/// Bursts in a block, timed together: one is as short as the clock's own work.
const BURSTS: u64 = 20_000;
/// Trips of a line to the other processor and back in a block.
const TRIPS: u64 = 2_000;

/// Adds the rows.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place) -> Outcome {
    eprintln!("daemon: grace periods");
    bind(place.asker);
    let pages = rig::pages(PAGES);
    let visits = visits(&pages);
    let mut daemon = ByHand::with(&pages)?;
    let mut neighbour = daemon.attach(|control| Helper::neighbour(control, PAGES, place.answerer))?;
    let worker = daemon.attach(attached)?;
    let reader = worker.reader()?;
    let (mut drains, mut bursts, mut transfers) = (Vec::new(), Vec::new(), Vec::new());
    let mut at = 0;
    let mut taken = pages.iter().cycle();
    for _ in 0..BLOCKS {
        neighbour.set_to_work(order::CHANGING)?;
        for page in taken.by_ref().take(TAKES) {
            wait(GAP + Duration::from_nanos(drains.len() as u64 * 7_919 % GAP_VARIES_NS));
            drains.push(drain(&mut daemon, page)?);
        }
        neighbour.order(order::REST)?;
        bursts.push(burst_ns(&reader, &visits, &mut at));
        transfer_ns(place, &mut transfers);
    }
    let (burst_ns, transfer_ns) = (median(bursts), median_ns(&mut transfers));
    let floor = burst_ns + 2.0 * transfer_ns;
    let name = "invalidate and drain, another process reads in bursts of 32";
    let limit = Target::CostsAtMost(1.0);
    rows.push(Row::new(name, "ns", median_ns(&mut drains), floor, "1 burst + 2 line transfers", limit));
    let name = "a cache line's way to another processor";
    rows.push(Row::new(name, "ns", transfer_ns, burst_ns, "1 burst", Target::None));
    Ok(())
}

fn attached(control: &Path) -> Result<Attachment, AttachError> {
    Attachment::connect(control, &AttachOptions { label: "bench".into(), ..AttachOptions::default() })
}

/// Lets time pass, and this processor have it.
fn wait(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        spin_loop();
    }
}

/// How long it takes until nobody can use a page that is taken away, in nanoseconds; puts it back.
fn drain(daemon: &mut ByHand, page: &Page) -> Result<f64, Box<dyn std::error::Error>> {
    let range = IovaRange::page_of(page.iova);
    let (ns, ()) = time_ns(|| {
        daemon.table.remove(range);
        while let Some(epoch) = daemon.table.begin_grace() {
            // The clock is part of each look, as in the daemon, which has to know how long it waits.
            while {
                black_box(Instant::now());
                !daemon.is_drained(epoch)
            } {
                spin_loop();
            }
            daemon.table.grace_completed(epoch);
        }
    });
    daemon.table.insert(range, page.target, Access::READ_WRITE)?;
    Ok(ns)
}

/// One pin with its lookups.
fn burst_ns(reader: &Reader, visits: &[u64], at: &mut usize) -> f64 {
    let start = thread_time();
    *at = hit::bursts(reader, visits, *at, BURSTS * BURST);
    thread_time().saturating_sub(start).as_secs_f64() * 1e9 / BURSTS as f64
}

/// Half a round trip of one word between two processors, [`TRIPS`] times.
pub(super) fn transfer_ns(place: &Place, times: &mut Vec<f64>) {
    let word = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bind(place.answerer);
            for trip in 0..TRIPS {
                // Acquire and release: the pair of the loop below.
                while word.load(Ordering::Acquire) != 2 * trip + 1 {
                    spin_loop();
                }
                word.store(2 * trip + 2, Ordering::Release);
            }
        });
        for trip in 0..TRIPS {
            let (ns, ()) = time_ns(|| {
                word.store(2 * trip + 1, Ordering::Release);
                while word.load(Ordering::Acquire) != 2 * trip + 2 {
                    spin_loop();
                }
            });
            times.push(ns / 2.0);
        }
    });
}
