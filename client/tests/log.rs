//! What happens while a log line does not come to its end, or after one that panics: nothing that matters hangs on one.

mod support;

use std::fmt::{Debug, Write as _};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, Once};
use std::time::Duration;

use iotlb_client::queue::vring::Vring;
use iotlb_client::{Access, Attachment, PinError, Queue, thread_pins};
use iotlb_proto::control::{DaemonMessage, QueueLease, Refusal, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::{AtomicU64, Ordering};
use iotlb_proto::table::QueueRecord;
use support::{Daemon, PATIENCE, PATIENCE_MS, eventfd, wait_until};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Lines that somebody wrote while pinned.
static PINNED_LINES: AtomicU64 = AtomicU64::new(0);
/// Lines that are waited for, by a part of their text; each once.
static WANTED: Mutex<Vec<(&str, Then)>> = Mutex::new(Vec::new());

/// What a line that is waited for does.
enum Then {
    /// It is like one for a pipe that nobody reads. `end` comes when its other end is dropped.
    Stuck {
        reached: Sender<()>,
        end: Receiver<()>,
    },
    Panics,
}

/// The next line with this text does that.
fn when(text: &'static str, then: Then) {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| tracing::subscriber::set_global_default(Log).expect("nobody else listens"));
    WANTED.lock().expect("nobody panics with it").push((text, then));
}

/// A line that does not come to its end before this is dropped.
struct Line {
    reached: Receiver<()>,
    _end: Sender<()>,
}

impl Line {
    /// The next one with this text.
    fn stuck(text: &'static str) -> Line {
        let (reached, is_reached) = mpsc::channel();
        let (end, ends) = mpsc::channel();
        when(text, Then::Stuck { reached, end: ends });
        Line { reached: is_reached, _end: end }
    }

    fn wait(&self) {
        self.reached.recv_timeout(PATIENCE).expect("the line is written");
    }
}

struct Log;

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn event(&self, event: &Event<'_>) {
        if thread_pins::count() != 0 {
            PINNED_LINES.fetch_add(1, Ordering::Relaxed);
        }
        let mut text = Text::default();
        event.record(&mut text);
        let mut wanted = WANTED.lock().expect("nobody panics with it");
        let found = wanted.iter().position(|(part, _)| text.0.contains(part)).map(|at| wanted.swap_remove(at).1);
        drop(wanted);
        match found {
            Some(Then::Stuck { reached, end }) => {
                let _ = reached.send(());
                let _ = end.recv();
            }
            Some(Then::Panics) => panic!("a line that panics"),
            None => {}
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}

/// Leases queue 0; returns the claim's number as well.
fn lease(daemon: &Daemon, attachment: &Attachment) -> (Queue, u64) {
    let bells = [eventfd(), eventfd(), eventfd()];
    std::thread::scope(|scope| {
        let claiming = scope.spawn(|| attachment.claim_queues(&[0], PATIENCE_MS));
        let WorkerMessage::ClaimQueues { claim, .. } = daemon.receive().0 else { panic!("not a claim") };
        let lease = QueueLease { queue: 0, claim, kick: true, call: true, err: true };
        daemon.send(&DaemonMessage::Lease(lease), &bells.each_ref().map(AsFd::as_fd));
        (claiming.join().expect("no panic").expect("leased").pop().expect("one"), claim)
    })
}

/// Does `work` in a thread, which ends although a line is stuck.
fn ends(work: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || {
        work();
        done.send(()).expect("the test waits");
    });
    is_done.recv_timeout(PATIENCE).expect("it waits for the log");
}

#[test]
fn a_revocation_is_answered_before_it_is_logged() {
    let mut daemon = Daemon::new();
    let _attachment = daemon.attach().expect("attach");
    let line = Line::stuck("revoked this worker's access");
    daemon.send(&DaemonMessage::Revoke, &[]);
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked);
    line.wait();
}

#[test]
fn the_end_is_known_before_it_is_logged() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let line = Line::stuck("closed the control socket");
    daemon.socket = None;
    line.wait();
    assert!(!attachment.alive());
    drop(line);

    let attachment = daemon.attach().expect("attach");
    let line = Line::stuck("control socket: the attachment is over");
    daemon.send_bytes(&[0xff; 3], &[]);
    line.wait();
    assert!(!attachment.alive());
}

#[test]
fn a_control_thread_that_panics_ends_the_attachment() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("the attachment lives");
    when("handshake message after", Then::Panics);
    daemon.send(&DaemonMessage::Refused(Refusal::Full), &[]);
    wait_until("the attachment is over", || !attachment.alive());
    drop(attachment);
    assert!(!support::wait_readable(daemon.socket.as_ref().expect("attached").as_fd(), Duration::ZERO), "still pinned");
    drop(guard);
    assert_eq!(reader.pin().expect_err("nobody would hear of a revocation"), PinError::DaemonDead);
    // And the daemon gets its queues back.
    drop(reader);
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked);
    assert!(daemon.try_receive().is_none());
}

#[test]
fn leases_do_not_wait_for_the_log() {
    let mut daemon = Daemon::new();
    let attachment = daemon.attach().expect("attach");
    let (queue, claim) = lease(&daemon, &attachment);
    let line = Line::stuck("took a queue back");
    daemon.send(&DaemonMessage::LeaseRefused { queue: 0, claim, reason: "the operator said so".to_owned() }, &[]);
    line.wait();
    assert!(!queue.held());
    ends(|| drop(queue));
    drop(line);

    let (queue, claim) = lease(&daemon, &attachment);
    let line = Line::stuck("wrong number of descriptors");
    daemon.send(&DaemonMessage::Lease(QueueLease { queue: 0, claim, kick: true, call: true, err: true }), &[]);
    line.wait();
    ends(|| drop(queue));
    drop(line);

    let line = Line::stuck("given up");
    let lease = QueueLease { queue: 0, claim, kick: false, call: false, err: false };
    daemon.send(&DaemonMessage::Lease(lease), &[]);
    line.wait();
    let attachment_2 = attachment.clone();
    ends(move || assert!(attachment_2.claim_queues(&[0], 1).is_err(), "nobody answers"));
}

#[test]
fn a_ring_that_starts_logs_nothing_while_it_is_pinned() {
    let line = Line::stuck("a line of the test's own");
    let (daemon, _memory, attachment) = Daemon::with_memory(3);
    daemon.map(0, 3 * PAGE_SIZE, 0, Access::READ_WRITE);
    let record = {
        let mut table = daemon.table();
        let session_generation = table.bump_session();
        let (desc, avail, used) = (0, PAGE_SIZE, 2 * PAGE_SIZE);
        QueueRecord { started: true, enabled: true, size: 16, desc, avail, used, base: 0, session_generation }
    };
    let reader = attachment.reader().expect("a reader");
    {
        let guard = reader.pin().expect("the attachment lives");
        Vring::default().begin(&guard, &record, 0).map(drop).expect("all is present");
    }
    assert_eq!(PINNED_LINES.load(Ordering::Relaxed), 0);
    // The listener counts.
    let guard = reader.pin().expect("the attachment lives");
    let end = std::thread::spawn(move || drop((line.reached.recv_timeout(PATIENCE), line)));
    tracing::debug!("a line of the test's own");
    drop(guard);
    end.join().expect("no panic");
    assert_eq!(PINNED_LINES.load(Ordering::Relaxed), 1);
}
