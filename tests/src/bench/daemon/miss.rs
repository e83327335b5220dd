//! From a worker's miss to its answer, with a front-end that answers at once.
//!
//! The peers are the same chains with nothing in them but what the front-end does ([`hops`](super::hops)), so their
//! time is the sum of the hops, on this machine, with the same threads on the same processors: once with everybody
//! awake, and once with everybody asleep.

use iotlb_proto::sync::{AtomicBool, Ordering};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use iotlb_client::{Access, Reader};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, MessageHeader};
use rustix::thread::CpuSet;

use super::hops::{Polling, Sleeping};
use super::place::Place;
use super::service::{ACK_LEN, IOTLB_LEN, IOVA_BASE, Service, answer};
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
const COLD_PAGES: u64 = 32;
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
    let pipelines = Arc::new(AtomicBool::new(false));
    let (times_in, update_times) = channel();
    let front_end = spawn_front_end(&service, place.answerer, &pipelines, times_in)?;
    let (polling, sleeping) = (Polling::start(place.answerer)?, Sleeping::start(place.answerer)?);
    let mut reader = service.worker.reader()?;
    let mut at = IOVA_BASE;
    let mut next = || {
        at += GAP * PAGE;
        at
    };
    let (mut ours, mut hops) = (Vec::new(), Vec::new());
    let (mut cold, mut piped) = (Vec::new(), Vec::new());
    for _ in 0..BLOCKS {
        for n in 0..BLOCK {
            let ns = resolve(&mut reader, next(), 1)?;
            if n >= WARM_UP {
                ours.push(ns);
            }
        }
        for (pipelined, times) in [(false, &mut cold), (true, &mut piped)] {
            // Relaxed: the misses come later, over a socket.
            pipelines.store(pipelined, Ordering::Relaxed);
            resolve(&mut reader, next(), 1)?;
            for _ in 0..BATCHES {
                times.push(resolve(&mut reader, next(), COLD_PAGES)?);
            }
        }
        pipelines.store(false, Ordering::Relaxed);
        polling.awake(true);
        for n in 0..BLOCK {
            let (ns, ()) = time_ns(|| polling.ask());
            if n >= WARM_UP {
                hops.push(ns);
            }
        }
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
    front_end.join().map_err(|_| "the front-end panicked")?;
    polling.end();
    sleeping.end();
    let mut updates: Vec<f64> = update_times.try_iter().collect();
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

/// The front-end's thread: every miss is answered at once. `times` hears how long the UPDATEs behind the first take
/// when [`COLD_PAGES`] are answered one by one.
fn spawn_front_end(
    service: &Service,
    cpu: Option<usize>,
    pipelines: &Arc<AtomicBool>,
    times: Sender<f64>,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    let (main, back_end) = (service.main.try_clone()?, service.back_end.try_clone()?);
    let (pipelines, user_address) = (Arc::clone(pipelines), service.user_address);
    Ok(std::thread::spawn(move || {
        bind(cpu);
        // An Err is the end of the service.
        let _ = answer_misses(&main, &back_end, user_address, &pipelines, &times);
    }))
}

fn answer_misses(
    mut main: &UnixStream,
    mut back_end: &UnixStream,
    user_address: u64,
    pipelines: &AtomicBool,
    times: &Sender<f64>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 64 * IOTLB_LEN];
    let mut filled = 0;
    let mut updates: Vec<[u8; IOTLB_LEN]> = Vec::with_capacity(64);
    let mut acks = vec![0; 64 * ACK_LEN];
    loop {
        match back_end.read(&mut bytes[filled..])? {
            0 => return Ok(()),
            count => filled += count,
        }
        let (misses, _) = bytes[..filled].as_chunks::<IOTLB_LEN>();
        updates.clear();
        updates.extend(misses.iter().filter_map(|miss| answer(miss, user_address)));
        if pipelines.load(Ordering::Relaxed) {
            main.write_all(updates.as_flattened())?;
            main.read_exact(&mut acks[..updates.len() * ACK_LEN])?;
        } else {
            let mut start = None;
            for update in &updates {
                main.write_all(update)?;
                main.read_exact(&mut acks[..ACK_LEN])?;
                // Without the first: that one is part of the miss.
                start.get_or_insert_with(Instant::now);
            }
            if let Some(start) = start.filter(|_| updates.len() as u64 == COLD_PAGES) {
                // An Err means that nobody wants to know.
                let _ = times.send(start.elapsed().as_secs_f64() * 1e9);
            }
        }
        // Only those that asked for one get a reply.
        let asked = misses.iter().filter(|miss| needs_reply(&miss[..])).count();
        let whole = misses.len() * IOTLB_LEN;
        for _ in 0..asked {
            let mut reply = [0; ACK_LEN];
            reply[..HEADER_LEN].copy_from_slice(&MessageHeader::reply(BACKEND_IOTLB).encode());
            back_end.write_all(&reply)?;
        }
        bytes.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

/// Whether a message asks for a reply.
fn needs_reply(message: &[u8]) -> bool {
    message.first_chunk::<HEADER_LEN>().is_some_and(|header| MessageHeader::decode(header).needs_reply())
}
