//! Two processes at once: what a lookup loses when another process looks up in the same table.

use std::time::Instant;

use super::{Outcome, Run, hit, visits};
use crate::bench::child::{Helper, TURN, order};
use crate::bench::measure::{median, thread_time};
use crate::bench::report::{Row, Target};
use crate::bench::rig::Rig;
use crate::processors::{self, bind};

/// Entries in the table.
const ENTRIES: u64 = 2_048;
/// Lookups in one round: some milliseconds.
const LOOKUPS: u64 = 1 << 20;
/// Loads in one round.
const LOADS: u64 = 1 << 22;

/// Measures the group.
///
/// # Errors
/// The service or the neighbour does not start, or the neighbour did nothing.
pub fn run(run: &mut Run) -> Outcome {
    eprintln!("neighbour: two processes at once");
    let Some((near, far)) = processors::first_two() else {
        eprintln!("neighbour: LEFT OUT: two processes at once take two processors, and here is one");
        return Ok(());
    };
    let mut rig = Rig::start()?;
    let pages = rig.fill(ENTRIES)?;
    let former = processors::current();
    bind(Some(near));
    let result = together(run, &rig, &visits(&pages), far);
    // What is measured after this runs where it likes.
    processors::restore(&former);
    result
}

/// The calling thread is bound; the neighbour is to run on `cpu`.
fn together(run: &mut Run, rig: &Rig, visits: &[u64], cpu: usize) -> Outcome {
    let reader = rig.worker.reader()?;
    let mut neighbour = Helper::neighbour(&rig.control_socket(), ENTRIES, Some(cpu))?;
    let mut at = 0;
    let mut lookups = || at = hit::bursts(&reader, visits, at, LOOKUPS);
    let loads = || hit::l1_chain(LOADS);
    let (mut ours, mut l1) = (Vec::new(), Vec::new());
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    lookups();
    for _ in 0..run.rounds() {
        // Each pair one after the other, so that what else the machine does hits both.
        let (first, second) = pair(&mut neighbour, order::LOOKUPS, LOOKUPS, &mut lookups)?;
        ours.push(second / first);
        alone.push(first);
        together.push(second);
        let (first, second) = pair(&mut neighbour, order::LOADS, LOADS, loads)?;
        l1.push(second / first);
    }
    let (alone, together) = (median(alone), median(together));
    let name = "random hit, 2048 entries, a second process looks up too";
    run.rows.push(Row::new(name, "ns", together, alone, "ours, alone", Target::None));
    let name = "factor lost to a neighbour, lookups against loads";
    run.rows.push(Row::new(name, "x", median(ours), median(l1), "L1 loads in both", Target::CostsAtMost(1.1)));
    Ok(())
}

/// `work`, which is `count` operations, alone, and while the neighbour does its `order`: nanoseconds an operation.
fn pair(
    neighbour: &mut Helper,
    order: u8,
    count: u64,
    mut work: impl FnMut(),
) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let mut timed = || {
        let start = thread_time();
        work();
        thread_time().saturating_sub(start).as_secs_f64() * 1e9 / count as f64
    };
    let until = Instant::now() + TURN;
    while Instant::now() < until {
        let alone = timed();
        neighbour.set_to_work(order)?;
        let before = neighbour.count()?;
        let together = timed();
        let done = neighbour.count()? - before;
        neighbour.order(order::REST)?;
        // Where somebody else had its processor all the time, nobody was in the way, and that is no figure.
        if done > 0 {
            return Ok((alone, together));
        }
    }
    Err("the neighbour got no turn while it was looked at".into())
}
