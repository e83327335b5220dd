//! What a ring remembers between pins.

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;

use super::burst::Burst;
use super::chain::Parts;
use super::fault::{Broken, MissList, MissPlace, RingFault};
use super::memory::{Generations, RingMemory, Source};
use super::table::{Table, TableView};

/// Bytes before the entries of the available and the used ring: flags and index.
pub(super) const RING_HEADER: usize = 4;
/// Bytes of an available entry, and of the event index behind the entries of either ring.
pub(super) const U16_SIZE: usize = 2;
/// Bytes of a used entry.
pub(super) const USED_SIZE: usize = 8;
/// Offset of `idx` in either ring.
pub(super) const INDEX_OFFSET: usize = 2;

/// What a ring accepts and how far it looks.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes a chain may have, readable and writable together.
    pub chain_bytes_max: u64,
    /// Chains behind the next one that are looked at, at most, when that one has misses. Only posted ones: a miss for
    /// an address the guest did not map shows up as a fault in its log.
    pub lookahead: u16,
}

impl Default for Limits {
    /// 3 MiB: a Linux guest without mergeable buffers posts a page and one for each fragment that it can have, whatever
    /// the packet needs: 18 pages as most kernels are built, 46 at most, of up to 64 KiB. What a chain costs hangs more
    /// on its descriptors: 1,024 of them can lie in two pages each however short they are, and 3 MiB add 768 pages.
    /// 64 chains: a large packet takes 43 of a guest's usual receive buffers.
    fn default() -> Limits {
        Limits { chain_bytes_max: 3 << 20, lookahead: 64 }
    }
}

/// The device side of one split ring; see the [module](super).
#[derive(Debug)]
pub struct Vring {
    limits: Limits,
    setup: Option<Setup>,
    tables: Option<Tables>,
    state: RingState,
}

/// What the front-end set up, as last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Setup {
    source: Source,
    session: u64,
    queue: u64,
    features: u64,
    record: QueueRecord,
}

/// The three tables, and for what they hold.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) desc: Table,
    pub(super) avail: Table,
    pub(super) used: Table,
    /// Generations read before the first of them was translated.
    key: Generations,
    used_access: Access,
}

/// The part of a ring that a burst changes.
#[derive(Debug, Default)]
pub(super) struct RingState {
    /// Running index of the next used element; published up to `published`.
    pub(super) next_used: u16,
    pub(super) published: u16,
    /// Chains taken and not completed. They start at `next_used`: the ring is in order.
    pub(super) taken: u16,
    /// `avail.idx` as last seen.
    pub(super) avail_seen: u16,
    /// `used.idx` when the driver was last told, if that is known.
    pub(super) signalled: Option<u16>,
    /// The driver is to be called whatever its flags say.
    pub(super) call_owed: bool,
    /// What broke the ring; it rests until its setup changes.
    pub(super) broken: Option<Broken>,
    /// Whether `next_used` means anything. What the used ring says counts more, where it may be read.
    positioned: bool,
    /// The front-end denied reading the used ring.
    used_write_only: bool,
    pub(super) spare: Vec<Parts>,
    pub(super) scratch: Vec<u8>,
}

impl Default for Vring {
    fn default() -> Vring {
        Vring::new(Limits::default())
    }
}

impl Vring {
    /// A ring that knows nothing yet.
    #[must_use]
    pub fn new(limits: Limits) -> Vring {
        Vring { limits, setup: None, tables: None, state: RingState::default() }
    }

    /// How many chains were completed, as a running 16-bit index: the progress word, and the commit point.
    #[must_use]
    pub fn position(&self) -> u16 {
        self.state.published
    }

    /// Why the ring rests, if it does.
    #[must_use]
    pub fn broken(&self) -> Option<Broken> {
        self.state.broken
    }

    /// Tells the ring that `access` at `iova` was denied. Returns whether that helps: a used ring that may be written
    /// but not read is tried again with less.
    pub fn denied(&mut self, iova: u64, access: Access, record: &QueueRecord) -> bool {
        let len = used_len(record.size, true) as u64;
        let in_used = IovaRange::from_len(record.used, len).is_some_and(|used| {
            // Who asked for more than the miss named asked for its page.
            used.page_aligned().contains(iova)
        });
        let retry = in_used && access == Access::READ_WRITE && !self.state.used_write_only;
        if retry {
            self.state.used_write_only = true;
        }
        retry
    }

    /// Starts work under a pin: `memory` is the guard, `record` the queue's record read under it, `features` what the
    /// driver acknowledged.
    ///
    /// # Errors
    ///
    /// [`RingFault::Stopped`] where the ring may not be touched; a miss, memory that could not be mapped or a wrong
    /// alignment in one of its tables; [`RingFault::Broken`] again, while a broken ring was not set up anew.
    pub fn begin<'g, M: RingMemory + ?Sized>(
        &'g mut self,
        memory: &'g M,
        record: &QueueRecord,
        features: u64,
    ) -> Result<Burst<'g, M>, RingFault> {
        // Before anything is translated: an unlink from here on makes the key stale, not the tables wrong.
        let key = memory.generations();
        if !record.started || record.session_generation != key.session {
            *self = Vring::new(self.limits);
            return Err(RingFault::Stopped);
        }
        self.set_up(key, record, features);
        if let Some(broken) = self.state.broken {
            return Err(broken.into());
        }
        // A burst that was forgotten instead of dropped has left them taken.
        self.state.taken = 0;
        let is_stale = self.tables.as_ref().is_none_or(|tables| tables.key != key);
        if is_stale && self.state.used_write_only {
            // Reading may have been denied because nothing was mapped there at the time.
            let len = used_len(record.size, features & virtio::EVENT_IDX != 0) as u64;
            let readable = memory.translate_pieces(record.used, len, Access::READ_WRITE, &mut |_| ());
            self.state.used_write_only = readable.is_err();
        }
        let used_access = if self.state.used_write_only { Access::WRITE } else { Access::READ_WRITE };
        if is_stale || self.tables.as_ref().is_none_or(|tables| tables.used_access != used_access) {
            self.tables = None;
            let tables = translate(memory, record, features, used_access, key).inspect_err(|fault| {
                if let RingFault::Broken(broken) = fault {
                    self.state.broken = Some(*broken);
                }
            })?;
            self.tables = Some(tables);
        }
        let Some(tables) = self.tables.as_ref() else {
            // Present or just made: there is no third way.
            return Err(RingFault::Stopped);
        };
        // SAFETY: `memory` and the tables are both borrowed for 'g, and `tables.key` equals the generations read above,
        // under the pin that `memory` stands for. The source is among them, and unique as `RingMemory` asks: so the
        // tables were translated in this memory and not in another with the same generations.
        let (desc, avail, used) = unsafe { (tables.desc.view(), tables.avail.view(), tables.used.view()) };
        self.state.find_position(&used, used_access.allows(Access::READ), record.base);
        Ok(Burst::new(memory, &mut self.state, desc, avail, used, record, features, self.limits))
    }

    /// Compares the ring's setup with the one last seen, and forgets what does not hold any more.
    fn set_up(&mut self, key: Generations, record: &QueueRecord, features: u64) {
        // That a ring was enabled or disabled is not a restart.
        let setup = Setup {
            source: key.source,
            session: key.session,
            queue: key.queue,
            features,
            record: QueueRecord { enabled: false, ..*record },
        };
        let Some(old) = self.setup.replace(setup) else {
            return;
        };
        if old == setup {
            return;
        }
        self.tables = None;
        self.state.broken = None;
        let ring = |of: &Setup| (of.source, of.session, of.features, of.record);
        if ring(&old) != ring(&setup) {
            self.state.positioned = false;
            self.state.used_write_only = false;
        }
    }
}

impl RingState {
    /// Finds out where the ring stands. A used ring that may be read is asked each time: another worker may have had
    /// the queue since, and the driver may have started the ring anew. A driver that stores something else gets that.
    fn find_position(&mut self, used: &TableView<'_>, readable: bool, base: u16) {
        let position = if readable {
            // Acquire: partner is a predecessor's release store in `publish`, so that what it did to the ring
            // before its last commit comes before what we do.
            used.load_u16(INDEX_OFFSET, Ordering::Acquire)
        } else if self.positioned {
            self.next_used
        } else {
            base
        };
        if !self.positioned || position != self.next_used {
            self.next_used = position;
            self.published = position;
            // Nobody knows what a predecessor told the driver: it is owed one call.
            self.signalled = None;
            self.call_owed = true;
        }
        // What was posted in the ring as it was before says nothing about it as it is now.
        self.avail_seen = self.next_used;
        self.positioned = true;
    }
}

fn used_len(size: u16, event_idx: bool) -> usize {
    RING_HEADER + usize::from(size) * USED_SIZE + if event_idx { U16_SIZE } else { 0 }
}

/// Translates all three tables; what is missing in any of them is listed in one fault.
fn translate<M: RingMemory + ?Sized>(
    memory: &M,
    record: &QueueRecord,
    features: u64,
    used_access: Access,
    key: Generations,
) -> Result<Tables, RingFault> {
    let size = record.size;
    if !size.is_power_of_two() {
        return Err(Broken::Size { size }.into());
    }
    for (iova, align) in [(record.desc, 16usize), (record.avail, 2), (record.used, 4)] {
        if !iova.is_multiple_of(align as u64) {
            return Err(Broken::Misaligned { iova, align }.into());
        }
    }
    // Drivers need not allocate the event indexes when they are not negotiated, so do not ask for their page.
    let event_idx = features & virtio::EVENT_IDX != 0;
    let entries = usize::from(size);
    let avail_len = RING_HEADER + entries * U16_SIZE + if event_idx { U16_SIZE } else { 0 };
    let mut misses = MissList::default();
    let desc = Table::translate(memory, record.desc, entries * 16, 16, Access::READ, &mut misses)?;
    let avail = Table::translate(memory, record.avail, avail_len, 2, Access::READ, &mut misses)?;
    let used = Table::translate(memory, record.used, used_len(size, event_idx), 4, used_access, &mut misses)?;
    match (desc, avail, used) {
        (Some(desc), Some(avail), Some(used)) => Ok(Tables { desc, avail, used, key, used_access }),
        _ => {
            let required = misses.len();
            Err(RingFault::Miss(misses.into_set(required, MissPlace::Tables)))
        }
    }
}
