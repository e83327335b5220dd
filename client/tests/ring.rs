//! A ring that outlives the attachment it was used with.

mod support;

use iotlb_client::queue::vring::Vring;
use iotlb_client::{Access, Attachment};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use support::{Daemon, Memory};

const SIZE: u16 = 16;
/// The ring's tables, a page each; IOVA and place in memory are the same.
const DESC: u64 = 0;
const AVAIL: u64 = PAGE_SIZE;
const USED: u64 = 2 * PAGE_SIZE;
const BUFFER: u64 = 3 * PAGE_SIZE;

/// Posts a buffer as the chain number `index`.
fn post(memory: &Memory, index: u16) {
    let descriptor = [&BUFFER.to_le_bytes()[..], &64_u32.to_le_bytes(), &0_u16.to_le_bytes(), &0_u16.to_le_bytes()];
    memory.poke(DESC, &descriptor.concat());
    memory.poke(AVAIL + 4 + 2 * u64::from(index), &0_u16.to_le_bytes());
    memory.poke(AVAIL + 2, &(index + 1).to_le_bytes());
}

/// Takes what is posted, and gives it back.
fn serve(ring: &mut Vring, attachment: &Attachment) -> u16 {
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("the attachment lives");
    let record = guard.queue_record(0).expect("a queue");
    let mut burst = ring.begin(&guard, &record, guard.acked_features()).expect("all is present");
    while let Some(chain) = burst.next_chain().expect("all is present") {
        burst.complete(chain, 0);
    }
    drop(burst);
    ring.position()
}

#[test]
fn a_new_attachment_to_the_same_device_has_the_ring_in_its_own_arena() {
    let (mut daemon, memory, first) = Daemon::with_memory(4);
    daemon.map(0, 4 * PAGE_SIZE, 0, Access::READ_WRITE);
    {
        let mut table = daemon.table();
        let session_generation = table.bump_session();
        table.set_running(true);
        let record = QueueRecord {
            started: true,
            enabled: true,
            size: SIZE,
            desc: DESC,
            avail: AVAIL,
            used: USED,
            base: 0,
            session_generation,
        };
        table.publish_queue(0, &record);
    }
    post(&memory, 0);
    let mut ring = Vring::default();
    assert_eq!(serve(&mut ring, &first), 1);
    // The first one lives: so the second has its arena elsewhere, and a ring that mistakes one for the other is seen.
    let second = daemon.attach().expect("attach");
    let other = Memory::new(memory.size);
    daemon.add_region(1, 0, &other);
    daemon.finish_map();
    other.poke(USED + 2, &3_u16.to_le_bytes());
    post(&other, 3);
    assert_eq!(serve(&mut ring, &second), 4);
    assert_eq!((memory.peek(USED + 2, 2), other.peek(USED + 2, 2)), (vec![1, 0], vec![4, 0]));
}
