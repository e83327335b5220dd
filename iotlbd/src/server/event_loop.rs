//! The loop: one thread that owns the device, its front-end and its workers.
//!
//! A round: harvest misses, let the device do a slice of what it has to do, carry out what it wants until it wants
//! nothing, look whether readers let a grace period pass, read the front-end's next requests, then poll for a while
//! ([`Pace`]), or sleep until a descriptor or the timer says otherwise.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use iotlb_proto::liveness::LivenessOwner;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::vhost_user::{IotlbKind, Request};
use tracing::{debug, error, info};

use super::alarm::{Alarm, now_ns};
use super::arrivals::Arrival;
use super::back_end::BackEnd;
use super::closer::Closer;
use super::config::{ServerConfig, StallPolicy};
use super::eventfd::Signaller;
use super::figures::Figures;
use super::front_end::{FrontEnd, FrontEndDoor, Incoming};
use super::grace::{GraceWait, Pause};
use super::kernel;
use super::leases::Leases;
use super::pace::{Idle, Pace};
use super::poller::{Poller, Ready, Token};
use super::registry::Registry;
use super::turn::Turn;
use super::{ControlListener, ServerError, signals};
use crate::device::{Device, DeviceConfig, Event, WorkerId};
use crate::log_budget::LogBudget;

/// Front-end requests taken in one round, so that misses and clocks are looked at while a front-end talks on and on.
const REQUESTS_PER_ROUND: usize = 32;
/// How long what was read from the front-end may stay in its sockets when nothing follows, whatever else the loop has
/// to do. About as long as the loop polls: after that nobody is likely to be woken up in vain.
const LEFT_NS: u64 = 50_000;

/// Everything the server owns.
#[derive(Debug)]
pub(crate) struct EventLoop {
    /// First, since fields go in this order: on every way out workers take the daemon for dead before the front-end's
    /// connection closes. Where that was not drained, a pin in between would find what the front-end takes for done.
    _liveness: LivenessOwner,
    pub(super) poller: Poller,
    pub(super) alarm: Alarm,
    pub(super) stop: OwnedFd,
    pub(super) device: Device,
    pub(super) facts: Facts,
    pub(super) door: FrontEndDoor,
    pub(super) front_end: Option<FrontEnd>,
    pub(super) back_end: Option<BackEnd>,
    pub(super) control: ControlListener,
    /// After a failed accept: when to try again.
    pub(super) accept_again_ns: Option<u64>,
    /// When to send again what the kernel would not take, or what was left for later.
    pub(super) flush_again_ns: Option<u64>,
    pub(super) arrivals: BTreeMap<u32, Arrival>,
    pub(super) next_arrival: u32,
    /// What connections cost before HELLO, and what those that are over still have to rest.
    pub(super) arrivals_turn: Turn,
    pub(super) registry: Registry,
    pub(super) leases: Leases,
    pub(super) grace: GraceWait,
    pub(super) signaller: Signaller,
    /// For what came over the control socket.
    pub(super) closer: Closer,
    /// For the event descriptors of rings.
    pub(super) ring_closer: Closer,
    /// Arrivals were reported and not looked at.
    pub(super) arrivals_wait: bool,
    /// What is logged about a ring's errors is bounded.
    pub(super) queue_errors: LogBudget,
    /// The same for refused workers.
    pub(super) refusals: LogBudget,
    pub(super) stopping: bool,
    /// Told to stop by what must not be said twice.
    told: bool,
    pub(super) done: bool,
    pub(super) figures: Figures,
    /// Answered misses whose threads sleep, to be woken up with the next [`EventLoop::send_out`].
    pub(super) sleepers: Vec<(WorkerId, u16)>,
    /// When the front-end's last message was read, on either channel.
    pub(super) heard_ns: u64,
    /// More is to be done than this round did: do not sleep.
    pub(super) busy: bool,
    /// This round had something to do.
    pub(super) worked: bool,
    pub(super) pace: Pace,
    /// Workers were asked to ring.
    doorbell_wanted: bool,
    /// The loop slept before this round.
    slept: bool,
}

/// What does not change while a server lives.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) device_name: String,
    pub(crate) stall: StallPolicy,
    pub(crate) queues: u16,
    pub(crate) arena_size: u64,
    pub(crate) table_size: u64,
    pub(crate) miss_timeout_ms: u32,
    pub(crate) table: Arc<OwnedFd>,
    pub(crate) liveness: Arc<OwnedFd>,
}

fn loop_error(step: &'static str) -> impl FnOnce(io::Error) -> ServerError {
    move |source| ServerError::Loop { step, source }
}

impl EventLoop {
    pub(crate) fn new(
        config: ServerConfig,
        door: FrontEndDoor,
        control: ControlListener,
        stop: OwnedFd,
        cpus: usize,
    ) -> Result<EventLoop, ServerError> {
        super::inherit::prepare(&stop).map_err(loop_error("use the stop descriptor"))?;
        let (owner, liveness) = LivenessOwner::create()?;
        let mut registry = Registry::new(config.max_workers);
        let table_config = TableConfig { size: config.table_size, generation: registry.next_incarnation() };
        let (table, table_fd) = TableWriter::create(&table_config)?;
        // The table takes whole nodes only: it may be a little smaller than was allowed.
        let table_size = rustix::fs::fstat(&table_fd).map_err(|e| loop_error("look at the table")(e.into()))?.st_size;
        let device_config = device_config(&config);
        let facts = Facts {
            device_name: config.device_name,
            stall: config.stall,
            queues: device_config.queues,
            arena_size: device_config.arena_size,
            table_size: u64::try_from(table_size).unwrap_or(0),
            miss_timeout_ms: config.miss_timeout_ms,
            table: Arc::new(table_fd),
            liveness: Arc::new(liveness),
        };
        let pace = Pace::new(config.busy_poll, cpus);
        let leases = Leases::new(facts.queues);
        let poller = Poller::new().map_err(loop_error("make an epoll set"))?;
        let alarm = Alarm::new().map_err(loop_error("make a timer"))?;
        poller.watch(&alarm, Token::Alarm).map_err(loop_error("watch the timer"))?;
        poller.watch(&stop, Token::Stop).map_err(loop_error("watch for the end"))?;
        poller.watch(&control, Token::ControlListener).map_err(loop_error("watch the control socket"))?;
        if let Some(listener) = door.listener() {
            poller.watch(listener, Token::FrontEndListener).map_err(loop_error("watch the front-end socket"))?;
        }
        Ok(EventLoop {
            _liveness: owner,
            poller,
            alarm,
            stop,
            device: Device::new(device_config, table),
            facts,
            door,
            front_end: None,
            back_end: None,
            control,
            accept_again_ns: None,
            flush_again_ns: None,
            arrivals: BTreeMap::new(),
            next_arrival: 0,
            arrivals_turn: Turn::default(),
            registry,
            leases,
            grace: GraceWait::default(),
            signaller: Signaller::default(),
            closer: Closer::of("what came over the control socket"),
            ring_closer: Closer::of("the event descriptors of rings"),
            arrivals_wait: false,
            queue_errors: LogBudget::default(),
            refusals: LogBudget::default(),
            stopping: false,
            told: false,
            done: false,
            figures: Figures::new(config.stats),
            sleepers: Vec::new(),
            heard_ns: 0,
            busy: false,
            worked: false,
            pace,
            doorbell_wanted: false,
            slept: false,
        })
    }

    pub(crate) fn run(&mut self) -> Result<(), ServerError> {
        if let FrontEndDoor::Once(connection) = &mut self.door {
            match connection.take() {
                Some(fd) => self.front_end_connected(fd),
                None => debug!("no front-end will come"),
            }
        }
        let mut ready = Vec::new();
        loop {
            self.busy = false;
            let now = now_ns();
            if self.device.next_deadline_ns().is_some_and(|due| due <= now) {
                self.device.handle(Event::Tick, now);
            }
            self.expire_arrivals(now);
            self.accept_after_pause(now);
            self.flush_after_pause(now);
            self.harvest(now);
            if self.device.has_work() {
                self.device.handle(Event::Continue, now);
            }
            self.settle();
            self.busy |= self.device.has_work();
            if self.done {
                return Ok(());
            }
            let worked = std::mem::take(&mut self.worked);
            if worked {
                self.pace.worked(now);
            }
            // A round without work is short: its clock still serves.
            self.wait(if worked { now_ns() } else { now }, &mut ready)?;
            for &event in &ready {
                self.dispatch(event)?;
            }
        }
    }

    /// Waits for what is to be done next: polls or sleeps.
    fn wait(&mut self, now: u64, ready: &mut Vec<Ready>) -> Result<(), ServerError> {
        self.watch_room();
        self.slept = false;
        let idle = if self.busy { Idle::PollAll } else { self.pace.idle(now) };
        if idle == Idle::Sleep || now.saturating_sub(self.heard_ns) > LEFT_NS {
            self.put_away();
        }
        match idle {
            Idle::Poll | Idle::PollAll => {
                if !self.busy && idle == Idle::PollAll {
                    // Whoever the loop waits for may wait for this processor.
                    let before = now_ns();
                    std::thread::yield_now();
                    self.pace.yielded(now_ns().saturating_sub(before));
                }
                if let Some(front_end) = &mut self.front_end {
                    front_end.look();
                }
                ready.clear();
                if idle == Idle::PollAll {
                    self.poller.wait(false, ready).map_err(loop_error("wait"))?;
                }
            }
            // Something to tell came up just now.
            Idle::Sleep if self.busy => ready.clear(),
            Idle::Sleep => {
                let sleep = self.prepare_sleep()?;
                self.poller.wait(sleep, ready).map_err(loop_error("wait"))?;
                self.slept = sleep;
            }
        }
        if std::mem::take(&mut self.doorbell_wanted) {
            self.device.table().set_doorbell_wanted(false);
        }
        Ok(())
    }

    /// Takes what was read from the front-end's sockets: while much is expected it is left there.
    fn put_away(&mut self) {
        if let Some(front_end) = &mut self.front_end {
            front_end.put_away();
            self.busy |= front_end.has_bad_news();
        }
        let over = self.back_end.as_mut().and_then(|back_end| back_end.put_away().err());
        if let Some(error) = over {
            self.back_end_lost(&error.to_string());
            self.busy = true;
        }
    }

    /// Has room for output reported where something waits for it, and only there.
    fn watch_room(&mut self) {
        let EventLoop { poller, front_end, back_end, .. } = self;
        if let Some(front_end) = front_end
            && let Some(room) = front_end.room_matters()
            && let Err(error) = poller.rearm(&*front_end, Token::FrontEnd, room)
        {
            front_end.lose(format!("it cannot be watched: {error}"));
            self.busy = true;
        }
        let Some(back_end) = back_end else { return };
        let Some(room) = back_end.room_matters() else { return };
        if let Err(error) = poller.rearm(&*back_end, Token::BackEnd, room) {
            self.back_end_lost(&error.to_string());
            self.busy = true;
        }
    }

    /// Says that the loop may sleep, if it may: then nothing was posted that no doorbell will be rung for.
    fn prepare_sleep(&mut self) -> Result<bool, ServerError> {
        self.device.table().set_doorbell_wanted(true);
        self.doorbell_wanted = true;
        // Partner of the fence inside: that in `WorkerSegment::mark_posted`. A worker that did not see the wish had
        // posted before, and is seen here.
        if self.registry.iter_mut().any(|worker| worker.segment.has_posted()) {
            return Ok(false);
        }
        let deadline = [
            self.device.next_deadline_ns(),
            self.grace.deadline_ns(),
            self.registry.stall_deadline_ns(&self.facts.stall),
            self.arrivals_deadline_ns(),
            self.accept_again_ns,
            self.flush_again_ns,
        ]
        .into_iter()
        .flatten()
        .min();
        if deadline.is_some_and(|due| due <= now_ns()) {
            return Ok(false);
        }
        self.alarm.set(deadline).map_err(loop_error("set its timer"))?;
        Ok(true)
    }

    fn dispatch(&mut self, event: Ready) -> Result<(), ServerError> {
        // A worker may ring as it likes, and a deadline is no sign of more to come: neither keeps the loop awake.
        self.worked |= !matches!(event.token, Token::Alarm | Token::Doorbell(_));
        match event.token {
            Token::Alarm => self.alarm.expired(),
            Token::Stop => self.told_to_stop()?,
            Token::FrontEndListener => self.front_end_waits(),
            Token::FrontEnd => {
                if let Some(front_end) = &mut self.front_end {
                    front_end.ready(event.hung_up);
                }
            }
            Token::BackEnd => self.read_back_end(),
            Token::ControlListener => self.accept_workers(),
            Token::Arrival(id) => self.arrival_ready(id),
            Token::Control(id) => self.control_ready(WorkerId(id)),
            Token::Process(id) => self.process_ended(WorkerId(id)),
            // Nothing to do: the ring itself was the message. Its counter is never read, so no worker can make that
            // block.
            Token::Doorbell(_) => {}
        }
        Ok(())
    }

    /// Carries out what the device wants, and feeds it what it may have, until both have an end or a round's share is
    /// used up. What it has to say to the front-end goes out together, before the front-end or readers are waited for.
    fn settle(&mut self) {
        self.carry_on();
        self.send_out();
    }

    fn carry_on(&mut self) {
        let mut requests = 0;
        let mut seen_ns = None;
        loop {
            while let Some(action) = self.device.next_action() {
                self.carry_out(action);
            }
            if self.done {
                return;
            }
            if self.look_at_readers() {
                seen_ns = None;
                continue;
            }
            if requests == REQUESTS_PER_ROUND {
                self.busy = true;
                return;
            }
            if !self.next_request(&mut seen_ns) {
                // All there was to read is read, if requests are read at all now.
                if self.device.accepts_requests() && self.judge_replies() {
                    continue;
                }
                return;
            }
            requests += 1;
            self.worked = true;
        }
    }

    /// Whether a grace period completed.
    fn look_at_readers(&mut self) -> bool {
        let Some(target) = self.device.grace_target() else {
            self.readers_let_go();
            return false;
        };
        loop {
            let now = now_ns();
            if self.registry.is_drained(target) {
                self.readers_let_go();
                self.device.handle(Event::GraceCompleted { epoch: target }, now);
                return true;
            }
            match self.grace.held(target, now) {
                Pause::Spin => {
                    self.send_out();
                    std::hint::spin_loop();
                }
                // Look once more: a reader that unpinned before it could see the wish does not ring.
                Pause::FallAsleep if self.pace.is_busy() => {}
                Pause::FallAsleep => self.device.table().set_writer_sleeps(true),
                Pause::Sleep => {
                    self.take_stall_steps(target, now);
                    // A worker that was removed just now does not hold it back any more.
                    if self.registry.is_drained(target) {
                        continue;
                    }
                    return false;
                }
            }
        }
    }

    fn readers_let_go(&mut self) {
        if self.grace.over() {
            self.device.table().set_writer_sleeps(false);
            for worker in self.registry.drained() {
                info!(worker = worker.0, "the worker let go of guest memory; the front-end is answered");
            }
        }
    }

    /// Feeds the device one request; returns whether there was one. `seen_ns` is when the one before was seen, if no
    /// reader was waited for since.
    fn next_request(&mut self, seen_ns: &mut Option<u64>) -> bool {
        let accepts = self.device.accepts_requests();
        let is_here = self.front_end.as_ref().is_some_and(FrontEnd::has_request);
        if !is_here {
            // Now, because it takes a while to find out that there is none.
            self.send_out();
        }
        let Some(front_end) = &mut self.front_end else { return false };
        let event = match front_end.next(accepts) {
            Incoming::Nothing => return false,
            Incoming::Request(header, request) => Event::Request { header, request },
            Incoming::Bad(header, error) => Event::BadRequest { header, error },
            Incoming::Lost(reason) => {
                info!("the front-end's connection is over: {reason}");
                Event::FrontEndLost { reason }
            }
        };
        if std::mem::take(&mut self.slept) && !front_end.has_request() {
            // Where the loop slept, so does the front-end behind its message. To take that wakes it up (which is why it
            // is not done while the loop polls): by the time it runs the answer is there.
            front_end.put_away();
        }
        // Messages that were seen together came at the same time, unless readers were waited for in between.
        let now = match *seen_ns {
            Some(seen) if is_here && accepts => seen,
            _ => now_ns(),
        };
        *seen_ns = Some(now);
        self.heard_ns = now;
        match &event {
            Event::Request { request: Request::GetVringBase { .. }, .. } => self.note_progress(),
            Event::Request { request: Request::Iotlb(message), .. } if message.kind == IotlbKind::Invalidate => {
                // One that came together with it was answered, or this one would not have its turn.
                if self.figures.waits() {
                    self.figures.answered(now_ns());
                }
                self.figures.invalidated(now);
            }
            _ => {}
        }
        self.device.handle(event, now);
        true
    }

    fn told_to_stop(&mut self) -> Result<(), ServerError> {
        let counts = signals::take(&self.stop);
        if counts && self.told {
            error!("told to stop again: not waiting for workers any longer");
            return Err(ServerError::Forced);
        }
        self.told |= counts;
        if self.stopping {
            return Ok(());
        }
        self.stopping = true;
        if let Some(listener) = self.door.listener() {
            self.poller.forget(listener);
        }
        match &mut self.front_end {
            Some(front_end) => {
                info!("stopping: the front-end's connection is drained first");
                front_end.lose(String::from("the daemon stops"));
            }
            None => self.done = true,
        }
        Ok(())
    }
}

fn device_config(config: &ServerConfig) -> DeviceConfig {
    let super::DeviceKind::Net { queue_pairs } = config.device;
    DeviceConfig::net(queue_pairs, config.miss_timeout_ms, config.arena_size).with_uso(kernel::passes_uso())
}
