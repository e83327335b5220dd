//! Which of the segment's miss cells this process uses, and for what.
//!
//! A cell is free, or owned by a [`Ticket`](super::Ticket), or abandoned: its ticket was dropped while the daemon
//! still had the request. An abandoned cell is free again once its answer has come.

use iotlb_proto::layout::worker::{CELL_CAPACITY, POSTED_WORDS};
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering};
use iotlb_proto::worker::{Answer, WorkerSegment};
use rustix::thread::futex;

/// Tickets are 24 bits wide: the cell's state word holds a code beside them.
const TICKET_MASK: u32 = (1 << 24) - 1;

/// Lock-free: threads that miss at the same time begin their search at different words.
#[derive(Debug)]
pub(crate) struct CellPool {
    /// A bit for every free cell.
    free: [AtomicU64; POSTED_WORDS],
    /// A bit for every abandoned cell.
    abandoned: [AtomicU64; POSTED_WORDS],
    /// The last ticket of each cell; changed by the cell's owner only.
    tickets: [AtomicU32; CELL_CAPACITY],
}

impl Default for CellPool {
    fn default() -> Self {
        CellPool {
            free: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            abandoned: std::array::from_fn(|_| AtomicU64::new(0)),
            tickets: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

impl CellPool {
    /// A cell, and the ticket for its next request. `hint` spreads threads over the words.
    pub(crate) fn take(&self, hint: usize, segment: &WorkerSegment) -> Option<(u16, u32)> {
        let index = self.take_free(hint).or_else(|| {
            self.reap(segment);
            self.take_free(hint)
        })?;
        let ticket = &self.tickets[usize::from(index)];
        // Relaxed: the cell's owner is alone with it, and handed it on through `free`.
        let next = ticket.load(Ordering::Relaxed).wrapping_add(1) & TICKET_MASK;
        ticket.store(next, Ordering::Relaxed);
        Some((index, next))
    }

    fn take_free(&self, hint: usize) -> Option<u16> {
        for step in 0..POSTED_WORDS {
            let word = (hint + step) % POSTED_WORDS;
            // Relaxed: only a hint which bit to try.
            let mut bits = self.free[word].load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                // Acquire pairs with the release in `give_back`: the former owner has taken its answer.
                bits = self.free[word].fetch_and(!(1 << bit), Ordering::Acquire);
                if bits & (1 << bit) != 0 {
                    return u16::try_from(word * 64 + bit as usize).ok();
                }
            }
        }
        None
    }

    /// The answer to the cell's request was taken, or it was never posted.
    pub(crate) fn give_back(&self, index: u16) {
        let (word, bit) = place(index);
        // Release pairs with the acquire in `take_free`.
        self.free[word].fetch_or(bit, Ordering::Release);
    }

    /// Nobody waits for the answer any more; until it comes the daemon may still write the cell.
    pub(crate) fn abandon(&self, index: u16) {
        let (word, bit) = place(index);
        // Release pairs with the acquire in `reap`: the ticket number goes along.
        self.abandoned[word].fetch_or(bit, Ordering::Release);
    }

    /// Frees the abandoned cells that were answered.
    fn reap(&self, segment: &WorkerSegment) {
        for word in 0..POSTED_WORDS {
            // Acquire pairs with the release in `abandon`. The bits are ours until they are put back.
            let taken = self.abandoned[word].swap(0, Ordering::Acquire);
            let mut bits = taken;
            while bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let index = word * 64 + bit;
                let ticket = self.tickets[index].load(Ordering::Relaxed);
                let Ok(index) = u16::try_from(index) else { continue };
                if segment.cells[usize::from(index)].answer(ticket).is_some() {
                    self.give_back(index);
                } else {
                    self.abandon(index);
                }
            }
        }
    }

    /// Ends the sleep of every thread that waits for an answer, so that it looks at the attachment's state.
    pub(crate) fn wake_sleepers(&self, segment: &WorkerSegment) {
        for cell in &segment.cells {
            // Relaxed: who goes to sleep right after this wakes by itself within a time slice.
            if cell.sleeping.load(Ordering::Relaxed) != 0 {
                let _ = futex::wake(&cell.state, futex::Flags::empty(), 1);
            }
        }
    }
}

fn place(index: u16) -> (usize, u64) {
    (usize::from(index) / 64, 1 << (index % 64))
}

/// Counts an answer in the segment's statistics.
pub(crate) fn count_answer(segment: &WorkerSegment, answer: Answer) {
    // Relaxed: statistics.
    match answer {
        Answer::Denied => segment.counters.denied.fetch_add(1, Ordering::Relaxed),
        Answer::TimedOut => segment.counters.timed_out.fetch_add(1, Ordering::Relaxed),
        Answer::Resolved | Answer::Stopped | Answer::Invalid => return,
    };
}
