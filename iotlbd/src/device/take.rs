//! What waits for a grace period before the front-end hears of it, and what takes more than one slice of work.
//!
//! A job that has work left and one that waits for readers are the same to the front-end: no request is accepted, no
//! reply is given. Everybody else is served between two slices, and finds the table half done: a miss may be answered
//! by a translation that goes in the next slice. A reader may find that one anyway, up to the grace period, and that
//! begins after the last slice.

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::table::TargetRemoval;
use smallvec::SmallVec;

use super::memory::Plan;
use super::ring::USED_INDEX;
use super::{Action, Device, MemoryChange, ReplyPayload};

// A daemon that is optimised is one that somebody uses.
#[cfg(all(feature = "planted-faults", not(debug_assertions)))]
compile_error!("the feature `planted-faults` breaks the daemon on purpose: it is for tests of debug builds only");

/// How often an entry is tried again after a grace period. The table promises that one is enough; more mean a bug, and
/// then the entry is left out: it is a cache.
pub(super) const PUBLISH_ATTEMPTS: u8 = 4;

/// Translations that a job publishes in one slice. Each may cut superpages at both ends, which fills a node a level: 10
/// microseconds at worst.
const PARTS_PER_SLICE: usize = 8;

/// The reply that is due at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nobody waits for a reply.
    Nothing,
    /// A number.
    Number { request: u32, value: u64 },
    /// A header alone.
    Empty { request: u32 },
    /// GET_VRING_BASE: the index is read once no worker touches the ring.
    VringBase { request: u32, ring: u16 },
}

/// What a refused request is answered with where a reply is due.
pub(super) const REFUSED: u64 = 1;

impl Due {
    /// The same for a request that is refused, though it may take something away.
    pub(super) fn refused(self) -> Due {
        match self {
            Due::Number { request, .. } => Due::Number { request, value: REFUSED },
            due => due,
        }
    }
}

/// A change of translations.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    /// Publish.
    Insert { range: IovaRange, target: u64, access: Access },
    /// Unpublish: the front-end replaced what is there by something this side cannot reach.
    Remove { range: IovaRange },
}

/// How far a job is. Each stage may wait for a grace period, or have more to do than one slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Translations into memory that goes are unlinked.
    Unlink,
    /// What was unlinked before the job began is drained.
    Drain,
    /// Memory changes are announced.
    Memory,
    /// Translations are published.
    Publish,
    /// What publishing replaced is drained.
    Settle,
}

/// One request, or the end of a session, that may have to wait. There is at most one a device. What only few of them
/// have is boxed: each UPDATE is one, and is handed on several times.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) stage: Stage,
    pub(super) due: Due,
    /// What is to be unlinked, and how far that is.
    pub(super) removal: Option<Box<TargetRemoval>>,
    /// Guest memory after the drain.
    pub(super) memory: Option<Box<Plan>>,
    /// Publish guest memory as it is (no IOMMU) once the memory stands.
    pub(super) identity: bool,
    /// What is to be published: nearly always one.
    pub(super) parts: SmallVec<[Part; 1]>,
    /// How many of these are done.
    pub(super) published: usize,
    pub(super) attempts: u8,
    /// Ask for the pages of started rings when done.
    pub(super) ask_rings: bool,
    /// Close the connection when done.
    pub(super) close: Option<String>,
}

impl Job {
    /// A job that begins with a drain.
    pub(super) fn take(due: Due) -> Job {
        Job {
            stage: Stage::Drain,
            due,
            removal: None,
            memory: None,
            identity: false,
            parts: SmallVec::new(),
            published: 0,
            attempts: 0,
            ask_rings: false,
            close: None,
        }
    }

    /// A job that begins with a removal, which is drained then.
    pub(super) fn unlink(due: Due, removal: TargetRemoval) -> Job {
        Job { stage: Stage::Unlink, removal: Some(Box::new(removal)), ..Job::take(due) }
    }

    /// A job that begins with what it publishes.
    pub(super) fn give(due: Due) -> Job {
        Job { stage: Stage::Memory, ..Job::take(due) }
    }
}

/// How a step of a job ended.
enum Step {
    /// A grace period is needed.
    Wait,
    /// The slice is over, the stage is not.
    More,
    /// Go on with this.
    Next(Stage),
    /// The reply may go out.
    Done,
}

impl Device {
    /// Starts a job; at most one runs, because no request is accepted while it does.
    pub(super) fn start(&mut self, job: Job) {
        debug_assert!(self.job.is_none());
        self.run(job);
    }

    pub(super) fn grace_completed(&mut self, epoch: u64) {
        match self.grace {
            Some(target) if epoch >= target => {
                self.grace = None;
                self.table.grace_completed(target);
                self.advance();
            }
            _ => tracing::debug!(epoch, "grace period that nobody waits for"),
        }
    }

    /// Whether a job has work left. One that has none waits for a grace period.
    fn is_unfinished(&self) -> bool {
        self.job.is_some() && self.grace.is_none()
    }

    /// Whether there is work that goes on with [`super::Event::Continue`].
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.is_unfinished() || self.is_missed() || !self.table.is_tidy()
    }

    /// Does one slice. A job first: somebody waits for it.
    pub(super) fn go_on(&mut self) {
        if self.is_unfinished() {
            self.advance();
        } else if self.is_missed() {
            self.publish_missed();
        } else {
            self.table.tidy();
        }
    }

    /// Whether the job has to wait for a grace period first.
    fn must_wait(&mut self) -> bool {
        // With the feature `planted-faults` the device does what it must never do: it acknowledges at once, whoever
        // still reads what was taken. A test shows that the demo's oracle notices such a daemon.
        if cfg!(feature = "planted-faults") || self.table.is_quiet() {
            return false;
        }
        self.grace = self.table.begin_grace();
        self.grace.is_some()
    }

    /// Goes on with the job until it is done, waits, or did a slice of work.
    pub(super) fn advance(&mut self) {
        if let Some(job) = self.job.take() {
            self.run(job);
        }
    }

    fn run(&mut self, mut job: Job) {
        loop {
            match self.step(&mut job) {
                Step::Next(stage) => job.stage = stage,
                Step::Done => return self.finish(job),
                Step::More => break,
                Step::Wait => {
                    self.counters.graces_waited += 1;
                    break;
                }
            }
        }
        self.job = Some(job);
    }

    fn step(&mut self, job: &mut Job) -> Step {
        match job.stage {
            Stage::Unlink => {
                if let Some(removal) = &mut job.removal {
                    self.table.remove_targets(removal);
                    if !removal.is_done() {
                        return Step::More;
                    }
                }
                // The region goes, whether anything led into it or not. Noted after the last slice, so that no grace
                // period that began between two of them counts.
                self.table.note_taken();
                Step::Next(Stage::Drain)
            }
            Stage::Drain if self.must_wait() => Step::Wait,
            Stage::Drain => {
                // Before memory changes.
                self.read_stopped_rings();
                Step::Next(Stage::Memory)
            }
            Stage::Memory => {
                if let Some(mut plan) = job.memory.take() {
                    self.memory.commit(&mut plan);
                    if !plan.is_empty() {
                        self.announce(*plan);
                    }
                    self.refresh_rings();
                    // A ring may have had everything else, in a session that told no features.
                    job.identity |= self.wants_identity() && !self.identity;
                }
                if job.identity {
                    job.parts.extend(self.identity_parts(IovaRange::ALL));
                    self.identity = true;
                }
                Step::Next(Stage::Publish)
            }
            Stage::Publish => self.publish(job),
            Stage::Settle if self.must_wait() => Step::Wait,
            Stage::Settle => Step::Done,
        }
    }

    /// Tells workers about changed memory, and readers that they have to look.
    fn announce(&mut self, plan: Plan) {
        // Before any entry into new memory: a reader that finds one compares this generation first.
        self.map_generation = self.table.bump_memory_map();
        let changes = plan
            .removed
            .into_iter()
            .map(|id| MemoryChange::Remove { id })
            .chain(plan.added.into_iter().map(|(info, fd)| MemoryChange::Add(info, fd)))
            .chain(std::iter::once(MemoryChange::Generation(self.map_generation)));
        self.actions.extend(changes.map(Action::Memory));
    }

    /// What is to be published for `wanted` to be there as guest memory is: the regions it touches, and those that lie
    /// over them, in the order that decides between them.
    pub(super) fn identity_parts(&self, wanted: IovaRange) -> Vec<Part> {
        let mut ranges = vec![wanted];
        let mut parts = Vec::new();
        for region in self.memory.regions() {
            if let Some(range) = region.guest_range()
                && ranges.iter().any(|chosen| chosen.overlaps(range))
            {
                ranges.push(range);
                parts.push(Part::Insert { range, target: region.info.arena_offset, access: Access::READ_WRITE });
            }
        }
        parts
    }

    fn publish(&mut self, job: &mut Job) -> Step {
        let mut parts = 0;
        while let Some(part) = job.parts.get(job.published).copied() {
            if parts == PARTS_PER_SLICE {
                return Step::More;
            }
            match part {
                Part::Remove { range } => {
                    self.table.remove(range);
                }
                Part::Insert { range, target, access } => match self.table.insert(range, target, access) {
                    Ok(()) => self.appeared(range, access),
                    Err(full) if job.attempts < PUBLISH_ATTEMPTS => {
                        job.attempts += 1;
                        tracing::debug!(%range, error = %full, "translation waits for a grace period");
                        self.grace = self.table.begin_grace();
                        if self.grace.is_some() {
                            return Step::Wait;
                        }
                        continue;
                    }
                    Err(error) => {
                        tracing::error!(%range, %error, "translation left out");
                        // What it was to replace must not stay.
                        self.table.remove(range);
                    }
                },
            }
            job.attempts = 0;
            job.published += 1;
            parts += 1;
        }
        Step::Next(Stage::Settle)
    }

    /// A translation was published.
    fn appeared(&mut self, range: IovaRange, access: Access) {
        for index in 0..self.rings.len() {
            let used = self.rings.get(index).and_then(|ring| ring.started).map(|at| at.used);
            if used.is_some_and(|used| range.contains(used.saturating_add(USED_INDEX))) {
                self.locate_used_index(index);
            }
        }
        let (misses, mut to) = self.miss_engine();
        misses.appeared(range, access, &mut to);
    }

    /// The job is over: nothing that was taken is in use any more.
    fn finish(&mut self, job: Job) {
        self.read_stopped_rings();
        match job.due {
            Due::Nothing => {}
            Due::Number { request, value } => {
                self.actions.push_back(Action::Reply { request, payload: ReplyPayload::U64(value) });
            }
            Due::Empty { request } => {
                self.actions.push_back(Action::Reply { request, payload: ReplyPayload::Bytes(Vec::new()) });
            }
            Due::VringBase { request, ring } => {
                let num = self.rings.get(usize::from(ring)).map_or(0, |ring| u32::from(ring.base));
                let payload = ReplyPayload::VringState { index: u32::from(ring), num };
                self.actions.push_back(Action::Reply { request, payload });
            }
        }
        if let Some(reason) = job.close {
            self.actions.push_back(Action::UseBackEndChannel(None));
            self.actions.push_back(Action::CloseFrontEnd { reason });
        }
        self.release_held();
        if job.ask_rings {
            self.ask_for_rings();
        }
    }
}
