//! What no peer can bring about at will: a loop whose parts are put into the state in question by hand.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::control::{self, DaemonMessage, WorkerMessage};
use iotlb_proto::epoch::grace::FIRST_EPOCH;
use iotlb_proto::socket::PacketSocket;
use iotlb_proto::sync::Ordering;
use iotlb_proto::worker::WorkerSegment;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::alarm::now_ns;
use super::arrivals::ARRIVALS_MAX;
use super::config::QUEUE_PAIRS_MAX;
use super::event_loop::EventLoop;
use super::link::{Link, Outgoing};
use super::process::Process;
use super::turn::Turn;
use super::worker::Worker;
use super::{DeviceKind, FrontEndSource, Server, ServerConfig};
use crate::device::WorkerId;

/// Longest wait for what other threads do.
const WATCHDOG: Duration = Duration::from_secs(30);

/// A loop that does not run.
struct Standing {
    event_loop: EventLoop,
    directory: tempfile::TempDir,
}

impl Standing {
    /// Somebody who connects and says nothing.
    fn silent(&self) -> PacketSocket {
        PacketSocket::connect(&self.directory.path().join("control"), 1000).expect("connects")
    }

    /// Somebody who says what is no HELLO, and is to hear that.
    fn stranger(&self) -> PacketSocket {
        let socket = self.silent();
        socket.send(&[0xee], &[]).expect("sent");
        socket
    }
}

fn is_answered(socket: &PacketSocket) -> bool {
    matches!(socket.receive_into(&mut Vec::new()), Ok(Some(_)))
}

fn standing() -> Standing {
    let directory = tempfile::tempdir().expect("temporary directory");
    let device = DeviceKind::Net { queue_pairs: QUEUE_PAIRS_MAX };
    let config = ServerConfig::new(device, FrontEndSource::Taken, directory.path().join("control"));
    let Server { config, front_end, control } = Server::start(config).expect("starts");
    let (stop, _) = std::io::pipe().expect("pipe");
    let event_loop = EventLoop::new(config, front_end, control, OwnedFd::from(stop), 1).expect("a loop");
    Standing { event_loop, directory }
}

/// A process that lives until it is told to end.
fn living() -> (Child, Process) {
    let child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("starts");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("small")).expect("not 0");
    (child, Process::unverified(pidfd_open(pid, PidfdFlags::empty()).expect("pidfd")))
}

/// Attaches a worker by hand; with it the other end of its connection.
fn attach(event_loop: &mut EventLoop, process: Process) -> (WorkerId, PacketSocket) {
    let (ours, theirs) = PacketSocket::pair().expect("a socket pair");
    let link = Link::new(ours);
    let (segment, _fd) = WorkerSegment::create(1).expect("a segment");
    let doorbell = EventLoop::new_doorbell().expect("an eventfd");
    let id = event_loop.registry.next_id();
    event_loop.registry.insert(Worker::new(id, String::new(), process, segment, Arc::new(doorbell), link, None));
    (id, theirs)
}

#[test]
fn queues_claimed_by_a_worker_that_is_gone_are_free() {
    let Standing { mut event_loop, .. } = standing();
    let (mut child, process) = living();
    let (id, _theirs) = attach(&mut event_loop, process);
    child.kill().expect("killed");
    child.wait().expect("ended");
    // One that reads nothing, and is found to have ended when there is no room for an answer.
    let queues: Vec<u16> = (0..event_loop.facts.queues).collect();
    for claim in 0.. {
        if event_loop.registry.get_mut(id).is_none() {
            break;
        }
        event_loop.worker_says(id, WorkerMessage::ClaimQueues { claim, queues: queues.clone() });
    }
    let taken: Vec<u16> = queues.into_iter().filter(|&queue| event_loop.leases.get(queue).is_some()).collect();
    assert_eq!(taken, [0_u16; 0], "nobody is there to give them back");
}

#[test]
fn the_order_to_give_up_and_the_answer_to_it_wait_for_no_turn() {
    let Standing { mut event_loop, .. } = standing();
    let (mut child, process) = living();
    let (id, theirs) = attach(&mut event_loop, process);
    let worker = event_loop.registry.get_mut(id).expect("attached");
    worker.segment.announce(1);
    worker.segment.slot(0).store(FIRST_EPOCH, Ordering::Release);
    let link = worker.link.as_mut().expect("connected");
    link.push(Outgoing::Lease { queue: 0, claim: 1 }).expect("room");
    link.tire();
    let policy = event_loop.facts.stall;
    for ms in [0, policy.report_ms, policy.revoke_ms] {
        event_loop.take_stall_steps(FIRST_EPOCH + 1, u64::from(ms) * 1_000_000);
    }
    let mut heard = Vec::new();
    while let Ok(Some(bytes)) = theirs.receive_into(&mut Vec::new()) {
        heard.push(control::decode::<DaemonMessage>(&bytes).expect("a message"));
    }
    assert_eq!(heard, [DaemonMessage::Revoke], "told, and nothing else after that");
    let answer = control::encode(&WorkerMessage::Revoked).expect("encodes");
    theirs.send(&answer, &[]).expect("sent");
    event_loop.control_ready(id);
    assert!(event_loop.registry.get_mut(id).is_none(), "it has left");
    child.kill().expect("killed");
    child.wait().expect("ended");
}

#[test]
fn who_has_not_said_hello_waits_for_a_turn_that_all_such_share() {
    let standing = standing();
    let strangers = [(); 3].map(|()| standing.stranger());
    let refused = || strangers.iter().filter(|socket| is_answered(socket)).count();
    let Standing { mut event_loop, .. } = standing;
    event_loop.accept_workers();
    let ids: Vec<u32> = event_loop.arrivals.keys().copied().collect();
    event_loop.arrival_ready(ids[0]);
    assert_eq!(refused(), 1);
    event_loop.arrivals_turn.tire();
    for &id in &ids[1..] {
        event_loop.arrival_ready(id);
    }
    assert_eq!(refused(), 0, "the first took all their time");
    // They are not to blame for that.
    event_loop.expire_arrivals(now_ns() + 3_600_000_000_000);
    assert_eq!(event_loop.arrivals.len(), 2);
    event_loop.arrivals_turn = Turn::default();
    event_loop.accept_after_pause(u64::MAX);
    assert_eq!(refused(), 2);
}

#[test]
fn who_said_something_is_heard_however_long_the_loop_was_held_up() {
    let standing = standing();
    let strangers = [(); ARRIVALS_MAX].map(|()| standing.stranger());
    let Standing { mut event_loop, .. } = standing;
    event_loop.accept_workers();
    assert_eq!(event_loop.arrivals.len(), ARRIVALS_MAX, "no place is left, so none has long");
    event_loop.expire_arrivals(now_ns() + 60_000_000);
    let since = Instant::now();
    // Again and again: all of the closing threads may be on their way.
    while let Some(&id) = event_loop.arrivals.keys().next() {
        assert!(since.elapsed() < WATCHDOG, "in vain");
        event_loop.arrivals_turn = Turn::default();
        event_loop.arrival_ready(id);
    }
    let unheard = strangers.iter().filter(|socket| !is_answered(socket)).count();
    assert_eq!(unheard, 0, "closed with what they said unread");
}

#[test]
fn who_waits_for_what_others_left_to_close_is_not_late_for_that() {
    let standing = standing();
    let (stranger, silent) = (standing.stranger(), standing.silent());
    let Standing { mut event_loop, .. } = standing;
    event_loop.accept_workers();
    event_loop.closer.hang();
    let ids: Vec<u32> = event_loop.arrivals.keys().copied().collect();
    for &id in &ids {
        event_loop.arrival_ready(id);
    }
    event_loop.expire_arrivals(now_ns() + 3_000_000_000);
    let left: Vec<u32> = event_loop.arrivals.keys().copied().collect();
    assert_eq!(left, ids[..1], "only who said nothing has no reason to stay");
    event_loop.closer.go_on();
    let since = Instant::now();
    while !event_loop.arrivals.is_empty() {
        assert!(since.elapsed() < WATCHDOG, "in vain");
        event_loop.accept_after_pause(u64::MAX);
    }
    assert!(is_answered(&stranger) && !is_answered(&silent));
}

#[test]
fn who_comes_again_to_have_a_new_account_waits() {
    let Standing { mut event_loop, .. } = standing();
    let (mut child, process) = living();
    let (id, _theirs) = attach(&mut event_loop, process);
    event_loop.registry.get_mut(id).and_then(|worker| worker.link.as_mut()).expect("connected").tire();
    event_loop.disconnect(id, "as a test wants it");
    assert!(event_loop.arrivals_turn.comes_ns(now_ns(), 1).is_some());
    child.kill().expect("killed");
    child.wait().expect("ended");
    event_loop.arrivals_turn = Turn::default();
    // The same for one that leaves.
    let (mut child, process) = living();
    let (id, _theirs) = attach(&mut event_loop, process);
    event_loop.registry.get_mut(id).and_then(|worker| worker.link.as_mut()).expect("connected").tire();
    event_loop.worker_says(id, WorkerMessage::Revoked);
    assert!(event_loop.arrivals_turn.comes_ns(now_ns(), 1).is_some());
    child.kill().expect("killed");
    child.wait().expect("ended");
}
