//! The device: what happens with each event, the life of a session, and who hears of misses.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iotlb_proto::control::RegionInfo;
use iotlb_proto::table::TableWriter;
use iotlb_proto::worker::{Answer, MissRequest};

use super::extents::Extents;
use super::held::{Held, HeldMisses};
use super::memory::Memory;
use super::miss::{Coverage, Misses, Surroundings, coverage};
use super::ring::{Kick, Ring};
use super::session::Session;
use super::take::{Due, Job};
use super::{Action, DeviceConfig, Event, WorkerId};
use crate::log_budget::LogBudget;

/// Running totals since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Front-end requests.
    pub requests: u64,
    /// UPDATE messages that published something.
    pub updates: u64,
    /// INVALIDATE messages.
    pub invalidations: u64,
    /// Misses workers posted.
    pub misses: u64,
    /// MISS messages sent.
    pub miss_messages: u64,
    /// Grace periods that a request had to wait for.
    pub graces_waited: u64,
    /// Requests that were refused or made no sense.
    pub refused: u64,
    /// Sessions ended.
    pub sessions: u64,
}

/// The state machine.
#[derive(Debug)]
pub struct Device {
    pub(super) config: DeviceConfig,
    pub(super) table: TableWriter,
    pub(super) extents: Extents,
    pub(super) session: Session,
    pub(super) memory: Memory,
    pub(super) rings: Vec<Ring>,
    pub(super) misses: Misses,
    pub(super) job: Option<Job>,
    pub(super) actions: VecDeque<Action>,
    pub(super) counters: Counters,
    /// The epoch the job waits for.
    pub(super) grace: Option<u64>,
    /// Whether guest memory is published as it is (sessions without IOMMU).
    pub(super) identity: bool,
    pub(super) session_generation: u64,
    pub(super) map_generation: u64,
    /// Misses that came while the identity map is being rebuilt, judged when it stands, and those of its evicted parts.
    held: HeldMisses,
    /// For what a front-end, or a guest or a worker through it, can make go wrong as often as it likes.
    complaints: LogBudget,
    pub(super) now_ns: u64,
}

impl Device {
    /// A device without a front-end.
    #[must_use]
    pub fn new(config: DeviceConfig, mut table: TableWriter) -> Device {
        let rings = std::iter::repeat_with(Ring::default).take(config.rings()).collect();
        let session_generation = table.bump_session();
        Device {
            extents: Extents::default(),
            session: Session::default(),
            memory: Memory::new(config.arena_size),
            rings,
            misses: Misses::new(config.miss_timeout_ms),
            job: None,
            actions: VecDeque::new(),
            counters: Counters::default(),
            grace: None,
            identity: false,
            session_generation,
            map_generation: 0,
            held: HeldMisses::default(),
            complaints: LogBudget::default(),
            now_ns: 0,
            config,
            table,
        }
    }

    /// Feeds one event. `now_ns` is monotonic.
    pub fn handle(&mut self, event: Event, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
        match event {
            Event::FrontEndConnected => self.connect(),
            Event::Request { header, request } if self.accepts_requests() => self.request(header, request),
            Event::BadRequest { header, error } if self.accepts_requests() => self.bad_request(header, &error),
            Event::Request { header, .. } | Event::BadRequest { header, .. } => {
                // The edge reads only while it may, so this is its bug; a lost reply would freeze the front-end
                // silently.
                tracing::error!(request = header.request, "request delivered while none is accepted");
                self.lose_front_end("request out of turn".to_owned());
            }
            Event::FrontEndLost { reason } => self.lose_front_end(reason),
            Event::MissReply { value } => {
                let (misses, mut to) = self.miss_engine();
                if !misses.reply(value, &mut to) && self.may_complain() {
                    tracing::warn!(value, "reply on the back-end channel that nobody asked for");
                }
            }
            Event::BackEndLost => self.lose_back_end(),
            Event::Miss { worker, cell, request } => self.miss(worker, cell, request),
            Event::WorkerGone { worker } => {
                self.misses.worker_gone(worker);
                self.held.worker_gone(worker);
            }
            Event::GraceCompleted { epoch } => self.grace_completed(epoch),
            Event::Continue => self.go_on(),
            Event::Tick => {
                self.misses.tick(self.now_ns, &mut self.actions);
            }
        }
    }

    /// The next thing to carry out. Misses that came since there last was none go out in one batch: so hand over all
    /// events there are, then ask.
    pub fn next_action(&mut self) -> Option<Action> {
        if self.actions.is_empty() && self.session.may_ask() {
            let (misses, mut to) = self.miss_engine();
            misses.pump(&mut to);
        }
        self.actions.pop_front()
    }

    /// Whether the next front-end request may be read (false while a take is unfinished or waits for its grace).
    #[must_use]
    pub fn accepts_requests(&self) -> bool {
        self.session.connected && self.job.is_none()
    }

    /// While a grace period is needed: the epoch every slot must reach. The edge scans and reports
    /// [`Event::GraceCompleted`].
    #[must_use]
    pub fn grace_target(&self) -> Option<u64> {
        self.grace
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn next_deadline_ns(&self) -> Option<u64> {
        self.misses.next_deadline_ns()
    }

    /// Regions a worker that attaches now has to map, and the memory-map generation they make up.
    #[must_use]
    pub fn regions(&self) -> (Vec<(RegionInfo, Arc<OwnedFd>)>, u64) {
        (self.memory.regions().iter().map(super::memory::Region::share).collect(), self.map_generation)
    }

    /// Kick, call and err descriptors of a queue.
    #[must_use]
    pub fn queue_descriptors(&self, queue: u16) -> [Option<BorrowedFd<'_>>; 3] {
        let Some(ring) = self.rings.get(usize::from(queue)) else { return [None; 3] };
        let kick = match &ring.kick {
            Kick::Fd(fd) => Some(fd.as_fd()),
            Kick::None | Kick::Polled => None,
        };
        [kick, ring.call.as_ref().map(AsFd::as_fd), ring.err.as_ref().map(AsFd::as_fd)]
    }

    /// The table (hints: doorbell_wanted, writer_sleeps; figures).
    #[must_use]
    pub fn table(&self) -> &TableWriter {
        &self.table
    }

    /// How the device presents itself.
    #[must_use]
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Running totals.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters { miss_messages: self.misses.sent(), ..self.counters }
    }

    /// How long the front-end was busy with each page that it was asked for, in nanoseconds.
    #[must_use]
    pub fn page_ns(&self) -> &hdrhistogram::Histogram<u64> {
        self.misses.page_ns()
    }

    /// Misses that wait for an answer now, ring pages included.
    #[must_use]
    pub fn misses_waiting(&self) -> usize {
        self.misses.waiting()
    }

    /// Whether any ring is started.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.started.is_some())
    }

    /// The owner of `queue` says that it has completely processed all available entries before `avail_index`. Only used
    /// when the used ring was in reach in this run and cannot be read: the word may be of a former run.
    pub fn note_progress(&mut self, queue: u16, avail_index: u16) {
        if let Some(ring) = self.rings.get_mut(usize::from(queue))
            && (ring.published.started || ring.unread)
        {
            ring.progress = Some(avail_index);
        }
    }

    /// Whether a line about the front-end's mistakes may be logged now. Each is counted all the same.
    pub(super) fn may_complain(&mut self) -> bool {
        self.complaints.take(self.now_ns)
    }

    // ---- sessions ----

    fn connect(&mut self) {
        if self.session.connected || self.job.is_some() {
            tracing::error!("front-end connected while the former session is not closed");
            return;
        }
        self.session = Session { connected: true, ..Session::default() };
        self.table.set_running(true);
    }

    fn lose_front_end(&mut self, reason: String) {
        let closing = self.job.as_ref().is_some_and(|job| job.close.is_some());
        if !self.session.connected || closing {
            return;
        }
        tracing::debug!(%reason, "session ends");
        self.counters.sessions += 1;
        self.stop_everything();
        for (queue, ring) in (0u16..).zip(self.rings.iter_mut()) {
            let old = std::mem::replace(ring, Ring { published: ring.published, ..Ring::default() });
            if old.call.is_some() || old.err.is_some() {
                self.actions.push_back(Action::QueueDescriptors { queue, call_changed: false });
                self.actions.extend([old.call, old.err].into_iter().flatten().map(Action::CloseDescriptor));
            }
        }
        self.table.set_running(false);
        self.session = Session::default();
        self.misses.channel_replaced();
        // A job that waited is void: its reply has no reader, and all memory goes, what it would have removed included.
        self.job = Some(Job {
            memory: Some(Box::new(self.memory.plan_clear())),
            close: Some(reason),
            ..Job::take(Due::Nothing)
        });
        self.advance();
    }

    fn lose_back_end(&mut self) {
        tracing::warn!("back-end channel lost: misses cannot be asked for any more");
        self.session.channel = false;
        self.misses.channel_replaced();
        self.misses.stop(&mut self.actions);
        self.actions.push_back(Action::UseBackEndChannel(None));
    }

    /// Device reset and session end: rings stopped, table empty, a new session generation, nobody waits for a miss.
    pub(super) fn stop_everything(&mut self) {
        self.session_generation = self.table.bump_session();
        // First, so that no ring that stops looks which of its pages others need.
        self.misses.stop(&mut self.actions);
        for index in 0..self.rings.len() {
            self.stop_ring(index);
            if let Some(ring) = self.rings.get_mut(index) {
                ring.reset();
            }
        }
        self.session.reset();
        self.table.set_acked_features(0);
        self.clear_table();
        self.table.note_taken();
        self.release_held();
    }

    pub(super) fn clear_table(&mut self) {
        self.table.clear();
        self.extents.clear();
        self.identity = false;
    }

    // ---- misses ----

    pub(super) fn miss_engine(&mut self) -> (&mut Misses, Surroundings<'_, TableWriter>) {
        let replies = self.session.reply_ack();
        let now_ns = self.now_ns;
        (&mut self.misses, Surroundings { table: &self.table, actions: &mut self.actions, replies, now_ns })
    }

    fn miss(&mut self, worker: WorkerId, cell: u16, request: MissRequest) {
        self.counters.misses += 1;
        self.judge(Held { worker, cell, request, published: false });
    }

    fn judge(&mut self, held: Held) {
        let Held { worker, cell, request, published } = held;
        let now_ns = self.now_ns;
        let answer = if !self.session.connected || !self.is_running() {
            Answer::Stopped
        } else if self.session.iommu() {
            if self.session.channel {
                let (misses, mut to) = self.miss_engine();
                misses.post(worker, cell, request, now_ns, &mut to);
                return;
            }
            // Nothing can be asked, but what the front-end sent by itself can be used.
            match coverage(&self.table, request.range, request.access) {
                Coverage::Covered => Answer::Resolved,
                _ => Answer::Stopped,
            }
        } else {
            match coverage(&self.table, request.range, request.access) {
                Coverage::Covered => Answer::Resolved,
                _ if published => Answer::Resolved,
                // The map may just be changing: judge when it stands. What belongs to it was evicted, and comes again.
                _ if self.job.is_some() || self.identity && self.memory.holds(request.range) => {
                    self.held.insert(held);
                    return;
                }
                _ => Answer::Denied,
            }
        };
        self.actions.push_back(Action::AnswerMiss { worker, cell, ticket: request.ticket, answer });
    }

    /// Judges the misses that waited for the identity map.
    pub(super) fn release_held(&mut self) {
        if !self.held.is_empty() {
            self.held.take().for_each(|held| self.judge(held));
        }
    }

    /// Whether a part of the identity map is to be published again. Not while the front-end's own job is under way; and
    /// when this one is done, the front-end's turn comes first.
    pub(super) fn is_missed(&self) -> bool {
        self.job.is_none() && !self.held.is_empty()
    }

    /// Publishes the next part of the identity map that was evicted and is missed.
    pub(super) fn publish_missed(&mut self) {
        if let Some(range) = self.held.publish_next() {
            let parts = self.identity_parts(range).into();
            self.start(Job { parts, ..Job::give(Due::Nothing) });
        }
    }

    /// Asks for the pages of started rings that are not translated. Where nobody may be asked yet nothing is queued, or
    /// its time could be over before it is: whatever makes [`Session::may_ask`] true asks for the rings.
    pub(super) fn ask_for_rings(&mut self) {
        if !self.session.iommu() || !self.session.may_ask() {
            return;
        }
        let now_ns = self.now_ns;
        let areas: Vec<_> = self.rings.iter().filter_map(Ring::areas).flatten().collect();
        self.misses.want(areas.into_iter(), now_ns, &self.table);
    }
}
