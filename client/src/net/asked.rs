//! What a lane asked the daemon for, and how much of it the lane waits for.

use std::time::{Duration, Instant};

use iotlb_proto::iova::PAGE_MASK;

use crate::miss::pages;
use crate::queue::vring::{Miss, MissPlace, MissSet};
use crate::{Access, Answer, Reader, RequestError, ResolveError, Ticket};

/// How long a miss may take. Below half of the time after which the daemon revokes a stalled reader, although nobody
/// waits pinned: the ring stands still meanwhile.
const MISS_TIMEOUT: Duration = Duration::from_millis(400);

/// So long the thread sleeps on an answer, once, and serves nobody else: most come far sooner, and nobody hears them
/// quicker. A busy host keeps others waiting as long. Then they are served, and the answer is looked for in between.
const SLEEP_MS: u32 = 2;

/// From one look for a late answer to the next, while nothing else happens: at least this,
const LOOK_PAUSE_MIN: Duration = Duration::from_millis(1);
/// and this part of the time that the answer has taken so far. Some fifty looks find it within an eighth of its time.
const LOOK_PAUSE_PART: u32 = 8;

/// Pages waited for at a time, when fewer are needed at once: to be woken up for each page costs more than the page.
/// Not more, so that what is complete is not kept from the driver, which may have to see it before it posts more.
const PAGES_WAITED_FOR: u64 = 8;

/// Requests without an answer.
#[derive(Debug, Default)]
pub(super) struct Asked {
    requests: Vec<Request>,
    /// Queue records were these.
    queue_generation: u64,
}

#[derive(Debug)]
struct Request {
    /// What it is for.
    miss: Miss,
    /// What it stood in the way of when it was made. `None`: it is a wish, perhaps of several chains.
    required_by: Option<MissPlace>,
    ticket: Ticket,
    /// When the thread slept on it, in vain so far.
    slept_at: Option<Instant>,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// Something came: try again.
    Answered,
    /// There was nothing to wait for: other lanes or threads have all cells.
    Nothing,
    /// Nothing came yet, and others have waited: it is their turn.
    NotYet,
    /// Nor since then. Look again at this time, or when there is something else to do.
    Look(Instant),
    /// What the ring needs does not come.
    Refused(Refusal),
}

/// Why something that the ring needs does not come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The front-end denied it, or it lies in memory that cannot be mapped.
    Denied {
        /// First address of what was asked for.
        iova: u64,
        /// What was wanted there.
        access: Access,
    },
    /// It was not answered in time, or the device stopped.
    Unanswered,
}

impl Refusal {
    /// What an answer to `request` means for what `set` needs, if it is a refusal of that. A wish that went beyond what
    /// is needed may have been denied for what lies there: such a denial says nothing yet, and what is needed is asked
    /// for by itself.
    fn of(answer: Answer, request: &Request, set: &MissSet) -> Option<Refusal> {
        let of_its_pages = |miss: &&Miss| touches(&request.miss, miss);
        let mut needed = set.required().iter().filter(of_its_pages);
        match answer {
            Answer::Resolved => None,
            Answer::Denied | Answer::Invalid => {
                // Nor does a request for more than what is wanted there by now, or for other bytes of the page.
                let counts = |miss: &&Miss| {
                    if !miss.range().overlaps(request.miss.range()) {
                        return false;
                    }
                    let is_for_it = request.required_by == Some(set.place) || miss.range().covers(request.miss.range());
                    is_for_it && miss.access.allows(request.miss.access)
                };
                needed.find(counts).map(|miss| Refusal::Denied { iova: request.miss.iova, access: miss.access })
            }
            Answer::TimedOut | Answer::Stopped => needed.next().map(|_| Refusal::Unanswered),
        }
    }
}

/// Whether a request for `asked` is one for all pages of `miss`: nearly always whole pages come.
fn answers(asked: &Miss, miss: &Miss) -> bool {
    asked.range().page_aligned().covers(miss.range()) && asked.access.allows(miss.access)
}

/// Whether the two have pages in common.
fn touches(asked: &Miss, miss: &Miss) -> bool {
    asked.range().page_aligned().overlaps(miss.range().page_aligned())
}

impl Asked {
    /// Whether something was refused that `set` needs, as far as answers have come. A denial comes first: what it says
    /// is final, whatever else has no answer. Says so once: what was refused may be asked for again.
    pub(super) fn take_refusal(&mut self, reader: &mut Reader, set: &MissSet) -> Option<Refusal> {
        let refusals = self.requests.iter_mut().enumerate().filter_map(|(at, request)| {
            let answer = reader.poll(&mut request.ticket)?;
            Some((at, Refusal::of(answer, request, set)?))
        });
        let (at, refusal) = refusals.min_by_key(|(_, refusal)| *refusal == Refusal::Unanswered)?;
        self.requests.swap_remove(at);
        Some(refusal)
    }

    /// Forgets what was answered, denials included: those of what a set needs are to be taken before, and what was only
    /// a wish is asked for again when its turn comes.
    pub(super) fn forget_answered(&mut self, reader: &mut Reader) {
        self.requests.retain_mut(|request| reader.poll(&mut request.ticket).is_none());
    }

    /// Forgets what was asked for under other queue records: what a ring that was set up since has at the same place
    /// may need less.
    pub(super) fn keep_of(&mut self, queue_generation: u64) {
        if self.queue_generation != queue_generation {
            *self = Asked { queue_generation, ..Asked::default() };
        }
    }

    /// Asks, in one batch, for all of `set` that was not asked for yet.
    ///
    /// Each page is asked for once, however its neighbours were counted to it then and now: a second request that the
    /// daemon takes up only after the chain was served and its page unmapped would show up as a fault in the guest's
    /// log. While what is needed takes long, nothing more is wished for: a wish that is denied is forgotten, and would
    /// be asked for again at each look.
    ///
    /// # Errors
    /// See [`Reader::request_all`].
    pub(super) fn ask(&mut self, reader: &mut Reader, set: &MissSet) -> Result<(), RequestError> {
        let (required, wishes) = set.misses.split_at(set.required().len());
        let mut new = Vec::new();
        required.iter().for_each(|miss| self.add_unasked(miss, &mut new));
        let required = new.len();
        if self.requests.iter().all(|request| request.slept_at.is_none()) {
            wishes.iter().for_each(|miss| self.add_unasked(miss, &mut new));
        }
        let tickets = reader.request_all(new.iter().map(|miss| (miss.iova, miss.len, miss.access)))?;
        self.requests.extend(new.into_iter().zip(tickets).enumerate().map(|(number, (miss, ticket))| Request {
            miss,
            required_by: (number < required).then_some(set.place),
            ticket,
            slept_at: None,
        }));
        Ok(())
    }

    /// Waits for as much of `set` as [`awaited`] says, but sleeps only once for each answer.
    ///
    /// # Errors
    /// [`ResolveError::DaemonDead`] and [`ResolveError::Revoked`] only.
    pub(super) fn wait(&mut self, reader: &mut Reader, set: &MissSet) -> Result<Waited, ResolveError> {
        let outstanding: Vec<bool> = set.misses.iter().map(|miss| self.overlapping(miss).is_some()).collect();
        let count = awaited(set, &outstanding);
        let mut waited = Waited::Nothing;
        // From the last on: answers come in order, so this mostly sleeps once.
        for miss in set.misses[..count].iter().rev() {
            while let Some(at) = self.overlapping(miss) {
                let Request { ticket, slept_at, .. } = &mut self.requests[at];
                let answer = match slept_at {
                    Some(_) => reader.poll(ticket),
                    None => {
                        *slept_at = Some(Instant::now());
                        match reader.wait(ticket, SLEEP_MS) {
                            Ok(answer) => Some(answer),
                            Err(error @ (ResolveError::DaemonDead | ResolveError::Revoked)) => return Err(error),
                            Err(_) if waited == Waited::Nothing => return Ok(Waited::NotYet),
                            Err(_) => None,
                        }
                    }
                };
                let Some(answer) = answer else {
                    // What came may be enough for some.
                    return Ok(if waited == Waited::Answered { waited } else { self.still_waits(reader, set, at) });
                };
                waited = Waited::Answered;
                let request = self.requests.swap_remove(at);
                // Of what is needed, not only of what is waited for: it may be both.
                match Refusal::of(answer, &request, set) {
                    None => {}
                    Some(Refusal::Unanswered) => {
                        let denied = self.take_refusal(reader, set);
                        return Ok(Waited::Refused(denied.unwrap_or(Refusal::Unanswered)));
                    }
                    Some(refusal) => return Ok(Waited::Refused(refusal)),
                }
            }
        }
        Ok(waited)
    }

    /// The request at `at` has no answer, and was slept for already.
    fn still_waits(&mut self, reader: &mut Reader, set: &MissSet, at: usize) -> Waited {
        let now = Instant::now();
        let since = *self.requests[at].slept_at.get_or_insert(now);
        let waited = now.duration_since(since);
        if waited < MISS_TIMEOUT {
            return Waited::Look(now + LOOK_PAUSE_MIN.max(waited / LOOK_PAUSE_PART));
        }
        let request = self.requests.swap_remove(at);
        match Refusal::of(Answer::TimedOut, &request, set) {
            Some(refusal) => Waited::Refused(self.take_refusal(reader, set).unwrap_or(refusal)),
            None => Waited::Answered,
        }
    }

    /// Adds those parts of `miss` to `new` that no request is out for.
    fn add_unasked(&self, miss: &Miss, new: &mut Vec<Miss>) {
        let near: Vec<&Miss> =
            self.requests.iter().map(|asked| &asked.miss).filter(|asked| touches(asked, miss)).collect();
        if near.is_empty() {
            new.push(*miss);
            return;
        }
        let begin = new.len();
        let last_of_all = miss.range().last();
        let mut at = Some(miss.iova);
        while let Some(first) = at {
            let last = (first | PAGE_MASK).min(last_of_all);
            at = last.checked_add(1).filter(|next| *next <= last_of_all);
            let part = Miss { iova: first, len: last - first + 1, access: miss.access };
            if near.iter().any(|asked| answers(asked, &part)) {
                continue;
            }
            match new[begin..].last_mut() {
                Some(before) if before.iova + before.len == part.iova => before.len += part.len,
                _ => new.push(part),
            }
        }
    }

    fn overlapping(&self, miss: &Miss) -> Option<usize> {
        self.requests.iter().rposition(|request| touches(&request.miss, miss))
    }
}

/// How many of the misses, from the first on, to wait for before the ring is tried again: what it needs, or
/// [`PAGES_WAITED_FOR`] if that is more. But not for the last of several that are outstanding: the front-end works on
/// that one while the ring is looked at for what was posted meanwhile, and so does not run out of work.
fn awaited(set: &MissSet, outstanding: &[bool]) -> usize {
    let mut count = 0;
    let enough = set.misses.iter().position(|miss| {
        count += pages(miss.range());
        count >= PAGES_WAITED_FOR
    });
    let count = enough.map_or(set.misses.len(), |last| last + 1).max(set.required);
    let mut waiting = (0..count).rev().filter(|number| outstanding.get(*number) == Some(&true));
    match (waiting.next(), waiting.next()) {
        (Some(last), Some(_)) => last,
        _ => count,
    }
}

#[cfg(test)]
mod tests {
    use iotlb_proto::iova::PAGE_SIZE;

    use super::*;
    use crate::queue::vring::MissPlace;

    fn set(pages: &[u64], required: usize) -> MissSet {
        let miss =
            |(number, pages): (u64, &u64)| Miss { iova: number << 20, len: pages * PAGE_SIZE, access: Access::READ };
        MissSet { misses: (0..).zip(pages).map(miss).collect(), required, place: MissPlace::Chain { position: 0 } }
    }

    #[test]
    fn a_chain_does_not_wait_for_those_behind_it() {
        // A header and two fragments; behind them the same twice.
        let packets = set(&[1, 8, 8, 1, 8, 8, 1, 8, 8], 3);
        assert_eq!(awaited(&packets, &[true; 9]), 2, "the last fragment is outstanding while more is asked for");
        let rest = set(&[8, 1, 8, 8, 1, 8, 8], 1);
        assert_eq!(awaited(&rest, &[true; 7]), 1);
    }

    #[test]
    fn single_pages_are_waited_for_together() {
        assert_eq!(awaited(&set(&[1; 64], 1), &[true; 64]), 7);
        assert_eq!(awaited(&set(&[1; 3], 1), &[true; 3]), 2);
        assert_eq!(awaited(&set(&[1], 1), &[true]), 1);
    }

    #[test]
    fn what_was_answered_is_not_counted_as_outstanding() {
        let mut outstanding = [false; 9];
        outstanding[2] = true;
        assert_eq!(awaited(&set(&[1, 8, 8, 1, 8, 8, 1, 8, 8], 3), &outstanding), 3);
        assert_eq!(awaited(&set(&[1; 64], 1), &[false; 64]), 8, "no cell was free for any of them");
    }
}
