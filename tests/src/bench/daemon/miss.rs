//! From a worker's miss to its answer, with a front-end that answers at once.
//!
//! The peers are the same chains with nothing in them but what the front-end does ([`hops`](super::hops)), so their
//! time is the sum of the hops, on this machine, with the same threads on the same processors: once with everybody
//! awake, and once with everybody asleep.
//!
//! A request for 32 pages may take as long as one miss and 31 UPDATEs of that front-end. Those are timed in blocks of
//! their own, where nobody waits for them: timed inside the request, they would go up with what they are to judge.

use std::time::Duration;

use iotlb_client::{Access, Reader};
use rustix::thread::CpuSet;

use super::front_end::{BATCH, FrontEnd};
use super::hops::{Polling, Sleeping};
use super::place::Place;
use super::service::{IOVA_BASE, Service};
use super::{Outcome, median_ns, time_ns};
use crate::bench::peers::PAGE;
use crate::bench::report::{Row, Target};
use crate::processors::{bind, restore};

/// Blocks of each contestant, in turn.
const BLOCKS: u64 = 21;
/// Misses in a block.
const BLOCK: u64 = 60;
/// The first of a block are not counted: everybody has to wake up.
const WARM_UP: u64 = 10;
/// Requests for 32 pages in a block.
const BATCHES: u64 = 6;
/// Pages of such a request.
const COLD_PAGES: u64 = BATCH as u64;
/// Misses that find everybody asleep.
const COLD: u64 = 300;
/// Pause before each of them: longer than anybody polls.
const COLD_PAUSE: Duration = Duration::from_micros(600);
/// Longest wait for a miss.
const TIMEOUT_MS: u32 = 10_000;
/// Pages between two requests, so that no two share anything.
const GAP: u64 = 2 * COLD_PAGES;

/// Adds the rows.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place, everywhere: &CpuSet) -> Outcome {
    eprintln!("daemon: misses");
    // A daemon that finds itself confined to one processor does not poll, so it is started unconfined.
    restore(everywhere);
    let service = Service::start(place.answerer, false)?;
    bind(place.asker);
    let (main, back_end) = (service.main.try_clone()?, service.back_end.try_clone()?);
    let front_end = FrontEnd::spawn(main, back_end, service.user_address, place.answerer);
    let (polling, sleeping) = (Polling::start(place.answerer)?, Sleeping::start(place.answerer)?);
    let mut reader = service.worker.reader()?;
    let mut at = IOVA_BASE;
    let mut next = || {
        at += GAP * PAGE;
        at
    };
    let (mut ours, mut hops) = (Vec::new(), Vec::new());
    let (mut cold, mut piped, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let (mut updates, mut bare_updates) = (Vec::new(), Vec::new());
    for _ in 0..BLOCKS {
        for n in 0..BLOCK {
            let ns = resolve(&mut reader, next(), 1)?;
            if n >= WARM_UP {
                ours.push(ns);
            }
        }
        for (pipelined, times) in [(false, &mut cold), (true, &mut piped)] {
            front_end.pipelines(pipelined);
            resolve(&mut reader, next(), 1)?;
            for _ in 0..BATCHES {
                times.push(resolve(&mut reader, next(), COLD_PAGES)?);
            }
        }
        front_end.pipelines(false);
        front_end.plain_updates(&mut updates, BATCHES, &mut next)?;
        polling.awake(true);
        for n in 0..BLOCK {
            let (ns, done) = time_ns(|| polling.ask(1));
            done?;
            if n >= WARM_UP {
                hops.push(ns);
            }
        }
        for _ in 0..BATCHES {
            let (ns, done) = time_ns(|| polling.ask(BATCH));
            done?;
            bare.push(ns);
        }
        polling.plain_updates(&mut bare_updates, BATCHES)?;
        polling.awake(false);
    }
    let (mut cold_ours, mut cold_hops, mut cold_spun) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..COLD {
        // Sleeping is what is measured: everybody is to be asleep when the miss comes.
        std::thread::sleep(COLD_PAUSE);
        cold_ours.push(resolve(&mut reader, next(), 1)?);
        for (spins, times) in [(false, &mut cold_hops), (true, &mut cold_spun)] {
            std::thread::sleep(COLD_PAUSE);
            let (ns, done) = time_ns(|| sleeping.ask(spins));
            done?;
            times.push(ns);
        }
    }
    drop(reader);
    drop(service);
    front_end.join()?;
    polling.end()?;
    sleeping.end();
    let (one, updates_ns) = (median_ns(&mut ours), median_ns(&mut updates));
    let (cold, piped, hops) = (median_ns(&mut cold), median_ns(&mut piped), median_ns(&mut hops));
    let (cold_one, cold_hops) = (median_ns(&mut cold_ours), median_ns(&mut cold_hops));
    let cold_spun = median_ns(&mut cold_spun);
    let limit = Target::CostsAtMost(1.2);
    let name = "one miss, worker to worker, everybody asleep";
    rows.push(Row::new(name, "ns", cold_one, cold_hops, "the same hops, blocking", limit));
    // A client that is used to answers this soon spins for them, which the hops of the goal do not: what our own code
    // takes shows against those that do.
    let name = "the same, against an asker that spins as well";
    rows.push(Row::new(name, "ns", cold_one, cold_spun, "the same hops, the asker spins", Target::None));
    // For context: the goal for hops that poll is one of `--busy-poll` on three processors.
    let name = "one miss after the other, worker to worker";
    rows.push(Row::new(name, "ns", one, hops, "the same hops, polling", Target::None));
    let sum = one + updates_ns;
    rows.push(Row::new(
        "32 cold pages in one request",
        "ns",
        cold,
        sum,
        "1 miss + 31 UPDATEs",
        Target::CostsAtMost(1.0),
    ));
    // For context: the same where the back-end has nothing to do with a page, which is what the messages take, however
    // good a back-end is.
    let (bare, sum) = (median_ns(&mut bare), hops + median_ns(&mut bare_updates));
    let name = "the same, against nothing but messages";
    rows.push(Row::new(name, "ns", cold, bare, "32 pages, no back-end", Target::None));
    let name = "nothing but messages, against theirs";
    rows.push(Row::new(name, "ns", bare, sum, "its 1 miss + 31 UPDATEs", Target::None));
    let name = "32 cold pages, a front-end that pipelines";
    rows.push(Row::new(name, "ns", piped, one, "1 miss", Target::CostsAtMost(3.0)));
    Ok(())
}

/// How long `pages` pages that nobody has asked for take.
fn resolve(reader: &mut Reader, iova: u64, pages: u64) -> Result<f64, Box<dyn std::error::Error>> {
    let (ns, result) = time_ns(|| reader.resolve(iova, pages * PAGE, Access::READ, TIMEOUT_MS));
    result?;
    Ok(ns)
}
