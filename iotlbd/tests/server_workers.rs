//! Workers at the server's door: who is let in, and what becomes of those that misbehave.

mod server_support;

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use iotlb_client::{AttachOptions, Attachment};
use iotlb_proto::control::message::CONTROL_VERSION;
use iotlb_proto::control::{self, DaemonMessage, Hello, Refusal, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::layout::worker::PROGRESS_VALID;
use iotlb_proto::socket::{PacketError, PacketListener, PacketSocket};
use iotlb_proto::sync::Ordering;
use iotlbd::sim::FrontEndOptions;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use server_support::{
    RawWorker, Running, TIMEOUT_MS, connect, hear, hello, own_pidfd, say, started_front_end, started_front_end_with,
    watchdog,
};

/// Where `started_front_end` has the used ring of queue 0.
const USED: u64 = 0x1_0000 + 2 * PAGE_SIZE;

/// Longest wait for something that may need several tries.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the server answers to `hello`, sent with `pidfd`.
fn refusal(server: &Running, hello: Hello, pidfd: Option<OwnedFd>) -> Refusal {
    let socket = connect(&server.control());
    let bytes = control::encode(&WorkerMessage::Hello(hello)).expect("encodes");
    let fds: Vec<_> = pidfd.iter().map(AsFd::as_fd).collect();
    socket.send_blocking(&bytes, &fds, TIMEOUT_MS).expect("sends");
    let (message, fds) = hear(&socket).expect("an answer");
    assert!(fds.is_empty(), "a refused worker got {} descriptors", fds.len());
    assert!(matches!(hear(&socket), Err(PacketError::Closed)), "the connection stays open");
    match message {
        DaemonMessage::Refused(refusal) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_worker_is_welcomed_with_all_it_needs() {
    let _watchdog = watchdog();
    let server = Running::start();
    let first = RawWorker::attach(&server.control());
    let second = RawWorker::attach(&server.control());
    assert!(first.liveness.alive());
    assert_eq!((first.welcome.queues, first.welcome.device.as_str()), (2, "net0"));
    assert_ne!(first.welcome.worker, second.welcome.worker);
    assert_ne!(first.welcome.incarnation, second.welcome.incarnation);
    drop(second);
    server.stop();
    assert!(!first.liveness.alive(), "the server is gone and the worker does not see it");
}

#[test]
fn strangers_are_refused_with_a_reason() {
    let _watchdog = watchdog();
    let server = Running::start_with(|config| config.max_workers = 1);
    let own = || Some(own_pidfd());
    let other_messages = Hello { control_version: CONTROL_VERSION + 1, layout_version: 0, ..hello() };
    assert_eq!(refusal(&server, other_messages, own()), Refusal::Control { version: CONTROL_VERSION });
    let other_layout = Hello { layout_hash: 1, ..hello() };
    assert!(matches!(refusal(&server, other_layout, own()), Refusal::Layout { .. }));
    let other_version = Hello { layout_version: 0, ..hello() };
    assert!(matches!(refusal(&server, other_version, own()), Refusal::Layout { .. }));
    let other_device = Hello { device: String::from("blk7"), ..hello() };
    assert_eq!(refusal(&server, other_device, own()), Refusal::NoSuchDevice);
    assert_eq!(refusal(&server, hello(), None), Refusal::Pidfd);
    let no_pidfd = OwnedFd::from(std::fs::File::open("/dev/null").expect("opens"));
    assert_eq!(refusal(&server, hello(), Some(no_pidfd)), Refusal::Pidfd);

    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("starts");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("small")).expect("not 0");
    let foreign = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
    let refused = refusal(&server, hello(), Some(foreign));
    drop(child.stdin.take());
    child.wait().expect("ends");
    assert_eq!(refused, Refusal::Pidfd, "another process's pidfd");

    let inside = RawWorker::attach(&server.control());
    assert_eq!(refusal(&server, hello(), own()), Refusal::Full);
    inside.leave();
    RawWorker::attach(&server.control()).leave();
    server.stop();
}

#[test]
fn who_leaves_before_the_welcome_takes_no_place() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("control");
    let listener = PacketListener::bind(&path, 0o600).expect("listens");
    // As a worker that did not wait for an answer. All of it is there before the server looks.
    let gone = connect(&path);
    let bytes = control::encode(&WorkerMessage::Hello(hello())).expect("encodes");
    let say_hello = |socket: &PacketSocket| socket.send_blocking(&bytes, &[own_pidfd().as_fd()], TIMEOUT_MS);
    say_hello(&gone).expect("sends");
    say(&gone, &WorkerMessage::Revoked);
    drop(gone);
    let server = Running::start_with(|config| {
        config.control_listener = Some(listener.as_fd().try_clone_to_owned().expect("a descriptor"));
        config.max_workers = 1;
    });
    // The server may take two connections in one round: so until it has heard all of the first.
    let start = Instant::now();
    loop {
        let next = connect(&path);
        say_hello(&next).expect("sends");
        match hear(&next).expect("an answer").0 {
            DaemonMessage::Welcome(_) => break,
            DaemonMessage::Refused(Refusal::Full) if start.elapsed() < PATIENCE => std::thread::yield_now(),
            other => panic!("{other:?}"),
        }
    }
    server.stop();
}

#[test]
fn garbage_is_shown_the_door_and_disturbs_nobody() {
    let _watchdog = watchdog();
    let server = Running::start();
    let good = RawWorker::attach(&server.control());
    for bytes in [&[0xff_u8; 64][..], &[0; 4096], b"GET / HTTP/1.1\r\n\r\n"] {
        let socket = connect(&server.control());
        socket.send_blocking(bytes, &[], TIMEOUT_MS).expect("sends");
        let (message, _) = hear(&socket).expect("an answer");
        assert!(matches!(message, DaemonMessage::Refused(Refusal::NotAWorker)), "{message:?}");
    }
    // No HELLO first.
    let socket = connect(&server.control());
    say(&socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    assert!(matches!(hear(&socket), Ok((DaemonMessage::Refused(Refusal::NotAWorker), _))));
    // Garbage from a worker that is attached.
    let bad = RawWorker::attach(&server.control());
    bad.socket.send_blocking(&[0xee; 100], &[], TIMEOUT_MS).expect("sends");
    assert!(matches!(hear(&bad.socket), Err(PacketError::Closed)));
    // The good one is served as before.
    say(&good.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![1] });
    assert!(matches!(hear(&good.socket), Ok((DaemonMessage::Lease(lease), _)) if lease.queue == 1));
    server.stop();
}

#[test]
fn those_that_say_nothing_make_room_after_a_while() {
    let _watchdog = watchdog();
    let server = Running::start();
    let silent: Vec<_> = (0..40).map(|_| connect(&server.control())).collect();
    // It waits behind all of them.
    let worker = RawWorker::attach(&server.control());
    assert!(matches!(hear(&silent[0]), Err(PacketError::Closed)));
    worker.leave();
    server.stop();
}

#[test]
fn silent_connections_do_not_keep_a_worker_out_for_as_long_as_it_waits() {
    let _watchdog = watchdog();
    let server = Running::start();
    let silent: Vec<_> = (0..60).map(|_| connect(&server.control())).collect();
    let attached = Attachment::connect(&server.control(), &AttachOptions::default());
    assert!(attached.is_ok(), "{:?}", attached.err());
    drop((attached, silent));
    server.stop();
}

#[test]
fn every_word_of_a_lease_names_its_claim() {
    let _watchdog = watchdog();
    let server = Running::start();
    let (first, second) = (RawWorker::attach(&server.control()), RawWorker::attach(&server.control()));
    let claim = |worker: &RawWorker, claim: u64, queues: &[u16]| {
        say(&worker.socket, &WorkerMessage::ClaimQueues { claim, queues: queues.to_vec() });
    };
    // The next message about a lease: its queue, its claim, and whether it is granted. Memory is not looked at.
    let answer = |worker: &RawWorker| loop {
        match hear(&worker.socket).expect("an answer").0 {
            DaemonMessage::Lease(lease) => return (lease.queue, lease.claim, true),
            DaemonMessage::LeaseRefused { queue, claim, .. } => return (queue, claim, false),
            DaemonMessage::AddRegion(_) | DaemonMessage::MemoryMap { .. } => {}
            other => panic!("unexpected: {other:?}"),
        }
    };
    claim(&first, u64::MAX, &[1, 0]);
    assert_eq!([answer(&first), answer(&first)], [(1, u64::MAX, true), (0, u64::MAX, true)]);
    claim(&second, 5, &[0]);
    assert_eq!(answer(&second), (0, 5, false));
    // The release of another lease than the present one.
    say(&first.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: 7 });
    // Answered after the release was read.
    claim(&first, 8, &[1]);
    assert_eq!(answer(&first), (1, 8, true));
    claim(&second, 6, &[0]);
    assert_eq!(answer(&second), (0, 6, false), "a release of no lease freed the queue");
    say(&first.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: u64::MAX });
    claim(&first, 9, &[1]);
    assert_eq!(answer(&first), (1, 9, true));
    claim(&second, 6, &[0]);
    assert_eq!(answer(&second), (0, 6, true));
    // The front-end brings descriptors: the updates name the claims that the queues have now.
    let _front_end = started_front_end(&server.front_end());
    assert_eq!((answer(&first), answer(&second)), ((1, 9, true), (0, 6, true)));
    server.stop();
}

#[test]
fn queues_are_leased_first_come_first_served() {
    let _watchdog = watchdog();
    let server = Running::start();
    let first = RawWorker::attach(&server.control());
    let second = RawWorker::attach(&server.control());
    let claim = |worker: &RawWorker, queue: u16| {
        say(&worker.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![queue] });
        match hear(&worker.socket).expect("an answer").0 {
            DaemonMessage::Lease(lease) => {
                assert_eq!(lease.queue, queue);
                true
            }
            DaemonMessage::LeaseRefused { queue: refused, reason, .. } => {
                assert_eq!(refused, queue);
                assert!(!reason.is_empty());
                false
            }
            other => panic!("unexpected: {other:?}"),
        }
    };
    assert!(claim(&first, 0));
    assert!(!claim(&second, 0), "leased twice");
    assert!(claim(&second, 1));
    assert!(!claim(&first, 2), "there are two queues");
    first.leave();
    assert!(claim(&second, 0), "free again");
    say(&second.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: 1 });
    let third = RawWorker::attach(&server.control());
    // Messages of different workers have no order, so the release is waited for by asking on the same connection.
    assert!(claim(&second, 1));
    assert!(claim(&third, 0));
    server.stop();
}

#[test]
fn a_queue_is_handed_on_with_how_far_it_got() {
    let _watchdog = watchdog();
    let server = Running::start();
    let exact = FrontEndOptions { exact_permissions: true, ..FrontEndOptions::default() };
    let mut front_end = started_front_end_with(&server.front_end(), exact);
    // To be written only.
    let page = front_end.viommu.unmap(USED).expect("mapped").page;
    front_end.viommu.map(USED, page, iotlb_client::Access::WRITE).expect("not mapped now");
    front_end.push_update(USED).expect("acknowledged");
    let claim = |worker: &RawWorker, claim| {
        say(&worker.socket, &WorkerMessage::ClaimQueues { claim, queues: vec![0] });
        while !matches!(hear(&worker.socket), Ok((DaemonMessage::Lease(lease), _)) if lease.claim == claim) {}
    };
    // A worker that may write the used ring but not read it begins there.
    let base = |worker: &RawWorker| worker.table.queue(0).expect("a ring").base;
    let first = RawWorker::attach(&server.control());
    claim(&first, 1);
    assert_eq!(base(&first), 0);
    let used_index = |index| front_end.guest.store_u16(page + 2, index).expect("guest memory");
    used_index(7);
    // What a worker says counts only where the used ring cannot be read.
    first.segment.progress[0].store(PROGRESS_VALID | 5, Ordering::Relaxed);
    say(&first.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: 1 });
    claim(&first, 2);
    assert_eq!(base(&first), 7);
    // The release found no room in the socket, and the next claim did.
    used_index(8);
    claim(&first, 3);
    assert_eq!(base(&first), 8);
    say(&first.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: 2 });
    used_index(9);
    first.leave();
    let second = RawWorker::attach(&server.control());
    claim(&second, 1);
    assert_eq!(base(&second), 9);
    server.stop();
}

#[test]
fn what_was_said_in_a_former_lease_is_not_said_in_the_next() {
    let _watchdog = watchdog();
    let server = Running::start();
    let mut front_end = started_front_end(&server.front_end());
    let worker = RawWorker::attach(&server.control());
    let claim = |claim| {
        say(&worker.socket, &WorkerMessage::ClaimQueues { claim, queues: vec![0] });
        while !matches!(hear(&worker.socket), Ok((DaemonMessage::Lease(lease), _)) if lease.claim == claim) {}
    };
    let word = || worker.segment.progress[0].load(Ordering::Relaxed);
    claim(1);
    worker.segment.progress[0].store(PROGRESS_VALID | 500, Ordering::Relaxed);
    say(&worker.socket, &WorkerMessage::ReleaseQueue { queue: 0, claim: 1 });
    claim(2);
    assert_eq!(word(), 0);
    worker.segment.progress[0].store(PROGRESS_VALID | 500, Ordering::Relaxed);
    claim(3);
    assert_eq!(word(), 0, "another claim is another lease, whether the release between them was heard or not");
    assert_eq!(front_end.vring_base(0).expect("an answer"), 0);
    server.stop();
}
