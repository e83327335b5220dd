//! The writer: what the daemon does to the table between two messages.

use std::hint::black_box;
use std::time::{Duration, Instant};

use iotlb_client::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::table::{TableConfig, TableWriter, TargetRemoval};

use super::{Outcome, Run, hit, visits};
use crate::bench::measure::{Shuffle, median, thread_time};
use crate::bench::peers::{PAGE, Page};
use crate::bench::report::{Row, Target};
use crate::bench::rig::{self, Rig};

/// Entries in the table while single ones come and go.
const SMALL: u64 = 2_048;
/// Entries inserted and then removed again between two looks at the clock; few, so that the table keeps its size.
const BATCH: usize = 64;
/// Batches in one round.
const BATCHES: usize = 256;
/// Longest that one slice of a removal may take, in microseconds: other devices wait that long.
const SLICE_MAX_US: f64 = 100.0;
/// Bytes of the tables used here.
const TABLE_SIZE: u64 = 32 << 20;

/// Measures the group.
///
/// # Errors
/// No memory for a table, or the service does not stand.
pub fn run(run: &mut Run) -> Outcome {
    one_entry(run)?;
    many_entries(run)
}

fn one_entry(run: &mut Run) -> Outcome {
    eprintln!("edit: one entry");
    let mut rig = Rig::start()?;
    let pages = rig.fill(SMALL)?;
    let visits = visits(&pages);
    let reader = rig.worker.reader()?;
    // Every other page is live, so no node of the tree is ever empty: that would be another price.
    let all = rig::pages(2 * SMALL);
    let every_other = |from: usize| -> Vec<Page> { all.iter().skip(from).step_by(2).copied().collect() };
    let mut writer = filled(&every_other(0))?;
    let mut absent = every_other(1);
    let order = Shuffle::new(9).permutation(absent.len() as u64);
    absent = order.iter().filter_map(|&n| absent.get(usize::try_from(n).ok()?).copied()).collect();
    let (mut inserts, mut removes, mut lookups, mut nothing) = (vec![], vec![], vec![], vec![]);
    let mut at = 0;
    for _ in 0..run.rounds() {
        for batch in absent.chunks_exact(BATCH).cycle().take(BATCHES) {
            let start = Instant::now();
            for page in batch {
                writer.insert(page_range(page), page.target, Access::READ_WRITE)?;
            }
            let inserted = Instant::now();
            for page in batch {
                black_box(writer.remove(page_range(page)));
            }
            let removed = Instant::now();
            for page in batch {
                black_box(writer.remove(page_range(page)));
            }
            // A batch is shorter than the processor-time clock can tell, so each counts alone: the median passes by
            // those that were interrupted.
            nothing.push(per(removed.elapsed(), BATCH));
            removes.push(per(removed - inserted, BATCH));
            inserts.push(per(inserted - start, BATCH));
        }
        let operations = BATCH * BATCHES;
        let start = thread_time();
        at = hit::bursts(&reader, &visits, at, operations as u64);
        lookups.push(per(thread_time().saturating_sub(start), operations));
    }
    let lookup = median(lookups);
    let mut push = |name: &str, ours, target| {
        let name = format!("{name}, table of {SMALL}");
        run.rows.push(Row::new(name, "ns", ours, lookup, "one random lookup", target));
    };
    push("insert one 4 KiB entry", median(inserts), Target::CostsAtMost(10.0));
    push("remove one 4 KiB entry", median(removes), Target::CostsAtMost(10.0));
    push("remove where nothing is", median(nothing), Target::None);
    Ok(())
}

fn many_entries(run: &mut Run) -> Outcome {
    let entries: u64 = if run.quick { 1 << 14 } else { 1 << 20 };
    eprintln!("edit: {entries} entries at once");
    let pages = rig::pages(entries);
    let (Some(first), Some(last)) = (pages.first(), pages.last()) else { return Ok(()) };
    // Ragged: the outermost entries stay, so no level above can be dropped whole.
    let inner = IovaRange::new(first.iova + PAGE, last.iova - 1).ok_or("a range")?;
    let (mut fill, mut all, mut ragged, mut refill, mut targets) = (vec![], vec![], vec![], vec![], vec![]);
    let (mut all_slice, mut targets_slice) = (vec![], vec![]);
    let count = pages.len();
    for _ in 0..run.rounds().min(5) {
        // A new table each time: nodes that were used before are cleared when they are used again.
        let start = thread_time();
        let mut writer = filled(&pages)?;
        fill.push(per(thread_time().saturating_sub(start), count));
        let whole = slices(&mut writer, |writer| {
            black_box(writer.clear());
            true
        });
        all.push(per(whole.sum, count));
        all_slice.push(per(whole.longest, 1) / 1e3);
        let mut writer = filled(&pages)?;
        let inside = slices(&mut writer, |writer| {
            black_box(writer.remove(inner));
            true
        });
        ragged.push(per(inside.sum, count));
        let start = thread_time();
        insert(&mut writer, &pages)?;
        refill.push(per(thread_time().saturating_sub(start), count));
        let mut writer = filled(&pages)?;
        let mut removal = TargetRemoval::new(0, u64::MAX);
        let region = slices(&mut writer, |writer| {
            black_box(writer.remove_targets(&mut removal));
            removal.is_done()
        });
        targets.push(per(region.sum, count));
        targets_slice.push(per(region.longest, 1) / 1e3);
    }
    let mut push = |name: &str, ours, target| {
        let name = format!("{name}, {entries} entries");
        run.rows.push(Row::new(name, "ns", ours, 1.0, "1 ns an entry", target));
    };
    push("insert in order of address", median(fill), Target::None);
    // Here is what clearing the nodes costs that a removal leaves as they are.
    push("insert again, nodes used before", median(refill), Target::None);
    push("remove all", median(all), Target::CostsAtMost(2.0));
    push("remove a range with ragged edges", median(ragged), Target::CostsAtMost(2.0));
    push("remove by target (a region goes)", median(targets), Target::CostsAtMost(2.0));
    let mut push = |name: &str, ours| {
        let name = format!("longest slice of {name}, {entries} entries");
        run.rows.push(Row::new(name, "us", ours, 1.0, "1 us", Target::CostsAtMost(SLICE_MAX_US)));
    };
    push("remove all", median(all_slice));
    push("remove by target", median(targets_slice));
    Ok(())
}

/// How long the slices of a removal took.
#[derive(Default)]
struct Slices {
    sum: Duration,
    longest: Duration,
}

/// Calls `remove` until it is done, completes the grace period, and has everything put away, as the daemon does.
fn slices(writer: &mut TableWriter, mut remove: impl FnMut(&mut TableWriter) -> bool) -> Slices {
    let mut slices = Slices::default();
    let mut timed = |step: &mut dyn FnMut() -> bool| {
        let start = thread_time();
        let goes_on = step();
        let time = thread_time().saturating_sub(start);
        slices.sum += time;
        slices.longest = slices.longest.max(time);
        goes_on
    };
    while timed(&mut || !remove(writer)) {}
    timed(&mut || {
        if let Some(epoch) = writer.begin_grace() {
            writer.grace_completed(epoch);
        }
        false
    });
    while timed(&mut || writer.tidy()) {}
    slices
}

fn page_range(page: &Page) -> IovaRange {
    IovaRange::page_of(page.iova)
}

/// A table with these pages, as the daemon writes it.
fn filled(pages: &[Page]) -> Result<TableWriter, Box<dyn std::error::Error>> {
    let (mut writer, _fd) = TableWriter::create(&TableConfig { size: TABLE_SIZE, generation: 1 })?;
    insert(&mut writer, pages)?;
    Ok(writer)
}

fn insert(writer: &mut TableWriter, pages: &[Page]) -> Outcome {
    for page in pages {
        writer.insert(page_range(page), page.target, Access::READ_WRITE)?;
    }
    Ok(())
}

fn per(time: Duration, operations: usize) -> f64 {
    time.as_secs_f64() * 1e9 / operations as f64
}
