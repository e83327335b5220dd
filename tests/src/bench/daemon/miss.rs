//! From a worker's miss to its answer, with a front-end that answers at once.
//!
//! The peer is the same chain without anything in it: a word from the asker to the answerer, 52 bytes over a socket to
//! a blocked thread, 44 bytes back, a word to the asker. So its time is the sum of the hops, on this machine, with the
//! same threads on the same processors.

use iotlb_proto::sync::{AtomicBool, AtomicU32, Ordering};
use std::hint::spin_loop;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use iotlb_client::{Access, Reader};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, Iotlb, MessageHeader};
use rustix::net::{RecvFlags, recv};
use rustix::thread::{CpuSet, futex};

use super::place::{Place, bind, restore};
use super::service::{ACK_LEN, IOTLB_LEN, IOVA_BASE, Service, update};
use super::{Outcome, median_ns, time_ns};
use crate::bench::peers::PAGE;
use crate::bench::report::{Row, Target};

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
/// How long the client spins before it sleeps; the peer's asker does the same.
const SPIN: Duration = Duration::from_micros(20);
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
    let chain = Chain::start(place.answerer)?;
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
        chain.awake(true);
        for n in 0..BLOCK {
            let (ns, ()) = time_ns(|| chain.ask());
            if n >= WARM_UP {
                hops.push(ns);
            }
        }
        chain.awake(false);
    }
    drop(reader);
    drop(service);
    front_end.join().map_err(|_| "the front-end panicked")?;
    chain.end();
    let mut updates: Vec<f64> = update_times.try_iter().collect();
    let (one, update_ns) = (median_ns(&mut ours), median_ns(&mut updates));
    let (cold, piped, hops) = (median_ns(&mut cold), median_ns(&mut piped), median_ns(&mut hops));
    let limit = Target::CostsAtMost(1.2);
    rows.push(Row::new("one miss, worker to worker", "ns", one, hops, "the same hops, bare", limit));
    let sum = one + 31.0 * update_ns;
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

/// The front-end's thread: every miss is answered at once.
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
    let mut acks = vec![0; 64 * ACK_LEN];
    loop {
        match back_end.read(&mut bytes[filled..])? {
            0 => return Ok(()),
            count => filled += count,
        }
        let whole = filled - filled % IOTLB_LEN;
        let updates: Vec<[u8; IOTLB_LEN]> = bytes[..whole]
            .chunks_exact(IOTLB_LEN)
            .filter_map(|miss| Iotlb::decode(&miss[HEADER_LEN..]))
            .map(|miss| update(miss.iova & !(PAGE - 1), user_address))
            .collect();
        if pipelines.load(Ordering::Relaxed) {
            main.write_all(updates.as_flattened())?;
            main.read_exact(&mut acks[..updates.len() * ACK_LEN])?;
        } else {
            for update in &updates {
                let start = Instant::now();
                main.write_all(update)?;
                main.read_exact(&mut acks[..ACK_LEN])?;
                // An Err means that nobody wants to know.
                let _ = times.send(start.elapsed().as_secs_f64() * 1e9);
            }
        }
        // Only those that asked for one get a reply.
        let asked = bytes[..whole].chunks_exact(IOTLB_LEN).filter(|miss| needs_reply(miss)).count();
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

/// The bare chain.
struct Chain {
    shared: Arc<Words>,
    answerer: std::thread::JoinHandle<()>,
    front_end: std::thread::JoinHandle<()>,
}

/// What the asker and the answerer share, on lines of their own.
#[derive(Default)]
struct Words {
    asked: Line,
    answered: Line,
    sleeping: Line,
    state: Line,
}

#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU32);

/// The answerer sleeps.
const REST: u32 = 0;
/// It polls.
const AWAKE: u32 = 1;
/// It ends.
const END: u32 = 2;

impl Chain {
    fn start(cpu: Option<usize>) -> std::io::Result<Chain> {
        let shared = Arc::new(Words::default());
        let (near, far) = UnixStream::pair()?;
        let front_end = std::thread::spawn(move || {
            bind(cpu);
            let (mut far, mut miss) = (&far, [0; IOTLB_LEN]);
            // A MISS is as long as an UPDATE. An Err is the end.
            while far.read_exact(&mut miss).and_then(|()| far.write_all(&miss)).is_ok() {}
        });
        let words = Arc::clone(&shared);
        let answerer = std::thread::spawn(move || {
            bind(cpu);
            relay(&words, &near);
        });
        Ok(Chain { shared, answerer, front_end })
    }

    fn awake(&self, awake: bool) {
        self.shared.state.0.store(if awake { AWAKE } else { REST }, Ordering::Release);
        self.answerer.thread().unpark();
    }

    /// One chain from end to end, with the waiting of a client: spin, then sleep.
    fn ask(&self) {
        let words = &self.shared;
        let ticket = words.asked.0.load(Ordering::Relaxed).wrapping_add(1);
        words.asked.0.store(ticket, Ordering::Release);
        let spin_until = Instant::now() + SPIN;
        while words.answered.0.load(Ordering::Acquire) != ticket {
            if Instant::now() < spin_until {
                spin_loop();
                continue;
            }
            // Sequentially consistent, as the other side's pair: one of the two sees the other's store.
            words.sleeping.0.store(1, Ordering::SeqCst);
            if words.answered.0.load(Ordering::SeqCst) != ticket {
                // Every way to wake up is a reason to look again.
                let _ = futex::wait(&words.answered.0, futex::Flags::empty(), ticket.wrapping_sub(1), None);
            }
            words.sleeping.0.store(0, Ordering::Relaxed);
        }
    }

    fn end(self) {
        self.shared.state.0.store(END, Ordering::Release);
        self.answerer.thread().unpark();
        // A panic there has already been told on the terminal.
        let _ = (self.answerer.join(), self.front_end.join());
    }
}

/// The answerer: a word in, a message out, a message in, a word out; yields in between.
fn relay(words: &Words, stream: &UnixStream) {
    let mut message = [0; IOTLB_LEN];
    let mut taken = 0;
    loop {
        match words.state.0.load(Ordering::Acquire) {
            REST => {
                std::thread::park();
                continue;
            }
            AWAKE => {}
            _ => return,
        }
        let asked = words.asked.0.load(Ordering::Acquire);
        if asked != taken {
            taken = asked;
            let mut out = stream;
            if out.write_all(&message).is_err() {
                return;
            }
        }
        if recv(stream, &mut message[..], RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count > 0) {
            words.answered.0.store(taken, Ordering::SeqCst);
            if words.sleeping.0.load(Ordering::SeqCst) != 0 {
                // An Err cannot be: the word is mapped and aligned.
                let _ = futex::wake(&words.answered.0, futex::Flags::empty(), 1);
            }
        }
        std::thread::yield_now();
    }
}
