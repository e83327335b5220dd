//! The miss engine alone, over a table that is a map of pages.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use iotlb_proto::table::Translation;
use iotlb_proto::worker::{Answer, MissRequest};
use proptest::prelude::*;

use super::*;

#[derive(Default)]
struct Pages(BTreeMap<u64, Access>);

impl Translations for Pages {
    fn leaf(&self, iova: u64) -> Option<Translation> {
        let first = iova & !PAGE_MASK;
        let access = *self.0.get(&first)?;
        Some(Translation { first, last: first | PAGE_MASK, target: first, access })
    }
}

fn request(ticket: u32, first: u64, len: u64, access: Access) -> MissRequest {
    MissRequest { ticket, range: IovaRange::from_len(first, len).expect("a range"), access }
}

#[test]
fn coverage_tells_absent_from_forbidden() {
    let pages = Pages(BTreeMap::from([(0, Access::READ_WRITE), (4096, Access::READ)]));
    let of = |first, len, access| coverage(&pages, IovaRange::from_len(first, len).expect("a range"), access);
    assert_eq!(of(10, 8000, Access::READ), Coverage::Covered);
    assert_eq!(of(10, 8000, Access::WRITE), Coverage::Forbidden(4096));
    assert_eq!(of(10, 9000, Access::READ), Coverage::Absent(8192));
    assert_eq!(of(u64::MAX, 1, Access::READ), Coverage::Absent(u64::MAX));
}

#[test]
fn pages_of_a_range_reach_the_end_of_the_space() {
    let pages = |first, len| pages_of(IovaRange::from_len(first, len).expect("a range")).collect::<Vec<_>>();
    assert_eq!(pages(0xfff, 2), [0, 0x1000]);
    assert_eq!(pages(u64::MAX, 1), [!0xfff]);
}

#[test]
fn a_page_that_was_there_once_is_not_asked_for_again() {
    let (mut pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    let two_pages = request(1, 0, 8192, Access::READ);
    misses.post(WorkerId(0), 0, two_pages, 0, &mut around(&pages, &mut actions));
    misses.pump(&mut around(&pages, &mut actions));
    assert_eq!(actions.drain(..).count(), 2, "both pages are asked for");
    pages.0.insert(0, Access::READ);
    misses.appeared(IovaRange::page_of(0), Access::READ, &mut around(&pages, &mut actions));
    // The worker uses the first page, the guest unmaps and flushes it; then the second page comes.
    pages.0.clear();
    pages.0.insert(4096, Access::READ);
    misses.appeared(IovaRange::page_of(4096), Access::READ, &mut around(&pages, &mut actions));
    let left: Vec<_> = actions.drain(..).collect();
    assert!(matches!(left[..], [Action::AnswerMiss { answer: Answer::Resolved, .. }]), "{left:?}");
}

/// What was sent since: page, and whether a reply was asked for.
fn sent(actions: &mut VecDeque<Action>) -> Vec<(u64, bool)> {
    let sent = |action| match action {
        Action::SendBackEnd { message, need_reply } => Some((message.iova, need_reply)),
        _ => None,
    };
    actions.drain(..).filter_map(sent).collect()
}

#[test]
fn one_reply_ends_the_wait_for_a_batch() {
    let (mut pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    for cell in 0..3 {
        let page = request(u32::from(cell), u64::from(cell) * PAGE_SIZE, PAGE_SIZE, Access::READ);
        misses.post(WorkerId(0), cell, page, 0, &mut around(&pages, &mut actions));
    }
    misses.pump(&mut around(&pages, &mut actions));
    assert_eq!(sent(&mut actions), [(0, false), (0x1000, false), (0x2000, true)]);
    // The second page is refused without a word, the third aloud.
    pages.0.insert(0, Access::READ);
    misses.appeared(IovaRange::page_of(0), Access::READ, &mut around(&pages, &mut actions));
    assert!(matches!(actions.pop_front(), Some(Action::AnswerMiss { cell: 0, answer: Answer::Resolved, .. })));
    assert!(misses.reply(1, &mut around(&pages, &mut actions)));
    assert!(actions.is_empty(), "a refusal is confirmed before the worker hears of it");
    misses.pump(&mut around(&pages, &mut actions));
    assert_eq!(sent(&mut actions), [(0x1000, true), (0x2000, true)], "each with a reply of its own");
    assert!(misses.reply(1, &mut around(&pages, &mut actions)));
    assert!(matches!(actions.pop_front(), Some(Action::AnswerMiss { cell: 1, answer: Answer::Denied, .. })));
    pages.0.insert(0x2000, Access::READ);
    assert!(misses.reply(0, &mut around(&pages, &mut actions)));
    assert!(matches!(actions.pop_front(), Some(Action::AnswerMiss { cell: 2, answer: Answer::Resolved, .. })));
    assert!(!misses.reply(0, &mut around(&pages, &mut actions)), "nothing is in flight");
}

#[test]
fn a_long_batch_asks_for_replies_on_the_way() {
    let (pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    for cell in 0..3 {
        let many = request(0, u64::from(cell) << 30, CELL_PAGES_MAX * PAGE_SIZE, Access::READ);
        misses.post(WorkerId(0), cell, many, 0, &mut around(&pages, &mut actions));
    }
    misses.pump(&mut around(&pages, &mut actions));
    let batch = sent(&mut actions);
    assert_eq!(batch.len(), IN_FLIGHT_MAX.min(3 * usize::try_from(CELL_PAGES_MAX).expect("small")));
    assert!(batch.chunks(REPLY_EVERY).all(|part| part.last().is_some_and(|(_, reply)| *reply)), "{batch:?}");
    assert!(misses.reply(0, &mut around(&pages, &mut actions)));
    assert_eq!(misses.flights.due().len(), batch.len() - REPLY_EVERY, "one reply frees the places of all before it");
}

#[test]
fn without_replies_a_page_is_asked_for_again_when_somebody_has_waited_in_vain() {
    let (pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    let half_ns = misses.timeout_ns / 2;
    // Two that ask again after each time-out, half of one apart: somebody waits for the page at any time.
    let mut asked = Vec::new();
    for turn in 0..6 {
        let now_ns = turn * half_ns;
        misses.tick(now_ns, &mut actions);
        let cell = u16::try_from(turn % 2).expect("small");
        let mut around = Surroundings { replies: false, now_ns, ..around(&pages, &mut actions) };
        misses.post(WorkerId(0), cell, request(0, 0, 4096, Access::READ), now_ns, &mut around);
        misses.pump(&mut around);
        asked.push(sent(&mut actions).len());
    }
    assert_eq!(asked, [1, 0, 1, 1, 1, 1]);
}

#[test]
fn who_wants_too_much_on_and_on_does_not_keep_others_from_what_they_may_have() {
    let (pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    let post = |misses: &mut Misses, worker, cell, access, actions: &mut VecDeque<Action>| {
        let page = request(u32::from(cell), 0, PAGE_SIZE, access);
        misses.post(WorkerId(worker), cell, page, 0, &mut around(&pages, actions));
    };
    // The guest lets the device read the page. Of worker 0 one of two misses always waits, and it wants to write.
    post(&mut misses, 0, 0, Access::READ_WRITE, &mut actions);
    misses.pump(&mut around(&pages, &mut actions));
    post(&mut misses, 1, 0, Access::READ, &mut actions);
    post(&mut misses, 0, 1, Access::READ_WRITE, &mut actions);
    for round in 0.. {
        assert!(round < 8, "the page is never asked for to be read");
        let asked = actions.drain(..).find_map(|action| match action {
            Action::SendBackEnd { message, .. } => Some(message.access),
            _ => None,
        });
        if asked == Some(Access::READ) {
            break;
        }
        assert!(misses.reply(1, &mut around(&pages, &mut actions)));
        let denied: Vec<u16> = actions
            .iter()
            .filter_map(|action| match action {
                Action::AnswerMiss { worker: WorkerId(0), cell, answer: Answer::Denied, .. } => Some(*cell),
                _ => None,
            })
            .collect();
        misses.pump(&mut around(&pages, &mut actions));
        for cell in denied {
            post(&mut misses, 0, cell, Access::READ_WRITE, &mut actions);
        }
    }
}

#[test]
fn a_page_that_somebody_else_queued_comes_in_ones_own_turn() {
    let (pages, mut actions) = (Pages::default(), VecDeque::new());
    let mut misses = Misses::new(400);
    for cell in 0..20 {
        let many = request(0, u64::from(cell) << 30, CELL_PAGES_MAX * PAGE_SIZE, Access::READ);
        misses.post(WorkerId(0), cell, many, 0, &mut around(&pages, &mut actions));
    }
    misses.pump(&mut around(&pages, &mut actions));
    assert_eq!(sent(&mut actions).len(), IN_FLIGHT_MAX, "the rest waits");
    let wanted = 19 << 30;
    misses.post(WorkerId(1), 0, request(0, wanted, PAGE_SIZE, Access::READ), 0, &mut around(&pages, &mut actions));
    assert!(misses.reply(0, &mut around(&pages, &mut actions)));
    misses.pump(&mut around(&pages, &mut actions));
    let batch = sent(&mut actions);
    assert!(batch.len() < IN_FLIGHT_MAX && batch.iter().any(|(page, _)| *page == wanted), "{batch:?}");
}

#[test]
fn many_who_want_the_same_pages_give_up_without_a_look_at_each_other() {
    // Every way to an end: time, refusal, the workers' own, the device's, a cell that is posted again.
    for end in ["time", "refusal", "gone", "stop", "again"] {
        let (pages, mut actions) = (Pages::default(), VecDeque::new());
        let mut misses = Misses::new(400);
        let (workers, cells) = (8, 64);
        let all = || (0..cells).flat_map(|cell| (0..workers).map(move |worker| (worker, cell)));
        let same = request(0, 0, CELL_PAGES_MAX * PAGE_SIZE, Access::READ);
        for (worker, cell) in all() {
            misses.post(WorkerId(worker), cell, same, 0, &mut around(&pages, &mut actions));
        }
        if end == "refusal" {
            misses.pump(&mut around(&pages, &mut actions));
        }
        let before = crowd::LOOKS.get();
        match end {
            "time" => misses.tick(u64::MAX, &mut actions),
            "refusal" => {
                while misses.waiting() > 0 {
                    assert!(misses.reply(1, &mut around(&pages, &mut actions)));
                    misses.pump(&mut around(&pages, &mut actions));
                }
            }
            "gone" => (0..workers).for_each(|worker| misses.worker_gone(WorkerId(worker))),
            "stop" => misses.stop(&mut actions),
            _ => all().for_each(|(worker, cell)| {
                misses.post(WorkerId(worker), cell, same, 0, &mut around(&pages, &mut actions));
            }),
        }
        let places = u64::from(workers) * u64::from(cells) * CELL_PAGES_MAX;
        let looks = crowd::LOOKS.get() - before;
        assert!(looks < 32 * places, "{end}: {looks} looks for {places} places");
    }
}

fn around<'a>(table: &'a Pages, actions: &'a mut VecDeque<Action>) -> Surroundings<'a, Pages> {
    Surroundings { table, actions, replies: true, now_ns: 0 }
}

/// One step of a random life.
#[derive(Clone, Debug)]
enum Step {
    Post { worker: u32, cell: u16, page: u64, len: u64, access: u8 },
    Want { page: u64 },
    Unwant { page: u64, pages: u64 },
    Map { page: u64, pages: u64, access: u8 },
    Unmap { page: u64 },
    Reply { value: u64 },
    Wait { ns: u64 },
    Gone { worker: u32 },
    Pump,
    Stop,
    Channel,
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..6u64;
    prop_oneof![
        6 => (0..3u32, 0..3u16, page.clone(), 1..9000u64, 1..4u8)
            .prop_map(|(worker, cell, page, len, access)| Step::Post { worker, cell, page, len, access }),
        1 => page.clone().prop_map(|page| Step::Want { page }),
        1 => (page.clone(), 1..4u64).prop_map(|(page, pages)| Step::Unwant { page, pages }),
        3 => (page.clone(), 1..4u64, 1..4u8).prop_map(|(page, pages, access)| Step::Map { page, pages, access }),
        2 => page.prop_map(|page| Step::Unmap { page }),
        5 => (0..2u64).prop_map(|value| Step::Reply { value }),
        1 => (0..3_000_000u64).prop_map(|ns| Step::Wait { ns }),
        1 => (0..3u32).prop_map(|worker| Step::Gone { worker }),
        4 => Just(Step::Pump),
        1 => Just(Step::Stop),
        1 => Just(Step::Channel),
    ]
}

/// What must hold between any two events.
fn check(misses: &Misses) {
    for (id, waiter) in &misses.waiters {
        assert!(!waiter.open.is_empty(), "a waiter that waits for nothing");
        for page in waiter.open.iter() {
            let interest = misses
                .pages
                .get(page)
                .expect("a waiter's page is known")
                .waiters
                .iter()
                .filter(|i| i.waiter == *id)
                .count();
            assert_eq!(interest, 1, "page {page:#x} knows its waiter");
        }
    }
    assert!(
        misses.flights.due().iter().is_sorted_by(|a, b| a.number < b.number),
        "messages in flight are out of order"
    );
    let places = misses.turns.all();
    let queued: BTreeSet<u64> = places.iter().map(|(_, page)| *page).collect();
    assert_eq!(queued.len(), places.len(), "a page is queued twice");
    for (page, entry) in misses.pages.iter() {
        assert!(!entry.waiters.is_empty(), "a page that nobody waits for");
        for interest in entry.waiters.iter() {
            let waiter = &misses.waiters[&interest.waiter];
            assert!(waiter.open.iter().any(|open| open == *page), "a waiter knows its page");
            assert_eq!((interest.owner, interest.access), (waiter.owner(), waiter.access));
        }
        match entry.state {
            State::Queued(place) => {
                assert!(places.contains(&(place, *page)));
                let owners = entry.waiters.iter().map(|interest| misses.waiters[&interest.waiter].owner());
                assert!(owners.into_iter().any(|owner| owner == place.owner()), "a page waits in a stranger's queue");
            }
            State::Sent { number } => {
                assert!(!queued.contains(page));
                let under_way =
                    misses.flights.due().iter().any(|f| f.number == number) || misses.flights.silent().contains(page);
                assert!(under_way, "page {page:#x} waits for a message that is not under way");
            }
        }
    }
    assert!(queued.iter().all(|page| misses.pages.get(*page).is_some()));
    assert!(misses.flights.due().len() + misses.flights.silent().len() <= IN_FLIGHT_MAX);
    assert!(misses.flights.due().back().is_none_or(|flight| flight.replies), "nothing will end the wait for the last");
    assert_eq!(misses.by_cell.len() + misses.own.len(), misses.waiters.len());
}

proptest! {
    #[test]
    fn nothing_is_forgotten(steps in proptest::collection::vec(step(), 1..200), replies: bool) {
        let mut misses = Misses::new(1);
        let mut table = Pages::default();
        let mut actions = VecDeque::new();
        let mut now_ns = 0;
        let mut ticket = 0;
        let mut due: BTreeMap<(WorkerId, u16), u32> = BTreeMap::new();
        for step in steps {
            let bits = |bits| Access::from_bits(bits).expect("two bits");
            let mut to = Surroundings { table: &table, actions: &mut actions, replies, now_ns };
            match step {
                Step::Post { worker, cell, page, len, access } => {
                    ticket += 1;
                    due.insert((WorkerId(worker), cell), ticket);
                    let request = request(ticket, page * PAGE_SIZE + 100, len, bits(access));
                    misses.post(WorkerId(worker), cell, request, now_ns, &mut to);
                }
                Step::Want { page } => {
                    let range = IovaRange::page_of(page * PAGE_SIZE);
                    misses.want([(range, Access::READ)].into_iter(), now_ns, &table);
                }
                Step::Unwant { page, pages } => {
                    let (first, needed) = (page * PAGE_SIZE, (page + 2) * PAGE_SIZE);
                    let range = IovaRange::from_len(first, pages * PAGE_SIZE).expect("a range");
                    misses.unwant([(range, Access::READ)].into_iter(), |page| page.first() == needed);
                    let left = misses.own.range(first..=range.last());
                    prop_assert!(left.map(|(page, _)| *page).all(|page| page == needed));
                }
                Step::Map { page, pages, access } => {
                    let range = IovaRange::from_len(page * PAGE_SIZE, pages * PAGE_SIZE).expect("low addresses");
                    table.0.extend(pages_of(range).map(|page| (page, bits(access))));
                    let mut to = Surroundings { table: &table, actions: &mut actions, replies, now_ns };
                    misses.appeared(range, bits(access), &mut to);
                }
                Step::Unmap { page } => {
                    table.0.remove(&(page * PAGE_SIZE));
                }
                Step::Reply { value } => {
                    let expected = !misses.flights.due().is_empty();
                    prop_assert_eq!(misses.reply(value, &mut to), expected);
                }
                Step::Wait { ns } => {
                    now_ns += ns;
                    misses.tick(now_ns, &mut actions);
                    prop_assert!(misses.next_deadline_ns().is_none_or(|deadline| deadline > now_ns));
                }
                Step::Gone { worker } => {
                    misses.worker_gone(WorkerId(worker));
                    due.retain(|(holder, _), _| *holder != WorkerId(worker));
                }
                Step::Pump => misses.pump(&mut to),
                Step::Stop => misses.stop(&mut actions),
                Step::Channel => misses.channel_replaced(),
            }
            check(&misses);
            for action in actions.drain(..) {
                if let Action::AnswerMiss { worker, cell, ticket, answer } = action {
                    prop_assert_eq!(due.remove(&(worker, cell)), Some(ticket), "answered {:?}", answer);
                }
            }
            // Whoever is not answered yet is still known.
            let asked: Vec<_> = misses.by_cell.keys().copied().collect();
            prop_assert_eq!(due.keys().copied().collect::<Vec<_>>(), asked);
        }
        misses.tick(u64::MAX, &mut actions);
        prop_assert_eq!((misses.waiters.len(), misses.pages.len(), misses.turns.all().len()), (0, 0, 0));
        let late = actions.iter().filter(|a| matches!(a, Action::AnswerMiss { answer: Answer::TimedOut, .. })).count();
        prop_assert_eq!(late, due.len());
    }
}
