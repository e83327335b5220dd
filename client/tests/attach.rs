//! Attaching, and every way in which it fails.

mod support;

use std::os::fd::AsFd;
use std::path::Path;

use iotlb_client::{AttachError, AttachOptions, Attachment, PinError, ReaderError};
use iotlb_proto::control::message::CONTROL_VERSION;
use iotlb_proto::control::{ControlError, DaemonMessage, Refusal, WorkerMessage};
use iotlb_proto::layout::worker::SLOT_CAPACITY;
use iotlb_proto::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use iotlb_proto::shm::memfd;
use support::{Daemon, TABLE_SIZE, wait_until};

fn sends_and_shares<T: Send + Sync>() {}
fn sends<T: Send>() {}

#[test]
fn handles_go_where_they_should() {
    sends_and_shares::<Attachment>();
    sends_and_shares::<iotlb_client::Queue>();
    sends::<iotlb_client::Reader>();
    sends::<iotlb_client::Ticket>();
}

#[test]
fn attaches_and_detaches() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    assert!(attachment.alive());
    assert_eq!((attachment.device(), attachment.worker(), attachment.queue_count()), ("net0", 7, 4));
    let copy = attachment.clone();
    drop(attachment);
    assert!(copy.alive());
    let mut reader = copy.reader().expect("a reader");
    drop(copy);
    drop(reader.pin().expect("a reader is a handle too"));
    let ticket = reader.request(0x1000, 1, iotlb_client::Access::READ).expect("posted");
    drop(reader);
    assert!(matches!(daemon.try_receive(), Some((WorkerMessage::Revoked, _))), "a clean end is said, not only seen");
    assert!(daemon.try_receive().is_none(), "the last handle closes the socket; a ticket is none");
    drop(ticket);
}

#[test]
fn no_signal_of_the_program_comes_to_the_librarys_thread() {
    let mut daemon = Daemon::new();
    let _attachment = daemon.attach().expect("attach");
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let masks = || -> Vec<u64> {
        let threads = std::fs::read_dir("/proc/self/task").expect("threads");
        threads
            .map(|thread| thread.expect("a thread").path())
            .filter(|thread| read(thread.join("comm")).trim() == "iotlb-control")
            .filter_map(|thread| {
                let status = read(thread.join("status"));
                let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?.trim();
                Some(u64::from_str_radix(mask, 16).expect("a mask"))
            })
            .collect()
    };
    support::wait_until("the thread has its name", || !masks().is_empty());
    let masks = masks();
    let signals = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGALRM];
    let wanted: u64 = signals.iter().map(|number| 1 << (number - 1)).sum();
    assert!(masks.iter().all(|mask| mask & wanted == wanted), "{masks:x?}");
    // The program's own threads go on as they were.
    let own = read("/proc/thread-self/status".into());
    let own = own.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask").trim().to_owned();
    assert_eq!(u64::from_str_radix(&own, 16).expect("a mask") & wanted, 0);
}

#[test]
fn a_layout_that_does_not_fit_names_both_sides() {
    let mut daemon = Daemon::new();
    let refusal = DaemonMessage::Refused(Refusal::Layout { version: 77, hash: 0xabcd });
    let error = daemon.attach_with(|d| d.send(&refusal, &[])).expect_err("refused");
    let AttachError::Layout { our_version, our_hash, daemon_version: 77, daemon_hash: 0xabcd } = error else {
        panic!("{error:?}");
    };
    assert_eq!((our_version, our_hash), (LAYOUT_VERSION, LAYOUT_HASH));
    let text = error.to_string();
    for part in ["77", "0x000000000000abcd", &LAYOUT_VERSION.to_string(), &format!("{LAYOUT_HASH:#018x}")] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn a_control_version_that_does_not_fit_names_both_sides() {
    let mut daemon = Daemon::new();
    let refusal = DaemonMessage::Refused(Refusal::Control { version: 77 });
    let error = daemon.attach_with(|d| d.send(&refusal, &[])).expect_err("refused");
    assert!(matches!(error, AttachError::Control { our_version: CONTROL_VERSION, daemon_version: 77 }), "{error:?}");
    let text = error.to_string();
    for part in [&format!("worker speaks control version {CONTROL_VERSION}"), "daemon speaks 77"] {
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    }
}

#[test]
fn every_refusal_is_told() {
    let mut daemon = Daemon::new();
    let mut refused = |refusal| {
        let message = DaemonMessage::Refused(refusal);
        daemon.attach_with(|d| d.send(&message, &[])).expect_err("refused")
    };
    assert!(matches!(refused(Refusal::NoSuchDevice), AttachError::NoSuchDevice { .. }));
    assert!(matches!(refused(Refusal::Full), AttachError::Full));
    assert!(matches!(refused(Refusal::Pidfd), AttachError::PidfdRefused));
    assert!(matches!(refused(Refusal::NotAWorker), AttachError::NotAWorker));
    assert!(matches!(refused(Refusal::Banned), AttachError::Banned));
    let error = refused(Refusal::Exhausted { reason: "no more descriptors".to_owned() });
    assert!(error.to_string().contains("no more descriptors"));
}

#[test]
fn an_answer_that_is_none() {
    let mut daemon = Daemon::new();
    let error = daemon.attach_with(|d| d.send(&DaemonMessage::Revoke, &[])).expect_err("not a handshake");
    assert!(matches!(error, AttachError::Unexpected));
    let error = daemon.attach_with(|d| d.send_bytes(&[0xff; 100], &[])).expect_err("not a message");
    assert!(matches!(error, AttachError::Channel(_)));
    let error = daemon.attach_with(|_| ()).expect_err("silence");
    assert!(matches!(error, AttachError::TimedOut { timeout_ms: 300 }));
}

#[test]
fn wrong_descriptors_are_refused() {
    let mut daemon = Daemon::new();
    let welcome = DaemonMessage::Welcome(daemon.welcome());
    let mut with = |pick: &dyn Fn(&Daemon)| daemon.attach_with(|d| pick(d)).expect_err("wrong descriptors");

    let error = with(&|d| d.send(&welcome, &d.welcome_fds()[..3]));
    assert!(matches!(error, AttachError::Descriptors { count: 3 }));

    let error = with(&|d| {
        let [table, segment, liveness, doorbell] = d.welcome_fds();
        d.send(&welcome, &[segment, table, liveness, doorbell]);
    });
    assert!(matches!(error, AttachError::Seals { what: "table", .. }));

    let error = with(&|d| {
        let [table, segment, liveness, _] = d.welcome_fds();
        d.send(&welcome, &[table, segment, liveness, liveness]);
    });
    assert!(matches!(error, AttachError::Doorbell(_)));

    // Right size, but the daemon could still shrink it under our feet.
    let unsealed = memfd::create("table", TABLE_SIZE).expect("a memfd");
    let error = with(&|d| {
        let [_, segment, liveness, doorbell] = d.welcome_fds();
        d.send(&welcome, &[unsealed.as_fd(), segment, liveness, doorbell]);
    });
    assert!(matches!(error, AttachError::Seals { what: "table", .. }));

    // Sealed, but no table of this build: zeros.
    memfd::seal_read_only(unsealed.as_fd()).expect("seal");
    let error = with(&|d| {
        let [_, segment, liveness, doorbell] = d.welcome_fds();
        d.send(&welcome, &[unsealed.as_fd(), segment, liveness, doorbell]);
    });
    assert!(matches!(error, AttachError::Table(_)));
    assert!(error.to_string().contains(&format!("{LAYOUT_HASH:#018x}")));

    let error = with(&|d| {
        let [table, segment, _, doorbell] = d.welcome_fds();
        d.send(&welcome, &[table, segment, segment, doorbell]);
    });
    assert!(matches!(error, AttachError::Liveness(_)));
}

#[test]
fn impossible_numbers_are_refused() {
    let mut daemon = Daemon::new();
    let good = daemon.welcome();
    let mut with = |welcome| {
        let message = DaemonMessage::Welcome(welcome);
        daemon.attach_with(|d| d.send(&message, &d.welcome_fds())).expect_err("impossible")
    };
    let mut bad = good.clone();
    bad.incarnation ^= 1;
    assert!(matches!(with(bad), AttachError::Segment(_)));
    let mut bad = good.clone();
    bad.segment_size *= 2;
    assert!(matches!(with(bad), AttachError::Welcome { field: "segment_size", .. }));
    let mut bad = good.clone();
    bad.queues = 300;
    assert!(matches!(with(bad), AttachError::Welcome { field: "queues", value: 300 }));
    for arena_size in [0, 4097, 1 << 60, u64::MAX] {
        let mut bad = good.clone();
        bad.arena_size = arena_size;
        assert!(matches!(with(bad), AttachError::Arena(_)));
    }
}

#[test]
fn who_does_not_attach_after_all_says_so() {
    let mut daemon = Daemon::new();
    let mut welcome = daemon.welcome();
    welcome.arena_size = u64::MAX;
    let welcome = DaemonMessage::Welcome(welcome);
    daemon.attach_with(|d| d.send(&welcome, &d.welcome_fds())).expect_err("more than there is");
    // Else a daemon that has let it in counts it until the process ends, and it may try again and again.
    assert!(matches!(daemon.try_receive(), Some((WorkerMessage::Revoked, _))));
    assert!(daemon.try_receive().is_none());

    daemon.attach_with(|_| ()).expect_err("silence");
    assert!(matches!(daemon.try_receive(), Some((WorkerMessage::Revoked, _))));
    assert!(daemon.try_receive().is_none());
}

#[test]
fn bad_paths_and_names() {
    let long = format!("/tmp/{}", "x".repeat(200));
    let error = Attachment::connect(Path::new(&long), &AttachOptions::default()).expect_err("too long");
    assert!(error.to_string().contains("107"), "{error}");
    let nobody = tempfile::tempdir().expect("a directory").path().join("none.sock");
    let error = Attachment::connect(&nobody, &AttachOptions::default()).expect_err("nobody listens");
    assert!(matches!(error, AttachError::Address(_)));
    let (_ours, theirs) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket pair");
    let options = AttachOptions { label: "x".repeat(65), ..AttachOptions::default() };
    let error = Attachment::from_socket(theirs, &options).expect_err("too long");
    assert!(matches!(error, AttachError::Name(ControlError::TextTooLong { field: "the label", len: 65, .. })));
    let options = AttachOptions { device: "a\nb".to_owned(), ..AttachOptions::default() };
    let error = Attachment::connect("/nowhere".as_ref(), &options).expect_err("no line of a log");
    assert!(matches!(error, AttachError::Name(ControlError::TextControl { field: "the device name" })));
}

#[test]
fn readers_are_numbered_and_their_places_come_back() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let mut readers: Vec<_> = (0..SLOT_CAPACITY).map(|_| attachment.reader().expect("a place")).collect();
    assert_eq!(attachment.reader().expect_err("full"), ReaderError::TooMany);
    readers.pop();
    let again = attachment.reader().expect("a place came back");
    drop(again.pin().expect("pin"));
}

#[test]
fn the_daemons_death_is_seen_by_the_next_pin() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let reader = attachment.reader().expect("a reader");
    drop(reader.pin().expect("the daemon lives"));
    daemon.kill();
    // No waiting: the kernel marked the word before the thread was gone, while the socket is still open.
    assert_eq!(reader.pin().expect_err("the daemon is dead"), PinError::DaemonDead);
    assert!(!attachment.alive());
    assert_eq!(attachment.reader().expect_err("the daemon is dead"), ReaderError::DaemonDead);
    assert!(daemon.segment.is_drained(u64::MAX), "the refused pin left the slot clear");
    wait_until("events are raised", || support::wait_readable(attachment.events(), support::PATIENCE));
}

#[test]
fn a_pin_within_another_sees_the_end_too() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let reader = attachment.reader().expect("a reader");
    let outer = reader.pin().expect("the daemon lives");
    drop(reader.pin().expect("the daemon lives"));
    daemon.kill();
    assert_eq!(reader.pin().expect_err("the daemon is dead"), PinError::DaemonDead);
    assert!(!daemon.segment.is_drained(u64::MAX), "the outer pin goes on");
    drop(outer);
    assert!(daemon.segment.is_drained(u64::MAX), "and was the only one");
}

#[test]
fn a_worker_that_cannot_go_on_says_so_when_nothing_of_it_pins() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let reader = attachment.reader().expect("a reader");
    // What the worker cannot read: it gives the attachment up, though daemon and socket live.
    daemon.send_bytes(&[0xff; 3], &[]);
    assert!(support::wait_readable(attachment.events(), support::PATIENCE));
    assert_eq!(reader.pin().expect_err("given up"), PinError::DaemonDead);
    drop(attachment);
    drop(reader);
    // Else the daemon counts its slots, and keeps its queues, until the process ends.
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked);
}

#[test]
fn the_sockets_end_is_the_end() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let reader = attachment.reader().expect("a reader");
    daemon.socket = None;
    assert!(support::wait_readable(attachment.events(), support::PATIENCE));
    assert!(!attachment.alive());
    assert_eq!(reader.pin().expect_err("cut off"), PinError::DaemonDead);
    attachment.clear_events();
    assert!(!support::wait_readable(attachment.events(), std::time::Duration::ZERO));
}

#[test]
fn handshake_messages_after_the_handshake_are_ignored() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    daemon.send(&DaemonMessage::Refused(Refusal::Full), &[]);
    daemon.send(&DaemonMessage::MemoryMap { generation: 0 }, &[]);
    assert_eq!(daemon.receive().0, WorkerMessage::Mapped { generation: 0 });
    assert!(attachment.alive());
}
