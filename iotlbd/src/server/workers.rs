//! What workers say, and what becomes of them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use iotlb_proto::layout::worker::PROGRESS_VALID;
use iotlb_proto::sync::Ordering;
use tracing::{debug, error, info, warn};

use super::alarm::now_ns;
use super::event_loop::EventLoop;
use super::link::{Link, LinkError, Outgoing, Sent};
use super::poller::Token;
use super::stall::Step;
use super::worker::Worker;
use crate::device::{Event, WorkerId};

/// Messages of one worker taken in one round: the others' turn comes after.
const MESSAGES_PER_ROUND: usize = 32;

/// Pause when too many descriptors are on their way: nobody says when they have arrived.
const FLUSH_PAUSE_NS: u64 = 10_000_000;

impl EventLoop {
    /// Takes all posted misses. What one worker can have posted is bounded by its cells, so this is too.
    pub(super) fn harvest(&mut self, now_ns: u64) {
        let EventLoop { registry, device, worked, .. } = self;
        for worker in registry.iter_mut() {
            let id = worker.id;
            worker.harvest(|cell, request| {
                *worked = true;
                device.handle(Event::Miss { worker: id, cell, request }, now_ns);
            });
        }
    }

    /// Puts a message into a worker's queue. An overflow ends its connection.
    pub(super) fn push(&mut self, id: WorkerId, message: Outgoing) {
        let Some(link) = self.registry.get_mut(id).and_then(|worker| worker.link.as_mut()) else { return };
        if let Err(error) = link.push(message) {
            self.disconnect(id, &error.to_string());
        }
    }

    /// Sends what can be sent.
    pub(super) fn flush(&mut self, id: WorkerId) {
        let EventLoop { registry, device, .. } = self;
        let connections = registry.len();
        let Some(link) = registry.get_mut(id).and_then(|worker| worker.link.as_mut()) else { return };
        match link.flush(device, connections) {
            Ok(Sent::Yes | Sent::NoRoom) => {}
            Ok(Sent::TryLater) => self.flush_again_at(now_ns().saturating_add(FLUSH_PAUSE_NS)),
            Ok(Sent::Rests(until_ns)) => self.flush_again_at(until_ns),
            // What it said before it closed is heard first, that it leaves above all. Then the end shows there too.
            Err(LinkError::Closed) => {}
            Err(error) => self.disconnect(id, &error.to_string()),
        }
    }

    fn flush_again_at(&mut self, due_ns: u64) {
        self.flush_again_ns = Some(self.flush_again_ns.map_or(due_ns, |due| due.min(due_ns)));
    }

    /// Tries again to send what the kernel would not take, and goes on with connections that rested.
    pub(super) fn flush_after_pause(&mut self, now_ns: u64) {
        if self.flush_again_ns.is_some_and(|due| due <= now_ns) {
            self.flush_again_ns = None;
            for id in self.registry.ids() {
                let link = self.registry.get_mut(id).and_then(|worker| worker.link.as_ref());
                if link.is_some_and(Link::is_unread) {
                    self.control_ready(id);
                } else {
                    self.flush(id);
                }
            }
        }
    }

    /// A worker's connection has something to read, room to write, or has ended.
    pub(super) fn control_ready(&mut self, id: WorkerId) {
        self.flush(id);
        let connections = self.registry.len();
        for _ in 0..MESSAGES_PER_ROUND {
            let Some(link) = self.registry.get_mut(id).and_then(|worker| worker.link.as_mut()) else { return };
            if let Some(until_ns) = link.rests_until_ns(connections) {
                self.flush_again_at(until_ns);
                return;
            }
            match link.receive() {
                Ok(Some(message)) => self.worker_says(id, message),
                Ok(None) => return,
                Err(LinkError::Closed) => {
                    self.disconnect(id, "the worker closed it");
                    return;
                }
                Err(error) => {
                    self.disconnect(id, &error.to_string());
                    return;
                }
            }
        }
        let EventLoop { registry, poller, .. } = self;
        let link = registry.get_mut(id).and_then(|worker| worker.link.as_ref());
        if let Some(Err(error)) = link.map(|link| poller.rearm_both(link, Token::Control(id.0))) {
            self.disconnect(id, &error.to_string());
        }
    }

    pub(super) fn worker_says(&mut self, id: WorkerId, message: WorkerMessage) {
        match message {
            WorkerMessage::Hello(_) => self.disconnect(id, "it said HELLO twice"),
            WorkerMessage::ClaimQueues { claim, queues } => {
                if queues.len() > usize::from(self.facts.queues) {
                    self.disconnect(id, "it claimed more queues than there are");
                    return;
                }
                let mut leased = Vec::new();
                self.note_progress_of(id);
                for queue in queues {
                    let had = self.leases.get(queue).is_some();
                    let answer = match self.leases.claim(queue, id, claim) {
                        Ok(()) => {
                            if had {
                                // It gave the queue back before: where the release finds no room in the socket, it
                                // comes behind the next claim.
                                self.device.owner_left(queue);
                            }
                            self.clear_progress(id, queue);
                            leased.push(queue);
                            Outgoing::Lease { queue, claim }
                        }
                        Err(error) => {
                            let reason = error.to_string();
                            Outgoing::Message(DaemonMessage::LeaseRefused { queue, claim, reason }, Vec::new())
                        }
                    };
                    self.push(id, answer);
                    if self.registry.get_mut(id).is_none_or(|worker| worker.link.is_none()) {
                        // There was no room for the answer, which ended the connection. Had the process ended too,
                        // nobody would give back what it claims now.
                        return;
                    }
                }
                if !leased.is_empty() {
                    info!(worker = id.0, queues = ?leased, claim, "leased");
                }
                self.flush(id);
            }
            WorkerMessage::ReleaseQueue { queue, claim } => {
                self.note_progress_of(id);
                if !self.leases.release(queue, id, claim) {
                    debug!(worker = id.0, queue, claim, "a worker releases what it does not have under this claim");
                    return;
                }
                info!(worker = id.0, queue, claim, "released");
                self.device.owner_left(queue);
                if let Some(link) = self.registry.get_mut(id).and_then(|worker| worker.link.as_mut()) {
                    link.withdraw(queue, claim);
                }
            }
            WorkerMessage::Mapped { generation } => debug!(worker = id.0, generation, "memory mapped"),
            WorkerMessage::Revoked => {
                info!(worker = id.0, "the worker gave up guest memory and leaves");
                self.remove_worker(id);
            }
            WorkerMessage::QueueError { queue, reason } => self.queue_error(id, queue, &reason),
        }
    }

    fn queue_error(&mut self, id: WorkerId, queue: u16, reason: &str) {
        if self.leases.get(queue).map(|lease| lease.owner) != Some(id) {
            debug!(worker = id.0, queue, "a worker reports an error of a queue it does not own");
            return;
        }
        if self.queue_errors.take(now_ns()) {
            warn!(worker = id.0, queue, ?reason, "the ring is broken; its error descriptor is signalled");
        }
        let [_, _, err] = self.device.queue_descriptors(queue);
        let Some(err) = err else { return };
        match err.try_clone_to_owned() {
            Ok(fd) => {
                if !self.signaller.signal(fd) {
                    debug!(queue, "the error descriptor is no eventfd, or its counter is full");
                }
            }
            Err(error) => debug!(queue, "the error descriptor cannot be duplicated: {error}"),
        }
    }

    /// Ends a worker's connection. Its process lives, so its slots go on counting and its queues stay its own.
    pub(super) fn disconnect(&mut self, id: WorkerId, reason: &str) {
        let Some(worker) = self.registry.get_mut(id) else { return };
        let Some(link) = worker.link.take() else { return };
        let (is_dead, label) = (worker.process.is_dead(), worker.label.clone());
        let socket = self.end_link(link);
        self.closer.give(vec![socket]);
        if is_dead {
            self.process_ended(id);
            return;
        }
        warn!(
            worker = id.0,
            ?label,
            "connection ended ({reason}) but the process lives: its pins count and it keeps its queues"
        );
    }

    /// A worker's process has ended: nothing of it can reach guest memory any more.
    pub(super) fn process_ended(&mut self, id: WorkerId) {
        let Some(worker) = self.registry.get_mut(id) else { return };
        if !worker.process.is_dead() {
            return;
        }
        info!(worker = id.0, label = ?worker.label, "the worker's process ended");
        self.remove_worker(id);
    }

    /// Tells the device how far each worker says that it came on its queues.
    pub(super) fn note_progress(&mut self) {
        for id in self.registry.ids() {
            self.note_progress_of(id);
        }
    }

    fn note_progress_of(&mut self, id: WorkerId) {
        let EventLoop { registry, leases, device, .. } = self;
        let Some(worker) = registry.get_mut(id) else { return };
        for queue in leases.owned(id) {
            // Relaxed: the number stands for itself, and a wrong one harms the worker's own queue only.
            let Some(word) = worker.segment.progress.get(usize::from(queue)) else { continue };
            let word = word.load(Ordering::Relaxed);
            if word & PROGRESS_VALID != 0 {
                // The low 16 bits are the index.
                device.note_progress(queue, u16::try_from(word & 0xffff).unwrap_or(0));
            }
        }
    }

    /// What the worker said in a former lease says nothing of the one that begins: others may have had the queue since.
    fn clear_progress(&mut self, id: WorkerId, queue: u16) {
        let word = self.registry.get_mut(id).and_then(|worker| worker.segment.progress.get(usize::from(queue)));
        if let Some(word) = word {
            // Relaxed: messages order it. The worker wrote last before it gave the queue back, which was heard before
            // this claim, and writes again when it has heard of the lease.
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Its slots count no longer, its queues are free.
    fn remove_worker(&mut self, id: WorkerId) {
        self.note_progress_of(id);
        let Some(worker) = self.registry.remove(id) else { return };
        self.let_go(worker);
        let freed = self.leases.release_all(id);
        if !freed.is_empty() {
            info!(worker = id.0, queues = ?freed, "free again");
        }
        freed.into_iter().for_each(|queue| self.device.owner_left(queue));
        self.device.handle(Event::WorkerGone { worker: id }, now_ns());
    }

    /// Has closed what a worker shared, or could have sent things to.
    fn let_go(&mut self, worker: Worker) {
        let Worker { process, doorbell, link, .. } = worker;
        self.poller.forget(&process);
        self.poller.forget(doorbell.as_fd());
        let mut fds = Vec::new();
        if let Some(link) = link {
            fds.push(self.end_link(link));
        }
        fds.push(process.into_pidfd());
        // The other descriptor of it went with the link's WELCOME.
        fds.extend(Arc::into_inner(doorbell));
        self.closer.give(fds);
    }

    /// Has nothing to do with a connection any more; returns what is to be closed.
    fn end_link(&mut self, link: Link) -> OwnedFd {
        self.poller.forget(&link);
        let (socket, turn) = link.into_parts();
        self.arrivals_turn.take_over(&turn, now_ns());
        socket
    }

    /// The end of the loop: lets everybody go.
    pub(super) fn let_all_go(&mut self) {
        for id in self.registry.ids() {
            if let Some(worker) = self.registry.remove(id) {
                self.let_go(worker);
            }
        }
        self.drop_arrivals();
    }

    /// Does what is due to workers that hold a reply back.
    pub(super) fn take_stall_steps(&mut self, target: u64, now_ns: u64) {
        let steps = self.registry.stalled(target, now_ns, &self.facts.stall);
        for (id, step, held_ms) in steps {
            let Some(worker) = self.registry.get_mut(id) else { continue };
            let label = worker.label.clone();
            match step {
                Step::Report => {
                    warn!(
                        worker = id.0,
                        ?label,
                        held_ms,
                        "the worker holds guest memory and the front-end waits for it"
                    );
                }
                Step::Revoke => {
                    warn!(worker = id.0, ?label, held_ms, "the worker is told to give up guest memory");
                    if let Some(link) = &mut worker.link {
                        link.order_to_give_up();
                    }
                    // To read as well: what waits there was left for its turn, and is not reported again.
                    self.control_ready(id);
                }
                Step::Kill => match worker.process.kill() {
                    Ok(()) => warn!(worker = id.0, ?label, held_ms, "the worker is killed"),
                    Err(error) => error!(
                        worker = id.0,
                        ?label,
                        held_ms,
                        "the worker cannot be killed from here ({error}); the guest waits until it ends: kill it"
                    ),
                },
                Step::Remind => {
                    error!(worker = id.0, ?label, held_ms, "the guest still waits for this worker: kill it");
                }
            }
        }
    }

    /// A descriptor of the doorbell for a new worker.
    pub(super) fn new_doorbell() -> std::io::Result<OwnedFd> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
    }
}
