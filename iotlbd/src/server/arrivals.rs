//! Connections on the control socket: from accept to HELLO, and what HELLO must say.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iotlb_proto::control::message::{CONTROL_VERSION, HELLO_MAGIC, NAME_MAX, clip_reason};
use iotlb_proto::control::{DaemonMessage, Hello, Refusal, Welcome, WorkerMessage};
use iotlb_proto::layout::worker::SEGMENT_SIZE;
use iotlb_proto::layout::{LAYOUT_HASH, LAYOUT_VERSION};
use iotlb_proto::liveness::WORD_OFFSET;
use iotlb_proto::socket::PacketSocket;
use iotlb_proto::worker::WorkerSegment;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{debug, info, warn};

use super::alarm::now_ns;
use super::event_loop::EventLoop;
use super::link::{self, Link, LinkError, Outgoing};
use super::poller::{Token, is_readable};
use super::process::{self, Process, ProcessError};
use super::worker::Worker;

/// Connections that have not said HELLO yet. More wait in the kernel's queue.
pub(super) const ARRIVALS_MAX: usize = 16;
/// Time to say HELLO.
const HELLO_TIMEOUT_NS: u64 = 2_000_000_000;
/// The same when all places are taken: HELLO comes with the connection, and others may wait behind silent ones.
const HELLO_HURRY_NS: u64 = 50_000_000;
/// Pause after an accept that failed for want of descriptors or memory: the connection waits, and so would the loop
/// spin.
const ACCEPT_PAUSE_NS: u64 = 100_000_000;

/// A connection that has not said HELLO yet.
#[derive(Debug)]
pub(crate) struct Arrival {
    socket: PacketSocket,
    /// The process behind it, asked for at once: later its number may be another's.
    peer: Option<OwnedFd>,
    since_ns: u64,
}

/// A connection that is not taken as a worker's.
struct Refused {
    refusal: Refusal,
    /// For the log.
    why: String,
    socket: PacketSocket,
}

impl Arrival {
    /// Whether something was sent on it, or it was closed. To ask receives nothing and wakes nobody up, so it is on no
    /// account.
    fn has_spoken(&self) -> bool {
        is_readable(self)
    }
}

impl AsFd for Arrival {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl EventLoop {
    /// Accepts all that wait, as far as there is room.
    pub(super) fn accept_workers(&mut self) {
        if self.stopping {
            return;
        }
        if self.is_closing_behind() {
            self.pause_accept();
            return;
        }
        while self.arrivals.len() < ARRIVALS_MAX {
            match accept_with(&self.control, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => match self.arrived(fd) {
                    Err(error) if error.is_exhausted() => return self.cannot_accept(&error),
                    Err(error) => debug!("a connection was closed at once: {error}"),
                    Ok(()) => {}
                },
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return self.cannot_accept(&error),
            }
        }
    }

    /// For want of descriptors or memory: whoever looks after this machine has to know.
    fn cannot_accept(&mut self, error: &dyn std::error::Error) {
        warn!("a worker cannot be accepted now: {error}");
        self.pause_accept();
    }

    /// Whether too much hangs that workers had or sent for another to be let in.
    fn is_closing_behind(&mut self) -> bool {
        let now_ns = now_ns();
        // Both: each says so by itself.
        self.closer.is_behind(now_ns) | self.ring_closer.is_behind(now_ns)
    }

    /// Tries to accept again a little later: the listener reports only what is new.
    pub(super) fn pause_accept(&mut self) {
        self.accept_again_ns = Some(now_ns().saturating_add(ACCEPT_PAUSE_NS));
    }

    pub(super) fn accept_after_pause(&mut self, now_ns: u64) {
        if self.accept_again_ns.is_some_and(|due| due <= now_ns) {
            self.accept_again_ns = None;
            if std::mem::take(&mut self.arrivals_wait) {
                let ids: Vec<u32> = self.arrivals.keys().copied().collect();
                for id in ids {
                    self.arrival_ready(id);
                }
            }
            self.accept_workers();
            if self.front_end.is_none() {
                self.front_end_waits();
            }
        }
    }

    /// An Err says that the process behind the connection cannot be named; it is closed then.
    fn arrived(&mut self, fd: OwnedFd) -> Result<(), ProcessError> {
        let peer = match process::peer(&fd) {
            Ok(peer) => peer,
            Err(error) => {
                self.closer.give(vec![fd]);
                return Err(error);
            }
        };
        let socket = match PacketSocket::from_fd(fd) {
            Ok(socket) => socket,
            Err(error) => {
                warn!("a connection on the control socket is of the wrong kind: {error}");
                return Ok(());
            }
        };
        socket.take_descriptors_only();
        let id = self.next_arrival;
        self.next_arrival = self.next_arrival.wrapping_add(1);
        if let Err(error) = self.poller.watch(&socket, Token::Arrival(id)) {
            warn!("a connection cannot be watched: {error}");
            self.closer.give(vec![socket.into()]);
            return Ok(());
        }
        self.arrivals.insert(id, Arrival { socket, peer, since_ns: now_ns() });
        Ok(())
    }

    /// When the connection that came first has taken too long to say HELLO.
    pub(super) fn arrivals_deadline_ns(&self) -> Option<u64> {
        self.first_arrival().map(|(_, due)| due)
    }

    /// The connection that came first, and until when it may take to say HELLO.
    fn first_arrival(&self) -> Option<(u32, u64)> {
        let allowed_ns = if self.arrivals.len() < ARRIVALS_MAX { HELLO_TIMEOUT_NS } else { HELLO_HURRY_NS };
        let (id, arrival) = self.arrivals.iter().min_by_key(|(_, arrival)| arrival.since_ns)?;
        Some((*id, arrival.since_ns.saturating_add(allowed_ns)))
    }

    fn late_arrival(&self, now_ns: u64) -> Option<u32> {
        self.first_arrival().filter(|(_, due)| *due <= now_ns).map(|(id, _)| id)
    }

    /// Closes the connections that took too long to say HELLO.
    pub(super) fn expire_arrivals(&mut self, now_ns: u64) {
        while let Some(id) = self.late_arrival(now_ns) {
            // What it said may lie there unread: it is not to blame for what held the loop up, nor for what it has to
            // wait for. Either way it is not the one that is late then.
            self.look_at_arrival(id, now_ns);
            if self.late_arrival(now_ns) != Some(id) {
                continue;
            }
            if self.refusals.take(now_ns) {
                info!("a connection on the control socket did not say HELLO in time and was closed");
            }
            if let Some(arrival) = self.drop_arrival(id) {
                self.closer.give(vec![arrival.socket.into()]);
            }
        }
    }

    /// Closes all connections that have not said HELLO yet.
    pub(super) fn drop_arrivals(&mut self) {
        for arrival in std::mem::take(&mut self.arrivals).into_values() {
            self.poller.forget(&arrival);
            self.closer.give(vec![arrival.socket.into()]);
        }
    }

    fn drop_arrival(&mut self, id: u32) -> Option<Arrival> {
        let arrival = self.arrivals.remove(&id)?;
        self.poller.forget(&arrival);
        // There is room again for one that waits.
        self.accept_again_ns = Some(now_ns());
        Some(arrival)
    }

    pub(super) fn arrival_ready(&mut self, id: u32) {
        self.look_at_arrival(id, now_ns());
    }

    /// Hears what a connection has said, or puts that off while nobody can be let in.
    fn look_at_arrival(&mut self, id: u32, now_ns: u64) {
        let waits_until_ns = if self.is_closing_behind() {
            Some(now_ns.saturating_add(ACCEPT_PAUSE_NS))
        } else {
            self.arrivals_turn.comes_ns(now_ns, 1)
        };
        let Some(arrival) = self.arrivals.get_mut(&id) else { return };
        if let Some(until_ns) = waits_until_ns {
            // It may have said HELLO in time: from then on it has all its time again. Not so who has said nothing, or
            // places would be taken for as long as somebody sees to it that there is something to wait for.
            if arrival.has_spoken() {
                arrival.since_ns = until_ns;
            }
            self.arrivals_wait = true;
            self.accept_again_ns = Some(self.accept_again_ns.map_or(until_ns, |due| due.min(until_ns)));
            return;
        }
        let mut fds = Vec::new();
        let received = self.arrivals_turn.spend(|| link::receive(&arrival.socket, &mut fds));
        if matches!(received, Ok(None)) {
            return;
        }
        let Some(arrival) = self.drop_arrival(id) else { return };
        let refused = match received {
            Ok(Some(WorkerMessage::Hello(hello))) => self.attach(hello, &fds, arrival).err(),
            Ok(Some(_)) => Some(Refused {
                refusal: Refusal::NotAWorker,
                why: String::from("no HELLO came first"),
                socket: arrival.socket,
            }),
            Ok(None) | Err(LinkError::Closed) => {
                fds.insert(0, arrival.socket.into());
                None
            }
            Err(error) => {
                Some(Refused { refusal: Refusal::NotAWorker, why: error.to_string(), socket: arrival.socket })
            }
        };
        if let Some(Refused { refusal, why, socket }) = refused {
            if self.refusals.take(now_ns) {
                warn!("a worker was refused: {refusal:?}: {why}");
            }
            self.arrivals_turn.spend(|| link::send_once(&socket, &DaemonMessage::Refused(refusal)));
            // First: the other side sees its end whatever else hangs.
            fds.insert(0, socket.into());
        }
        self.closer.give(fds);
    }

    fn attach(&mut self, hello: Hello, fds: &[OwnedFd], arrival: Arrival) -> Result<(), Refused> {
        let Arrival { socket, peer, .. } = arrival;
        if let Err(refusal) = self.check_hello(&hello) {
            let why = format!("label {:?}", hello.label);
            return Err(Refused { refusal, why, socket });
        }
        let process = match Process::verified(peer, fds.first().map(AsFd::as_fd), socket.as_fd()) {
            Ok(process) if fds.len() == 1 => process,
            Ok(_) => {
                let why = String::from("more than one descriptor came with HELLO");
                return Err(Refused { refusal: Refusal::NotAWorker, why, socket });
            }
            Err(error) => return Err(Refused { refusal: Refusal::Pidfd, why: error.to_string(), socket }),
        };
        let incarnation = self.registry.next_incarnation();
        let made = WorkerSegment::create(incarnation)
            .map_err(|error| error.to_string())
            .and_then(|segment| EventLoop::new_doorbell().map(|bell| (segment, bell)).map_err(|e| e.to_string()));
        let ((segment, segment_fd), doorbell) = match made {
            Ok(made) => made,
            Err(why) => return Err(Refused { refusal: Refusal::Exhausted { reason: clip_reason(&why) }, why, socket }),
        };
        let id = self.registry.next_id();
        let watched = self
            .poller
            .watch(&doorbell, Token::Doorbell(id.0))
            .and_then(|()| self.poller.watch(&process, Token::Process(id.0)))
            .and_then(|()| self.poller.watch_both(&socket, Token::Control(id.0)));
        if let Err(error) = watched {
            self.poller.forget(&doorbell);
            self.poller.forget(&process);
            let why = error.to_string();
            return Err(Refused { refusal: Refusal::Exhausted { reason: clip_reason(&why) }, why, socket });
        }
        info!(worker = id.0, label = ?hello.label, workers = self.registry.len() + 1, "attached");
        let doorbell = Arc::new(doorbell);
        let bell = Arc::clone(&doorbell);
        // From here on its slots count, and only then does it get what it can pin with.
        let target = self.device.grace_target();
        self.registry.insert(Worker::new(id, hello.label, process, segment, doorbell, Link::new(socket), target));
        let facts = &self.facts;
        let welcome = Welcome {
            worker: id.0,
            incarnation,
            device: facts.device_name.clone(),
            table_size: facts.table_size,
            segment_size: SEGMENT_SIZE as u64,
            liveness_offset: WORD_OFFSET,
            arena_size: facts.arena_size,
            miss_timeout_ms: facts.miss_timeout_ms,
            queues: facts.queues,
        };
        let descriptors = vec![Arc::clone(&facts.table), Arc::new(segment_fd), Arc::clone(&facts.liveness), bell];
        self.push(id, Outgoing::Message(DaemonMessage::Welcome(welcome), descriptors));
        self.tell_memory(id);
        self.flush(id);
        Ok(())
    }

    fn check_hello(&self, hello: &Hello) -> Result<(), Refusal> {
        if hello.magic != HELLO_MAGIC || hello.device.len() > NAME_MAX || hello.label.len() > NAME_MAX {
            return Err(Refusal::NotAWorker);
        }
        if hello.control_version != CONTROL_VERSION {
            return Err(Refusal::Control { version: CONTROL_VERSION });
        }
        if hello.layout_version != LAYOUT_VERSION || hello.layout_hash != LAYOUT_HASH {
            return Err(Refusal::Layout { version: LAYOUT_VERSION, hash: LAYOUT_HASH });
        }
        if !hello.device.is_empty() && hello.device != self.facts.device_name {
            return Err(Refusal::NoSuchDevice);
        }
        if self.registry.is_full() {
            return Err(Refusal::Full);
        }
        Ok(())
    }
}
