//! A whole device under random traffic, in one thread and without a clock: a front-end that maps, unmaps, remaps,
//! resets and disconnects; workers that pin, look up, keep what they found and miss; grace periods that take their
//! time.
//!
//! Checked after every step, against a model of a few lines:
//! - the table never holds a translation that the model does not (it may hold fewer: it is a cache);
//! - while nothing waits for a reply, no pinned worker holds a translation that was taken away;
//! - each request that needs a reply gets exactly one, in order; the others get none;
//! - the connection is closed, and memory unmapped, only when nobody uses it any more;
//! - a miss is answered at most once, and `Resolved` only if the table has it (of several pages, the last to come).
//!
//! A run is named by its seed. Planted mistakes show that the checks see what they are for.

mod harness;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use harness::{channel, eventfd, header, memfd, region, table_of};
use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::tree::SLICE_WORDS;
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage, MemoryRegion, Request, VringAddress, VringFd, VringState};
use iotlb_proto::worker::{Answer, MissRequest};
use iotlbd::device::{Action, Device, DeviceConfig, Event, MemoryChange, ReplyPayload, WorkerId};

/// Granularity of the model. Smaller than a page, so that byte-granular ranges are part of the game.
const UNIT: u64 = 1024;
const PAGE: u64 = 4096;
/// Where the guest maps: a few pages each in places far apart, so that the tree has many nodes.
const WINDOWS: [u64; 6] = [0, 0x20_0000, 0x4000_0000, 0xfef0_0000, 0x7f_ffff_f000, u64::MAX - 0xffff];
const WINDOW_PAGES: u64 = 8;
/// And in places so far apart that each needs several nodes: small tables overflow.
const FAR: u64 = 0x100_0000_0000;
const FAR_STEP: u64 = 0x80_0000_0000;
const FAR_WINDOWS: u64 = 96;
const WORKERS: u32 = 3;
const STEPS: u32 = 1500;

/// What is wrong with this run's surroundings.
#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    None,
    /// Grace periods are reported as soon as they are asked for, whoever is pinned.
    ImpatientGrace,
    /// An invalidation whose end is 2^64 is seen as empty, as a known back-end does.
    WrappedEnd,
}

/// xorshift64*: enough to vary, and the same everywhere.
struct Random(u64);

impl Random {
    fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// What one unit translates to: file and offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Meaning {
    arena: u64,
    access: Access,
}

#[derive(Default)]
struct Worker {
    /// 0, or the epoch it pinned.
    slot: u64,
    held: Vec<(u64, Meaning)>,
    tickets: BTreeMap<u16, (u32, IovaRange, Access)>,
}

struct Simulation {
    random: Random,
    device: Device,
    mistake: Mistake,
    now_ns: u64,
    regions: Vec<(MemoryRegion, OwnedFd)>,
    /// Regions the front-end last announced, and where they are in the arena.
    announced: Vec<MemoryRegion>,
    /// What the front-end's messages mean so far, by unit.
    model: BTreeMap<u64, Meaning>,
    /// What the message that waits for its reply superseded: may still be there until then.
    superseded: BTreeMap<u64, Meaning>,
    /// What the guest has mapped, by page: user address and access.
    guest: BTreeMap<u64, (u64, Access)>,
    workers: Vec<Worker>,
    /// The request whose reply is due.
    due: Option<u32>,
    connected: bool,
    running: bool,
    closing: bool,
    miss_messages: VecDeque<(IotlbMessage, bool)>,
    next_ticket: u32,
    resolved: u32,
    denied: u32,
    waits: u32,
    /// Slices of jobs that left work, and of those, how many were followed by something else than the next.
    slices: u32,
    between: u32,
}

type Check = Result<(), String>;

macro_rules! check {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}

impl Simulation {
    fn new(seed: u64, mistake: Mistake) -> Simulation {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        // From so small that entries are evicted all the time to so large that none is.
        let size = [336_000, 400_000, 8 << 20][usize::try_from(random.below(3)).expect("small")];
        let mut table = TableWriter::create(&TableConfig { size, generation: 1 }).expect("a table").0;
        // From slices of one step to such that hold everything.
        table.set_slice_words([1, 1000, SLICE_WORDS][usize::try_from(random.below(3)).expect("small")]);
        let mut config = DeviceConfig::net(1, 50, 1 << 40);
        config.features |= iotlb_proto::vhost_user::features::virtio::LOG_ALL;
        let regions = [
            region(0, 64 * PAGE, 0x7000_0000),
            // Adjacent in the front-end, so that updates span both.
            region(0x1_0000_0000, 64 * PAGE, 0x7000_0000 + 64 * PAGE),
            region(0x2_0000_0000, 32 * PAGE, 0x7f00_0000_0000),
        ];
        Simulation {
            random,
            device: Device::new(config, table),
            mistake,
            now_ns: 1,
            regions: regions.into_iter().map(|region| (region, memfd(region.size))).collect(),
            announced: Vec::new(),
            model: BTreeMap::new(),
            superseded: BTreeMap::new(),
            guest: BTreeMap::new(),
            workers: (0..WORKERS).map(|_| Worker::default()).collect(),
            due: None,
            connected: false,
            running: false,
            closing: false,
            miss_messages: VecDeque::new(),
            next_ticket: 1,
            resolved: 0,
            denied: 0,
            waits: 0,
            slices: 0,
            between: 0,
        }
    }

    fn run(&mut self) -> Check {
        for step in 0..STEPS {
            self.step().map_err(|error| format!("step {step}: {error}"))?;
        }
        // Everybody lets go: whatever waits must come to its end.
        for worker in &mut self.workers {
            worker.slot = 0;
            worker.held.clear();
        }
        self.finish_work()?;
        check!(self.device.grace_target().is_none(), "a grace period is wanted though nobody is pinned");
        check!(self.due.is_none(), "request {:?} was never answered", self.due);
        self.now_ns += 1_000_000_000;
        self.feed(Event::Tick)?;
        for (id, worker) in self.workers.iter().enumerate() {
            check!(worker.tickets.is_empty(), "worker {id} still waits: {:?}", worker.tickets);
        }
        Ok(())
    }

    fn step(&mut self) -> Check {
        self.now_ns += self.random.below(200_000);
        if self.is_unfinished() {
            self.slices += 1;
        }
        if self.device.has_work() {
            // The edge comes round again without sleeping; now and then something else is there first.
            if !self.random.one_in(3) {
                self.feed(Event::Continue)?;
                return self.check();
            }
            self.between += u32::from(self.is_unfinished());
        }
        match self.random.below(20) {
            0..5 => self.front_end()?,
            5 | 6 => self.pin()?,
            7..10 => self.unpin(),
            10..12 => self.post_miss()?,
            12..16 => self.answer_miss()?,
            16..19 => self.complete_grace()?,
            _ => {
                if self.device.next_deadline_ns().is_some_and(|deadline| deadline <= self.now_ns) {
                    self.feed(Event::Tick)?;
                }
                if self.random.one_in(10) {
                    let id = u32::try_from(self.random.below(u64::from(WORKERS))).expect("small");
                    if let Some(worker) = self.worker(id) {
                        *worker = Worker::default();
                    }
                    self.feed(Event::WorkerGone { worker: WorkerId(id) })?;
                    self.complete_grace()?;
                }
            }
        }
        if self.mistake == Mistake::ImpatientGrace
            && let Some(epoch) = self.device.grace_target()
        {
            self.feed(Event::GraceCompleted { epoch })?;
        }
        self.check()
    }

    /// Whether a request, or the end of a session, has slices left.
    fn is_unfinished(&self) -> bool {
        self.device.has_work() && self.device.grace_target().is_none() && (self.due.is_some() || self.closing)
    }

    fn worker(&mut self, id: u32) -> Option<&mut Worker> {
        self.workers.get_mut(usize::try_from(id).ok()?)
    }

    // ---- front-end ----

    fn front_end(&mut self) -> Check {
        if !self.device.accepts_requests() {
            if !self.closing && self.connected && self.random.one_in(40) {
                // The connection breaks while a request waits.
                return self.disconnect();
            }
            if !self.connected && !self.closing {
                return self.connect();
            }
            return Ok(());
        }
        if !self.running && self.random.one_in(4) {
            return self.start_ring();
        }
        match self.random.below(60) {
            40.. => {
                let page = FAR + self.random.below(FAR_WINDOWS) * FAR_STEP;
                self.guest.insert(page, (0x7000_0000, Access::READ_WRITE));
                self.update_of(page)
            }
            0..18 => {
                let page = self.random_page();
                let user = self.random_user();
                let access = [Access::READ, Access::READ_WRITE, Access::READ_WRITE][self.index(3)];
                self.guest.insert(page, (user, access));
                if self.random.one_in(2) {
                    return self.update_of(page);
                }
                Ok(())
            }
            18..28 => self.unmap(),
            28..32 => self.odd_update(),
            32 => {
                let num = [0, 1, 2][self.index(3)];
                self.send(Request::SetVringEnable(VringState { index: 0, num }), true)
            }
            33 => {
                let features = self.device.config().features;
                let log = iotlb_proto::vhost_user::features::virtio::LOG_ALL;
                let flip = if self.random.one_in(2) { log } else { 0 };
                self.send(Request::SetFeatures(features & !flip), true)
            }
            34 => self.set_memory(),
            35 => self.remove_or_add_region(),
            36 => self.stop_ring(),
            37 => self.set_memory(),
            38 => {
                if self.random.one_in(2) {
                    return self.disconnect();
                }
                self.forget_everything();
                let need = self.random.one_in(2);
                self.send(Request::SetStatus(0), need)?;
                self.when_idle(|s| {
                    let features = s.device.config().features;
                    s.send(Request::SetFeatures(features), false)
                })
            }
            _ => self.send(Request::Unknown(999), true),
        }
    }

    fn index(&mut self, limit: u64) -> usize {
        usize::try_from(self.random.below(limit)).expect("small")
    }

    fn random_page(&mut self) -> u64 {
        let window = match self.random.below(5) {
            0 => FAR + self.random.below(FAR_WINDOWS) * FAR_STEP,
            _ => WINDOWS[self.index(6)],
        };
        window + self.random.below(WINDOW_PAGES) * PAGE
    }

    fn random_user(&mut self) -> u64 {
        match self.random.below(10) {
            0..7 => 0x7000_0000 + self.random.below(128) * PAGE,
            7 | 8 => 0x7f00_0000_0000 + self.random.below(32) * PAGE,
            // Outside.
            _ => 0x1000,
        }
    }

    fn update_of(&mut self, page: u64) -> Check {
        let Some((user, access)) = self.guest.get(&page).copied() else { return Ok(()) };
        let message = IotlbMessage::update(page, PAGE, user, access);
        self.mean(&message);
        let need = !self.random.one_in(8);
        self.send(Request::Iotlb(message), need)
    }

    /// Any size and alignment the protocol allows, and some it does not.
    fn odd_update(&mut self) -> Check {
        let iova = self.random_page() + self.random.below(4) * UNIT;
        let room = (u64::MAX - iova) / UNIT + 1;
        let size = (1 + self.random.below(24)).min(room) * UNIT;
        let user = self.random_user() + self.random.below(4) * UNIT;
        let access = [Access::NONE, Access::READ, Access::WRITE, Access::READ_WRITE][self.index(4)];
        let mut message = IotlbMessage::update(iova, size, user, access);
        if self.random.one_in(8) {
            message.size = if self.random.one_in(2) { 0 } else { u64::MAX };
        } else {
            self.mean(&message);
        }
        self.send(Request::Iotlb(message), true)
    }

    /// Writes into the model what an update means.
    fn mean(&mut self, message: &IotlbMessage) {
        if !self.has_iommu() {
            return;
        }
        for offset in (0..message.size).step_by(1024) {
            let unit = message.iova + offset;
            let meaning = self.arena(message.user_address + offset).filter(|_| !message.access.is_none());
            let old = match meaning {
                Some(arena) => self.model.insert(unit, Meaning { arena, access: message.access }),
                None => self.model.remove(&unit),
            };
            if let Some(old) = old {
                self.superseded.insert(unit, old);
            }
        }
    }

    fn has_iommu(&self) -> bool {
        self.connected
    }

    /// Where the device must have put a user address: found by what it tells workers, and checked by file.
    fn arena(&self, user: u64) -> Option<u64> {
        let region = self.announced.iter().find(|r| user >= r.user_address && user - r.user_address < r.size)?;
        // Guest addresses here never overlap, so each region lies at its own.
        Some(region.guest_address + (user - region.user_address))
    }

    fn unmap(&mut self) -> Check {
        let (iova, size) = match self.random.below(12) {
            0 => (0, 0),
            1 => (0, u64::MAX),
            2 => (0xfef0_0000, 0xffff_ffff_0110_0000),
            3 => (0, 0xfee0_0000),
            4 => (self.random_page() + UNIT, UNIT),
            5 => (self.random_page(), 3 * PAGE),
            _ => (self.random_page(), PAGE),
        };
        let end = match (iova, size) {
            (_, 0) | (0, u64::MAX) => 1u128 << 64,
            _ => (u128::from(iova) + u128::from(size)).min(1 << 64),
        };
        let first = u128::from(iova);
        let hit = |at: u64, len: u64| u128::from(at) < end && u128::from(at) + u128::from(len) > first;
        self.guest.retain(|page, _| !hit(*page, PAGE));
        self.model.retain(|unit, _| !hit(*unit, UNIT));
        let mut message = IotlbMessage::invalidate(iova, size);
        if self.mistake == Mistake::WrappedEnd && iova.checked_add(size).is_none() {
            message = IotlbMessage::invalidate(0x1234_0000, PAGE);
        }
        let need = !self.random.one_in(8);
        self.send(Request::Iotlb(message), need)
    }

    fn connect(&mut self) -> Check {
        self.feed(Event::FrontEndConnected)?;
        self.connected = true;
        let (features, protocol) = (self.device.config().features, self.device.config().protocol_features);
        self.send(Request::SetProtocolFeatures(protocol), false)?;
        self.when_idle(|s| s.send(Request::SetBackendReqFd(channel()), true))?;
        self.when_idle(|s| s.send(Request::SetFeatures(features), false))?;
        self.when_idle(Simulation::set_memory)
    }

    /// The next message of a sequence is only sent when the device takes it, which may be never in this run.
    fn when_idle(&mut self, then: impl FnOnce(&mut Simulation) -> Check) -> Check {
        if self.device.accepts_requests() {
            return then(self);
        }
        // Whoever is pinned lets go, as workers do sooner or later.
        for worker in &mut self.workers {
            worker.slot = 0;
            worker.held.clear();
        }
        self.finish_work()?;
        check!(self.device.accepts_requests(), "the device waits for nobody");
        then(self)
    }

    fn disconnect(&mut self) -> Check {
        self.forget_everything();
        self.announced.clear();
        self.connected = false;
        self.closing = true;
        self.due = None;
        self.miss_messages.clear();
        self.feed(Event::FrontEndLost { reason: "simulated".to_owned() })
    }

    fn forget_everything(&mut self) {
        self.model.clear();
        self.superseded.clear();
        self.running = false;
    }

    fn set_memory(&mut self) -> Check {
        self.model.clear();
        let mask = 1 + self.random.below(7);
        let chosen: Vec<_> = (0..3).filter(|bit| mask >> bit & 1 == 1).collect();
        let table: Vec<_> = chosen.iter().map(|at| (self.regions[*at].0, &self.regions[*at].1)).collect();
        let request = table_of(&table);
        self.announced = chosen.iter().map(|at| self.regions[*at].0).collect();
        self.send(request, true)
    }

    fn remove_or_add_region(&mut self) -> Check {
        let at = self.index(3);
        let (description, fd) = &self.regions[at];
        let (description, fd) = (*description, fd.try_clone().expect("a descriptor"));
        if let Some(at) = self.announced.iter().position(|r| *r == description) {
            self.announced.remove(at);
            let (first, last) = (description.guest_address, description.guest_address + description.size);
            let leads_there = |meaning: &Meaning| (first..last).contains(&meaning.arena);
            // It goes in slices; some of it may be there until the reply.
            let gone = self.model.extract_if(.., |_, meaning| leads_there(meaning));
            self.superseded.extend(gone);
            return self.send(Request::RemMemReg(description), true);
        }
        self.announced.push(description);
        self.send(Request::AddMemReg(description, fd), true)
    }

    fn stop_ring(&mut self) -> Check {
        if self.running {
            self.model.clear();
            self.running = false;
        }
        self.send(Request::GetVringBase { index: 0 }, true)
    }

    fn start_ring(&mut self) -> Check {
        if self.running {
            return Ok(());
        }
        let at = WINDOWS[2];
        let address = VringAddress { index: 0, flags: 0, desc: at, avail: at + PAGE, used: at + 2 * PAGE, log: 0 };
        self.send(Request::SetVringNum(VringState { index: 0, num: 128 }), false)?;
        self.when_idle(|s| s.send(Request::SetVringAddr(address), false))?;
        self.when_idle(|s| s.send(Request::SetVringKick(VringFd { index: 0, fd: Some(eventfd()) }), false))?;
        self.running = true;
        Ok(())
    }

    fn send(&mut self, request: Request, need_reply: bool) -> Check {
        let header = header(&request, need_reply);
        check!(self.due.is_none(), "a request while another waits");
        let always = matches!(request, Request::GetVringBase { .. });
        // Acknowledgements are negotiated by the first request of a session.
        self.due = (need_reply || always).then_some(header.request);
        self.feed(Event::Request { header, request })?;
        if self.device.grace_target().is_some() {
            self.waits += 1;
        }
        Ok(())
    }

    // ---- workers ----

    fn pin(&mut self) -> Check {
        let id = self.index(u64::from(WORKERS));
        let epoch = self.device.table().memory().header().epoch.word.load(Ordering::Relaxed);
        if self.workers[id].slot == 0 {
            self.workers[id].slot = epoch;
        }
        let page = self.random_page();
        for unit in (0..PAGE).step_by(1024).map(|offset| page + offset) {
            if let Some(leaf) = self.device.table().lookup(unit) {
                let meaning = Meaning { arena: leaf.target + (unit - leaf.first), access: leaf.access };
                self.workers[id].held.push((unit, meaning));
            }
        }
        Ok(())
    }

    fn unpin(&mut self) {
        let id = self.index(u64::from(WORKERS));
        self.workers[id].slot = 0;
        self.workers[id].held.clear();
    }

    fn post_miss(&mut self) -> Check {
        let id = self.index(u64::from(WORKERS));
        let cell = u16::try_from(self.random.below(6)).expect("small");
        let at = self.index(16);
        let page = match self.guest.keys().nth(at) {
            Some(page) if !self.random.one_in(3) => *page,
            _ => self.random_page(),
        };
        let first = page + self.random.below(4) * UNIT;
        let len = (1 + self.random.below(6)).min((u64::MAX - first) / UNIT + 1) * UNIT;
        let range = IovaRange::from_len(first, len).expect("inside");
        let access = [Access::READ, Access::WRITE, Access::READ_WRITE][self.index(3)];
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        // Posting again without having seen the answer gives the earlier one up.
        self.workers[id].tickets.insert(cell, (ticket, range, access));
        let worker = WorkerId(u32::try_from(id).expect("small"));
        self.feed(Event::Miss { worker, cell, request: MissRequest { ticket, range, access } })
    }

    /// The front-end reads one message from the back-end channel.
    fn answer_miss(&mut self) -> Check {
        if !self.connected || !self.device.accepts_requests() {
            return Ok(());
        }
        let Some((message, need_reply)) = self.miss_messages.pop_front() else { return Ok(()) };
        let page = message.iova & !(PAGE - 1);
        let allowed = self
            .guest
            .get(&page)
            .is_some_and(|(user, access)| access.allows(message.access) && self.arena(*user).is_some());
        if allowed {
            self.update_of(page)?;
        }
        if !need_reply {
            return Ok(());
        }
        // The reply comes behind the acknowledgement of the update.
        self.when_idle(|s| s.feed(Event::MissReply { value: u64::from(!allowed) }))
    }

    // ---- the edge ----

    fn complete_grace(&mut self) -> Check {
        while let Some(epoch) = self.device.grace_target() {
            if self.workers.iter().any(|w| w.slot != 0 && w.slot < epoch) {
                break;
            }
            self.feed(Event::GraceCompleted { epoch })?;
        }
        Ok(())
    }

    /// Grace periods complete and work goes on, until there is neither or somebody is pinned.
    fn finish_work(&mut self) -> Check {
        self.complete_grace()?;
        while self.device.has_work() {
            self.feed(Event::Continue)?;
            self.complete_grace()?;
        }
        Ok(())
    }

    fn feed(&mut self, event: Event) -> Check {
        self.device.handle(event, self.now_ns);
        while let Some(action) = self.device.next_action() {
            match action {
                Action::Reply { request, payload } => {
                    check!(self.due == Some(request), "reply to {request}, due is {:?}", self.due);
                    self.due = None;
                    if let ReplyPayload::U64(value) = payload {
                        check!(value <= 1, "odd value {value}");
                    }
                }
                Action::SendBackEnd { message, need_reply } => {
                    check!(
                        message.kind == IotlbKind::Miss || !need_reply,
                        "{message:?} asks for a reply: {need_reply}"
                    );
                    if message.kind == IotlbKind::Miss {
                        self.miss_messages.push_back((message, need_reply));
                        check!(self.miss_messages.len() <= 64, "too many messages in flight");
                    }
                }
                Action::AnswerMiss { worker, cell, ticket, answer } => self.answered(worker, cell, ticket, answer)?,
                Action::CloseFrontEnd { .. } => {
                    check!(self.closing, "closed without cause");
                    self.closing = false;
                    self.no_stale_holder().map_err(|error| format!("closed: {error}"))?;
                }
                // Workers unmap it now.
                Action::Memory(MemoryChange::Remove { .. }) => self.no_stale_holder()?,
                Action::UseBackEndChannel(_)
                | Action::Memory(_)
                | Action::QueueDescriptors { .. }
                | Action::CloseDescriptor(_) => {}
            }
        }
        if self.device.accepts_requests() {
            check!(self.due.is_none(), "request {:?} was left without a reply", self.due);
            self.superseded.clear();
        }
        Ok(())
    }

    fn answered(&mut self, worker: WorkerId, cell: u16, ticket: u32, answer: Answer) -> Check {
        let Some(state) = self.worker(worker.0) else { return Err(format!("answer to unknown {worker:?}")) };
        let Some((expected, range, access)) = state.tickets.remove(&cell) else {
            return Err(format!("{worker:?} cell {cell} is answered twice"));
        };
        check!(expected == ticket, "ticket {ticket} is answered, {expected} was posted");
        match answer {
            Answer::Resolved => {
                self.resolved += 1;
                // Earlier pages of the range may have been taken away again; the one that came last is there.
                let pages = (range.first() >> 12..=range.last() >> 12).map(|page| IovaRange::page_of(page << 12));
                let mut parts = pages.filter_map(|page| page.intersection(range));
                check!(parts.any(|part| self.is_covered(part, access)), "{range} is resolved, and none of it is there");
            }
            Answer::Denied => self.denied += 1,
            Answer::TimedOut | Answer::Stopped => {}
            Answer::Invalid => return Err("a valid miss is invalid".to_owned()),
        }
        Ok(())
    }

    /// Whether the device's table has all of `range`, with `access`.
    fn is_covered(&self, range: IovaRange, access: Access) -> bool {
        let mut at = range.first();
        loop {
            match self.device.table().lookup(at) {
                Some(leaf) if !leaf.access.allows(access) => return false,
                Some(leaf) if leaf.last >= range.last() => return true,
                Some(leaf) => at = leaf.last + 1,
                None => return false,
            }
        }
    }

    // ---- checks ----

    fn check(&mut self) -> Check {
        let mut wrong = Ok(());
        let (model, superseded) = (&self.model, &self.superseded);
        self.device.table().for_each(|leaf| {
            // Everything mapped lies on units, but where leaves are cut by invalidations of other sizes.
            let mut at = leaf.first;
            loop {
                let unit = at & !(UNIT - 1);
                let found = Meaning { arena: leaf.target + (at - leaf.first) - (at - unit), access: leaf.access };
                if model.get(&unit) != Some(&found) && superseded.get(&unit) != Some(&found) {
                    wrong = Err(format!("table has {at:#x} -> {found:x?}, model {:x?}", model.get(&unit)));
                }
                if leaf.last - unit < UNIT {
                    break;
                }
                at = unit + UNIT;
            }
        });
        wrong?;
        if self.due.is_none() && (self.device.accepts_requests() || !self.connected && !self.closing) {
            self.no_stale_holder()?;
        }
        Ok(())
    }

    /// What pinned workers still hold must be what the front-end believes to be in use.
    fn no_stale_holder(&self) -> Check {
        for (id, worker) in self.workers.iter().enumerate() {
            for (unit, held) in &worker.held {
                check!(
                    self.model.get(unit) == Some(held),
                    "worker {id} still uses {unit:#x} -> {held:x?}, which was taken away"
                );
            }
        }
        Ok(())
    }
}

fn run(seed: u64, mistake: Mistake) -> Result<Simulation, String> {
    let mut simulation = Simulation::new(seed, mistake);
    simulation.run().map_err(|error| format!("seed {seed}: {error}"))?;
    Ok(simulation)
}

#[test]
fn the_rule_holds_under_random_traffic() {
    let (mut resolved, mut denied, mut waits, mut evictions) = (0, 0, 0, 0);
    let (mut slices, mut between) = (0, 0);
    for seed in 1..=60 {
        match run(seed, Mistake::None) {
            Ok(simulation) => {
                resolved += simulation.resolved;
                denied += simulation.denied;
                waits += simulation.waits;
                slices += simulation.slices;
                between += simulation.between;
                evictions += simulation.device.table().stats().evictions;
            }
            Err(error) => panic!("{error}"),
        }
    }
    // The runs are only worth something if they came to these places.
    assert!(resolved > 100 && denied > 100 && waits > 1000, "{resolved} resolved, {denied} denied, {waits} waits");
    assert!(evictions > 0, "no table was ever full");
    assert!(slices > 100 && between > 30, "{slices} slices, {between} times something between them");
}

/// Whether any of some seeds shows the mistake.
fn is_seen(mistake: Mistake, sign: &str) -> bool {
    (1..=20).any(|seed| run(seed, mistake).is_err_and(|error| error.contains(sign)))
}

#[test]
fn an_impatient_grace_period_is_seen() {
    assert!(is_seen(Mistake::ImpatientGrace, "which was taken away"));
}

#[test]
fn a_wrapped_end_is_seen() {
    assert!(is_seen(Mistake::WrappedEnd, "table has"));
}
