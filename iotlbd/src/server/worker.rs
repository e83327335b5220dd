//! One attached worker, from its registration to its process's end.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iotlb_proto::layout::worker::{CELL_CAPACITY, MissCell, POSTED_WORDS};
use iotlb_proto::worker::{Answer, MissRequest, WorkerSegment};
use rustix::thread::futex;
use tracing::debug;

use super::link::Link;
use super::process::Process;
use super::stall::Stall;
use crate::device::WorkerId;

/// A worker. Its slots count in every grace period as long as it is in the registry, whether it still talks or not.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    /// What the worker calls itself.
    pub(crate) label: String,
    pub(crate) process: Process,
    pub(crate) segment: WorkerSegment,
    pub(crate) doorbell: Arc<OwnedFd>,
    /// `None`: the connection is gone and the process lives. A stall, not a drain.
    pub(crate) link: Option<Link>,
    pub(crate) stall: Stall,
    /// The newest grace period that every slot was seen to let pass, or that was waited for when the worker came.
    passed: u64,
    /// Cells whose misses the device works on.
    pending: CellSet,
    /// Cells posted anew while pending: looked at again when the old miss is answered. So a worker that posts one cell
    /// over and over never has more than its cells in the device's books.
    again: CellSet,
}

impl Worker {
    /// A worker that comes while the grace period `target` is waited for, if one is. It does not count for that one: it
    /// gets what it can pin with after the fence (see `iotlb_proto::epoch`). Did it count, workers that come and go in
    /// turns would hold a reply for ever, and none of them for long.
    pub(crate) fn new(
        id: WorkerId,
        label: String,
        process: Process,
        segment: WorkerSegment,
        doorbell: Arc<OwnedFd>,
        link: Link,
        target: Option<u64>,
    ) -> Worker {
        Worker {
            id,
            label,
            process,
            segment,
            doorbell,
            link: Some(link),
            stall: Stall::default(),
            passed: target.unwrap_or(0),
            pending: CellSet::default(),
            again: CellSet::default(),
        }
    }

    /// Whether every slot lets the grace period `target` pass, or did so once before: whoever pins after that finds
    /// nothing of what is waited for (see `iotlb_proto::epoch`). Were all workers to be free in one look, two that pin
    /// in turns, with a wrong epoch, would hold a reply for ever, and neither of them for long.
    pub(crate) fn lets_pass(&mut self, target: u64) -> bool {
        if self.passed < target && self.segment.is_drained(target) {
            self.passed = target;
        }
        self.passed >= target
    }

    /// Takes all posted misses.
    pub(crate) fn harvest(&mut self, mut each: impl FnMut(u16, MissRequest)) {
        if !self.segment.has_posted() {
            return;
        }
        let Worker { segment, pending, again, .. } = self;
        segment.take_posted(|cell| take(segment, pending, again, cell, &mut each));
    }

    /// Answers a miss; returns whether somebody sleeps on it and is to be woken up ([`Worker::wake`]). A request that
    /// was posted over the old one meanwhile is handed to `each`.
    pub(crate) fn answer(
        &mut self,
        cell: u16,
        ticket: u32,
        answer: Answer,
        mut each: impl FnMut(u16, MissRequest),
    ) -> bool {
        let Some(words) = self.segment.cells.get(usize::from(cell)) else { return false };
        let sleeps = words.store_answer(ticket, answer);
        self.pending.remove(cell);
        if self.again.remove(cell) {
            let Worker { segment, pending, again, .. } = self;
            take(segment, pending, again, cell, &mut each);
        }
        sleeps
    }

    /// Wakes up who sleeps on a cell.
    pub(crate) fn wake(&self, cell: u16) {
        if let Some(words) = self.segment.cells.get(usize::from(cell)) {
            wake(words);
        }
    }
}

/// Looks at one posted cell.
fn take(
    segment: &WorkerSegment,
    pending: &mut CellSet,
    again: &mut CellSet,
    cell: u16,
    each: &mut impl FnMut(u16, MissRequest),
) {
    let Some(words) = segment.cells.get(usize::from(cell)) else { return };
    if pending.contains(cell) {
        again.insert(cell);
        return;
    }
    match words.take() {
        Ok(Some(request)) => {
            pending.insert(cell);
            each(cell, request);
        }
        // The bit was set without a request: only the worker itself can suffer.
        Ok(None) => {}
        Err(ticket) => {
            debug!(cell, ticket, "a worker posted a senseless miss");
            store(words, ticket, Answer::Invalid);
        }
    }
}

fn store(words: &MissCell, ticket: u32, answer: Answer) {
    if words.store_answer(ticket, answer) {
        wake(words);
    }
}

/// Wakes up one thread: a request is one thread's, and a worker may have thousands sleep on the word. Returns how many
/// woke up.
fn wake(words: &MissCell) -> usize {
    // Shared: the worker is another process. An Err cannot be: the word is mapped and aligned.
    futex::wake(&words.state, futex::Flags::empty(), 1).unwrap_or(0)
}

/// A set of cell numbers.
#[derive(Clone, Copy, Debug, Default)]
struct CellSet {
    words: [u64; POSTED_WORDS],
}

const _: () = assert!(POSTED_WORDS * 64 == CELL_CAPACITY);

impl CellSet {
    fn place(cell: u16) -> (usize, u64) {
        (usize::from(cell) / 64 % POSTED_WORDS, 1 << (cell % 64))
    }

    fn contains(&self, cell: u16) -> bool {
        let (word, bit) = CellSet::place(cell);
        self.words[word] & bit != 0
    }

    fn insert(&mut self, cell: u16) {
        let (word, bit) = CellSet::place(cell);
        self.words[word] |= bit;
    }

    /// Returns whether it was there.
    fn remove(&mut self, cell: u16) -> bool {
        let (word, bit) = CellSet::place(cell);
        let there = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sleeper_is_woken_up_however_many_there_are() {
        let (segment, _fd) = WorkerSegment::create(1).expect("a segment");
        let cell = &segment.cells[0];
        let ids = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let id = ids.0.clone();
                scope.spawn(move || {
                    id.send(rustix::thread::gettid()).expect("heard");
                    futex::wait(&cell.state, futex::Flags::empty(), 0, None).expect("woken up");
                });
            }
            for id in ids.1.iter().take(3) {
                let number = format!("/proc/self/task/{}/syscall", id.as_raw_nonzero());
                // Asleep on this very futex: the channel that brought the number has others.
                let call = format!("{} {:#x} ", libc::SYS_futex, std::ptr::from_ref(&cell.state).addr());
                let since = std::time::Instant::now();
                while !std::fs::read_to_string(&number).is_ok_and(|text| text.starts_with(&call)) {
                    assert!(since.elapsed().as_secs() < 30, "it does not sleep");
                    std::thread::yield_now();
                }
            }
            let woken = [(); 4].map(|()| wake(cell));
            // Whoever is left would be waited for, and no failure be seen.
            while wake(cell) > 0 {}
            assert_eq!(woken, [1, 1, 1, 0]);
        });
    }
}
