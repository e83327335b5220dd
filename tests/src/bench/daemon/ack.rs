//! How long the front-end waits for an acknowledgement, against a bare echo.

use std::time::Duration;

use rustix::thread::CpuSet;

use super::echo::{Echo, Sleeps, Takes};
use super::place::Place;
use super::service::{IOVA_BASE, Service, invalidate, round_trip, round_trip_awake};
use super::{Outcome, median_ns, time_ns};
use crate::bench::peers::PAGE;
use crate::bench::report::{Row, Target};
use crate::processors::{bind, restore};

/// Blocks of each contestant, in turn.
const BLOCKS: u64 = 41;
/// Messages in a block.
const BLOCK: u64 = 200;
/// The first of a block are not counted: who answers them has to wake up.
const WARM_UP: u64 = 20;
/// Messages that find the other side asleep.
const COLD: u64 = 400;
/// Pause before each of them: longer than anybody polls.
const COLD_PAUSE: Duration = Duration::from_micros(600);

/// Adds the rows.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place, everywhere: &CpuSet) -> Outcome {
    eprintln!("daemon: acknowledgements");
    // A daemon that finds itself confined to one processor does not poll, so it is started unconfined.
    restore(everywhere);
    let service = Service::start(place.answerer, false)?;
    bind(place.asker);
    let peer = Echo::start(place.answerer, Sleeps::InReceive, Takes::First)?;
    let epoll_peer = Echo::start(place.answerer, Sleeps::InEpoll, Takes::First)?;
    let late_peer = Echo::start(place.answerer, Sleeps::InReceive, Takes::Last)?;
    let echo = &peer.near;
    let (mut updates, mut invalidates) = (Vec::new(), Vec::new());
    let (mut echoes, mut late_echoes) = (Vec::new(), Vec::new());
    let (mut awake, mut awake_invalidates, mut awake_echoes) = (Vec::new(), Vec::new(), Vec::new());
    for block in 0..BLOCKS {
        for n in 0..BLOCK {
            let iova = IOVA_BASE + (block % 16 * BLOCK + n) * PAGE;
            let (update_ns, done) = time_ns(|| round_trip(&service.main, &service.update(iova)));
            done?;
            let (invalidate_ns, done) = time_ns(|| round_trip(&service.main, &invalidate(iova)));
            done?;
            if n >= WARM_UP {
                updates.push(update_ns);
                invalidates.push(invalidate_ns);
            }
        }
        for (echo, times) in [(echo, &mut echoes), (&late_peer.near, &mut late_echoes)] {
            for n in 0..2 * BLOCK {
                let (echo_ns, done) = time_ns(|| round_trip(echo, &invalidate(IOVA_BASE)));
                done?;
                if n >= WARM_UP {
                    times.push(echo_ns);
                }
            }
        }
        // Pages that come and go, as above: an INVALIDATE of nothing would be less work.
        for n in 0..BLOCK {
            let iova = IOVA_BASE + n * PAGE;
            for (message, times) in [(service.update(iova), &mut awake), (invalidate(iova), &mut awake_invalidates)] {
                let (ns, done) = time_ns(|| round_trip_awake(&service.main, &message));
                done?;
                if n >= WARM_UP {
                    times.push(ns);
                }
            }
        }
        for n in 0..2 * BLOCK {
            let (ns, done) = time_ns(|| round_trip_awake(echo, &invalidate(IOVA_BASE)));
            done?;
            if n >= WARM_UP {
                awake_echoes.push(ns);
            }
        }
    }
    let (echo_ns, late_echo_ns) = (median_ns(&mut echoes), median_ns(&mut late_echoes));
    for (name, times) in [("UPDATE", &mut updates), ("INVALIDATE", &mut invalidates)] {
        let name = format!("{name} acknowledged, one after the other");
        rows.push(Row::new(name, "ns", median_ns(times), echo_ns, "echo, polling", Target::CostsAtMost(1.2)));
    }
    let name = "UPDATE, against an echo that takes as late as we do";
    let late_row = Row::new(name, "ns", median_ns(&mut updates), late_echo_ns, "echo, takes last", Target::None);
    rows.push(late_row);
    let awake_echo = median_ns(&mut awake_echoes);
    for (name, times) in [("UPDATE", &mut awake), ("INVALIDATE", &mut awake_invalidates)] {
        let (name, limit) = (format!("{name} acknowledged, nobody sleeps"), Target::CostsAtMost(1.2));
        rows.push(Row::new(name, "ns", median_ns(times), awake_echo, "echo, nobody sleeps", limit));
    }
    let (mut cold, mut cold_invalidates) = (Vec::new(), Vec::new());
    let (mut cold_echoes, mut cold_epoll) = (Vec::new(), Vec::new());
    for n in 0..COLD {
        let iova = IOVA_BASE + n * PAGE;
        let (update, invalidation) = (service.update(iova), invalidate(iova));
        for (stream, message, times) in [
            (&service.main, &update, &mut cold),
            (&service.main, &invalidation, &mut cold_invalidates),
            (echo, &invalidation, &mut cold_echoes),
            (&epoll_peer.near, &invalidation, &mut cold_epoll),
        ] {
            // Sleeping is what is measured: both sides are to be asleep when the message comes.
            std::thread::sleep(COLD_PAUSE);
            let (ns, done) = time_ns(|| round_trip(stream, message));
            done?;
            times.push(ns);
        }
    }
    let (cold, cold_epoll) = (median_ns(&mut cold), median_ns(&mut cold_epoll));
    // The goal is for the same wait mode: a daemon has more to wait for than one socket.
    for (name, ns) in [("UPDATE", cold), ("INVALIDATE", median_ns(&mut cold_invalidates))] {
        let (name, limit) = (format!("{name} acknowledged, now and then"), Target::CostsAtMost(1.2));
        rows.push(Row::new(name, "ns", ns, cold_epoll, "echo, asleep in epoll_wait", limit));
    }
    let name = "UPDATE now and then, against an echo for one socket";
    rows.push(Row::new(name, "ns", cold, median_ns(&mut cold_echoes), "echo, asleep in recv", Target::None));
    late_peer.end()?;
    epoll_peer.end()?;
    peer.end()
}
