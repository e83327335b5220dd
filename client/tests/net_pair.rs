//! When a pair wants to be served again, and when its port takes packets. The test plays the daemon and the guest by
//! hand, in one thread.

mod support;

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use iotlb_client::net::echo::Echo;
use iotlb_client::net::lane::Lane;
use iotlb_client::net::pair::{Next, Pair, PairError, Port};
use iotlb_client::net::tap::{Direction, Tap};
use iotlb_client::{Access, Attachment, Reader};
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;
use support::namespace::{bring_up_with_addresses, in_a_namespace, ip, queues};
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
/// How long a packet waits for a buffer.
const RX_WAIT_MAX: Duration = Duration::from_millis(200);

fn base(queue: u16) -> u64 {
    4 * PAGE_SIZE * u64::from(queue)
}

/// Both rings of a pair; everything is mapped.
struct Stage {
    daemon: Daemon,
    memory: Memory,
    attachment: Attachment,
    reader: Reader,
    pair: Pair,
    session: u64,
}

impl Stage {
    /// `kick`: the descriptor of each ring, if it has one.
    fn new(port: Port, kick: [Option<&OwnedFd>; 2]) -> Stage {
        let (daemon, memory, attachment) = Daemon::with_memory(8);
        daemon.map(0, 8 * PAGE_SIZE, 0, Access::READ_WRITE);
        let mut pair = Pair::new(port);
        lease(&daemon, &attachment, kick, &mut pair);
        let reader = attachment.reader().expect("a reader");
        let mut stage = Stage { daemon, memory, attachment, reader, pair, session: 0 };
        stage.start();
        stage
    }

    /// The guest boots.
    fn start(&mut self) {
        self.session = self.daemon.table().bump_session();
        self.set_ring(RX, true);
        self.set_ring(TX, true);
        self.daemon.table().set_acked_features(FEATURES);
        self.daemon.table().set_running(true);
        wait_until("both rings", || {
            self.serve();
            self.pair.ready()
        });
    }

    fn set_ring(&mut self, queue: u16, enabled: bool) {
        self.daemon.table().publish_queue(queue, &QueueRecord { enabled, ..ring(queue, self.session) });
    }

    fn serve(&mut self) -> Next {
        self.pair.serve(&mut self.reader, self.attachment.counters()).expect("the attachment lives")
    }

    fn post(&self, queue: u16, len: u32, flags: u16) {
        post(&self.memory, queue, len, flags);
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

fn ring(queue: u16, session_generation: u64) -> QueueRecord {
    let [desc, avail, used] = [0, AVAIL, USED].map(|table| base(queue) + table);
    QueueRecord { started: true, enabled: true, size: SIZE, desc, avail, used, base: 0, session_generation }
}

/// Posts the ring's only buffer.
fn post(memory: &Memory, queue: u16, len: u32, flags: u16) {
    let descriptor = [&(base(queue) + BUFFER).to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &[0; 2]];
    memory.poke(base(queue), &descriptor.concat());
    memory.poke(base(queue) + AVAIL + 2, &1_u16.to_le_bytes());
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
        let mut stage = Stage::new(Port::Echo(Echo::new([2; 6], None)), [None, Some(&kick)]);
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

/// The port of a pair that receives and sends.
fn tap() -> Port {
    Port::Tap(Tap::open("tap0", Direction::Both).expect("root may"))
}

#[test]
fn a_ring_that_comes_and_goes_has_its_queue_attached_only_so_often() {
    if !in_a_namespace("a_ring_that_comes_and_goes_has_its_queue_attached_only_so_often") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    assert_eq!(queues("tap0"), (1, 0));
    // Again and again, until it was sooner than allowed.
    wait_until("a pause", || {
        stage.set_ring(RX, false);
        stage.serve();
        stage.set_ring(RX, true);
        assert_eq!(stage.serve(), Next::Now, "the ring has started");
        matches!(stage.serve(), Next::At(_))
    });
    assert_eq!(queues("tap0"), (0, 1));
    wait_until("the queue", || {
        stage.serve();
        queues("tap0") == (1, 0)
    });
}

#[test]
fn a_packet_does_not_wait_for_a_ring_that_is_out_of_service() {
    if !in_a_namespace("a_packet_does_not_wait_for_a_ring_that_is_out_of_service") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    bring_up_with_addresses("tap0");
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    host.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
    stage.pair.port_event(true, false);
    // There is no buffer yet.
    assert!(matches!(stage.serve(), Next::At(_) | Next::Now));
    stage.set_ring(RX, false);
    stage.serve();
    assert_eq!(stage.pair.figures().dropped, 1);
    assert_eq!(queues("tap0"), (0, 1));
}

#[test]
fn what_the_tap_holds_for_one_guest_is_not_for_the_next() {
    if !in_a_namespace("what_the_tap_holds_for_one_guest_is_not_for_the_next") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    bring_up_with_addresses("tap0");
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    let send = |text: &[u8]| host.send_to(text, "10.9.8.2:9").expect("sent");
    send(b"for the first");

    stage.start();
    wait_until("the queue", || {
        stage.serve();
        queues("tap0") == (1, 0)
    });
    send(b"for the second");
    stage.post(RX, 2048, WRITE);
    stage.pair.port_event(true, false);
    wait_until("a packet", || {
        stage.serve();
        stage.pair.figures().received == 1
    });
    // Two headers: virtio has 12 bytes, Ethernet, IPv4 and UDP 42.
    assert_eq!(stage.memory.peek(base(RX) + BUFFER + 12 + 42, 14), b"for the second");
}

#[test]
fn a_packet_that_the_kernel_cannot_hand_out_is_dropped_and_a_tap_that_is_gone_is_an_error() {
    if !in_a_namespace("a_packet_that_the_kernel_cannot_hand_out_is_dropped_and_a_tap_that_is_gone_is_an_error") {
        return;
    }
    nix::ioctl_write_ptr_bad!(set_header_size, nix::request_code_write!(b'T', 216, size_of::<i32>()), i32);
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    bring_up_with_addresses("tap0");
    // A header that no buffer of the pair holds has reads fail as an offload does that virtio has no name for.
    let other = Tap::open("tap0", Direction::FromGuest).expect("a second queue");
    let header_size = |size: i32| {
        // SAFETY: the call reads one int that lives across it; the descriptor is open.
        unsafe { set_header_size(other.as_fd().as_raw_fd(), &raw const size) }.expect("root may");
    };
    header_size(1 << 20);
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    let send = || host.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
    for _ in 0..100 {
        send();
    }
    stage.pair.port_event(true, false);
    while stage.serve() == Next::Now {}
    assert_eq!(stage.pair.figures().dropped, 100);

    header_size(12);
    send();
    stage.post(RX, 2048, WRITE);
    stage.pair.port_event(true, false);
    wait_until("a packet", || {
        stage.serve();
        stage.pair.figures().received == 1
    });

    ip("link delete tap0");
    stage.pair.port_event(true, true);
    let served = stage.pair.serve(&mut stage.reader, stage.attachment.counters());
    assert!(matches!(served, Err(PairError::TapIo(_))), "{served:?}");
}

#[test]
fn packets_that_are_too_large_do_not_leave_the_rest_in_the_tap() {
    if !in_a_namespace("packets_that_are_too_large_do_not_leave_the_rest_in_the_tap") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    // No mergeable buffers: one chain is all that a packet gets.
    stage.daemon.table().set_acked_features(FEATURES & !virtio::NET_MRG_RXBUF);
    ip("link set tap0 mtu 9000");
    bring_up_with_addresses("tap0");
    stage.post(RX, 1526, WRITE);
    wait_until("the queue", || {
        stage.serve();
        queues("tap0") == (1, 0)
    });
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    // More than the pair takes out of the TAP at a time.
    for _ in 0..100 {
        host.send_to(&[7; 8900], "10.9.8.2:9").expect("sent");
    }
    host.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
    stage.pair.port_event(true, false);
    let mut next = stage.serve();
    while next == Next::Now {
        next = stage.serve();
    }
    let figures = stage.pair.figures();
    assert_eq!((figures.dropped, figures.received), (100, 1), "the pair wants {next:?}, and packets wait in the TAP");
}

#[test]
fn a_packet_that_waits_for_one_driver_is_not_for_the_next() {
    if !in_a_namespace("a_packet_that_waits_for_one_driver_is_not_for_the_next") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    bring_up_with_addresses("tap0");
    stage.daemon.table().set_acked_features(FEATURES | virtio::NET_GUEST_CSUM);
    stage.serve();
    wait_until("the queue", || {
        stage.serve();
        queues("tap0") == (1, 0)
    });
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    let send = || host.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
    send();
    stage.pair.port_event(true, false);
    // There is no buffer yet.
    while stage.serve() == Next::Now {}
    // Another driver takes over before the worker looks again: the same session, and no unfinished checksums.
    stage.daemon.table().publish_queue(RX, &QueueRecord::default());
    stage.daemon.table().set_acked_features(FEATURES);
    stage.set_ring(RX, true);
    stage.post(RX, 2048, WRITE);
    wait_until("a packet", || {
        stage.serve();
        send();
        stage.pair.port_event(true, false);
        stage.pair.figures().received == 1
    });
    assert_eq!(stage.memory.peek(base(RX) + BUFFER, 1), [0], "its checksum is unfinished");
}

#[test]
fn a_guest_that_comes_while_the_pair_works_does_not_get_the_packets_of_the_former_one() {
    let kicks = [eventfd(), eventfd()];
    // The pair waits for a new memory map in the middle of its round, but not for long, and a packet does not wait for
    // ever: where the machine had no time for the other thread meanwhile, the test begins again.
    wait_until("a guest that came in time", || {
        let begin = Instant::now();
        let mut stage = Stage::new(Port::Echo(Echo::new([2; 6], None)), kicks.each_ref().map(Some));
        stage.send_question();
        wait_until("the question", || {
            stage.serve();
            stage.pair.figures().sent == 1
        });
        // The answer is for this guest, which has no buffer for it. It sends once more while its memory changes.
        wait_until("all else to be done", || stage.serve() != Next::Now);
        stage.memory.poke(base(TX) + USED, &[0, 0]);
        stage.memory.poke(base(TX) + AVAIL + 2, &2_u16.to_le_bytes());
        let generation = stage.daemon.table().bump_memory_map();
        let session = stage.session + 1;
        let next = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (daemon, memory) = (&stage.daemon, &stage.memory);
                // The ring that sends is at work, so the session was looked at.
                wait_until("no kicks", || memory.peek(base(TX) + USED, 1) == [1]);
                assert_eq!(daemon.table().bump_session(), session);
                daemon.table().publish_queue(RX, &ring(RX, session));
                post(memory, RX, 2048, WRITE);
                daemon.send(&DaemonMessage::MemoryMap { generation }, &[]);
                assert_eq!(daemon.receive().0, WorkerMessage::Mapped { generation });
            });
            stage.pair.serve(&mut stage.reader, stage.attachment.counters()).expect("the attachment lives")
        });
        assert_eq!(stage.pair.figures().received, 0, "the new guest got what was for the former one");
        next == Next::Now && begin.elapsed() < RX_WAIT_MAX
    });
}

#[test]
fn the_tap_is_told_what_a_guest_takes_only_when_its_queue_is_attached() {
    if !in_a_namespace("the_tap_is_told_what_a_guest_takes_only_when_its_queue_is_attached") {
        return;
    }
    let kicks = [eventfd(), eventfd()];
    let mut stage = Stage::new(tap(), kicks.each_ref().map(Some));
    bring_up_with_addresses("tap0");
    // What is set is the device's, so another queue shows it.
    let mut other = Tap::open("tap0", Direction::Both).expect("a second queue");
    let host = UdpSocket::bind("10.9.8.1:0").expect("our address");
    let send = || host.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
    stage.set_ring(RX, false);
    stage.serve();
    other.attach().expect("detached");
    stage.daemon.table().set_acked_features(FEATURES | virtio::NET_GUEST_CSUM);
    stage.serve();
    send();
    let mut packet = [0; 2048];
    assert_eq!(other.read(&mut packet).expect("readable"), Some(12 + 42 + 12));
    assert_eq!(packet[0], 0, "each time takes a lock that the whole host shares");
    other.detach();

    stage.set_ring(RX, true);
    wait_until("the queue", || {
        stage.serve();
        queues("tap0") == (1, 1)
    });
    send();
    stage.post(RX, 2048, WRITE);
    stage.pair.port_event(true, false);
    wait_until("a packet", || {
        stage.serve();
        stage.pair.figures().received == 1
    });
    assert_eq!(stage.memory.peek(base(RX) + BUFFER, 1), [1], "its checksum is unfinished");
}
