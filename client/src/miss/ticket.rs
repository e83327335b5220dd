//! One request, from the posted cell to its answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::CELL_PAGES_MAX;
use iotlb_proto::sync::Ordering;
use iotlb_proto::worker::cell::posted_state;
use rustix::thread::futex;

use super::{RequestError, ResolveError, Spin, Spinning, cells, pages};
use crate::shared::{Shared, slice_until};
use crate::{Access, Answer};

/// A request that was posted. Dropping it gives up the answer, not the request.
#[derive(Debug)]
pub struct Ticket {
    shared: Arc<Shared>,
    cell: u16,
    ticket: u32,
    answer: Option<Answer>,
}

impl Ticket {
    pub(crate) fn post(
        shared: &Arc<Shared>,
        hint: usize,
        iova: u64,
        len: u64,
        access: Access,
    ) -> Result<Ticket, RequestError> {
        let mut tickets = Ticket::post_all(shared, hint, [(iova, len, access)])?;
        tickets.pop().ok_or(RequestError::Full)
    }

    pub(crate) fn post_all(
        shared: &Arc<Shared>,
        hint: usize,
        ranges: impl IntoIterator<Item = (u64, u64, Access)>,
    ) -> Result<Vec<Ticket>, RequestError> {
        shared.check()?;
        let mut tickets = Vec::new();
        let mut posted = Ok(());
        for (iova, len, access) in ranges {
            let range =
                IovaRange::from_len(iova, len).filter(|range| !access.is_none() && pages(*range) <= CELL_PAGES_MAX);
            let Some(range) = range else {
                posted = Err(RequestError::Invalid);
                break;
            };
            let Some(ticket) = Ticket::fill(shared, hint, range, access) else { break };
            tickets.push(ticket);
        }
        if !tickets.is_empty() {
            ring_if_wanted(shared);
        }
        posted.map(|()| tickets)
    }

    /// See [`Reader::wait`](crate::Reader::wait).
    pub(crate) fn wait_with(&mut self, spin: &mut Spin, deadline: Instant) -> Result<Answer, ResolveError> {
        let mut spinning = spin.begin();
        let answer = self.wait(&mut spinning, deadline);
        spin.answered(&spinning);
        answer
    }

    /// Posts without ringing. `range` has at most [`CELL_PAGES_MAX`] pages.
    pub(super) fn fill(shared: &Arc<Shared>, hint: usize, range: IovaRange, access: Access) -> Option<Ticket> {
        let (cell, ticket) = shared.cells.take(hint, &shared.segment)?;
        shared.segment.cells[usize::from(cell)].post(ticket, range, access);
        shared.segment.mark_posted(cell);
        // Relaxed: statistics.
        shared.segment.counters.misses.fetch_add(1, Ordering::Relaxed);
        Some(Ticket { shared: Arc::clone(shared), cell, ticket, answer: None })
    }

    pub(crate) fn take_answer(&mut self) -> Option<Answer> {
        if self.answer.is_none()
            && let Some(answer) = self.shared.segment.cells[usize::from(self.cell)].answer(self.ticket)
        {
            cells::count_answer(&self.shared.segment, answer);
            self.shared.cells.give_back(self.cell);
            self.answer = Some(answer);
        }
        self.answer
    }

    /// Sleeps until the answer came, `slice` has passed, or the attachment's state changed.
    fn sleep(&self, slice: Duration) {
        let cell = &self.shared.segment.cells[usize::from(self.cell)];
        cell.set_sleeping(true);
        if cell.answer(self.ticket).is_none() {
            let timeout = futex::Timespec { tv_sec: 0, tv_nsec: i64::from(slice.subsec_nanos()) };
            // Every way to wake up is a reason to look again.
            let _ = futex::wait(&cell.state, futex::Flags::empty(), posted_state(self.ticket), Some(&timeout));
        }
        cell.set_sleeping(false);
    }

    /// Waits for the answer: spins first.
    pub(super) fn wait(&mut self, spinning: &mut Spinning, deadline: Instant) -> Result<Answer, ResolveError> {
        loop {
            if let Some(answer) = self.take_answer() {
                return Ok(answer);
            }
            if spinning.goes_on() {
                continue;
            }
            self.shared.check()?;
            self.sleep(slice_until(deadline).ok_or(ResolveError::TimedOut)?);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // Mostly it was answered: then nothing is left to do, and no system call is made. A forked child has not got
        // the cell.
        if self.answer.is_none() && self.shared.is_ours() && self.take_answer().is_none() {
            self.shared.cells.abandon(self.cell);
        }
    }
}

/// Wakes the daemon when it asked for it. The posted bits were followed by a full fence (`mark_posted`), whose
/// partner is the daemon's fence between saying so and looking at the bits once more.
pub(super) fn ring_if_wanted(shared: &Shared) {
    // Relaxed: ordered by that fence.
    if shared.table.header().wake.doorbell_wanted.load(Ordering::Relaxed) != 0 {
        shared.ring_doorbell();
    }
}
