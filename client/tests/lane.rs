//! A lane asks for what it misses and goes on; only [`Lane::wait`] waits. The test plays the daemon and the guest by
//! hand, in one thread, so that nothing is answered but when a line here says so.

mod support;

use std::os::fd::AsFd;

use iotlb_client::net::backlog::Backlog;
use iotlb_client::net::echo::Echo;
use iotlb_client::net::header::HEADER_LEN;
use iotlb_client::net::lane::{Done, Lane, Step};
use iotlb_client::net::pair::{Next, Pair, Port};
use iotlb_client::net::{rx, tx};
use iotlb_client::{Access, Answer, Attachment, Queue, Reader};
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use support::{Daemon, Memory, PATIENCE_MS, eventfd, wait_until};

const FEATURES: u64 = virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::EVENT_IDX | virtio::NET_MRG_RXBUF;
const SIZE: u16 = 16;
/// The ring's tables, a page each, present from the start; IOVA and place in memory are the same.
const DESC: u64 = 0;
const AVAIL: u64 = PAGE_SIZE;
const USED: u64 = 2 * PAGE_SIZE;
/// The first buffer; every other page, so that no two become one request.
const BUFFERS: u64 = 4 * PAGE_SIZE;
const PACKET_LEN: u32 = 12 + 60;
/// A buffer that begins in `page(20)` and ends in the next page.
const ACROSS_PAGES: u64 = BUFFERS + 41 * PAGE_SIZE - 8;
/// `flags` of a descriptor: another one follows; the device writes the buffer.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One queue.
struct Stage {
    daemon: Daemon,
    memory: Memory,
    attachment: Attachment,
    reader: Reader,
    lane: Lane,
    backlog: Backlog,
    descriptors: u16,
    chains: u16,
}

impl Stage {
    fn new() -> Stage {
        let (daemon, memory, attachment) = Daemon::with_memory(64);
        daemon.map(0, 3 * PAGE_SIZE, 0, Access::READ_WRITE);
        start_rings(&daemon, &[record(0)]);
        let lane = Lane::new(lease(&daemon, &attachment, &[1]).pop().expect("one"), 64);
        let reader = attachment.reader().expect("a reader");
        Stage { daemon, memory, attachment, reader, lane, backlog: Backlog::default(), descriptors: 0, chains: 0 }
    }

    /// Posts a packet in `parts` buffers, each in a page of its own.
    fn post(&mut self, parts: u16) {
        let buffers: Vec<u64> = (self.descriptors..self.descriptors + parts).map(page).collect();
        self.post_at(&buffers, 0);
    }

    /// Posts a chain of these buffers.
    fn post_at(&mut self, buffers: &[u64], flags: u16) {
        let head = self.descriptors;
        for (number, iova) in buffers.iter().enumerate() {
            let index = self.descriptors;
            let next = if number + 1 < buffers.len() { NEXT } else { 0 };
            let descriptor = [
                &iova.to_le_bytes()[..],
                &PACKET_LEN.to_le_bytes(),
                &(flags | next).to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            self.memory.poke(DESC + 16 * u64::from(index), &descriptor.concat());
            self.descriptors += 1;
        }
        self.memory.poke(AVAIL + 4 + 2 * u64::from(self.chains), &head.to_le_bytes());
        self.chains += 1;
        self.memory.poke(AVAIL + 2, &self.chains.to_le_bytes());
    }

    fn run(&mut self) -> Step {
        let backlog = &mut self.backlog;
        let collect = self.lane.run(&mut self.reader, self.attachment.counters(), |ring, guard, record, features| {
            let room = backlog.room();
            let done = tx::collect(ring, guard, record, features, backlog, room);
            Done { call: done.call, chains: done.chains, bytes: done.bytes, fault: done.fault }
        });
        collect.expect("the attachment lives")
    }

    /// The same for a queue that receives.
    fn deliver(&mut self) -> Step {
        let backlog = &mut self.backlog;
        let deliver = self.lane.run(&mut self.reader, self.attachment.counters(), |ring, guard, record, features| {
            let done = rx::deliver(ring, guard, record, features, backlog);
            Done { call: done.call, chains: done.chains, bytes: done.bytes, fault: done.fault }
        });
        deliver.expect("the attachment lives")
    }

    /// The lengths of the used elements, in order.
    fn used(&self) -> Vec<u32> {
        let count = u16::from_le_bytes(self.memory.peek(USED + 2, 2).try_into().expect("two bytes"));
        let len = |n| self.memory.peek(USED + 4 + 8 * n + 4, 4).try_into().expect("four bytes");
        (0..u64::from(count)).map(|n| u32::from_le_bytes(len(n))).collect()
    }

    fn wait(&mut self) -> Option<Step> {
        self.lane.wait(&mut self.reader).expect("the attachment lives")
    }
}

/// A request that was posted: cell, ticket, range.
type Asked = (u16, u32, IovaRange);

/// What was posted since the last time.
fn asked(daemon: &Daemon) -> Vec<Asked> {
    let mut cells = Vec::new();
    daemon.segment.take_posted(|cell| cells.push(cell));
    let take = |cell: u16| {
        let request = daemon.segment.cells[usize::from(cell)].take().expect("a sound request");
        let request = request.expect("a posted bit has a request");
        (cell, request.ticket, request.range)
    };
    cells.into_iter().map(take).collect()
}

/// Answers with whole pages, as nearly every front-end.
fn answer(daemon: &Daemon, request: Asked) {
    let range = request.2.page_aligned();
    daemon.table().insert(range, range.first(), Access::READ).expect("room");
    say(daemon, request, Answer::Resolved);
}

fn say(daemon: &Daemon, (cell, ticket, _): Asked, answer: Answer) {
    let asleep = daemon.segment.cells[usize::from(cell)].store_answer(ticket, answer);
    assert!(!asleep, "the one thread is here");
}

/// A ring whose tables begin at `base`.
fn record(base: u64) -> QueueRecord {
    let [desc, avail, used] = [DESC, AVAIL, USED].map(|table| base + table);
    QueueRecord { started: true, enabled: true, size: SIZE, desc, avail, used, base: 0, session_generation: 0 }
}

/// Starts the rings from queue 1 downwards.
fn start_rings(daemon: &Daemon, records: &[QueueRecord]) {
    let mut table = daemon.table();
    let session_generation = table.bump_session();
    table.set_acked_features(FEATURES);
    table.set_running(true);
    for (queue, record) in [1, 0].into_iter().zip(records) {
        table.publish_queue(queue, &QueueRecord { session_generation, ..*record });
    }
}

fn lease(daemon: &Daemon, attachment: &Attachment, queues: &'static [u16]) -> Vec<Queue> {
    let bells = [eventfd(), eventfd(), eventfd()];
    std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(queues, PATIENCE_MS));
        let WorkerMessage::ClaimQueues { claim, .. } = daemon.receive().0 else { panic!("not a claim") };
        for queue in queues.iter().copied() {
            let lease = QueueLease { queue, claim, kick: true, call: true, err: true };
            daemon.send(&DaemonMessage::Lease(lease), &bells.each_ref().map(AsFd::as_fd));
        }
        claiming.join().expect("no panic").expect("leased")
    })
}

/// The page of the buffer of descriptor `index`.
fn page(index: u16) -> u64 {
    BUFFERS + u64::from(index) * 2 * PAGE_SIZE
}

fn pages(asked: &[Asked]) -> Vec<u64> {
    asked.iter().map(|(.., range)| range.first()).collect()
}

#[test]
fn a_complete_packet_leaves_while_the_next_one_is_asked_for() {
    let mut stage = Stage::new();
    stage.daemon.map(page(0), PAGE_SIZE, page(0), Access::READ);
    stage.post(1);
    stage.post(1);
    // A run that waited would end with a pause: nobody answers.
    assert_eq!(stage.run(), Step::Missing);
    assert_eq!(stage.backlog.len(), 1, "it can go out now");
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [page(1)]);
    answer(&stage.daemon, requests[0]);
    assert_eq!((stage.wait(), stage.run()), (Some(Step::Again), Step::Again));
    assert_eq!(stage.backlog.len(), 2);
    assert_eq!(stage.wait(), None, "nothing is missing");
}

#[test]
fn what_is_posted_meanwhile_is_asked_for_before_the_last_answer() {
    let mut stage = Stage::new();
    stage.post(3);
    assert_eq!(stage.run(), Step::Missing);
    let first = asked(&stage.daemon);
    assert_eq!(pages(&first), [page(0), page(1), page(2)]);
    answer(&stage.daemon, first[0]);
    answer(&stage.daemon, first[1]);
    // The third is outstanding, and the daemon has more to do before it runs out of work.
    assert_eq!(stage.wait(), Some(Step::Again));
    stage.post(1);
    assert_eq!(stage.run(), Step::Missing);
    let second = asked(&stage.daemon);
    assert_eq!(pages(&second), [page(3)], "and nothing for the second time");
    answer(&stage.daemon, first[2]);
    assert_eq!(stage.wait(), Some(Step::Again));
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Missing, 1), "the first packet does not wait for the second");
    answer(&stage.daemon, second[0]);
    assert_eq!((stage.wait(), stage.run(), stage.backlog.len()), (Some(Step::Again), Step::Again, 2));
}

#[test]
fn a_denial_counts_also_when_nobody_waited_for_it() {
    for waited in [false, true] {
        let mut stage = Stage::new();
        stage.post(2);
        assert_eq!(stage.run(), Step::Missing);
        let requests = asked(&stage.daemon);
        assert_eq!(pages(&requests), [page(0), page(1)]);
        answer(&stage.daemon, requests[0]);
        if waited {
            assert_eq!(stage.wait(), Some(Step::Again), "the last one is left out");
        }
        say(&stage.daemon, requests[1], Answer::Denied);
        stage.daemon.map(page(2), PAGE_SIZE, page(2), Access::READ);
        stage.post(1);
        assert_eq!(stage.run(), Step::Again, "waited: {waited}");
        // Its chain goes back unused, and the next one is collected.
        assert_eq!((stage.run(), stage.backlog.len()), (Step::Again, 1), "waited: {waited}");
        assert_eq!(asked(&stage.daemon), [], "nothing was asked for twice; waited: {waited}");
    }
}

#[test]
fn a_wish_that_was_denied_is_asked_for_again_when_it_is_needed() {
    let mut stage = Stage::new();
    stage.post(1);
    stage.post(1);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    answer(&stage.daemon, requests[0]);
    say(&stage.daemon, requests[1], Answer::Denied);
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Missing, 1));
    let again = asked(&stage.daemon);
    assert_eq!(pages(&again), [page(1)]);
    answer(&stage.daemon, again[0]);
    assert_eq!((stage.wait(), stage.run(), stage.backlog.len()), (Some(Step::Again), Step::Again, 2));
}

#[test]
fn a_page_is_asked_for_once_although_it_gets_a_neighbour() {
    let mut stage = Stage::new();
    stage.post(1);
    stage.post_at(&[page(20)], 0);
    assert_eq!(stage.run(), Step::Missing);
    let first = asked(&stage.daemon);
    assert_eq!(pages(&first), [page(0), page(20)]);
    // Seen together, the two are one miss.
    stage.post_at(&[page(20) + PAGE_SIZE], 0);
    stage.post_at(&[page(20) + 2 * PAGE_SIZE], 0);
    assert_eq!(stage.run(), Step::Missing);
    let second = asked(&stage.daemon);
    let rest = IovaRange::from_len(page(20) + PAGE_SIZE, PAGE_SIZE + u64::from(PACKET_LEN)).expect("does not wrap");
    assert_eq!(second.iter().map(|(.., range)| *range).collect::<Vec<_>>(), [rest]);
    first.into_iter().chain(second).for_each(|request| answer(&stage.daemon, request));
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Again, 4));
}

#[test]
fn a_chain_does_not_fall_with_its_neighbour() {
    for waited in [false, true] {
        let mut stage = Stage::new();
        stage.post(1);
        stage.post_at(&[page(20)], 0);
        stage.post_at(&[page(20) + PAGE_SIZE], 0);
        assert_eq!(stage.run(), Step::Missing);
        let requests = asked(&stage.daemon);
        assert_eq!(pages(&requests), [page(0), page(20)], "the neighbours are one request");
        answer(&stage.daemon, requests[0]);
        assert_eq!((stage.run(), stage.backlog.len()), (Step::Missing, 1));
        // For the sake of the second page; the first is there by now.
        say(&stage.daemon, requests[1], Answer::Denied);
        stage.daemon.map(page(20), PAGE_SIZE, page(20), Access::READ);
        if waited {
            assert_eq!(stage.wait(), Some(Step::Again));
        }
        assert_eq!((stage.run(), stage.backlog.len()), (Step::Missing, 2), "waited: {waited}");
        let again = asked(&stage.daemon);
        assert_eq!(pages(&again), [page(20) + PAGE_SIZE]);
        say(&stage.daemon, again[0], Answer::Denied);
        assert_eq!((stage.wait(), stage.run()), (Some(Step::Again), Step::Again));
        assert_eq!((stage.backlog.len(), stage.used().len()), (2, 3), "waited: {waited}");
    }
}

/// A front-end that knows these parts of pages and no others.
fn answer_with_parts(daemon: &Daemon, known: &[IovaRange]) {
    for request in asked(daemon) {
        let (.., wanted) = request;
        match known.iter().find(|part| part.covers(wanted)) {
            Some(part) => {
                daemon.table().insert(*part, part.first(), Access::READ).expect("room");
                say(daemon, request, Answer::Resolved);
            }
            None => say(daemon, request, Answer::Denied),
        }
    }
}

#[test]
fn of_a_page_of_which_the_front_end_has_a_part_only_that_is_asked_for() {
    let part = |from: u64| IovaRange::from_len(page(20) + from, 0x200).expect("does not wrap");
    // Alone in its page; before and behind one that nobody knows; in a chain with one in another part.
    for (chains, known, packets) in [
        (&[&[0x800][..]][..], &[part(0x800)][..], 1),
        (&[&[0x800], &[0]], &[part(0x800)], 1),
        (&[&[0], &[0x800]], &[part(0x800)], 1),
        (&[&[0x800, 0xc00], &[0x400]], &[part(0x800), part(0xc00)], 1),
        (&[&[0x800, 0x1000], &[0]], &[part(0x800), part(0x1000)], 1),
    ] {
        let mut stage = Stage::new();
        for offsets in chains {
            stage.post_at(&offsets.iter().map(|offset| page(20) + offset).collect::<Vec<_>>(), 0);
        }
        let mut rounds = 0;
        while stage.used().len() < chains.len() {
            stage.run();
            answer_with_parts(&stage.daemon, known);
            stage.wait();
            rounds += 1;
            assert!(rounds < 20, "{chains:x?}: asked for on and on");
        }
        assert_eq!(stage.backlog.len(), packets, "{chains:x?}");
    }
}

#[test]
fn what_an_earlier_ring_asked_for_says_nothing_of_a_chain_at_the_same_place() {
    let mut stage = Stage::new();
    stage.post_at(&[ACROSS_PAGES], 0);
    assert_eq!(stage.run(), Step::Missing);
    let former = asked(&stage.daemon);
    assert_eq!(pages(&former), [ACROSS_PAGES], "both pages in one request");
    // Set up anew before the lane saw it stop, with a chain that needs the first of them only.
    (stage.descriptors, stage.chains) = (0, 0);
    stage.post_at(&[page(20)], 0);
    start_rings(&stage.daemon, &[record(0)]);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    say(&stage.daemon, former[0], Answer::Denied);
    assert_eq!(pages(&requests), [page(20)], "asked for by itself");
    answer(&stage.daemon, requests[0]);
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Again, 1));
}

#[test]
fn a_denial_counts_also_when_some_of_the_request_has_come() {
    let mut stage = Stage::new();
    stage.post_at(&[ACROSS_PAGES], 0);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [ACROSS_PAGES], "both pages in one request");
    stage.daemon.map(page(20), PAGE_SIZE, page(20), Access::READ);
    assert_eq!((stage.run(), asked(&stage.daemon)), (Step::Missing, vec![]), "it is still under way for the second");
    say(&stage.daemon, requests[0], Answer::Denied);
    assert_eq!((stage.run(), stage.run()), (Step::Again, Step::Again));
    assert_eq!((stage.used(), asked(&stage.daemon)), (vec![0], vec![]));
}

#[test]
fn a_denial_counts_beside_a_page_that_nobody_answers() {
    for waited in [false, true] {
        let mut stage = Stage::new();
        stage.post(2);
        assert_eq!(stage.run(), Step::Missing);
        let requests = asked(&stage.daemon);
        say(&stage.daemon, requests[0], Answer::TimedOut);
        say(&stage.daemon, requests[1], Answer::Denied);
        let step = if waited { stage.wait().expect("something is missing") } else { stage.run() };
        assert_eq!((step, stage.run(), stage.used()), (Step::Again, Step::Again, vec![0]), "waited: {waited}");
    }
}

#[test]
fn a_denial_is_not_lost_in_the_wait_for_a_wish() {
    let mut stage = Stage::new();
    // The page that the first chain reads is written by the second, which is waited for as well.
    stage.post_at(&[page(20)], 0);
    stage.post_at(&[page(20)], WRITE);
    stage.post_at(&[page(30)], 0);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [page(20), page(20), page(30)]);
    requests.into_iter().for_each(|request| say(&stage.daemon, request, Answer::Denied));
    assert_eq!(stage.wait(), Some(Step::Again));
    assert_eq!((stage.run(), stage.used()), (Step::Missing, vec![0]), "the first chain went back");
}

#[test]
fn an_answer_that_takes_long_is_looked_for_while_others_are_served() {
    let mut stage = Stage::new();
    stage.post(1);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(stage.wait(), Some(Step::Again), "it is somebody else's turn");
    assert_eq!((stage.run(), asked(&stage.daemon)), (Step::Missing, vec![]), "it is still under way");
    let step = stage.wait();
    assert!(matches!(step, Some(Step::Later(_))), "{step:?}: no sleep for the second time, and no round without end");
    answer(&stage.daemon, requests[0]);
    wait_until("the packet", || stage.run() == Step::Again);
    assert_eq!(stage.backlog.len(), 1);
}

#[test]
fn a_wish_that_is_denied_while_something_else_takes_long_is_asked_for_once() {
    let mut stage = Stage::new();
    stage.post_at(&[page(0)], 0);
    // Apart from it, so that it is a request of its own: a wish.
    stage.post_at(&[page(8)], 0);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [page(0), page(8)]);
    // The thread has slept for what it needs, in vain.
    while !matches!(stage.wait(), Some(Step::Later(_))) {
        assert_eq!(stage.run(), Step::Missing);
    }
    say(&stage.daemon, requests[1], Answer::Denied);
    for _ in 0..3 {
        assert_eq!((stage.run(), asked(&stage.daemon)), (Step::Missing, vec![]));
        let step = stage.wait();
        assert!(matches!(step, Some(Step::Later(_))), "{step:?}: to sleep again, others would wait");
    }
    answer(&stage.daemon, requests[0]);
    wait_until("the packet", || stage.run() == Step::Missing && stage.backlog.len() == 1);
    assert_eq!(pages(&asked(&stage.daemon)), [page(8)], "now it is needed");
}

/// A region that the worker could not map: its file is too short.
const UNMAPPED: u64 = 32 << 20;

fn add_unmapped(stage: &mut Stage) {
    stage.daemon.add_region_of(2, UNMAPPED, &stage.memory, 2 * stage.memory.size);
    stage.daemon.finish_map();
}

#[test]
fn a_buffer_in_memory_that_cannot_be_mapped_costs_only_its_chain() {
    let mut stage = Stage::new();
    add_unmapped(&mut stage);
    stage.daemon.map(page(0), PAGE_SIZE, UNMAPPED, Access::READ);
    stage.daemon.map(page(2), PAGE_SIZE, page(2), Access::READ);
    // The second is missing; it would be asked for in vain.
    stage.post(2);
    stage.post(1);
    assert_eq!((stage.run(), stage.run()), (Step::Again, Step::Again));
    assert_eq!((stage.used(), stage.backlog.len(), asked(&stage.daemon)), (vec![0, 0], 1, vec![]));
    assert!(stage.lane.ready());
}

#[test]
fn a_ring_in_memory_that_cannot_be_mapped_is_looked_at_again() {
    let mut stage = Stage::new();
    add_unmapped(&mut stage);
    stage.daemon.map(page(0), PAGE_SIZE, page(0), Access::READ);
    stage.post(1);
    // The used ring: a denial of that could mean that it may only be written.
    for table in [AVAIL, USED] {
        stage.daemon.unmap(table, PAGE_SIZE);
        stage.daemon.map(table, PAGE_SIZE, UNMAPPED, Access::READ_WRITE);
        let step = stage.run();
        assert!(matches!(step, Step::Later(_)) && !stage.lane.ready(), "{step:?}");
        stage.daemon.unmap(table, PAGE_SIZE);
        stage.daemon.map(table, PAGE_SIZE, table, Access::READ_WRITE);
        stage.lane.kicked();
    }
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Again, 1));
}

#[test]
fn a_packet_in_several_buffers_passes_over_a_denied_one_at_once() {
    let mut stage = Stage::new();
    for buffer in 0..5 {
        stage.post_at(&[page(buffer)], WRITE);
    }
    let third = page(2);
    [0, 1, 3, 4].map(page).iter().for_each(|iova| stage.daemon.map(*iova, PAGE_SIZE, *iova, Access::READ_WRITE));
    // In three buffers.
    let len = 2 * PACKET_LEN as usize + 1;
    let mut packet = stage.backlog.buffer_of(len);
    packet[HEADER_LEN..].fill(7);
    assert!(stage.backlog.push(packet));
    assert_eq!(stage.deliver(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [third]);
    say(&stage.daemon, requests[0], Answer::Denied);
    assert_eq!(stage.wait(), Some(Step::Again));
    // Only two are left, which are not enough.
    assert_eq!((stage.deliver(), stage.used()), (Step::Again, vec![0, 0, 0]));
    stage.post_at(&[page(5)], WRITE);
    stage.daemon.map(page(5), PAGE_SIZE, page(5), Access::READ_WRITE);
    assert_eq!((stage.deliver(), stage.used()), (Step::Again, vec![0, 0, 0, PACKET_LEN, PACKET_LEN, 1]));
    assert_eq!(asked(&stage.daemon), [], "nothing was asked for twice");
}

#[test]
fn a_lane_whose_pages_do_not_come_keeps_no_other_from_being_waited_for() {
    let (daemon, memory, attachment) = Daemon::with_memory(64);
    daemon.map(0, 3 * PAGE_SIZE, 0, Access::READ_WRITE);
    // The receive ring's tables are missing.
    start_rings(&daemon, &[record(0), record(1 << 32)]);
    let mut reader = attachment.reader().expect("a reader");
    let mut pair = Pair::new(Port::Echo(Echo::new([2; 6], None)));
    lease(&daemon, &attachment, &[0, 1]).into_iter().for_each(|queue| pair.add(Lane::new(queue, 64)));
    memory.poke(DESC, &[&page(0).to_le_bytes()[..], &PACKET_LEN.to_le_bytes(), &[0; 4]].concat());
    memory.poke(AVAIL + 2, &1_u16.to_le_bytes());

    assert_eq!(pair.serve(&mut reader, attachment.counters()).expect("alive"), Next::Now, "a ring has started");
    assert_eq!(pair.serve(&mut reader, attachment.counters()).expect("alive"), Next::Event, "both wait for pages");
    let (packet, tables): (Vec<Asked>, Vec<Asked>) =
        asked(&daemon).into_iter().partition(|(.., range)| range.first() == page(0));
    assert_eq!((packet.len(), tables.len()), (1, 3), "a buffer, and the tables");
    tables.into_iter().for_each(|request| say(&daemon, request, Answer::TimedOut));
    packet.into_iter().for_each(|request| answer(&daemon, request));
    assert_eq!(pair.wait(&mut reader).expect("alive"), Next::Now, "one may not, the other may go on");
    pair.serve(&mut reader, attachment.counters()).expect("alive");
    assert_eq!(pair.figures().sent, 1);
}

#[test]
fn a_ring_whose_tables_were_denied_is_looked_at_again_without_a_kick() {
    let mut stage = Stage::new();
    stage.daemon.map(page(0), PAGE_SIZE, page(0), Access::READ);
    stage.lane.refresh().expect("held");
    assert_eq!(stage.run(), Step::Idle);
    stage.daemon.unmap(AVAIL, PAGE_SIZE);
    assert_eq!(stage.run(), Step::Missing);
    let requests = asked(&stage.daemon);
    assert_eq!(pages(&requests), [AVAIL]);
    say(&stage.daemon, requests[0], Answer::Denied);
    let step = stage.wait();
    assert!(matches!(step, Some(Step::Later(_))), "{step:?}: a ring that says \"no kicks\" is kicked by nobody");
    assert!(!stage.lane.ready());

    stage.daemon.map(AVAIL, PAGE_SIZE, AVAIL, Access::READ);
    stage.post(1);
    wait_until("the packet", || match stage.run() {
        Step::Later(_) => false,
        step => {
            assert_eq!((step, stage.backlog.len()), (Step::Again, 1));
            true
        }
    });
    assert_eq!(asked(&stage.daemon), []);
}
