//! Many addresses in one call against one by one, in tables that no cache has anything of, and in those that were just
//! visited.

use std::hint::black_box;

use iotlb_client::{Access, Fault, Guard, Reader};

use super::{ACCESS_LEN, Outcome, Run};
use crate::bench::eviction::Eviction;
use crate::bench::measure::{Contestant, Shuffle, interleave, median, thread_time};
use crate::bench::peers::Page;
use crate::bench::report::{Row, Target};
use crate::bench::rig::Rig;

/// Addresses under one pin and in one call.
const BURST: usize = 32;
/// Entries that share a cache line.
const LINE_ENTRIES: u64 = 8;

/// Requests, as `translate_burst` takes them.
type Visits = Vec<(u64, u64)>;

/// Measures the group.
///
/// # Errors
/// The service does not stand.
pub fn run(run: &mut Run) -> Outcome {
    let mut rig = Rig::start()?;
    let eviction = Eviction::prepare();
    for entries in if run.quick { [1 << 10, 1 << 11] } else { [1 << 18, 1 << 20] } {
        eprintln!("burst: {entries} entries");
        let pages = rig.fill(entries)?;
        let reader = rig.worker.reader()?;
        cold(run, &reader, &pages, &eviction);
        warm(run, &reader, &pages);
    }
    Ok(())
}

fn visits(pages: &[Page], places: impl Iterator<Item = u64>) -> Visits {
    places.filter_map(|n| Some((pages.get(usize::try_from(n).ok()?)?.iova, ACCESS_LEN))).collect()
}

/// Every line of the table once, in no order, and nothing of it in a cache: each lookup waits for memory.
fn cold(run: &mut Run, reader: &Reader, pages: &[Page], eviction: &Eviction) {
    let entries = pages.len() as u64;
    let mut shuffle = Shuffle::new(42);
    let lines = shuffle.permutation(entries / LINE_ENTRIES);
    let visits = visits(pages, lines.into_iter().map(|line| line * LINE_ENTRIES + shuffle.below(LINE_ENTRIES)));
    let count = visits.len() as u64;
    let pass = |translate: fn(&Guard<'_>, &[(u64, u64)]) -> usize| {
        eviction.walk();
        let start = thread_time();
        in_bursts(reader, &visits, &mut 0, count, translate);
        thread_time().saturating_sub(start).as_secs_f64() * 1e9 / count as f64
    };
    let (mut bursts, mut singles) = (Vec::new(), Vec::new());
    for _ in 0..run.rounds() {
        bursts.push(pass(together));
        singles.push(pass(one_by_one));
    }
    let name = format!("translate_burst of 32, cold table of {entries} entries, an address");
    let (burst, single) = (median(bursts), median(singles));
    run.rows.push(Row::new(name, "ns", burst, single, "ours, one by one", Target::FasterAtLeast(1.0)));
}

/// Every page once, in no order, again and again.
fn warm(run: &mut Run, reader: &Reader, pages: &[Page]) {
    let entries = pages.len() as u64;
    let visits = visits(pages, Shuffle::new(42).permutation(entries).into_iter());
    // Far from each other: neither finds the lines that the other has just brought.
    let (mut at, mut at_burst) = (0, visits.len() / 2);
    let samples = interleave(
        run.rounds(),
        &mut [
            Contestant::new("translate_burst", |count| in_bursts(reader, &visits, &mut at_burst, count, together))
                .after(entries),
            Contestant::new("one by one", |count| in_bursts(reader, &visits, &mut at, count, one_by_one))
                .after(entries),
        ],
    );
    let [burst, single] = [0, 1].map(|n| samples[n].median_ns);
    let name = format!("the same, table of {entries} entries visited before");
    run.rows.push(Row::new(name, "ns", burst, single, "ours, one by one", Target::None));
}

fn in_bursts(
    reader: &Reader,
    visits: &[(u64, u64)],
    at: &mut usize,
    count: u64,
    translate: impl Fn(&Guard<'_>, &[(u64, u64)]) -> usize,
) {
    let mut sum = 0_usize;
    for _ in 0..count.div_ceil(BURST as u64) {
        if *at + BURST > visits.len() {
            *at = 0;
        }
        let guard = reader.pin().expect("the daemon lives");
        sum = sum.wrapping_add(translate(&guard, &visits[*at..*at + BURST]));
        *at += BURST;
    }
    black_box(sum);
}

fn together(guard: &Guard<'_>, burst: &[(u64, u64)]) -> usize {
    let mut out = [None; BURST];
    let whole = guard.translate_burst(burst, Access::READ, &mut out);
    assert_eq!(whole, burst.len(), "a miss among hits");
    out.iter().flatten().fold(0, |sum, segment| sum.wrapping_add(segment.as_ptr().addr()))
}

fn one_by_one(guard: &Guard<'_>, burst: &[(u64, u64)]) -> usize {
    let first = |&(iova, len)| -> Result<usize, Fault> {
        Ok(guard.translate(iova, len, Access::READ)?.next().map_or(0, |segment| segment.as_ptr().addr()))
    };
    burst.iter().fold(0, |sum, request| sum.wrapping_add(first(request).expect("a hit")))
}
