//! What `iotlb-net` does for a guest.

mod net_support;
mod support;

use iotlb_client::Answer;
use iotlb_proto::control::WorkerMessage;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::worker::cell::posted_state;
use net_support::{
    AVAIL, BUFFERS, Bells, GUEST, NEIGHBOUR, PAGES, RINGS, SIZE, Socket, Stage, WITHHELD, checksum, fragment, ping,
    terminate,
};
use support::{Memory, wait_until};

#[test]
fn pings_are_answered_through_cold_tables_and_sigterm_ends_it() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(100);
    stage.send(&fragment(0, &ping(b"hello")));
    stage.bells[1].kick();
    stage.wait_received(1);
    let reply = stage.received(0);
    assert_eq!((&reply[..6], &reply[6..12]), (&GUEST[..], &NEIGHBOUR[..]));
    assert_eq!((reply[34], checksum(&reply[34..]), &reply[42..]), (0, [0, 0], &b"hello"[..]));

    // 60,000 bytes in 41 fragments, posted at once.
    let request = ping(&(0..60_000_u32).map(|at| (at % 253).to_le_bytes()[0]).collect::<Vec<_>>());
    let count = request.chunks(1480).len();
    for (index, data) in request.chunks(1480).enumerate() {
        let more = if index + 1 < count { 0x2000 } else { 0 };
        stage.send(&fragment(more | u16::try_from(index * 185).expect("13 bits"), data));
    }
    stage.bells[1].kick();
    let last = 1 + u16::try_from(count).expect("41");
    stage.wait_received(last);
    let mut reply = Vec::new();
    for index in 1..last {
        reply.extend_from_slice(&stage.received(index)[34..]);
    }
    assert_eq!(checksum(&reply), [0, 0]);
    assert_eq!((reply[0], &reply[4..]), (0, &request[4..]));
    assert_eq!(stage.used_index(1), last);
    terminate(worker);
}

#[test]
fn a_denied_buffer_costs_its_chain_and_is_reported() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.post(1, 0xdead_beef_0000, 100, false);
    stage.send(&fragment(0, &ping(b"after")));
    stage.bells[1].kick();
    stage.wait_received(1);
    assert_eq!(&stage.received(0)[42..], b"after");
    assert_eq!((stage.used(1, 0), stage.used_index(1)), ((0, 0), 2));
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("0xdeadbeef0000"), "{reason}");
    terminate(worker);
}

#[test]
fn a_ring_whose_kick_nobody_can_wait_for_is_polled() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let bells = [Bells::new(), Bells::that_nobody_hears()];
    let mut stage = Stage::attach_with(&socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1], bells);
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("kick"), "{reason}");
    stage.post_receive_buffers(10);
    for count in 1..=2 {
        stage.send(&fragment(0, &ping(b"unheard")));
        stage.wait_received(count);
    }
    terminate(worker);
}

#[test]
fn a_broken_ring_rests_until_it_is_set_up_anew() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--echo"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(10);
    stage.write(RINGS[1] + AVAIL + 2, &(SIZE + 1).to_le_bytes());
    stage.bells[1].kick();
    let WorkerMessage::QueueError { queue: 1, reason } = stage.daemon.receive().0 else { panic!("no report") };
    assert!(reason.contains("avail.idx"), "{reason}");
    // The guest resets its device and starts over; the session changes.
    stage.write(RINGS[1] + AVAIL + 2, &[0, 0]);
    stage.start_rings();
    stage.send(&fragment(0, &ping(b"again")));
    stage.bells[1].kick();
    stage.wait_received(1);
    assert_eq!(&stage.received(0)[42..], b"again");
    terminate(worker);
}

/// The second pair's sending ring, in pages where the first one's buffers would be.
const SECOND: u64 = RINGS[1] + BUFFERS + 70 * PAGE_SIZE;

#[test]
fn a_pair_is_served_while_another_ones_page_does_not_come() {
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1,2,3", "--echo"]);
    let mut stage = Stage::attach_part(&socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1, 2, 3]);
    stage.post_receive_buffers(100);
    stage.send(&fragment(0, &ping(b"warm")));
    stage.bells[1].kick();
    stage.wait_received(1);
    // A buffer that is withheld, in a ring that is polled.
    let [avail, used] = [SECOND + PAGE_SIZE, SECOND + 2 * PAGE_SIZE];
    stage.write(SECOND, &[&WITHHELD.to_le_bytes()[..], &100_u32.to_le_bytes(), &[0; 4]].concat());
    stage.write(avail + 2, &1_u16.to_le_bytes());
    let session_generation = stage.session;
    let (started, enabled, size) = (true, true, SIZE);
    let record = QueueRecord { started, enabled, size, desc: SECOND, avail, used, base: 0, session_generation };
    stage.daemon.table().publish_queue(3, &record);

    let mut known: Vec<(usize, u32)> = Vec::new();
    // Cell and ticket of a miss for it that is not known.
    let miss = |stage: &Stage, known: &[(usize, u32)]| {
        let cells = stage.daemon.segment.cells.iter().enumerate();
        let mut withheld = cells.filter(|(_, cell)| cell.first.load(Ordering::SeqCst) == WITHHELD);
        withheld.find_map(|(at, cell)| {
            let state = cell.state.load(Ordering::SeqCst);
            let miss = (at, state >> 8);
            (state == posted_state(miss.1) && !known.contains(&miss)).then_some(miss)
        })
    };
    let is_given_back = |stage: &Stage| stage.read(used + 2, 2) == [1, 0];
    // A miss that is given up when its time is over, and asked for again, was waited for while nobody was served. Where
    // the host is so slow that it is over anyway there is another try.
    for received in 2..12 {
        wait_until("a miss", || miss(&stage, &known).is_some());
        let (at, ticket) = miss(&stage, &known).expect("it is not answered");
        known.push((at, ticket));
        stage.send(&fragment(0, &ping(b"hello")));
        stage.bells[1].kick();
        stage.wait_received(received);
        // Only now the front-end says no. Nobody who gave it up hears that.
        let cell = &stage.daemon.segment.cells[at];
        if cell.store_answer(ticket, Answer::Denied) {
            rustix::thread::futex::wake(&cell.state, rustix::thread::futex::Flags::empty(), 1).expect("wake");
        }
        wait_until("its chain or another miss", || is_given_back(&stage) || miss(&stage, &known).is_some());
        if is_given_back(&stage) {
            break;
        }
    }
    assert!(is_given_back(&stage), "the second pair's miss was given up each time before the first pair was served");
    terminate(worker);
}
