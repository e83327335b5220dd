//! The miss engine: workers' misses in, MISS messages on the back-end channel out, answers back.
//!
//! - All misses for one page, of all workers, share one message. A waiter that wants more than the message asked for
//!   stays, and the page is asked again.
//! - What is to be sent is collected and goes out in one batch ([`Misses::pump`]). The front-end takes the messages in
//!   order, so the last of a batch asks for a reply, and that reply ends the wait for all of them: a page that is not
//!   there by then was refused without a word, and is asked for once more, now with a reply of its own. To answer each
//!   message would cost the front-end as much again as to look the page up.
//! - So the messages in flight are a queue, and a reply belongs to the oldest that asked for one. A reply that no
//!   longer concerns anybody only frees its place, and those before it.
//! - Few messages are in flight, because the socket holds about 278 and a front-end that waits for us on the main
//!   channel does not read it. The rest waits in one queue a worker, served in turn.
//! - Answers are read from the table: what a pending take has removed is not there, so it resolves nobody.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, VecDeque};

use hdrhistogram::Histogram;
use iotlb_proto::access::Access;
use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SIZE};
use iotlb_proto::layout::worker::{CELL_CAPACITY, CELL_PAGES_MAX};
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage};
use iotlb_proto::worker::{Answer, MissRequest};
use smallvec::SmallVec;

use super::{Action, WorkerId};
pub(super) use coverage::{Coverage, Translations, coverage, pages_of};
use crowd::{Crowd, Interest};
use flights::{Flight, Flights, IN_FLIGHT_MAX};
use open::OpenPages;
use pages::{PageMiss, PageMisses, State};
use turns::{Owner, Turns};

mod coverage;
mod crowd;
mod flights;
mod open;
mod pages;
#[cfg(test)]
mod tests;
mod turns;

/// A reply is asked for after so many messages at the latest: half of the places become free while the front-end works
/// on the other half. More replies would only cost it more.
const REPLY_EVERY: usize = IN_FLIGHT_MAX / 2;
/// How often a page is asked again when the front-end says "done" and the page still is not there. The guest may have
/// mapped it just then, or others may want another part of it; a page that is not there after that does not come.
const RETRIES_MAX: u8 = 3;
/// What counts as the reply to a message without one, when a later one was replied to and the page is not there.
const PASSED_OVER: u64 = 1;
/// A front-end that refuses is asked once more before the worker hears of it: the guest may have mapped the page just
/// then.
const DENIALS_NEEDED: u8 = 2;

/// A worker's miss, or a ring page wanted by the device itself.
#[derive(Debug)]
struct Waiter {
    /// Cell and ticket to answer; `None` for the device.
    cell: Option<(WorkerId, u16, u32)>,
    range: IovaRange,
    access: Access,
    deadline_ns: u64,
    /// Pages that were not covered when last seen.
    open: OpenPages,
}

impl Waiter {
    fn owner(&self) -> Owner {
        self.cell.map(|(worker, _, _)| worker)
    }

    fn wants(&self, iova: u64) -> bool {
        (self.range.first()..=self.range.last()).contains(&iova)
    }

    fn part_in(&self, page: u64) -> IovaRange {
        self.range.intersection(IovaRange::page_of(page)).unwrap_or(self.range)
    }
}

/// Everything that is missing.
#[derive(Debug)]
pub(super) struct Misses {
    timeout_ns: u64,
    waiters: BTreeMap<u64, Waiter>,
    by_cell: BTreeMap<(WorkerId, u16), u64>,
    /// The device's own waiters, by page.
    own: BTreeMap<u64, u64>,
    pages: PageMisses,
    turns: Turns,
    flights: Flights,
    next_waiter: u64,
}

/// What the engine works with while it handles one event.
pub(super) struct Surroundings<'a, T: Translations> {
    pub(super) table: &'a T,
    pub(super) actions: &'a mut VecDeque<Action>,
    /// Whether MISS messages may ask for a reply (REPLY_ACK).
    pub(super) replies: bool,
    /// The present.
    pub(super) now_ns: u64,
}

impl Misses {
    pub(super) fn new(timeout_ms: u32) -> Misses {
        Misses {
            timeout_ns: u64::from(timeout_ms) * 1_000_000,
            waiters: BTreeMap::new(),
            by_cell: BTreeMap::new(),
            own: BTreeMap::new(),
            pages: PageMisses::default(),
            turns: Turns::default(),
            flights: Flights::default(),
            next_waiter: 0,
        }
    }

    /// MISS messages sent so far.
    pub(super) fn sent(&self) -> u64 {
        self.flights.sent()
    }

    /// How long the front-end was busy with each page that it was asked for.
    pub(super) fn page_ns(&self) -> &Histogram<u64> {
        self.flights.page_ns()
    }

    /// Misses that wait for an answer.
    pub(super) fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// When the first waiter's time is up.
    pub(super) fn next_deadline_ns(&self) -> Option<u64> {
        // All wait equally long and time only grows, so the oldest waiter is the first whose time is up.
        self.waiters.first_key_value().map(|(_, waiter)| waiter.deadline_ns)
    }

    /// A worker wants a range. The caller saw to it that the device runs.
    pub(super) fn post<T: Translations>(
        &mut self,
        worker: WorkerId,
        cell: u16,
        request: MissRequest,
        now_ns: u64,
        to: &mut Surroundings<'_, T>,
    ) {
        // A cell holds one miss. A worker that posts again before the answer has dropped the earlier one, which bounds
        // what a worker can have here: CELL_CAPACITY waiters of CELL_PAGES_MAX pages.
        self.forget_cell(worker, cell);
        let answer = |answer| Action::AnswerMiss { worker, cell, ticket: request.ticket, answer };
        let pages = request.range.page_aligned().len_minus_one() / PAGE_SIZE + 1;
        if usize::from(cell) >= CELL_CAPACITY || request.access.is_none() || pages > CELL_PAGES_MAX {
            to.actions.push_back(answer(Answer::Invalid));
            return;
        }
        if coverage(to.table, request.range, request.access) == Coverage::Covered {
            to.actions.push_back(answer(Answer::Resolved));
            return;
        }
        let id = self.add_waiter(Some((worker, cell, request.ticket)), request.range, request.access, now_ns);
        self.by_cell.insert((worker, cell), id);
        self.open_pages(id, to.table);
    }

    /// The device wants its rings. Nobody is answered; pages that are covered or asked for already are left alone.
    pub(super) fn want<T: Translations>(
        &mut self,
        areas: impl Iterator<Item = (IovaRange, Access)>,
        now_ns: u64,
        table: &T,
    ) {
        // Areas often share a page: it is asked for once, for all of them.
        let mut wanted: BTreeMap<u64, (IovaRange, Access)> = BTreeMap::new();
        for (range, access) in areas {
            for page in pages_of(range) {
                let Some(part) = IovaRange::page_of(page).intersection(range) else { continue };
                if coverage(table, part, access) == Coverage::Covered {
                    continue;
                }
                let both = wanted.get(&page).map_or((part, access), |&(other, also)| {
                    let hull = IovaRange::new(part.first().min(other.first()), part.last().max(other.last()));
                    (hull.unwrap_or(part), access.union(also))
                });
                wanted.insert(page, both);
            }
        }
        for (page, (part, access)) in wanted {
            if let Some(id) = self.own.get(&page).copied() {
                if self.waiters.get(&id).is_some_and(|w| w.access.allows(access) && w.range.covers(part)) {
                    continue;
                }
                self.remove_waiter(id);
            }
            let id = self.add_waiter(None, part, access, now_ns);
            self.own.insert(page, id);
            self.open_pages(id, table);
        }
    }

    /// The device does without the pages of a ring that was there, but for those that are still needed.
    pub(super) fn unwant(
        &mut self,
        areas: impl Iterator<Item = (IovaRange, Access)>,
        is_needed: impl Fn(IovaRange) -> bool,
    ) {
        for (range, _) in areas {
            let own = self.own.range(range.first() & !PAGE_MASK..=range.last());
            let left = own.filter(|(page, _)| !is_needed(IovaRange::page_of(**page)));
            let left: SmallVec<[u64; 4]> = left.map(|(_, id)| *id).collect();
            for id in left {
                self.remove_waiter(id);
            }
        }
    }

    /// Translations of all of `range`, which allow `access`, are in the table now.
    pub(super) fn appeared<T: Translations>(&mut self, range: IovaRange, access: Access, to: &mut Surroundings<'_, T>) {
        if self.pages.is_empty() {
            return;
        }
        let first = range.first() & !PAGE_MASK;
        if range.last() - first < PAGE_SIZE {
            // As nearly all are.
            self.note_time(first, to.now_ns);
            self.page_appeared(first, (range, access), to);
            return;
        }
        let touched = self.pages.touched(range);
        // Those that were seen together have one time.
        let _ = touched.iter().any(|page| self.note_time(*page, to.now_ns));
        for page in touched {
            self.page_appeared(page, (range, access), to);
        }
    }

    fn page_appeared<T: Translations>(&mut self, page: u64, new: (IovaRange, Access), to: &mut Surroundings<'_, T>) {
        self.recheck(page, Some(new), to);
        // Without replies nothing else says that the front-end is done with the page.
        if self.flights.land_silently(page) {
            self.judge(page, 0, None, to);
        }
    }

    /// Takes the time of an answer, if it is one to a message in flight; returns whether it is.
    fn note_time(&mut self, page: u64, now_ns: u64) -> bool {
        match self.pages.get(page) {
            Some(PageMiss { state: State::Sent { number }, .. }) => self.flights.came(*number, now_ns),
            _ => false,
        }
    }

    /// The reply to the oldest message in flight that asked for one. `false`: there is none.
    pub(super) fn reply<T: Translations>(&mut self, value: u64, to: &mut Surroundings<'_, T>) -> bool {
        if !self.flights.expects_reply() {
            return false;
        }
        while let Some(flight) = self.flights.land() {
            if self.is_current(&flight) {
                self.recheck(flight.page, None, to);
            }
            if self.is_current(&flight) {
                let value = if flight.replies { value } else { PASSED_OVER };
                self.judge(flight.page, value, Some(flight), to);
            }
            if flight.replies {
                break;
            }
        }
        true
    }

    /// Time passed.
    pub(super) fn tick(&mut self, now_ns: u64, actions: &mut VecDeque<Action>) {
        while let Some((&id, waiter)) = self.waiters.first_key_value() {
            if waiter.deadline_ns > now_ns {
                break;
            }
            let Some(waiter) = self.finish(id, Answer::TimedOut, actions) else { continue };
            for page in waiter.open.iter() {
                // Without replies a refusal is not heard. Whoever else waits for the page would never be asked for.
                if self.flights.land_silently(page) {
                    self.requeue(page);
                }
            }
        }
    }

    /// A worker is gone.
    pub(super) fn worker_gone(&mut self, worker: WorkerId) {
        let ids: Vec<u64> = self.by_cell.range((worker, 0)..=(worker, u16::MAX)).map(|(_, id)| *id).collect();
        for id in ids {
            self.remove_waiter(id);
        }
    }

    /// Nobody can be served any more: all are answered `Stopped`. What is in flight keeps its place.
    pub(super) fn stop(&mut self, actions: &mut VecDeque<Action>) {
        while let Some((&id, _)) = self.waiters.first_key_value() {
            self.finish(id, Answer::Stopped, actions);
        }
    }

    /// The back-end channel is another one, or none: replies that were due will never come.
    pub(super) fn channel_replaced(&mut self) {
        self.flights.forget();
        for page in self.pages.sent() {
            self.requeue(page);
        }
    }

    /// Sends what may be sent. The caller saw to it that there is a channel, and calls this when everything that is
    /// known by now was told: what goes out together is a batch.
    pub(super) fn pump<T: Translations>(&mut self, to: &mut Surroundings<'_, T>) {
        // After nearly every event, mostly in vain.
        if self.turns.is_empty() {
            return;
        }
        let mut unreplied = 0;
        while self.flights.room() > 0 {
            let Some(page) = self.turns.next() else { break };
            unreplied += 1;
            let last = self.turns.is_empty() || self.flights.room() == 1;
            if self.send(page, last || unreplied == REPLY_EVERY, to) {
                unreplied = 0;
            }
        }
    }

    /// Asks for a page, and for a reply if `ends_batch` or the page needs one of its own; returns whether it did the
    /// latter.
    fn send<T: Translations>(&mut self, page: u64, ends_batch: bool, to: &mut Surroundings<'_, T>) -> bool {
        let Some(entry) = self.pages.get_mut(page) else { return false };
        let access = match entry.waiters.first() {
            Some(first) if entry.apart => first.access,
            _ => entry.waiters.iter().fold(Access::NONE, |all, interest| all.union(interest.access)),
        };
        // Asked once by page, as front-ends expect, and then by the very address: a front-end may know only a part of
        // the page.
        let iova = match entry.waiters.first() {
            Some(first) if first.attempts > 0 || first.denials > 0 => match self.waiters.get(&first.waiter) {
                Some(waiter) => match coverage(to.table, waiter.part_in(page), waiter.access) {
                    Coverage::Absent(at) | Coverage::Forbidden(at) => at,
                    Coverage::Covered => page,
                },
                None => page,
            },
            _ => page,
        };
        // Once a page was not simply there, what the front-end says of it counts.
        let again = entry.apart || entry.waiters.iter().any(|i| i.attempts > 0 || i.denials > 0);
        let need_reply = to.replies && (ends_batch || again);
        if to.replies {
            self.flights.depart(iova, access, need_reply, to.now_ns);
        } else {
            self.flights.depart_silently(page);
        }
        entry.state = State::Sent { number: self.flights.sent() };
        let mut message = IotlbMessage::miss(iova, access);
        message.size = PAGE_SIZE - (iova & PAGE_MASK);
        to.actions.push_back(Action::SendBackEnd { message, need_reply });
        need_reply
    }

    fn is_current(&self, flight: &Flight) -> bool {
        self.pages.get(flight.page).is_some_and(|p| p.state == State::Sent { number: flight.number })
    }

    /// The front-end is done with a page, and some waiters still lack it: count, give up, or ask again.
    fn judge<T: Translations>(&mut self, page: u64, value: u64, flight: Option<Flight>, to: &mut Surroundings<'_, T>) {
        let Some(entry) = self.pages.get_mut(page) else { return };
        let mut verdicts = Vec::new();
        let mut passed_over = false;
        let mut anyone = false;
        for interest in entry.waiters.iter_mut() {
            let Some(waiter) = self.waiters.get(&interest.waiter) else { continue };
            // The message must be younger than the waiter, and must have asked for what the waiter wants: for a refusal
            // no more than that, for a success no less.
            if flight.is_some_and(|f| f.number <= interest.joined) {
                continue;
            }
            let fits = flight.is_none_or(|f| match value {
                0 => f.access.allows(waiter.access),
                _ => waiter.access.allows(f.access),
            });
            if !fits {
                passed_over = true;
                continue;
            }
            anyone = true;
            if value != 0 {
                interest.denials += 1;
                if interest.denials >= DENIALS_NEEDED {
                    verdicts.push((interest.waiter, Answer::Denied, None));
                }
            } else {
                interest.attempts = interest.attempts.saturating_add(1);
                if interest.attempts > RETRIES_MAX {
                    match coverage(to.table, waiter.part_in(page), waiter.access) {
                        Coverage::Forbidden(at) => {
                            verdicts.push((interest.waiter, Answer::Denied, Some((at, waiter.access))));
                        }
                        Coverage::Absent(_) => match flight {
                            // "Done" each time, and everything that came before it was read: the front-end has nothing
                            // for this address, and may say so like that.
                            Some(flight) if waiter.wants(flight.iova) => {
                                verdicts.push((interest.waiter, Answer::Denied, None));
                            }
                            // It was asked for what another one lacks, who is answered now; then this one has its turn.
                            Some(_) => {}
                            // Translations of other parts of the page, which may not have been meant as answers.
                            None => verdicts.push((interest.waiter, Answer::TimedOut, None)),
                        },
                        Coverage::Covered => verdicts.push((interest.waiter, Answer::TimedOut, None)),
                    }
                }
            }
        }
        // Who wanted less learns nothing from a refusal of more: from now on each is asked for in its turn, or somebody
        // who always wants too much would keep the others from what they may have.
        if value != 0 && (passed_over || !anyone) && entry.waiters.len() > 1 {
            entry.apart = true;
        }
        for (id, answer, failure) in verdicts {
            if let Some((iova, access)) = failure {
                let message =
                    IotlbMessage { iova, size: PAGE_SIZE, user_address: 0, access, kind: IotlbKind::AccessFail };
                to.actions.push_back(Action::SendBackEnd { message, need_reply: false });
            }
            self.finish(id, answer, to.actions);
        }
        self.requeue(page);
    }

    /// Settles the waiters of a page that is covered now. `new` is known to be in the table, with that access.
    fn recheck<T: Translations>(&mut self, page: u64, new: Option<(IovaRange, Access)>, to: &mut Surroundings<'_, T>) {
        let Entry::Occupied(mut entry) = self.pages.entry(page) else { return };
        let mut done: SmallVec<[u64; 1]> = SmallVec::new();
        let waiters = &mut self.waiters;
        let before = entry.get().waiters.len();
        entry.get_mut().waiters.retain(|interest| {
            let Some(waiter) = waiters.get_mut(&interest.waiter) else { return true };
            let part = waiter.part_in(page);
            let is_new = new.is_some_and(|(range, access)| range.covers(part) && access.allows(waiter.access));
            if !is_new && coverage(to.table, part, waiter.access) != Coverage::Covered {
                return true;
            }
            // A page that was there once counts, even if it was taken away again before the last one came: the answer
            // says "look again". Asking again from here could name a page that the guest has unmapped since, because
            // the worker has served what it wanted there; the worker asks for what it still needs.
            waiter.open.remove(page);
            if waiter.open.is_empty() {
                done.push(interest.waiter);
            }
            false
        });
        if entry.get().waiters.is_empty() {
            let gone = entry.remove();
            self.dropped(page, &gone);
        } else if entry.get().waiters.len() < before {
            self.see_to_owner(page);
        }
        for id in done {
            self.finish(id, Answer::Resolved, to.actions);
        }
    }

    fn add_waiter(&mut self, cell: Option<(WorkerId, u16, u32)>, range: IovaRange, access: Access, now_ns: u64) -> u64 {
        let id = self.next_waiter;
        self.next_waiter += 1;
        let deadline_ns = now_ns.saturating_add(self.timeout_ns);
        self.waiters.insert(id, Waiter { cell, range, access, deadline_ns, open: OpenPages::none_of(range) });
        id
    }

    /// Joins or creates the page misses a waiter needs.
    fn open_pages(&mut self, id: u64, table: &impl Translations) {
        let Some(waiter) = self.waiters.get_mut(&id) else { return };
        let owner = waiter.owner();
        let range = waiter.range;
        for page in pages_of(range) {
            if coverage(table, waiter.part_in(page), waiter.access) == Coverage::Covered || !waiter.open.insert(page) {
                continue;
            }
            let joined = self.flights.sent();
            let interest = Interest { waiter: id, owner, joined, access: waiter.access, denials: 0, attempts: 0 };
            match self.pages.entry(page) {
                Entry::Occupied(mut entry) => {
                    let miss = entry.get_mut();
                    miss.waiters.join(interest);
                    // It waits in the shorter queue of the two: who asks for little need not wait for all that somebody
                    // else asked for before.
                    if let State::Queued(place) = miss.state
                        && self.turns.pages_of(owner) < self.turns.pages_of(place.owner())
                    {
                        self.turns.leave(place);
                        miss.state = State::Queued(self.turns.join(owner, page));
                    }
                }
                Entry::Vacant(entry) => {
                    let state = State::Queued(self.turns.join(owner, page));
                    entry.insert(PageMiss { state, apart: false, waiters: Crowd::of(interest) });
                }
            }
        }
    }

    /// Puts a page (back) into the queue of its first waiter, or drops it when there is none.
    fn requeue(&mut self, page: u64) {
        let Some(entry) = self.pages.get_mut(page) else { return };
        let Some(owner) = entry.waiters.first().map(|interest| interest.owner) else {
            self.drop_page(page);
            return;
        };
        self.flights.land_silently(page);
        if let State::Queued(place) = entry.state {
            self.turns.leave(place);
        }
        entry.state = State::Queued(self.turns.join(owner, page));
    }

    /// Nobody wants a page any more.
    fn drop_page(&mut self, page: u64) {
        if let Some(gone) = self.pages.remove(page) {
            self.dropped(page, &gone);
        }
    }

    /// A page was taken out of those that somebody wants.
    fn dropped(&mut self, page: u64, gone: &PageMiss) {
        self.pages.tidy();
        self.flights.land_silently(page);
        if let State::Queued(place) = gone.state {
            self.turns.leave(place);
        }
    }

    /// Takes a waiter off a page, and drops the page when it was the last.
    fn detach(&mut self, id: u64, page: u64) {
        let Some(entry) = self.pages.get_mut(page) else { return };
        entry.waiters.leave(id);
        if entry.waiters.is_empty() {
            self.drop_page(page);
        } else {
            self.see_to_owner(page);
        }
    }

    /// A page that lost a waiter may wait in the queue of somebody who does not want it any more.
    fn see_to_owner(&mut self, page: u64) {
        let Some(PageMiss { state: State::Queued(place), waiters, .. }) = self.pages.get(page) else { return };
        if !waiters.has_of(place.owner()) {
            self.requeue(page);
        }
    }

    fn remove_waiter(&mut self, id: u64) -> Option<Waiter> {
        let waiter = self.waiters.remove(&id)?;
        match waiter.cell {
            Some((worker, cell, _)) => {
                self.by_cell.remove(&(worker, cell));
            }
            None => {
                self.own.remove(&(waiter.range.first() & !PAGE_MASK));
            }
        }
        for page in waiter.open.iter() {
            self.detach(id, page);
        }
        Some(waiter)
    }

    fn forget_cell(&mut self, worker: WorkerId, cell: u16) {
        if let Some(id) = self.by_cell.get(&(worker, cell)) {
            self.remove_waiter(*id);
        }
    }

    /// Answers a waiter and forgets it.
    fn finish(&mut self, id: u64, answer: Answer, actions: &mut VecDeque<Action>) -> Option<Waiter> {
        let waiter = self.remove_waiter(id)?;
        match waiter.cell {
            Some((worker, cell, ticket)) => {
                actions.push_back(Action::AnswerMiss { worker, cell, ticket, answer });
            }
            None if answer != Answer::Resolved => {
                tracing::debug!(range = %waiter.range, ?answer, "ring page not translated");
            }
            None => {}
        }
        Some(waiter)
    }
}
