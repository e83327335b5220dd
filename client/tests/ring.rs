//! What a ring, or whoever else keeps pointers, remembers beyond a pin, a lease or an attachment.

mod support;

use iotlb_client::queue::vring::{RingFault, Vring};
use iotlb_client::{Access, Attachment, Guard};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use support::{Daemon, Memory};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

const SIZE: u16 = 16;
/// The ring's tables, a page each; IOVA and place in memory are the same.
const DESC: u64 = 0;
const AVAIL: u64 = PAGE_SIZE;
const USED: u64 = 2 * PAGE_SIZE;
const BUFFER: u64 = 3 * PAGE_SIZE;
/// Removing all of it takes one node off the tree as a whole.
const GIB: u64 = 1 << 30;

/// Starts ring 0 with its tables from `base` on.
fn start(daemon: &Daemon, base: u64) {
    let mut table = daemon.table();
    let session_generation = table.bump_session();
    table.set_running(true);
    let [desc, avail, used] = [DESC, AVAIL, USED].map(|at| base + at);
    let record =
        QueueRecord { started: true, enabled: true, size: SIZE, desc, avail, used, base: 0, session_generation };
    table.publish_queue(0, &record);
}

/// Ends a grace period, as a daemon does before it acknowledges a removal.
fn grace(daemon: &Daemon) {
    let epoch = daemon.table().begin_grace().expect("something was removed");
    assert!(daemon.segment.is_drained(epoch), "nobody pins");
    daemon.table().grace_completed(epoch);
}

/// Posts a buffer as the chain number `index`.
fn post(memory: &Memory, index: u16) {
    let descriptor = [&BUFFER.to_le_bytes()[..], &64_u32.to_le_bytes(), &0_u16.to_le_bytes(), &0_u16.to_le_bytes()];
    memory.poke(DESC, &descriptor.concat());
    memory.poke(AVAIL + 4 + 2 * u64::from(index), &0_u16.to_le_bytes());
    memory.poke(AVAIL + 2, &(index + 1).to_le_bytes());
}

/// Takes what is posted, and gives it back. Returns how many there were, and where the ring stands then.
fn serve(ring: &mut Vring, attachment: &Attachment) -> (usize, u16) {
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("the attachment lives");
    let record = guard.queue_record(0).expect("a queue");
    let mut burst = ring.begin(&guard, &record, guard.acked_features()).expect("all is present");
    let mut taken = 0;
    while let Some(chain) = burst.next_chain().expect("all is present") {
        burst.complete(chain, 0);
        taken += 1;
    }
    drop(burst);
    (taken, ring.position())
}

#[test]
fn a_new_attachment_to_the_same_device_has_the_ring_in_its_own_arena() {
    let (mut daemon, memory, first) = Daemon::with_memory(4);
    daemon.map(0, 4 * PAGE_SIZE, 0, Access::READ_WRITE);
    start(&daemon, 0);
    post(&memory, 0);
    let mut ring = Vring::default();
    assert_eq!(serve(&mut ring, &first), (1, 1));
    // The first one lives: so the second has its arena elsewhere, and a ring that mistakes one for the other is seen.
    let second = daemon.attach().expect("attach");
    let other = Memory::new(memory.size);
    daemon.add_region(1, 0, &other);
    daemon.finish_map();
    other.poke(USED + 2, &3_u16.to_le_bytes());
    post(&other, 3);
    assert_eq!(serve(&mut ring, &second), (1, 4));
    assert_eq!((memory.peek(USED + 2, 2), other.peek(USED + 2, 2)), (vec![1, 0], vec![4, 0]));
}

#[test]
fn a_ring_that_another_worker_had_in_between_goes_on_where_that_one_stopped() {
    let (daemon, memory, attachment) = Daemon::with_memory(4);
    daemon.map(0, 4 * PAGE_SIZE, 0, Access::READ_WRITE);
    start(&daemon, 0);
    // Nothing in the table says that a queue went from one worker to another, and back.
    let (mut ours, mut theirs) = (Vring::default(), Vring::default());
    post(&memory, 0);
    assert_eq!(serve(&mut ours, &attachment), (1, 1));
    post(&memory, 1);
    post(&memory, 2);
    assert_eq!(serve(&mut theirs, &attachment), (2, 3));
    assert_eq!(serve(&mut ours, &attachment), (0, 3), "all is done");
    post(&memory, 3);
    assert_eq!(serve(&mut ours, &attachment), (1, 4));
    assert_eq!(memory.peek(USED + 2, 2), [4, 0]);
}

#[test]
fn a_ring_translated_late_in_a_pin_is_not_kept_beyond_a_removal() {
    let (daemon, _memory, attachment) = Daemon::with_memory(4);
    daemon.map(GIB, 4 * PAGE_SIZE, 0, Access::READ_WRITE);
    start(&daemon, GIB);
    let mut ring = Vring::default();
    let reader = attachment.reader().expect("a reader");
    {
        let guard = reader.pin().expect("the attachment lives");
        guard.translate(GIB, 8, Access::READ).expect("present");
        daemon.unmap(GIB, GIB);
        // What the pin may still use must not be what the ring keeps under the generation of the removal.
        let record = guard.queue_record(0).expect("a queue");
        let _ = ring.begin(&guard, &record, guard.acked_features());
    }
    grace(&daemon);
    // Acknowledged: the guest has other use for the pages.
    let guard = reader.pin().expect("the attachment lives");
    let record = guard.queue_record(0).expect("a queue");
    let fault = ring.begin(&guard, &record, guard.acked_features()).map(|_| ()).expect_err("nothing is mapped");
    assert!(matches!(fault, RingFault::Miss(_)), "{fault:?}");
}

/// What is looked up after the removal generation was read is not older than that, whatever the pin found before.
fn nothing_older_than_the_generation(look_up: impl Fn(&Guard<'_>) -> bool) {
    for nested in [false, true] {
        let (daemon, _memory, attachment) = Daemon::with_memory(4);
        daemon.map(GIB, 4 * PAGE_SIZE, 0, Access::READ_WRITE);
        let reader = attachment.reader().expect("a reader");
        let outer = reader.pin().expect("the attachment lives");
        assert!(look_up(&outer));
        let before = outer.removal_generation();
        assert!(look_up(&outer));
        daemon.unmap(GIB, GIB);
        let inner = nested.then(|| reader.pin().expect("the attachment lives"));
        assert_ne!(inner.as_ref().unwrap_or(&outer).removal_generation(), before);
        assert!(!look_up(&outer), "nested: {nested}");
        drop(inner);
        assert!(!look_up(&outer), "nested: {nested}");
    }
}

#[test]
fn a_translation_is_as_new_as_the_removal_generation_read_before() {
    nothing_older_than_the_generation(|guard| guard.translate(GIB, 8, Access::READ).is_ok());
}

#[test]
fn guest_memory_is_as_new_as_the_removal_generation_read_before() {
    nothing_older_than_the_generation(|guard| {
        let mut slices = guard.get_slices(GuestAddress(GIB), 8, Permissions::Read).expect("no wrap");
        slices.next().expect("not empty").is_ok()
    });
}
