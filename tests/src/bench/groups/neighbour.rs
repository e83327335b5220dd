//! Two processes at once: what a lookup loses when another process looks up in the same table.

use super::{Outcome, Run, hit, visits};
use crate::bench::child::{Helper, order};
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
    let mut lookups = |order: u8, neighbour: &mut Helper| -> Result<f64, Box<dyn std::error::Error>> {
        neighbour.order(order)?;
        let start = thread_time();
        at = hit::bursts(&reader, visits, at, LOOKUPS);
        Ok(thread_time().saturating_sub(start).as_secs_f64() * 1e9 / LOOKUPS as f64)
    };
    let loads = |order: u8, neighbour: &mut Helper| -> Result<f64, Box<dyn std::error::Error>> {
        neighbour.order(order)?;
        let start = thread_time();
        hit::l1_chain(LOADS);
        Ok(thread_time().saturating_sub(start).as_secs_f64() * 1e9 / LOADS as f64)
    };
    let (mut ours, mut l1) = (Vec::new(), Vec::new());
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    let mut done = [0; 2];
    lookups(order::REST, &mut neighbour)?;
    for _ in 0..run.rounds() {
        // Each pair one after the other, so that what else the machine does hits both.
        let first = lookups(order::REST, &mut neighbour)?;
        let before = neighbour.count()?;
        let second = lookups(order::LOOKUPS, &mut neighbour)?;
        done[0] += neighbour.count()? - before;
        ours.push(second / first);
        alone.push(first);
        together.push(second);
        let first = loads(order::REST, &mut neighbour)?;
        let before = neighbour.count()?;
        let second = loads(order::LOADS, &mut neighbour)?;
        done[1] += neighbour.count()? - before;
        l1.push(second / first);
    }
    neighbour.order(order::REST)?;
    if done.contains(&0) {
        return Err(format!("the neighbour has done {done:?} lookups and loads: nobody was in the way").into());
    }
    let (alone, together) = (median(alone), median(together));
    let name = "random hit, 2048 entries, a second process looks up too";
    run.rows.push(Row::new(name, "ns", together, alone, "ours, alone", Target::None));
    let name = "factor lost to a neighbour, lookups against loads";
    run.rows.push(Row::new(name, "x", median(ours), median(l1), "L1 loads in both", Target::CostsAtMost(1.1)));
    Ok(())
}
