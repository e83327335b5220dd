//! A front-end's thread that answers every miss at once, blocking. The daemon has it, and so has the bare chain that
//! polls ([`hops`](super::hops)).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use iotlb_proto::sync::{AtomicBool, Ordering};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, MessageHeader};

use super::service::{ACK_LEN, IOTLB_LEN, answer};
use crate::processors::bind;

/// Misses that come together whose UPDATEs are timed.
pub(super) const BATCH: usize = 32;
/// Misses read at once.
const MISSES_MAX: usize = 2 * BATCH;

/// The thread. It ends with the channels.
#[derive(Debug)]
pub(super) struct FrontEnd {
    pipelines: Arc<AtomicBool>,
    times: Receiver<f64>,
    thread: JoinHandle<()>,
}

impl FrontEnd {
    /// Starts it on `cpu`.
    pub(super) fn spawn(main: UnixStream, back_end: UnixStream, user_address: u64, cpu: Option<usize>) -> FrontEnd {
        let pipelines = Arc::new(AtomicBool::new(false));
        let (sender, times) = channel();
        let flag = Arc::clone(&pipelines);
        let thread = std::thread::spawn(move || {
            bind(cpu);
            // An Err is the end of the service.
            let _ = answer_misses(&main, &back_end, user_address, &flag, &sender);
        });
        FrontEnd { pipelines, times, thread }
    }

    /// Whether from now on it sends the UPDATEs of all misses that came together, then waits for all acknowledgements.
    pub(super) fn pipelines(&self, pipelines: bool) {
        // Relaxed: the misses come later, over a socket.
        self.pipelines.store(pipelines, Ordering::Relaxed);
    }

    /// Waits for its end. Returns how long the UPDATEs behind the first took each time that [`BATCH`] misses were
    /// answered one by one, in nanoseconds.
    ///
    /// # Errors
    /// It panicked.
    pub(super) fn join(self) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
        self.thread.join().map_err(|_| "the front-end panicked")?;
        Ok(self.times.try_iter().collect())
    }
}

fn answer_misses(
    mut main: &UnixStream,
    mut back_end: &UnixStream,
    user_address: u64,
    pipelines: &AtomicBool,
    times: &Sender<f64>,
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
            if let Some(start) = start.filter(|_| updates.len() == BATCH) {
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
