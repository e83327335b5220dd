//! The mapped worker segment, as both sides see it.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::epoch;
use crate::layout::worker::{CELL_CAPACITY, MAGIC, SEGMENT_SIZE, SLOT_CAPACITY, WorkerSegmentLayout, first_slot};
use crate::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use crate::shm::{Mapping, MappingError, MemfdError, SharedObject, memfd};
use crate::sync::{AtomicU64, Ordering, full_fence};

/// Why a worker segment could not be made or taken.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// Creating, sealing or checking the memory.
    #[error("worker segment: {0}")]
    Memfd(#[from] MemfdError),
    /// Mapping it.
    #[error("worker segment: {0}")]
    Mapping(#[from] MappingError),
    /// Its first words are not those of a worker segment of this build.
    #[error("the worker segment is of another kind or build ({field} is {found:#x}, expected {expected:#x})")]
    Identity {
        /// Which word.
        field: &'static str,
        /// What it should hold.
        expected: u64,
        /// What it holds.
        found: u64,
    },
}

/// A mapped worker segment. Dereferences to the layout: all words are atomics.
#[derive(Debug)]
pub struct WorkerSegment {
    layout: SharedObject<WorkerSegmentLayout>,
    /// Our own copy: what is in the segment may change.
    first_slot: usize,
}

impl WorkerSegment {
    /// Daemon: creates, sizes and seals the segment; returns the descriptor for the worker.
    ///
    /// # Errors
    /// Out of memory or descriptors.
    pub fn create(incarnation: u64) -> Result<(WorkerSegment, OwnedFd), SegmentError> {
        let fd = memfd::create("iotlbd-worker", SEGMENT_SIZE as u64)?;
        memfd::seal_size(fd.as_fd())?;
        let mapping = Arc::new(Mapping::read_write(fd.as_fd(), SEGMENT_SIZE)?);
        let segment = WorkerSegment { layout: SharedObject::new(&mapping, 0)?, first_slot: first_slot(incarnation) };
        let identity = &segment.identity;
        identity.magic.store(MAGIC, Ordering::Relaxed);
        identity.version.store(u64::from(LAYOUT_VERSION), Ordering::Relaxed);
        identity.layout_hash.store(LAYOUT_HASH, Ordering::Relaxed);
        identity.segment_size.store(SEGMENT_SIZE as u64, Ordering::Relaxed);
        identity.element_count.store(SLOT_CAPACITY as u64, Ordering::Relaxed);
        // Sending the descriptor orders these stores before the worker's loads.
        identity.generation.store(incarnation, Ordering::Relaxed);
        Ok((segment, fd))
    }

    /// Worker: maps the segment and checks that it is the one WELCOME spoke of.
    ///
    /// # Errors
    /// It is not, or cannot be mapped.
    pub fn open(fd: BorrowedFd<'_>, incarnation: u64) -> Result<WorkerSegment, SegmentError> {
        memfd::check_sealed(fd, SEGMENT_SIZE as u64)?;
        let mapping = Arc::new(Mapping::read_write(fd, SEGMENT_SIZE)?);
        let segment = WorkerSegment { layout: SharedObject::new(&mapping, 0)?, first_slot: first_slot(incarnation) };
        let identity = &segment.identity;
        for (field, word, expected) in [
            ("magic", &identity.magic, MAGIC),
            ("version", &identity.version, u64::from(LAYOUT_VERSION)),
            ("layout hash", &identity.layout_hash, LAYOUT_HASH),
            ("size", &identity.segment_size, SEGMENT_SIZE as u64),
            ("incarnation", &identity.generation, incarnation),
        ] {
            let found = word.load(Ordering::Relaxed);
            if found != expected {
                return Err(SegmentError::Identity { field, expected, found });
            }
        }
        Ok(segment)
    }

    /// Daemon: whether every slot in use lets the grace period `target` pass. A worker that lies about which slots it
    /// uses only gives up the protection of its own readers.
    #[must_use]
    pub fn is_drained(&self, target: u64) -> bool {
        let (before, from_first) = self.slots.split_at(self.first_slot);
        for slot in from_first.iter().chain(before) {
            // Acquire pairs with the release in `announce`. Asked first: its line is on its way back to the reader once
            // that has unpinned.
            let more = slot.more.load(Ordering::Acquire) != 0;
            if !epoch::is_drained(&slot.word, target) {
                return false;
            }
            if !more {
                break;
            }
        }
        true
    }

    /// Worker: the slot of a reader, which is counted from 0 and below [`SLOT_CAPACITY`].
    #[must_use]
    pub fn slot(&self, reader: usize) -> SharedObject<AtomicU64> {
        let index = self.slot_index(reader);
        self.layout.part(|layout| &layout.slots[index].word)
    }

    /// Worker: announces that the slots of `0..readers` may be used, before the first pin in the newest of them.
    pub fn announce(&self, readers: usize) {
        for reader in 0..readers.saturating_sub(1) {
            // Release pairs with the acquire in `is_drained`; see the prose of `epoch` for a writer that misses it.
            self.slots[self.slot_index(reader)].more.store(1, Ordering::Release);
        }
    }

    fn slot_index(&self, reader: usize) -> usize {
        self.first_slot.wrapping_add(reader) % SLOT_CAPACITY
    }

    /// Worker: marks cell `index` posted. Afterwards the caller tests the table's `doorbell_wanted` and rings when it
    /// is set: the fence in here and the daemon's see to it that one of the two notices the other.
    pub fn mark_posted(&self, index: u16) {
        let index = usize::from(index) % CELL_CAPACITY;
        // Release pairs with the acquire in `take_posted`: the cell's words come with it.
        self.posted.words[index / 64].fetch_or(1 << (index % 64), Ordering::Release);
        // Partner: the fence in `TableWriter::set_doorbell_wanted`.
        full_fence();
    }

    /// Daemon: whether any cell is posted.
    #[must_use]
    pub fn has_posted(&self) -> bool {
        self.posted.words.iter().any(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// Daemon: takes the numbers of all posted cells.
    pub fn take_posted(&self, mut each: impl FnMut(u16)) {
        for (word, base) in self.posted.words.iter().zip((0_u16..).step_by(64)) {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Acquire pairs with the release in `mark_posted`.
            let mut bits = word.swap(0, Ordering::Acquire);
            while bits != 0 {
                // Below 64, so it fits.
                each(base + u16::try_from(bits.trailing_zeros()).unwrap_or(0));
                bits &= bits - 1;
            }
        }
    }
}

impl Deref for WorkerSegment {
    type Target = WorkerSegmentLayout;

    #[inline]
    fn deref(&self) -> &WorkerSegmentLayout {
        &self.layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Access;
    use crate::iova::IovaRange;
    use crate::worker::Answer;

    fn pair() -> (WorkerSegment, WorkerSegment) {
        let (daemon, fd) = WorkerSegment::create(42).expect("create");
        let worker = WorkerSegment::open(fd.as_fd(), 42).expect("open");
        (daemon, worker)
    }

    #[test]
    fn a_miss_goes_there_and_back() {
        let (daemon, worker) = pair();
        let range = IovaRange::from_len(0x1ff0, 0x20).expect("range");
        for ticket in [0, 1, 0xff_ffff] {
            worker.cells[70].post(ticket, range, Access::WRITE);
            worker.mark_posted(70);
            assert!(daemon.has_posted());
            let mut posted = Vec::new();
            daemon.take_posted(|cell| posted.push(cell));
            assert_eq!(posted, [70]);
            let request = daemon.cells[70].take().expect("sane").expect("posted");
            assert_eq!((request.ticket, request.range, request.access), (ticket, range, Access::WRITE));
            assert_eq!(worker.cells[70].answer(ticket), None);
            assert!(!daemon.cells[70].store_answer(ticket, Answer::Denied));
            assert_eq!(worker.cells[70].answer(ticket), Some(Answer::Denied));
            assert_eq!(worker.cells[70].answer(ticket ^ 1), None, "an old ticket's answer is not this one's");
            assert_eq!(daemon.cells[70].take(), Ok(None));
        }
    }

    #[test]
    fn senseless_requests_are_told_apart() {
        let (daemon, worker) = pair();
        let cell = &worker.cells[0];
        let page = IovaRange::from_len(0x1000, 0x1000).expect("range");
        cell.post(5, page, Access::NONE);
        assert_eq!(daemon.cells[0].take(), Err(5));
        cell.post(6, page, Access::READ);
        cell.request.store(1, Ordering::Relaxed);
        assert_eq!(daemon.cells[0].take(), Err(6), "no bytes");
        cell.request.store(0x1000 << 8 | 0x40, Ordering::Relaxed);
        assert_eq!(daemon.cells[0].take(), Err(6), "unknown access");
        cell.request.store(u64::MAX << 8 | 1, Ordering::Relaxed);
        assert_eq!(daemon.cells[0].take(), Err(6), "too long");
        cell.post(7, IovaRange::from_len(0x1fff, 0x1_0002).expect("range"), Access::READ);
        assert_eq!(daemon.cells[0].take(), Err(7), "18 pages");
        cell.post(8, IovaRange::from_len(0x1fff, 0x1_0001).expect("range"), Access::READ);
        assert!(daemon.cells[0].take().expect("17 pages").is_some());
    }

    #[test]
    fn a_ring_of_lies_is_looked_at_once() {
        let (daemon, worker) = pair();
        for slot in &worker.slots {
            slot.more.store(u64::MAX, Ordering::Relaxed);
        }
        assert!(daemon.is_drained(5));
        let last = worker.slot(SLOT_CAPACITY - 1);
        last.store(4, Ordering::Relaxed);
        assert!(!daemon.is_drained(5));
        assert!(daemon.is_drained(4));
    }

    #[test]
    fn another_incarnations_segment_is_refused() {
        let (_daemon, fd) = WorkerSegment::create(42).expect("create");
        assert!(matches!(
            WorkerSegment::open(fd.as_fd(), 43),
            Err(SegmentError::Identity { field: "incarnation", .. })
        ));
    }

    #[test]
    fn a_slot_is_the_segments_and_outlives_the_view_it_came_from() {
        let (daemon, worker) = pair();
        worker.announce(3);
        let slot = worker.slot(2);
        drop(worker);
        slot.store(4, Ordering::Relaxed);
        assert!(!daemon.is_drained(5));
        assert_eq!(daemon.slot(2).load(Ordering::Relaxed), 4);
    }

    #[test]
    fn every_posted_cell_is_taken_once() {
        let (daemon, worker) = pair();
        let cells = [0, 1, 63, 64, 127, 130, 255];
        for cell in cells {
            worker.mark_posted(cell);
        }
        let mut posted = Vec::new();
        daemon.take_posted(|cell| posted.push(cell));
        assert_eq!(posted, cells);
        daemon.take_posted(|cell| panic!("cell {cell} again"));
        assert!(!daemon.has_posted());
    }

    #[test]
    fn a_slot_counts_once_it_was_announced_and_from_then_on() {
        let (daemon, worker) = pair();
        worker.announce(3);
        worker.announce(1);
        worker.slot(2).store(4, Ordering::Relaxed);
        assert!(!daemon.is_drained(5));
        worker.slot(2).store(0, Ordering::Relaxed);
        worker.slot(3).store(4, Ordering::Relaxed);
        assert!(daemon.is_drained(5), "slot 3 was never announced");
    }

    #[test]
    fn every_reader_has_a_slot_of_its_own_wherever_the_first_is() {
        for incarnation in [0, 1, 42, 63, u64::MAX] {
            let (daemon, _fd) = WorkerSegment::create(incarnation).expect("create");
            for reader in 0..SLOT_CAPACITY {
                daemon.announce(reader + 1);
                assert_eq!(daemon.slot(reader).swap(4, Ordering::Relaxed), 0);
                assert!(!daemon.is_drained(5));
                daemon.slot(reader).store(5, Ordering::Relaxed);
                assert!(daemon.is_drained(5), "{reader} of {incarnation}");
            }
        }
    }

    #[test]
    fn answers_and_sleepers_are_told_apart() {
        let (daemon, worker) = pair();
        let (mine, theirs) = (&worker.cells[9], &daemon.cells[9]);
        let all = [Answer::Resolved, Answer::Denied, Answer::TimedOut, Answer::Stopped, Answer::Invalid];
        for (ticket, answer) in (0..).zip(all) {
            mine.post(ticket, IovaRange::page_of(0x1000), Access::READ);
            mine.set_sleeping(ticket % 2 == 0);
            assert_eq!(theirs.store_answer(ticket, answer), ticket % 2 == 0);
            assert_eq!(mine.answer(ticket), Some(answer));
        }
    }
}
