//! A lane asks for what it misses and goes on; only [`Lane::wait`] waits. The test plays the daemon and the guest by
//! hand, in one thread, so that nothing is answered but when a line here says so.

mod support;

use std::os::fd::AsFd;

use iotlb_client::net::backlog::Backlog;
use iotlb_client::net::lane::{Done, Lane, Step};
use iotlb_client::net::tx;
use iotlb_client::{Access, Answer, Attachment, Reader};
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use support::{Daemon, Memory, PATIENCE_MS, eventfd};

const FEATURES: u64 = virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::EVENT_IDX;
const SIZE: u16 = 16;
/// The ring's tables, a page each, present from the start; IOVA and place in memory are the same.
const DESC: u64 = 0;
const AVAIL: u64 = PAGE_SIZE;
const USED: u64 = 2 * PAGE_SIZE;
/// The first buffer; every other page, so that no two become one request.
const BUFFERS: u64 = 4 * PAGE_SIZE;
const PACKET_LEN: u32 = 12 + 60;

/// One transmit queue.
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
        {
            let mut table = daemon.table();
            let session_generation = table.bump_session();
            table.set_acked_features(FEATURES);
            table.set_running(true);
            let (started, enabled) = (true, true);
            let record = QueueRecord {
                started,
                enabled,
                size: SIZE,
                desc: DESC,
                avail: AVAIL,
                used: USED,
                base: 0,
                session_generation,
            };
            table.publish_queue(1, &record);
        }
        daemon.map(0, 3 * PAGE_SIZE, 0, Access::READ_WRITE);
        let bells = [eventfd(), eventfd(), eventfd()];
        let queue = std::thread::scope(|scope| {
            let claiming = scope.spawn(|| attachment.claim_queues(&[1], PATIENCE_MS));
            let WorkerMessage::ClaimQueues { claim, .. } = daemon.receive().0 else { panic!("not a claim") };
            let lease = QueueLease { queue: 1, claim, kick: true, call: true, err: true };
            daemon.send(&DaemonMessage::Lease(lease), &bells.each_ref().map(AsFd::as_fd));
            claiming.join().expect("no panic").expect("leased").pop().expect("one")
        });
        let reader = attachment.reader().expect("a reader");
        let lane = Lane::new(queue, 64);
        Stage { daemon, memory, attachment, reader, lane, backlog: Backlog::default(), descriptors: 0, chains: 0 }
    }

    /// Posts a packet in `parts` buffers, each in a page of its own.
    fn post(&mut self, parts: u16) {
        let head = self.descriptors;
        for part in 1..=parts {
            let index = self.descriptors;
            let next = u16::from(part < parts);
            let descriptor = [
                &page(index).to_le_bytes()[..],
                &PACKET_LEN.to_le_bytes(),
                &next.to_le_bytes(),
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
        let collect = self.lane.run(&mut self.reader, self.attachment.segment(), |ring, guard, record, features| {
            let room = backlog.room();
            let done = tx::collect(ring, guard, record, features, backlog, room);
            Done { call: done.call, chains: done.chains, bytes: done.bytes, fault: done.fault }
        });
        collect.expect("the attachment lives")
    }

    fn wait(&mut self) -> Option<Step> {
        self.lane.wait(&mut self.reader).expect("the attachment lives")
    }

    /// What was posted since the last time: cell, ticket, range.
    fn asked(&self) -> Vec<(u16, u32, IovaRange)> {
        let mut cells = Vec::new();
        self.daemon.segment.take_posted(|cell| cells.push(cell));
        let take = |cell: u16| {
            let request = self.daemon.segment.cells[usize::from(cell)].take().expect("a sound request");
            let request = request.expect("a posted bit has a request");
            (cell, request.ticket, request.range)
        };
        cells.into_iter().map(take).collect()
    }

    fn answer(&self, (cell, ticket, range): (u16, u32, IovaRange)) {
        self.daemon.table().insert(range, range.first(), Access::READ).expect("room");
        let asleep = self.daemon.segment.cells[usize::from(cell)].store_answer(ticket, Answer::Resolved);
        assert!(!asleep, "the one thread is here");
    }
}

/// The page of the buffer of descriptor `index`.
fn page(index: u16) -> u64 {
    BUFFERS + u64::from(index) * 2 * PAGE_SIZE
}

fn pages(asked: &[(u16, u32, IovaRange)]) -> Vec<u64> {
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
    let asked = stage.asked();
    assert_eq!(pages(&asked), [page(1)]);
    stage.answer(asked[0]);
    assert_eq!((stage.wait(), stage.run()), (Some(Step::Again), Step::Again));
    assert_eq!(stage.backlog.len(), 2);
    assert_eq!(stage.wait(), None, "nothing is missing");
}

#[test]
fn what_is_posted_meanwhile_is_asked_for_before_the_last_answer() {
    let mut stage = Stage::new();
    stage.post(3);
    assert_eq!(stage.run(), Step::Missing);
    let first = stage.asked();
    assert_eq!(pages(&first), [page(0), page(1), page(2)]);
    stage.answer(first[0]);
    stage.answer(first[1]);
    // The third is outstanding, and the daemon has more to do before it runs out of work.
    assert_eq!(stage.wait(), Some(Step::Again));
    stage.post(1);
    assert_eq!(stage.run(), Step::Missing);
    let second = stage.asked();
    assert_eq!(pages(&second), [page(3)], "and nothing for the second time");
    stage.answer(first[2]);
    assert_eq!(stage.wait(), Some(Step::Again));
    assert_eq!((stage.run(), stage.backlog.len()), (Step::Missing, 1), "the first packet does not wait for the second");
    stage.answer(second[0]);
    assert_eq!((stage.wait(), stage.run(), stage.backlog.len()), (Some(Step::Again), Step::Again, 2));
}
