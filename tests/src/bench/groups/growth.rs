//! Curves: readers, devices, queues.

use std::hint::black_box;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::Ordering;
use iotlb_proto::worker::WorkerSegment;
use iotlbd::sim::SimError;
use iotlbd::sim::viommu::LAZY_FLUSH;

use super::{Outcome, Run, hit, visits};
use crate::bench::daemon::scan::incarnation;
use crate::bench::measure::{Contestant, interleave, median};
use crate::bench::peers::Page;
use crate::bench::report::Curve;
use crate::bench::rig::Rig;

/// Reader slots of one worker.
const SLOTS: usize = iotlb_proto::layout::worker::SLOT_CAPACITY;
/// Messages in one round of a socket measurement.
const MESSAGES: u32 = 200;

/// Measures the group.
///
/// # Errors
/// The service does not stand.
pub fn run(run: &mut Run) -> Outcome {
    readers(run)?;
    devices(run)?;
    queues(run)
}

/// Segments with `readers` slots in use, `each` of them in one.
fn segments(readers: usize, each: usize) -> Result<Vec<(WorkerSegment, OwnedFd)>, Box<dyn std::error::Error>> {
    let mut segments = Vec::new();
    let mut left = readers;
    for number in 0.. {
        let slots = left.min(each);
        if slots == 0 {
            break;
        }
        let (segment, fd) = WorkerSegment::create(incarnation(number))?;
        segment.announce(slots);
        segments.push((segment, fd));
        left -= slots;
    }
    Ok(segments)
}

/// One look at every slot, as the daemon does it until a grace period is over.
fn readers(run: &mut Run) -> Outcome {
    let mut curve = Curve::new("Grace period scan", "readers", "ns a scan");
    let sizes: &[usize] = if run.quick { &[1, 100] } else { &[1, 3, 10, 30, 100, 300, 1_000] };
    for &count in sizes {
        eprintln!("growth: {count} readers");
        let threads = segments(count, SLOTS)?;
        let processes = segments(count, 1)?;
        let pinned = segments(count, SLOTS)?;
        for (segment, _) in &pinned {
            for slot in &segment.slots {
                slot.word.store(7, Ordering::Relaxed);
            }
        }
        let scan = |segments: &[(WorkerSegment, OwnedFd)], count: u64| {
            for _ in 0..count {
                assert!(black_box(segments.iter().all(|(segment, _)| segment.is_drained(7))));
            }
        };
        let samples = interleave(
            run.point_rounds(),
            &mut [
                Contestant::new("threads", |count| scan(&threads, count)),
                Contestant::new("processes", |count| scan(&processes, count)),
                Contestant::new("pinned", |count| scan(&pinned, count)),
            ],
        );
        let names = ["idle, 64 threads a process", "idle, a process each", "pinned in the new epoch, 64 a process"];
        for (name, sample) in names.into_iter().zip(samples) {
            curve.add(name, count as u64, sample.median_ns);
        }
    }
    run.curves.push(curve);
    Ok(())
}

/// One daemon serves one device, so more devices are more daemons; here each on a thread of one process.
fn devices(run: &mut Run) -> Outcome {
    const ENTRIES: u64 = 1_024;
    let mut lookups = Curve::new("Random hit, bursts on each device in turn", "devices", "ns a lookup");
    let mut updates = Curve::new("UPDATE acknowledged, the other daemons idle", "devices", "us a message");
    let sizes: &[usize] = if run.quick { &[1, 2] } else { &[1, 2, 4, 8, 16] };
    let mut rigs: Vec<(Rig, Vec<Page>)> = Vec::new();
    for &count in sizes {
        eprintln!("growth: {count} devices");
        while rigs.len() < count {
            let mut rig = Rig::start()?;
            let pages = rig.fill(ENTRIES)?;
            rigs.push((rig, pages));
        }
        // The pages are the same in all of them. Addresses of its own for each would be memory that grows as well.
        let visits = rigs.first().map(|(_, pages)| visits(pages)).ok_or("a device")?;
        let mut readers = Vec::new();
        for (rig, _) in &rigs {
            readers.push(rig.worker.reader()?);
        }
        let mut at = 0;
        let in_turn = Contestant::new("lookups", |count| {
            let mut left = count;
            for reader in readers.iter().cycle() {
                let now = left.min(super::BURST);
                at = hit::bursts(reader, &visits, at, now);
                left -= now;
                if left == 0 {
                    break;
                }
            }
        });
        let samples = interleave(run.point_rounds(), &mut [in_turn]);
        lookups.add("iotlbd", count as u64, samples[0].median_ns);
        let (rig, pages) = rigs.first_mut().ok_or("a device")?;
        let iova = pages.first().ok_or("a page")?.iova;
        let times = message_times(run, || {
            let start = Instant::now();
            rig.front_end.push_update(iova)?;
            Ok(start.elapsed())
        })?;
        updates.add("iotlbd", count as u64, times);
    }
    run.curves.push(lookups);
    run.curves.push(updates);
    Ok(())
}

/// As QEMU counts them (`queues=`): each is a pair of rings.
fn queues(run: &mut Run) -> Outcome {
    let mut curve =
        Curve::new("INVALIDATE of a page, once for each queue pair as QEMU sends it", "queue pairs", "us a page");
    let mut single = Curve::new("The same, a message", "queue pairs", "us a message");
    let mut flushes =
        Curve::new("Flush of everything with all rings started, as a lazy guest's, a message", "queue pairs", "us");
    let pairs: &[u16] = if run.quick { &[1, 2] } else { &[1, 2, 4, 8, 16, 32, 64] };
    for &pairs in pairs {
        eprintln!("growth: {pairs} queue pairs");
        let mut rig = Rig::with_queue_pairs(pairs)?;
        let iova = rig.fill(1)?.first().ok_or("a page")?.iova;
        let time = message_times(run, || {
            // There is something to take away each time.
            rig.front_end.push_update(iova)?;
            let start = Instant::now();
            rig.front_end.invalidate(iova, PAGE_SIZE)?;
            Ok(start.elapsed())
        })?;
        curve.add("iotlbd", u64::from(pairs), time);
        single.add("iotlbd", u64::from(pairs), time / f64::from(pairs));
        let messages = f64::from(pairs) * LAZY_FLUSH.len() as f64;
        let time = message_times(run, || {
            // Of each ring the pages that were asked for after the flush before.
            rig.front_end.serve_misses()?;
            rig.front_end.push_update(iova)?;
            let start = Instant::now();
            rig.front_end.flush()?;
            Ok(start.elapsed())
        })?;
        flushes.add("iotlbd", u64::from(pairs), time / messages);
    }
    run.curves.push(curve);
    run.curves.push(single);
    run.curves.push(flushes);
    Ok(())
}

/// Median over the rounds of the time that one call of `send` says it took, in us.
fn message_times(
    run: &Run,
    mut send: impl FnMut() -> Result<Duration, SimError>,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut times = Vec::new();
    for _ in 0..run.point_rounds() {
        let mut sum = Duration::ZERO;
        for _ in 0..MESSAGES {
            sum += send()?;
        }
        times.push(sum.as_secs_f64() * 1e6 / f64::from(MESSAGES));
    }
    Ok(median(times))
}
