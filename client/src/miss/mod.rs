//! Asking the daemon for what is not in the table.
//!
//! A miss costs a few stores into the worker's segment, and a doorbell only when the daemon says that it sleeps.
//! [`Reader::request`] and [`Reader::poll`] never block; [`Reader::resolve`] does.

pub(crate) mod cells;
mod spin;

use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SHIFT};
use iotlb_proto::layout::worker::CELL_PAGES_MAX;
use iotlb_proto::sync::Ordering;
use iotlb_proto::worker::cell::posted_state;
use rustix::thread::futex;

pub(crate) use spin::Spin;

use crate::guard::{Fault, Guard};
use crate::reader::{PinError, Reader};
use crate::shared::{Down, Shared, slice_until};
use crate::{Access, Answer, thread_pins};

/// Rounds of asking for the same first missing page. The daemon answers *resolved* when it published the translation,
/// so a second round means that it was taken away again at once; a guest that does so on purpose must not keep a
/// worker busy.
const ROUNDS_MAX: u32 = 8;

/// Cells one call posts at a time: the 64 readers of a worker share 256.
const BATCH: usize = 32;

/// Lookups under one pin while searching for what is missing: some 10 microseconds.
const SCAN_LOOKUPS: u32 = 2048;

/// Why a range could not be made available.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The front-end has no translation for a part of it, or none that allows the access.
    #[error("the front-end has no such translation")]
    Denied,
    /// No answer in time, or the translations went away as fast as they came.
    #[error("no translation in time")]
    TimedOut,
    /// The device is not running: no front-end, all rings stopped, or the session ended.
    #[error("the device is not running")]
    Stopped,
    /// The daemon died: attach anew.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away: attach anew.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
    /// The calling thread holds a pin, on this device or another. What it would wait for might wait for the pin.
    #[error("a thread that holds a pin must not wait")]
    Pinned,
    /// The range is empty or wraps, no access is wanted, or the memory could not be mapped.
    #[error("the range is empty, wraps, or lies in memory that could not be mapped, or no access is wanted")]
    Invalid,
}

impl From<Down> for ResolveError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => ResolveError::DaemonDead,
            Down::Revoked => ResolveError::Revoked,
        }
    }
}

impl From<PinError> for ResolveError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::DaemonDead => ResolveError::DaemonDead,
            PinError::Revoked => ResolveError::Revoked,
        }
    }
}

/// Why a request was not posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// As many requests are outstanding as there are cells: poll some of them first.
    #[error("too many requests are outstanding: poll some of them first")]
    Full,
    /// The range is empty, wraps or has more than [`CELL_PAGES_MAX`] pages, or no access is wanted.
    #[error("the range is empty, wraps or has more than {CELL_PAGES_MAX} pages, or no access is wanted")]
    Invalid,
    /// The daemon died: attach anew.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away: attach anew.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
}

impl From<Down> for RequestError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => RequestError::DaemonDead,
            Down::Revoked => RequestError::Revoked,
        }
    }
}

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

    /// See [`Reader::wait`].
    pub(crate) fn wait_unpinned(&mut self, spin: &mut Spin, deadline: Instant) -> Result<Answer, ResolveError> {
        if thread_pins::count() != 0 {
            return Err(ResolveError::Pinned);
        }
        let started = Instant::now();
        let answer = self.wait(started + spin.length(), deadline);
        spin.answered_after(started.elapsed());
        answer
    }

    /// Posts without ringing. `range` has at most [`CELL_PAGES_MAX`] pages.
    fn fill(shared: &Arc<Shared>, hint: usize, range: IovaRange, access: Access) -> Option<Ticket> {
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

    /// Waits for the answer: spins first, until `spin_until`.
    fn wait(&mut self, spin_until: Instant, deadline: Instant) -> Result<Answer, ResolveError> {
        loop {
            if let Some(answer) = self.take_answer() {
                return Ok(answer);
            }
            if Instant::now() < spin_until {
                std::hint::spin_loop();
                continue;
            }
            self.shared.check()?;
            self.sleep(slice_until(deadline).ok_or(ResolveError::TimedOut)?);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.take_answer().is_none() {
            self.shared.cells.abandon(self.cell);
        }
    }
}

/// Wakes the daemon when it asked for it. The posted bits were followed by a full fence (`mark_posted`), whose
/// partner is the daemon's fence between saying so and looking at the bits once more.
fn ring_if_wanted(shared: &Shared) {
    // Relaxed: ordered by that fence.
    if shared.table.header().wake.doorbell_wanted.load(Ordering::Relaxed) != 0 {
        shared.ring_doorbell();
    }
}

fn pages(range: IovaRange) -> u64 {
    (range.last() >> PAGE_SHIFT) - (range.first() >> PAGE_SHIFT) + 1
}

/// See [`Reader::resolve`].
pub(crate) fn resolve(
    reader: &mut Reader,
    iova: u64,
    len: u64,
    access: Access,
    deadline: Instant,
) -> Result<(), ResolveError> {
    if thread_pins::count() != 0 {
        return Err(ResolveError::Pinned);
    }
    let range = IovaRange::from_len(iova, len).ok_or(ResolveError::Invalid)?;
    if access.is_none() {
        return Err(ResolveError::Invalid);
    }
    let mut rounds = 0;
    let mut progress = None;
    loop {
        let wanted = match missing(reader, range, access)? {
            Missing::Nothing => return Ok(()),
            Missing::Memory => {
                if reader.shared().wait_mapped(deadline)? {
                    continue;
                }
                return Err(ResolveError::TimedOut);
            }
            Missing::Chunks(chunks) => chunks,
        };
        let first = wanted.first().map(|chunk| chunk.first());
        rounds = if first > progress { 1 } else { rounds + 1 };
        progress = progress.max(first);
        if rounds > ROUNDS_MAX {
            return Err(ResolveError::TimedOut);
        }
        if !ask(reader, &wanted, access, deadline)? {
            rounds -= 1;
        }
    }
}

/// Posts all chunks for which there are cells, and waits for all answers. `false` when there was no cell at all.
fn ask(reader: &mut Reader, chunks: &[IovaRange], access: Access, deadline: Instant) -> Result<bool, ResolveError> {
    let shared = Arc::clone(reader.shared());
    let shared = &shared;
    let mut tickets: Vec<Ticket> =
        chunks.iter().map_while(|chunk| Ticket::fill(shared, reader.slot(), *chunk, access)).collect();
    ring_if_wanted(shared);
    if tickets.is_empty() {
        // Other threads hold every cell. Theirs are answered within the daemon's time-out, so look again soon.
        shared.check()?;
        std::thread::sleep(slice_until(deadline).ok_or(ResolveError::TimedOut)?.min(Duration::from_millis(1)));
        return Ok(false);
    }
    let started = Instant::now();
    let spin_until = started + reader.spin().length();
    // From the last on: answers mostly come in order, so that this sleeps once.
    for ticket in tickets.iter_mut().rev() {
        let answer = ticket.wait(spin_until, deadline);
        reader.spin().answered_after(started.elapsed());
        match answer? {
            Answer::Resolved => {}
            Answer::Denied => return Err(ResolveError::Denied),
            Answer::TimedOut => return Err(ResolveError::TimedOut),
            Answer::Stopped => return Err(ResolveError::Stopped),
            Answer::Invalid => return Err(ResolveError::Invalid),
        }
    }
    Ok(true)
}

/// What stands between a range and its translation.
enum Missing {
    Nothing,
    /// This process has not mapped all regions yet.
    Memory,
    /// These pages, the first [`BATCH`] chunks of them. Not empty.
    Chunks(Vec<IovaRange>),
}

/// Searches `range`, unpinning now and then.
fn missing(reader: &Reader, range: IovaRange, access: Access) -> Result<Missing, ResolveError> {
    let mut chunks: Vec<IovaRange> = Vec::new();
    let mut at = Some(range.first());
    while let Some(first) = at {
        let guard = reader.pin()?;
        let mut lookups = 0;
        while let Some(first) = at.filter(|_| lookups < SCAN_LOOKUPS) {
            lookups += 1;
            at = match step(&guard, first, range, access) {
                Ok(last) => last.checked_add(1).filter(|next| *next <= range.last()),
                Err(Fault::Miss { iova, .. }) => {
                    let last = (iova | PAGE_MASK).min(range.last());
                    if !add_page(&mut chunks, iova, last) {
                        return Ok(Missing::Chunks(chunks));
                    }
                    last.checked_add(1).filter(|next| *next <= range.last())
                }
                Err(Fault::Remapping) => return Ok(Missing::Memory),
                Err(Fault::Invalid) => return Err(ResolveError::Invalid),
            };
        }
        drop(guard);
        debug_assert!(at != Some(first), "every lookup gets on");
    }
    Ok(if chunks.is_empty() { Missing::Nothing } else { Missing::Chunks(chunks) })
}

/// The last address of the piece that begins at `first`.
fn step(guard: &Guard<'_>, first: u64, range: IovaRange, access: Access) -> Result<u64, Fault> {
    let len = (range.last() - first).saturating_add(1);
    match guard.walk(first, len, access).next() {
        Some(Ok(segment)) => Ok(first + (segment.len() as u64 - 1)),
        Some(Err(fault)) => Err(fault),
        None => Err(Fault::Invalid),
    }
}

/// Adds a missing page; `false` when the batch is full.
fn add_page(chunks: &mut Vec<IovaRange>, first: u64, last: u64) -> bool {
    if let Some(chunk) = chunks.last_mut()
        && chunk.last().checked_add(1) == Some(first)
        && let Some(longer) = IovaRange::new(chunk.first(), last)
        && pages(longer) <= CELL_PAGES_MAX
    {
        *chunk = longer;
        return true;
    }
    if chunks.len() == BATCH {
        return false;
    }
    chunks.extend(IovaRange::new(first, last));
    true
}
