//! A front-end's thread that answers every miss at once, blocking. The daemon has it, and so has the bare chain that
//! polls ([`hops`](super::hops)).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use iotlb_proto::sync::{AtomicBool, Ordering};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, MessageHeader};

use super::service::{ACK_LEN, IOTLB_LEN, answer, round_trip, update};
use super::{Outcome, time_ns};
use crate::bench::peers::PAGE;
use crate::processors::bind;

/// Misses that come together.
pub(super) const BATCH: usize = 32;
/// Misses read at once.
const MISSES_MAX: usize = 2 * BATCH;

/// The thread. It ends with the channels.
#[derive(Debug)]
pub(super) struct FrontEnd {
    pipelines: Arc<AtomicBool>,
    thread: JoinHandle<()>,
    /// Held from an UPDATE to its acknowledgement.
    main: Arc<Mutex<UnixStream>>,
    user_address: u64,
    cpu: Option<usize>,
}

impl FrontEnd {
    /// Starts it on `cpu`.
    pub(super) fn spawn(main: UnixStream, back_end: UnixStream, user_address: u64, cpu: Option<usize>) -> FrontEnd {
        let pipelines = Arc::new(AtomicBool::new(false));
        let main = Arc::new(Mutex::new(main));
        let (flag, its_main) = (Arc::clone(&pipelines), Arc::clone(&main));
        let thread = std::thread::spawn(move || {
            bind(cpu);
            // An Err is the end of the service.
            let _ = answer_misses(&its_main, &back_end, user_address, &flag);
        });
        FrontEnd { pipelines, thread, main, user_address, cpu }
    }

    /// Whether from now on it sends the UPDATEs of all misses that came together, then waits for all acknowledgements.
    pub(super) fn pipelines(&self, pipelines: bool) {
        // Relaxed: the misses come later, over a socket.
        self.pipelines.store(pipelines, Ordering::Relaxed);
    }

    /// Adds how long the UPDATEs behind the first of a batch take when nobody has asked for them, in nanoseconds: one
    /// after the other, each of a page of its own, from `next` on. It is what such a front-end always needs, so it is
    /// measured where no miss is in the way, but on the same processor, by a thread that waits as the front-end's.
    ///
    /// # Errors
    /// The connection is over, or an UPDATE was refused.
    pub(super) fn plain_updates(
        &self,
        times: &mut Vec<f64>,
        batches: u64,
        mut next: impl FnMut() -> u64 + Send,
    ) -> Outcome {
        let work = || -> std::io::Result<()> {
            bind(self.cpu);
            // An answer comes before the front-end has read the acknowledgement that belongs to it.
            let main = self.main.lock().unwrap_or_else(PoisonError::into_inner);
            for batch in 0..=batches {
                let iova = next();
                let updates: Vec<_> = (0..BATCH as u64).map(|n| update(iova + n * PAGE, self.user_address)).collect();
                // Without the first: that one is part of the miss.
                round_trip(&main, &updates[0])?;
                let (ns, done) = time_ns(|| updates[1..].iter().try_for_each(|update| round_trip(&main, update)));
                done?;
                // The other side had to wake up for the first batch.
                if batch > 0 {
                    times.push(ns);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| scope.spawn(work).join()).map_err(|_| "the plain UPDATEs panicked")??;
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It panicked.
    pub(super) fn join(self) -> Outcome {
        Ok(self.thread.join().map_err(|_| "the front-end panicked")?)
    }
}

fn answer_misses(
    main: &Mutex<UnixStream>,
    mut back_end: &UnixStream,
    user_address: u64,
    pipelines: &AtomicBool,
) -> std::io::Result<()> {
    let mut bytes = vec![0; MISSES_MAX * IOTLB_LEN];
    let mut filled = 0;
    let mut updates: Vec<[u8; IOTLB_LEN]> = Vec::with_capacity(MISSES_MAX);
    let mut acks = vec![0; MISSES_MAX * ACK_LEN];
    loop {
        match back_end.read(&mut bytes[filled..])? {
            0 => return Ok(()),
            count => filled += count,
        }
        let (misses, _) = bytes[..filled].as_chunks::<IOTLB_LEN>();
        updates.clear();
        updates.extend(misses.iter().filter_map(|miss| answer(miss, user_address)));
        let mut main = main.lock().unwrap_or_else(PoisonError::into_inner);
        if pipelines.load(Ordering::Relaxed) {
            main.write_all(updates.as_flattened())?;
            main.read_exact(&mut acks[..updates.len() * ACK_LEN])?;
        } else {
            for update in &updates {
                main.write_all(update)?;
                main.read_exact(&mut acks[..ACK_LEN])?;
            }
        }
        drop(main);
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
