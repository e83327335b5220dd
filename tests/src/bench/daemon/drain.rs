//! Taking a page away: how long until no reader can use it any more.

use iotlb_proto::sync::{AtomicU64, Ordering};
use std::hint::{black_box, spin_loop};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::process::{Command, Stdio};

use iotlb_client::Access;
use iotlb_proto::epoch;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::SLOT_CAPACITY;
use iotlb_proto::table::{TableConfig, TableReader, TableWriter};
use iotlb_proto::worker::WorkerSegment;

use super::place::Place;
use super::{Outcome, median_ns, time_ns};
use crate::bench::measure::{Contestant, Shuffle, interleave};
use crate::bench::peers::PAGE;
use crate::bench::report::{Row, Target};
use crate::processors::bind;

/// Set in the reading process: its two descriptors and its processor.
const READER: &str = "IOTLB_BENCH_DRAIN_READER";
const TABLE_SIZE: u64 = 1 << 20;
const INCARNATION: u64 = 1;
/// Live pages.
const PAGES: u64 = 2_048;
/// Lookups under one pin, as a datapath does them.
const BURST: u64 = 32;
/// Pages taken away.
const TAKES: u64 = 20_000;
/// Workers whose idle readers are looked at, 64 a worker.
const WORKERS: usize = 16;

/// Adds the rows.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place) -> Outcome {
    eprintln!("daemon: grace periods");
    bind(place.asker);
    let (mut table, table_fd) = TableWriter::create(&TableConfig { size: TABLE_SIZE, generation: 1 })?;
    let table_size = rustix::fs::fstat(&table_fd)?.st_size;
    for page in 0..PAGES {
        table.insert(page_at(page), page * PAGE, Access::READ_WRITE)?;
    }
    let (segment, segment_fd) = WorkerSegment::create(INCARNATION)?;
    for fd in [&table_fd, &segment_fd] {
        // For the reading process.
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    let cpu = place.answerer.map_or(-1, |cpu| i64::try_from(cpu).unwrap_or(-1));
    let mut child = Command::new(std::env::current_exe()?)
        .arg("daemon")
        .env(READER, format!("{} {} {table_size} {cpu}", table_fd.as_raw_fd(), segment_fd.as_raw_fd()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdout.as_mut().ok_or("no pipe")?.read_exact(&mut [0])?;
    let mut drains = Vec::new();
    for n in 0..TAKES {
        let page = page_at(n % PAGES);
        let (ns, ()) = time_ns(|| {
            table.remove(page);
            while let Some(epoch) = table.begin_grace() {
                while !segment.is_drained(epoch) {
                    spin_loop();
                }
                table.grace_completed(epoch);
            }
        });
        drains.push(ns);
        table.insert(page, n % PAGES * PAGE, Access::READ_WRITE)?;
    }
    drop(child.stdin.take());
    child.wait()?;
    let reader = TableReader::open(table_fd.as_fd(), u64::try_from(table_size)?)?;
    let (slot, mut shuffle) = (AtomicU64::new(0), Shuffle::new(9));
    let burst_ns = interleave(
        31,
        &mut [Contestant::new("burst", |count| {
            for _ in 0..count {
                burst(&reader, &slot, &mut shuffle);
            }
        })],
    )[0]
    .median_ns;
    let transfer_ns = transfer_ns(place);
    let floor = burst_ns + 2.0 * transfer_ns;
    rows.push(Row::new(
        "invalidate and drain, another process reads in bursts of 32",
        "ns",
        median_ns(&mut drains),
        floor,
        "1 burst + 2 line transfers",
        Target::CostsAtMost(1.0),
    ));
    rows.push(Row::new(
        "a cache line's way to another processor",
        "ns",
        transfer_ns,
        burst_ns,
        "1 burst",
        Target::None,
    ));
    idle_readers(rows)
}

/// The scan of 1,024 idle readers.
fn idle_readers(rows: &mut Vec<Row>) -> Outcome {
    let mut segments = Vec::new();
    for incarnation in (1..).take(WORKERS) {
        let (segment, _fd) = WorkerSegment::create(incarnation)?;
        segment.raise_high_water(SLOT_CAPACITY as u64);
        segments.push(segment);
    }
    let scan = interleave(
        31,
        &mut [Contestant::new("scan", |count| {
            for _ in 0..count {
                black_box(segments.iter().all(|segment| segment.is_drained(black_box(2))));
            }
        })],
    )[0]
    .median_ns;
    let readers = (WORKERS * SLOT_CAPACITY) as f64;
    rows.push(Row::new(
        "grace scan, per idle reader of 1,024",
        "ns",
        scan / readers,
        10.0,
        "the limit of 10 ns",
        Target::CostsAtMost(1.0),
    ));
    Ok(())
}

fn page_at(page: u64) -> IovaRange {
    IovaRange::page_of((1 << 30) + page * PAGE)
}

/// One pin with its lookups.
fn burst(table: &TableReader, slot: &iotlb_proto::sync::AtomicU64, shuffle: &mut Shuffle) {
    epoch::pin(slot, &table.header().epoch.word);
    for _ in 0..BURST {
        black_box(table.lookup_leaf(page_at(shuffle.below(PAGES)).first()));
    }
    epoch::unpin(slot);
}

/// Half a round trip of one word between two processors.
fn transfer_ns(place: &Place) -> f64 {
    const TRIPS: u64 = 20_000;
    let word = AtomicU64::new(0);
    let mut times = Vec::new();
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
    median_ns(&mut times)
}

/// The reading process: never returns when this is one.
pub(super) fn reader_if_child() -> Outcome {
    let Ok(text) = std::env::var(READER) else { return Ok(()) };
    let numbers: Vec<i64> = text.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [table, segment, size, cpu] = numbers[..] else { return Err("not four numbers".into()) };
    bind(usize::try_from(cpu).ok());
    let reader = TableReader::open(inherited(table)?, u64::try_from(size)?)?;
    let segment = WorkerSegment::open(inherited(segment)?, INCARNATION)?;
    segment.raise_high_water(1);
    std::thread::spawn(|| {
        // The parent's end, in either sense.
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let mut out = std::io::stdout();
    out.write_all(b".")?;
    out.flush()?;
    let mut shuffle = Shuffle::new(11);
    loop {
        burst(&reader, &segment.slots[0].word, &mut shuffle);
    }
}

fn inherited(fd: i64) -> Result<BorrowedFd<'static>, std::num::TryFromIntError> {
    let fd = RawFd::try_from(fd)?;
    // SAFETY: the parent left this descriptor open for this process, and nothing in it closes it.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
