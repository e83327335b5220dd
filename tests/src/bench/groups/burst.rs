//! Many addresses in one call against one by one, where the table is not in the first-level cache.

use std::hint::black_box;

use iotlb_client::{Access, Fault, Guard, Reader};

use super::{ACCESS_LEN, Outcome, Run};
use crate::bench::measure::{Contestant, Shuffle, interleave};
use crate::bench::report::{Row, Target};
use crate::bench::rig::Rig;

/// Addresses under one pin and in one call.
const BURST: usize = 32;

/// Measures the group.
///
/// # Errors
/// The service does not stand.
pub fn run(run: &mut Run) -> Outcome {
    let mut rig = Rig::start()?;
    for entries in if run.quick { [1 << 10, 1 << 11] } else { [1 << 18, 1 << 20] } {
        eprintln!("burst: {entries} entries");
        let pages = rig.fill(entries)?;
        // Every page once a round, in no order.
        let visits: Vec<(u64, u64)> = Shuffle::new(42)
            .permutation(entries)
            .into_iter()
            .filter_map(|n| Some((pages.get(usize::try_from(n).ok()?)?.iova, ACCESS_LEN)))
            .collect();
        let reader = rig.worker.reader()?;
        let (mut at, mut at_burst) = (0, 0);
        let samples = interleave(
            run.rounds(),
            &mut [
                Contestant::new("translate_burst", |count| in_bursts(&reader, &visits, &mut at_burst, count, together)),
                Contestant::new("one by one", |count| in_bursts(&reader, &visits, &mut at, count, one_by_one)),
            ],
        );
        let [burst, single] = [0, 1].map(|n| samples[n].median_ns);
        let name = format!("translate_burst of 32, {entries} entries, an address");
        run.rows.push(Row::new(name, "ns", burst, single, "ours, one by one", Target::FasterAtLeast(1.0)));
    }
    Ok(())
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
