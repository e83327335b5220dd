//! Leases, and losing everything.

mod support;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iotlb_client::{Access, Attachment, ClaimError, PinError, Queue};
use iotlb_proto::control::{self, DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::layout::worker::PROGRESS_VALID;
use iotlb_proto::sync::Ordering;
use rustix::net::SendFlags;
use support::{
    Daemon, PATIENCE, PATIENCE_MS, eventfd, segment_address, socket_pair, table_address, take_count, wait_readable,
    wait_until,
};

struct Ring {
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl Ring {
    fn new() -> Ring {
        Ring { kick: eventfd(), call: eventfd(), err: eventfd() }
    }

    fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [self.kick.as_fd(), self.call.as_fd(), self.err.as_fd()]
    }
}

const FULL: QueueLease = QueueLease { queue: 0, claim: 0, kick: true, call: true, err: true };

fn grant(daemon: &Daemon, queue: u16, claim: u64, ring: &Ring) {
    daemon.send(&DaemonMessage::Lease(QueueLease { queue, claim, ..FULL }), &ring.fds());
}

fn refuse(daemon: &Daemon, queue: u16, claim: u64, reason: &str) {
    daemon.send(&DaemonMessage::LeaseRefused { queue, claim, reason: reason.to_owned() }, &[]);
}

/// Takes the next message, which claims these queues; returns the claim's number.
fn claimed(daemon: &Daemon, expected: &[u16]) -> u64 {
    let WorkerMessage::ClaimQueues { claim, queues } = daemon.receive().0 else { panic!("not a claim") };
    assert_eq!(queues, expected);
    claim
}

/// Takes the next message, which gives this queue back; returns the claim's number.
fn released(daemon: &Daemon, expected: u16) -> u64 {
    let WorkerMessage::ReleaseQueue { queue, claim } = daemon.receive().0 else { panic!("not a release") };
    assert_eq!(queue, expected);
    claim
}

/// Leases queue 0, and returns the claim's number as well.
fn lease(daemon: &Daemon, attachment: &Attachment, ring: &Ring) -> (Queue, u64) {
    let mut number = 0;
    let mut queues = claim(attachment, &[0], || {
        number = claimed(daemon, &[0]);
        grant(daemon, 0, number, ring);
    })
    .expect("leased");
    (queues.pop().expect("one"), number)
}

/// Claims in a thread, because the daemon of the test has to answer.
fn claim(attachment: &Attachment, queues: &'static [u16], answer: impl FnOnce()) -> Result<Vec<Queue>, ClaimError> {
    std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(queues, PATIENCE_MS));
        answer();
        claiming.join().expect("the claimer does not panic")
    })
}

#[test]
fn queues_are_leased_and_given_back() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let rings = [Ring::new(), Ring::new()];
    let mut number = 0;
    let mut queues = claim(&attachment, &[2, 0], || {
        number = claimed(&daemon, &[2, 0]);
        grant(&daemon, 0, number, &rings[0]);
        grant(&daemon, 2, number, &rings[1]);
    })
    .expect("leased");
    assert_eq!(queues.iter().map(Queue::index).collect::<Vec<_>>(), [2, 0]);
    let zero = queues.pop().expect("two");
    assert!(zero.held());
    support::take_count(&rings[0].kick);
    rustix::io::write(&rings[0].kick, &5_u64.to_ne_bytes()).expect("kick");
    assert_eq!(take_count(zero.kick().expect("a kick descriptor").as_ref()), 5);
    assert!(zero.signal_call() && zero.signal_call());
    assert_eq!((take_count(&rings[0].call), take_count(&rings[1].call)), (2, 0));
    zero.set_progress(0x8001);
    assert_eq!(daemon.segment.progress[0].load(Ordering::SeqCst), PROGRESS_VALID | 0x8001);
    zero.signal_error("one\ntwo");
    let WorkerMessage::QueueError { queue: 0, reason } = daemon.receive().0 else { panic!("not an error report") };
    assert_eq!(reason, "one two", "what does not fit in a line of a log is replaced, not the report dropped");
    zero.signal_error(&"ä".repeat(200));
    let WorkerMessage::QueueError { queue: 0, reason } = daemon.receive().0 else { panic!("not an error report") };
    assert_eq!(reason.len(), 256);
    zero.release();
    assert_eq!(released(&daemon, 0), number);
    drop(queues);
    assert_eq!(released(&daemon, 2), number);
}

#[test]
fn all_or_none() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let ring = Ring::new();
    let mut number = 0;
    let error = claim(&attachment, &[0, 1], || {
        number = claimed(&daemon, &[0, 1]);
        grant(&daemon, 0, number, &ring);
        refuse(&daemon, 1, number, "it is worker 3's");
    })
    .expect_err("refused");
    assert!(error.to_string().contains("queue 1") && error.to_string().contains("worker 3's"), "{error}");
    assert_eq!(released(&daemon, 0), number, "the granted one goes back");
    // And can be had again.
    let (queue, again) = lease(&daemon, &attachment, &ring);
    assert_ne!(again, number, "no number comes twice");
    let error = attachment.claim_queues(&[0], PATIENCE_MS).expect_err("taken");
    assert!(matches!(error, ClaimError::Refused { queue: 0, .. }));
    let error = attachment.claim_queues(&[1, 1], PATIENCE_MS).expect_err("twice");
    assert!(matches!(error, ClaimError::Refused { queue: 1, .. }));
    let error = attachment.claim_queues(&[4], PATIENCE_MS).expect_err("there are four");
    assert!(matches!(error, ClaimError::Refused { queue: 4, .. }));
    drop(queue);
}

#[test]
fn a_claim_that_is_not_answered_is_taken_back() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let error = attachment.claim_queues(&[3], 1).expect_err("nobody answers");
    assert!(matches!(error, ClaimError::TimedOut { timeout_ms: 1 }));
    let first = claimed(&daemon, &[3]);
    assert_eq!(released(&daemon, 3), first);
    // The late answer belongs to the claim that was given up, and not to the next one.
    grant(&daemon, 3, first, &Ring::new());
    let error = attachment.claim_queues(&[3], 1).expect_err("nobody answers");
    assert!(matches!(error, ClaimError::TimedOut { .. }));
    let second = claimed(&daemon, &[3]);
    assert_eq!(released(&daemon, 3), second);
    let (late, ring) = (Ring::new(), Ring::new());
    let queues = claim(&attachment, &[3], || {
        let third = claimed(&daemon, &[3]);
        refuse(&daemon, 3, second, "late");
        grant(&daemon, 3, second, &late);
        grant(&daemon, 3, third, &ring);
    })
    .expect("leased");
    assert!(queues[0].signal_call());
    assert_eq!((take_count(&late.call), take_count(&ring.call)), (0, 1));
}

/// An attachment whose daemon reads when the test does, and the worker's end of its connection.
fn attach_sharing(daemon: &mut Daemon) -> (Attachment, OwnedFd) {
    let (ours, theirs) = socket_pair();
    let worker_end = theirs.try_clone().expect("a descriptor");
    let welcome = DaemonMessage::Welcome(daemon.welcome());
    let attachment = daemon.attach_over(ours, theirs, |daemon| daemon.send(&welcome, &daemon.welcome_fds()));
    (attachment.expect("attach"), worker_end)
}

/// Sends the daemon as much as goes into the socket; returns how many messages that were.
fn fill(worker_end: &OwnedFd) -> usize {
    let filler = WorkerMessage::QueueError { queue: 3, reason: "filler".to_owned() };
    let bytes = control::encode(&filler).expect("a message that fits");
    for count in 0.. {
        match rustix::net::send(worker_end, &bytes, SendFlags::DONTWAIT) {
            Ok(_) => {}
            Err(error) => {
                assert!(error == rustix::io::Errno::AGAIN && count > 0, "{error}");
                return count;
            }
        }
    }
    unreachable!("no socket takes so many")
}

/// Reads what filled the socket.
fn drain(daemon: &Daemon, fillers: usize) {
    for _ in 0..fillers {
        let message = daemon.receive().0;
        assert!(matches!(message, WorkerMessage::QueueError { .. }), "{message:?} amid what was there before");
    }
}

#[test]
fn a_claim_that_does_not_get_through_is_over_in_its_time_and_leaves_nothing() {
    let mut daemon = Daemon::new();
    let (attachment, worker_end) = attach_sharing(&mut daemon);
    let fillers = fill(&worker_end);
    for _ in 0..2 {
        let error = attachment.claim_queues(&[0, 1, 2, 3], 1).expect_err("the daemon does not read");
        assert!(matches!(error, ClaimError::TimedOut { timeout_ms: 1 }), "{error}");
    }
    drain(&daemon, fillers);
    // Neither the claims come now nor releases of them.
    let (queue, _) = lease(&daemon, &attachment, &Ring::new());
    assert!(queue.held());
}

#[test]
fn a_release_that_finds_no_room_is_not_waited_for_and_comes_later() {
    let mut daemon = Daemon::new();
    let (attachment, worker_end) = attach_sharing(&mut daemon);
    let ring = Ring::new();
    let (queue, held) = lease(&daemon, &attachment, &ring);
    let (mut given_up, mut fillers) = (0, 0);
    let error = claim(&attachment, &[1, 2], || {
        given_up = claimed(&daemon, &[1, 2]);
        fillers = fill(&worker_end);
        grant(&daemon, 1, given_up, &Ring::new());
        refuse(&daemon, 2, given_up, "it is worker 3's");
    })
    .expect_err("refused");
    assert!(matches!(error, ClaimError::Refused { queue: 2, .. }), "{error}");
    drop(queue);
    // The claimer may have it again before the daemon heard that it was given back.
    let mut again = claim(&attachment, &[0], || {
        drain(&daemon, fillers);
        let mut came = [(); 3].map(|()| daemon.receive().0);
        came.sort_by_key(|message| match message {
            WorkerMessage::ReleaseQueue { queue, .. } => *queue,
            _ => u16::MAX,
        });
        let [first, second, third] = came;
        assert_eq!(first, WorkerMessage::ReleaseQueue { queue: 0, claim: held });
        assert_eq!(second, WorkerMessage::ReleaseQueue { queue: 1, claim: given_up });
        let WorkerMessage::ClaimQueues { claim, queues } = third else { panic!("{third:?} is not a claim") };
        assert_eq!(queues, [0]);
        grant(&daemon, 0, claim, &ring);
    })
    .expect("leased");
    assert!(again.pop().is_some_and(|queue| queue.held()));
}

#[test]
fn an_update_of_a_former_lease_is_no_grant() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let (queue, former) = lease(&daemon, &attachment, &Ring::new());
    queue.release();
    // The front-end exchanged descriptors before the daemon read the release, and so the update is on its way to the
    // former owner when the queue goes to another worker, and when the former owner wants it back.
    let error = claim(&attachment, &[0], || {
        assert_eq!(released(&daemon, 0), former);
        let wanted = claimed(&daemon, &[0]);
        grant(&daemon, 0, former, &Ring::new());
        refuse(&daemon, 0, wanted, "it is worker 3's");
    })
    .expect_err("two workers have the queue");
    assert!(error.to_string().contains("worker 3's"), "{error}");
}

#[test]
fn what_is_said_of_a_former_lease_does_not_touch_the_present_one() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let (queue, former) = lease(&daemon, &attachment, &Ring::new());
    queue.release();
    released(&daemon, 0);
    let ring = Ring::new();
    let (queue, present) = lease(&daemon, &attachment, &ring);
    let generation = queue.descriptors_generation();
    let (stray, update) = (Ring::new(), Ring::new());
    grant(&daemon, 0, former, &stray);
    refuse(&daemon, 0, former, "the operator said so");
    // Neither has happened yet, perhaps; but what comes after them has, once it shows.
    grant(&daemon, 0, present, &update);
    wait_until("the exchange", || queue.descriptors_generation() > generation);
    assert_eq!(queue.descriptors_generation(), generation + 1, "there was one exchange");
    assert!(queue.held() && queue.signal_call());
    assert_eq!((take_count(&stray.call), take_count(&ring.call)), (0, 0));
    assert!(take_count(&update.call) > 0, "the update's descriptors are in use");
}

#[test]
fn descriptors_are_exchanged_under_the_worker() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let old = Ring::new();
    let (queue, claim) = lease(&daemon, &attachment, &old);
    let generation = queue.descriptors_generation();
    let held_kick = queue.kick().expect("a kick descriptor");
    let new = Ring::new();
    grant(&daemon, 0, claim, &new);
    assert!(wait_readable(attachment.events(), PATIENCE), "events are raised");
    attachment.clear_events();
    assert!(queue.descriptors_generation() > generation);
    assert_eq!((take_count(&old.call), take_count(&new.call)), (0, 1), "the new one was signalled once");
    assert!(queue.signal_call());
    assert_eq!((take_count(&old.call), take_count(&new.call)), (0, 1));
    rustix::io::write(&old.kick, &1_u64.to_ne_bytes()).expect("kick");
    assert_eq!(take_count(held_kick.as_ref()), 1, "what a thread still holds stays open");

    // A ring without descriptors is polled.
    let generation = queue.descriptors_generation();
    daemon.send(&DaemonMessage::Lease(QueueLease { claim, kick: false, call: false, err: false, ..FULL }), &[]);
    wait_until("the exchange", || queue.descriptors_generation() > generation);
    assert!(queue.kick().is_none() && !queue.signal_call() && queue.held());

    // Wrong counts and wrong kinds are not taken.
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
    daemon.send(&DaemonMessage::Lease(QueueLease { claim, ..FULL }), &[new.kick.as_fd()]);
    let generation = queue.descriptors_generation();
    let mixed = QueueLease { claim, err: false, ..FULL };
    daemon.send(&DaemonMessage::Lease(mixed), &[new.kick.as_fd(), socket.as_fd()]);
    wait_until("the exchange", || queue.descriptors_generation() > generation);
    assert!(queue.kick().is_some() && !queue.signal_call(), "a socket is no call descriptor");
    assert_eq!(queue.descriptors_generation(), generation + 1, "the wrong count was ignored");
}

#[test]
fn a_queue_can_be_taken_back() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let (queue, claim) = lease(&daemon, &attachment, &Ring::new());
    refuse(&daemon, 0, claim, "the operator said so");
    wait_until("the queue is lost", || !queue.held());
    wait_until("its descriptors are gone", || queue.kick().is_none());
    assert!(!queue.signal_call());
    drop(queue);
    drop(attachment);
    while let Some((message, _)) = daemon.try_receive() {
        assert_eq!(message, WorkerMessage::Revoked, "it only says that it leaves: there is nothing to give back");
    }
}

#[test]
fn a_claim_ends_with_the_daemon() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let error = std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(&[0], PATIENCE_MS));
        daemon.receive();
        daemon.kill();
        claiming.join().expect("the claimer does not panic").expect_err("dead")
    });
    assert!(matches!(error, ClaimError::DaemonDead));
}

#[test]
fn a_claim_that_finds_the_daemons_end_closed_finds_it_dead() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    // Closed for what the worker sends only: the control thread sees nothing of it, as in the moment of an end.
    rustix::net::shutdown(daemon.socket.as_ref().expect("attached"), rustix::net::Shutdown::Read).expect("shut down");
    let error = attachment.claim_queues(&[0], PATIENCE_MS).expect_err("dead");
    assert!(matches!(error, ClaimError::DaemonDead), "{error}");
}

#[test]
fn revocation_takes_the_memory_and_says_so() {
    let (mut daemon, memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, Access::READ_WRITE);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let address = guard.translate(0x1000, 1, Access::READ).expect("mapped").next().expect("a piece").as_ptr();
    assert!(is_reachable(address));
    // The reader stalls: still pinned.
    daemon.send(&DaemonMessage::Revoke, &[]);
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked);
    assert!(!is_reachable(address), "the memory is gone before the answer");
    drop(guard);
    assert_eq!(reader.pin().expect_err("revoked"), PinError::Revoked);
    assert!(!attachment.alive());
    assert!(wait_readable(attachment.events(), PATIENCE));
    // Nothing brings it back.
    daemon.add_region(2, 0x10_0000, &memory);
    daemon.finish_map();
    assert!(!is_reachable(address.wrapping_add(0x10_0000 - 0x1000)));
    assert!(matches!(attachment.claim_queues(&[0], PATIENCE_MS), Err(ClaimError::Revoked)));
}

/// Asks the kernel instead of dying.
fn is_reachable(address: *mut u8) -> bool {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    // SAFETY: the system call checks the address itself: it copies one byte, or answers EFAULT.
    let written = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), address.cast(), 1) };
    drop(reader);
    written == 1
}

#[test]
fn guest_memory_stays_out_of_children_and_core_dumps() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, Access::READ);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let address = guard.translate(0x1000, 1, Access::READ).expect("mapped").next().expect("a piece").as_ptr().addr();
    for (what, address) in [
        ("guest memory", address),
        ("table", table_address(&daemon.table_fd)),
        ("worker segment", segment_address(&attachment)),
    ] {
        let flags = flags_of(address);
        for flag in ["dc", "dd"] {
            assert!(flags.split(' ').any(|f| f == flag), "{what} lacks {flag:?}: {flags}");
        }
    }
    assert!(!flags_of(std::ptr::from_ref(&daemon).addr()).contains("dc"), "the check can tell");
}

/// `VmFlags` of the mapping around `address`.
fn flags_of(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let bounds =
            range.and_then(|(a, b)| Some((usize::from_str_radix(a, 16).ok()?, usize::from_str_radix(b, 16).ok()?)));
        if let Some((first, end)) = bounds {
            inside = (first..end).contains(&address);
        }
        if let Some(flags) = line.strip_prefix("VmFlags: ").filter(|_| inside) {
            return flags.to_owned();
        }
    }
    panic!("{address:#x} is not mapped");
}
