//! When a pair wants to be served again. The test plays the daemon and the guest by hand, in one thread.

mod support;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use iotlb_client::net::echo::Echo;
use iotlb_client::net::lane::Lane;
use iotlb_client::net::pair::{Next, Pair, Port};
use iotlb_client::{Access, Attachment, Reader};
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use support::{Daemon, Memory, PATIENCE_MS, eventfd, wait_until};

const FEATURES: u64 = virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::NET_MRG_RXBUF;
const SIZE: u16 = 16;
const RX: u16 = 0;
const TX: u16 = 1;
/// Of ring `n` the tables begin at page `4 n`, a page each: descriptors, available ring, used ring. The buffer is
/// behind them. IOVA and place in memory are the same.
const AVAIL: u64 = PAGE_SIZE;
const USED: u64 = 2 * PAGE_SIZE;
const BUFFER: u64 = 3 * PAGE_SIZE;
/// `flags` of a descriptor: the device writes the buffer.
const WRITE: u16 = 2;
/// How often a ring without a kick descriptor is looked at.
const POLL_PAUSE: Duration = Duration::from_millis(1);

fn base(queue: u16) -> u64 {
    4 * PAGE_SIZE * u64::from(queue)
}

/// Both rings of a pair over the neighbour that answers by itself; everything is mapped.
struct Stage {
    daemon: Daemon,
    memory: Memory,
    attachment: Attachment,
    reader: Reader,
    pair: Pair,
}

impl Stage {
    /// `kick`: the descriptor of each ring, if it has one.
    fn new(kick: [Option<&OwnedFd>; 2]) -> Stage {
        let (daemon, memory, attachment) = Daemon::with_memory(8);
        daemon.map(0, 8 * PAGE_SIZE, 0, Access::READ_WRITE);
        let mut pair = Pair::new(Port::Echo(Echo::new([2; 6], None)));
        lease(&daemon, &attachment, kick, &mut pair);
        let reader = attachment.reader().expect("a reader");
        let mut stage = Stage { daemon, memory, attachment, reader, pair };
        let session = stage.daemon.table().bump_session();
        stage.set_ring(RX, true, session);
        stage.set_ring(TX, true, session);
        stage.daemon.table().set_acked_features(FEATURES);
        stage.daemon.table().set_running(true);
        wait_until("both rings", || {
            stage.serve();
            stage.pair.ready()
        });
        stage
    }

    fn set_ring(&mut self, queue: u16, enabled: bool, session_generation: u64) {
        let [desc, avail, used] = [0, AVAIL, USED].map(|table| base(queue) + table);
        let record = QueueRecord { started: true, enabled, size: SIZE, desc, avail, used, base: 0, session_generation };
        self.daemon.table().publish_queue(queue, &record);
    }

    fn serve(&mut self) -> Next {
        self.pair.serve(&mut self.reader, self.attachment.segment()).expect("the attachment lives")
    }

    /// Posts the ring's only buffer.
    fn post(&self, queue: u16, len: u32, flags: u16) {
        let descriptor = [&(base(queue) + BUFFER).to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &[0; 2]];
        self.memory.poke(base(queue), &descriptor.concat());
        self.memory.poke(base(queue) + AVAIL + 2, &1_u16.to_le_bytes());
    }

    /// The guest asks who has an address.
    fn send_question(&self) {
        let arp =
            [&[0, 1, 8, 0, 6, 4, 0, 1][..], &[2, 0, 0, 0, 0, 1], &[10, 0, 0, 2], &[0; 6], &[10, 0, 0, 1]].concat();
        let packet = [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[8, 6], &arp].concat();
        self.memory.poke(base(TX) + BUFFER, &packet);
        self.post(TX, packet.len().try_into().expect("small"), 0);
    }
}

fn lease(daemon: &Daemon, attachment: &Attachment, kick: [Option<&OwnedFd>; 2], pair: &mut Pair) {
    let (call, err) = (eventfd(), eventfd());
    let leased = std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(&[RX, TX], PATIENCE_MS));
        let WorkerMessage::ClaimQueues { claim, .. } = daemon.receive().0 else { panic!("not a claim") };
        for (queue, kick) in [RX, TX].into_iter().zip(kick) {
            let lease = QueueLease { queue, claim, kick: kick.is_some(), call: true, err: true };
            let fds: Vec<BorrowedFd<'_>> = kick.into_iter().chain([&call, &err]).map(AsFd::as_fd).collect();
            daemon.send(&DaemonMessage::Lease(lease), &fds);
        }
        claiming.join().expect("no panic").expect("leased")
    });
    leased.into_iter().for_each(|queue| pair.add(Lane::new(queue, 64)));
    pair.lanes().for_each(|lane| drop(lane.refresh().expect("held")));
}

#[test]
fn a_polled_ring_is_polled_while_a_packet_waits_for_a_buffer() {
    let kick = eventfd();
    // A packet is given up in the end, and a test may be held up for longer: then it begins again.
    wait_until("a packet that was not given up", || {
        // The ring that receives has no kick descriptor, so that a buffer posted later rings no bell.
        let mut stage = Stage::new([None, Some(&kick)]);
        stage.send_question();
        wait_until("the question", || {
            stage.serve();
            stage.pair.figures().sent == 1
        });
        wait_until("all else to be done", || stage.serve() != Next::Now);
        let next = stage.serve();
        let soon = Instant::now() + POLL_PAUSE;
        if stage.pair.figures().dropped > 0 {
            return false;
        }
        assert!(matches!(next, Next::At(time) if time <= soon), "{next:?}, at the latest {soon:?}");
        stage.post(RX, 2048, WRITE);
        stage.serve();
        let figures = stage.pair.figures();
        assert_eq!(figures.received + figures.dropped, 1);
        figures.received == 1
    });
}
