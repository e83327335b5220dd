//! The life of a miss cell: free, posted, answered, and posted again with the next ticket.
//!
//! Only the worker moves a cell to *posted*, only the daemon answers, and each does so only when it is its turn, so the
//! state word needs no compare-and-swap. The ticket tells an answer from a late answer to the cell's former request.

use crate::access::Access;
use crate::iova::{IovaRange, PAGE_SHIFT};
use crate::layout::worker::{CELL_PAGES_MAX, MissCell};
use crate::sync::{Ordering, full_fence};

/// Tickets count modulo this: the upper 24 bits of the state word.
pub const TICKET_LIMIT: u32 = 1 << 24;

const CODE_BITS: u32 = 8;
const CODE_MASK: u32 = 0xff;
const POSTED: u32 = 1;

/// How a miss ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Answer {
    /// The table holds the translation, or held it: look again.
    Resolved = 2,
    /// The front-end has no translation, or none that allows the access, also when asked again.
    Denied = 3,
    /// The front-end did not answer in time.
    TimedOut = 4,
    /// The device is not running: no front-end, all rings stopped, or the session ended.
    Stopped = 5,
    /// The request made no sense: no bytes, too many pages, wrapped.
    Invalid = 6,
}

impl Answer {
    const fn from_code(code: u32) -> Option<Answer> {
        match code {
            2 => Some(Answer::Resolved),
            3 => Some(Answer::Denied),
            4 => Some(Answer::TimedOut),
            5 => Some(Answer::Stopped),
            6 => Some(Answer::Invalid),
            _ => None,
        }
    }
}

/// A miss as the daemon read it from a cell: copied once, then checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissRequest {
    /// Names the request within its cell; the answer carries it back.
    pub ticket: u32,
    /// Wanted addresses, at most [`CELL_PAGES_MAX`] pages.
    pub range: IovaRange,
    /// Wanted access; not empty.
    pub access: Access,
}

/// The state word of a posted request: what a worker that sleeps on the cell expects to find.
#[must_use]
pub const fn posted_state(ticket: u32) -> u32 {
    ticket << CODE_BITS | POSTED
}

impl MissCell {
    /// Worker: fills the cell. The caller owns it (it was never used, or its last answer was taken), and sets its
    /// posted bit afterwards. `ticket` is below [`TICKET_LIMIT`]; `range` has at most [`CELL_PAGES_MAX`] pages.
    pub fn post(&self, ticket: u32, range: IovaRange, access: Access) {
        self.first.store(range.first(), Ordering::Relaxed);
        let len = range.len_minus_one().wrapping_add(1);
        self.request.store(len << CODE_BITS | u64::from(access.bits()), Ordering::Relaxed);
        // Release pairs with the acquire in `take`: the two words above come with it.
        self.state.store(posted_state(ticket), Ordering::Release);
    }

    /// Worker: the answer to `ticket`, if there is one yet.
    #[inline]
    #[must_use]
    pub fn answer(&self, ticket: u32) -> Option<Answer> {
        // Acquire pairs with the release in `store_answer`: what was published before it is found by the next lookup.
        let state = self.state.load(Ordering::Acquire);
        if state >> CODE_BITS == ticket { Answer::from_code(state & CODE_MASK) } else { None }
    }

    /// Worker: announces that it is about to sleep until the state word is no longer [`posted_state`], or that it woke
    /// up. After announcing it must look at the answer once more before it sleeps.
    pub fn set_sleeping(&self, sleeping: bool) {
        self.sleeping.store(u32::from(sleeping), Ordering::Relaxed);
        // Partner: the fence in `store_answer`. Either the daemon sees the flag, or the worker sees the answer.
        full_fence();
    }

    /// Daemon: takes a copy of what was posted. `Ok(None)`: nothing is posted.
    ///
    /// # Errors
    /// The request makes no sense; the ticket to answer [`Answer::Invalid`] to.
    pub fn take(&self) -> Result<Option<MissRequest>, u32> {
        // Acquire pairs with the release in `post`. A hostile worker may change the words under us: each is read once.
        let state = self.state.load(Ordering::Acquire);
        if state & CODE_MASK != POSTED {
            return Ok(None);
        }
        let ticket = state >> CODE_BITS;
        let first = self.first.load(Ordering::Relaxed);
        let request = self.request.load(Ordering::Relaxed);
        let access = Access::from_bits((request & u64::from(CODE_MASK)).to_le_bytes()[0]).ok_or(ticket)?;
        let range = IovaRange::from_len(first, request >> CODE_BITS).ok_or(ticket)?;
        let pages = (range.last() >> PAGE_SHIFT) - (range.first() >> PAGE_SHIFT) + 1;
        if access.is_none() || pages > CELL_PAGES_MAX {
            return Err(ticket);
        }
        Ok(Some(MissRequest { ticket, range, access }))
    }

    /// Daemon: answers. Returns whether the worker sleeps on the cell and has to be woken.
    #[must_use]
    pub fn store_answer(&self, ticket: u32, answer: Answer) -> bool {
        // Release pairs with the acquire in `answer`.
        self.state.store((ticket & (TICKET_LIMIT - 1)) << CODE_BITS | answer as u32, Ordering::Release);
        // Partner: the fence in `set_sleeping`.
        full_fence();
        self.sleeping.load(Ordering::Relaxed) != 0
    }
}
