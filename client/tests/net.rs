//! What `iotlb-net` does for a guest.

mod net_support;
mod support;

use iotlb_proto::control::WorkerMessage;
use iotlb_proto::iova::PAGE_SIZE;
use net_support::{
    AVAIL, Bells, GUEST, NEIGHBOUR, PAGES, RINGS, SIZE, Socket, Stage, checksum, fragment, ping, terminate,
};
use support::Memory;

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
