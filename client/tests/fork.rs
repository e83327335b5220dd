//! A forked child has copies of its parent's handles. What it drops is still its parent's.

mod support;

use std::os::fd::AsFd;
use std::ptr::NonNull;

use iotlb_client::{Access, Attachment, Queue};
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::layout::worker::SEGMENT_SIZE;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rustix::mm::{MapFlags, ProtFlags};
use support::{Daemon, PATIENCE_MS, TABLE_SIZE, eventfd, wait_until};

/// What a child says of its descriptors and its memory.
const GOOD: i32 = 0;
const NOT_CLOSED: i32 = 1;
const MEMORY_LOST: i32 = 2;
const NO_MEMORY: i32 = 3;
const PANICKED: i32 = 4;

/// Longest life of a child, in seconds.
const CHILD_LIFE: u32 = 30;

/// What a child fills memory of its own with.
const PATTERN: u8 = 0x5a;

/// How `child` ends in a forked child.
fn in_a_child(child: impl FnOnce() -> i32) -> WaitStatus {
    // SAFETY: the child has one thread of many. It allocates, which the C library's fork allows for, and takes no lock
    // but those that the code under test takes; and it never returns into the test harness.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Child => {
            nix::unistd::alarm::set(CHILD_LIFE);
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(PANICKED);
            // SAFETY: ends the process at once; nothing of the parent's that was copied is to run.
            unsafe { libc::_exit(status) }
        }
        ForkResult::Parent { child } => {
            let mut status = WaitStatus::StillAlive;
            wait_until("the child ends", || {
                status = waitpid(child, Some(WaitPidFlag::WNOHANG)).expect("our own child");
                status != WaitStatus::StillAlive
            });
            status
        }
    }
}

fn assert_good(status: WaitStatus) {
    assert!(matches!(status, WaitStatus::Exited(_, GOOD)), "{status:?}");
}

fn lease(daemon: &Daemon, attachment: &Attachment) -> Queue {
    std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(&[0], PATIENCE_MS));
        let WorkerMessage::ClaimQueues { claim, .. } = daemon.receive().0 else { panic!("not a claim") };
        let bells = [eventfd(), eventfd(), eventfd()];
        let lease = QueueLease { queue: 0, claim, kick: true, call: true, err: true };
        daemon.send(&DaemonMessage::Lease(lease), &bells.each_ref().map(AsFd::as_fd));
        claiming.join().expect("the claimer does not panic").expect("leased").pop().expect("one")
    })
}

/// The worker's control thread runs, and nothing was said in its name.
fn assert_attached(daemon: &Daemon, attachment: &Attachment) {
    let generation = daemon.table().bump_memory_map();
    daemon.send(&DaemonMessage::MemoryMap { generation }, &[]);
    assert_eq!(daemon.receive().0, WorkerMessage::Mapped { generation });
    assert!(attachment.alive());
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc is mounted").count()
}

/// Memory of the child, where the parent has `len` shared bytes at `address`.
fn own_memory(address: NonNull<u8>, len: usize) -> bool {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: nothing that exists is replaced.
    let mapped =
        unsafe { rustix::mm::mmap_anonymous(address.as_ptr().cast(), len, ProtFlags::READ | ProtFlags::WRITE, flags) };
    if mapped.is_err() {
        return false;
    }
    // SAFETY: mapped above.
    unsafe { address.as_ptr().write_bytes(PATTERN, len) };
    true
}

/// Whether all of it is mapped still, and as it was. A part that is not mapped ends the child.
fn is_untouched(address: NonNull<u8>, len: usize) -> bool {
    // SAFETY: mapped by `own_memory`, for nobody else. If it is not any more, that is what the test looks for.
    (0..len).all(|at| unsafe { address.as_ptr().add(at).read_volatile() } == PATTERN)
}

#[test]
fn an_attachment_dropped_in_a_child_is_still_the_parents() {
    let mut daemon = Daemon::new();
    // The child takes it out of its own copy.
    let mut attachment = Some(daemon.attach().expect("attach"));
    assert_good(in_a_child(|| {
        let before = open_descriptors();
        drop(attachment.take());
        // Control socket, doorbell, the attachment's events and the control thread's.
        if open_descriptors() + 4 == before { GOOD } else { NOT_CLOSED }
    }));
    assert_attached(&daemon, attachment.as_ref().expect("the parent's own"));
    drop(attachment);
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked, "the parent leaves as ever");
}

#[test]
fn a_queue_dropped_in_a_child_is_still_the_parents() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let mut queue = Some(lease(&daemon, &attachment));
    assert_good(in_a_child(|| {
        drop(queue.take());
        GOOD
    }));
    assert_attached(&daemon, &attachment);
    assert!(queue.as_ref().is_some_and(Queue::held));
    drop(queue);
    let message = daemon.receive().0;
    assert!(matches!(message, WorkerMessage::ReleaseQueue { queue: 0, .. }), "{message:?}");
}

#[test]
fn what_a_child_drops_is_not_looked_for_in_memory_that_it_has_not_got() {
    let (daemon, _memory, attachment) = Daemon::with_memory(1);
    daemon.map(0, PAGE_SIZE, 0, Access::READ_WRITE);
    let queue = lease(&daemon, &attachment);
    let mut reader = attachment.reader().expect("a reader");
    let ticket = reader.request(0x10_0000, 1, Access::READ).expect("posted");
    let page = reader.pin().expect("pin").translate_one(0, 1, Access::READ).map(|segment| segment.as_ptr());
    let at = |address| NonNull::new(std::ptr::with_exposed_provenance_mut(address)).expect("mapped");
    let places = [
        (at(support::table_address(&daemon.table_fd)), usize::try_from(TABLE_SIZE).expect("small")),
        (at(support::segment_address(&attachment)), SEGMENT_SIZE),
        (page.and_then(NonNull::new).expect("mapped"), usize::try_from(PAGE_SIZE).expect("small")),
    ];
    let mut handles = Some((ticket, reader, queue, attachment));
    assert_good(in_a_child(|| {
        if !places.iter().all(|(address, len)| own_memory(*address, *len)) {
            return NO_MEMORY;
        }
        drop(handles.take());
        if places.iter().all(|(address, len)| is_untouched(*address, *len)) { GOOD } else { MEMORY_LOST }
    }));
    let (ticket, reader, queue, attachment) = handles.expect("the parent's own");
    assert_attached(&daemon, &attachment);
    drop(reader.pin().expect("the parent goes on"));
    drop((ticket, queue, reader));
}
