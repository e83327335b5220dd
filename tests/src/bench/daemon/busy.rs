//! One miss with `--busy-poll`: daemon, worker and front-end are awake.
//!
//! Worker and front-end work one after the other, so one thread plays both, and two processors do for what takes three
//! otherwise: nobody's turn is taken away. It asks, finds the MISS in its socket, answers it, and finds the answer in
//! its cell. The acknowledgement comes later and is not part of a miss.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use iotlb_client::{Access, Answer, Reader};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, MessageHeader};
use rustix::thread::CpuSet;

use super::echo::{Echo, Sleeps, Takes};
use super::place::Place;
use super::service::{ACK_LEN, IOTLB_LEN, IOVA_BASE, Service, receive_awake, round_trip_awake};
use super::{Outcome, median_ns, time_ns};
use crate::bench::peers::PAGE;
use crate::bench::report::{Row, Target};
use crate::processors::{bind, restore};

/// Blocks of each contestant, in turn. A daemon that never sleeps would take the processor from the echo, so each block
/// has a daemon of its own.
const BLOCKS: u64 = 11;
/// Misses and round trips in a block.
const BLOCK: u64 = 400;
/// The first of a block are not counted.
const WARM_UP: u64 = 40;
/// Pause between two misses.
const PAUSE: Duration = Duration::from_micros(15);
/// What a miss may take longer than a round trip, in nanoseconds.
const ALLOWANCE_NS: f64 = 2_000.0;

/// Adds the row.
pub(super) fn rows(rows: &mut Vec<Row>, place: &Place, everywhere: &CpuSet) -> Outcome {
    eprintln!("daemon: misses, busy polling");
    let echo = Echo::start(place.answerer, Sleeps::InReceive, Takes::First)?;
    let (mut misses, mut round_trips) = (Vec::new(), Vec::new());
    for _ in 0..BLOCKS {
        restore(everywhere);
        let service = Service::start(place.answerer, true)?;
        bind(place.asker);
        let mut reader = service.worker.reader()?;
        for n in 0..BLOCK {
            let (ns, done) = time_ns(|| miss(&service, &mut reader, IOVA_BASE + n * PAGE));
            done?;
            settle(&service)?;
            if n >= WARM_UP {
                misses.push(ns);
            }
        }
        drop(reader);
        let update = service.update(IOVA_BASE);
        drop(service);
        for n in 0..BLOCK {
            let (ns, done) = time_ns(|| round_trip_awake(&echo.near, &update));
            done?;
            if n >= WARM_UP {
                round_trips.push(ns);
            }
        }
    }
    echo.end()?;
    let limit = median_ns(&mut round_trips) + ALLOWANCE_NS;
    let name = "one miss, `--busy-poll`, nobody sleeps";
    rows.push(Row::new(name, "ns", median_ns(&mut misses), limit, "1 round trip + 2 us", Target::CostsAtMost(1.0)));
    Ok(())
}

/// One miss from end to end.
fn miss(service: &Service, reader: &mut Reader, iova: u64) -> Outcome {
    let mut ticket = reader.request(iova, PAGE, Access::READ)?;
    receive_awake(&service.back_end, &mut [0; IOTLB_LEN])?;
    let mut main: &UnixStream = &service.main;
    main.write_all(&service.update(iova))?;
    loop {
        match reader.poll(&mut ticket) {
            None => std::hint::spin_loop(),
            Some(Answer::Resolved) => return Ok(()),
            Some(other) => return Err(format!("a miss was answered {other:?}").into()),
        }
    }
}

/// Takes the acknowledgement, gives the reply that the miss asked for, and leaves the daemon time to take that in.
fn settle(service: &Service) -> Outcome {
    receive_awake(&service.main, &mut [0; ACK_LEN])?;
    let mut reply = [0; ACK_LEN];
    reply[..HEADER_LEN].copy_from_slice(&MessageHeader::reply(BACKEND_IOTLB).encode());
    let mut back_end: &UnixStream = &service.back_end;
    back_end.write_all(&reply)?;
    // What is measured is a miss that finds the daemon looking for one.
    let until = Instant::now() + PAUSE;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    Ok(())
}
