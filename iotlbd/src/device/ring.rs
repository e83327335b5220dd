//! Vrings: what the front-end said about each, and when it makes a ring that workers may touch.

use std::os::fd::OwnedFd;

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::VringAddress;

use super::memory::{Memory, Plan};
use super::{Action, Device};

/// Largest split ring (virtio specification, 2.7).
pub(super) const SIZE_MAX: u32 = 32_768;
/// SET_VRING_ADDR: writes to the used ring are logged.
pub(super) const ADDRESS_LOG: u32 = 1;
/// Where the used ring holds its index, from its start, in bytes.
pub(super) const USED_INDEX: u64 = 2;

/// Why a ring is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    #[error("ring {0} does not exist")]
    NoSuchRing(u32),
    #[error("a ring cannot have {0} descriptors: a power of two up to {SIZE_MAX} is needed")]
    Size(u32),
    #[error("ring {index} starts at index {base}, which does not fit 16 bits")]
    Base { index: u32, base: u32 },
    #[error("{what} of a ring at {address:#x} is misaligned or wraps")]
    Address { what: &'static str, address: u64 },
    #[error("ring {0} runs: stop it first")]
    Running(u32),
    #[error("{what} of a ring at user address {address:#x} lies outside guest memory")]
    OutsideMemory { what: &'static str, address: u64 },
    #[error("SET_VRING_ENABLE with {0}: 0 or 1 is needed")]
    Enable(u32),
}

/// The kick descriptor, which is also what starts a ring.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// Not given since the ring was last stopped.
    #[default]
    None,
    /// The ring is to be polled.
    Polled,
    /// An eventfd.
    Fd(OwnedFd),
}

impl Kick {
    fn into_fd(self) -> Option<OwnedFd> {
        match self {
            Kick::Fd(fd) => Some(fd),
            Kick::None | Kick::Polled => None,
        }
    }
}

/// Addresses as workers see them: IOVAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    pub(super) desc: u64,
    pub(super) avail: u64,
    pub(super) used: u64,
}

/// One ring.
#[derive(Debug, Default)]
pub(super) struct Ring {
    /// 0: not told.
    pub(super) size: u16,
    /// As told, before any conversion.
    pub(super) address: Option<VringAddress>,
    pub(super) base: u16,
    pub(super) kick: Kick,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    /// What SET_VRING_ENABLE said last; `None`: nothing yet. Front-ends say it before they negotiate features.
    pub(super) enable: Option<bool>,
    /// Set while workers may touch the ring: where it is.
    pub(super) started: Option<Addresses>,
    /// The ring was stopped, and how far it got is still to be read, once nobody touches it any more.
    pub(super) unread: bool,
    /// Region and offset of the used index when its translation was last known.
    pub(super) used_index: Option<(u64, u64)>,
    /// What a worker last said about how far it is; only used when the used index was in reach and cannot be read.
    pub(super) progress: Option<u16>,
    /// What the table holds.
    pub(super) published: QueueRecord,
}

impl Ring {
    /// Whether all that a start needs was told.
    pub(super) fn is_complete(&self) -> bool {
        self.size != 0 && self.address.is_some() && !matches!(self.kick, Kick::None)
    }

    /// The record for the table.
    pub(super) fn record(&self, starts_disabled: bool, session_generation: u64) -> QueueRecord {
        let Some(at) = self.started else {
            return QueueRecord { session_generation, ..QueueRecord::default() };
        };
        QueueRecord {
            started: true,
            enabled: self.enable.unwrap_or(!starts_disabled),
            size: self.size,
            desc: at.desc,
            avail: at.avail,
            used: at.used,
            base: self.base,
            session_generation,
        }
    }

    /// Forgets what makes a ring, after it was stopped. Call and error descriptors stay: the front-end sends them
    /// before it negotiates, and not again after a reset. So does what it said about enabling, and how far the ring
    /// got: QEMU 7 resets the device first and asks for that afterwards.
    pub(super) fn reset(&mut self) {
        self.size = 0;
        self.address = None;
        self.kick = Kick::None;
    }

    /// How far it is: rings are served in order, so everything before the used index is done and everything after it is
    /// to be taken again. Where the used ring never was in reach nobody did anything in this run: what a worker says is
    /// of a former one then.
    fn reached(&self, memory: &Memory) -> u16 {
        let Some((region, offset)) = self.used_index else { return self.base };
        memory.read_u16(region, offset).or(self.progress).unwrap_or(self.base)
    }

    /// Puts another kick descriptor in the place of the old one, which is returned, to be closed.
    pub(super) fn replace_kick(&mut self, kick: Kick) -> Option<OwnedFd> {
        std::mem::replace(&mut self.kick, kick).into_fd()
    }

    /// What the ring covers, and how it is accessed, while it is started.
    pub(super) fn areas(&self) -> Option<[(IovaRange, Access); 3]> {
        areas(self.started?, self.size).ok()
    }
}

/// A number of descriptors, checked.
pub(super) fn check_size(num: u32) -> Result<u16, RingError> {
    match u16::try_from(num) {
        Ok(size) if num <= SIZE_MAX && size.is_power_of_two() => Ok(size),
        _ => Err(RingError::Size(num)),
    }
}

/// The bytes of descriptor table, available ring and used ring (virtio specification, 2.7), event words included. The
/// used ring is asked for with read access too, because whoever takes a ring over reads its index.
pub(super) fn areas(at: Addresses, size: u16) -> Result<[(IovaRange, Access); 3], RingError> {
    let n = u64::from(size);
    let area = |what, address: u64, align: u64, len: u64, access| {
        if !address.is_multiple_of(align) {
            return Err(RingError::Address { what, address });
        }
        match IovaRange::from_len(address, len) {
            Some(range) => Ok((range, access)),
            None => Err(RingError::Address { what, address }),
        }
    };
    Ok([
        area("descriptor table", at.desc, 16, 16 * n, Access::READ)?,
        area("available ring", at.avail, 2, 6 + 2 * n, Access::READ)?,
        area("used ring", at.used, 4, 6 + 8 * n, Access::READ_WRITE)?,
    ])
}

/// The addresses of SET_VRING_ADDR, as they are.
pub(super) fn told(address: &VringAddress) -> Addresses {
    Addresses { desc: address.desc, avail: address.avail, used: address.used }
}

impl Device {
    pub(super) fn publish_ring(&mut self, index: usize) -> bool {
        let starts_disabled = self.session.rings_start_disabled();
        let generation = self.session_generation;
        let (Some(ring), Ok(queue)) = (self.rings.get_mut(index), u16::try_from(index)) else { return false };
        let record = ring.record(starts_disabled, generation);
        if record == ring.published {
            return false;
        }
        ring.published = record;
        self.table.publish_queue(queue, &record);
        true
    }

    /// Makes a started ring untouchable, keeps what is needed to tell how far it got. Returns whether it was started.
    pub(super) fn stop_ring(&mut self, index: usize) -> bool {
        self.locate_used_index(index);
        let areas = self.rings.get(index).and_then(Ring::areas);
        let (Some(ring), Ok(queue)) = (self.rings.get_mut(index), u16::try_from(index)) else { return false };
        let was_started = ring.started.take().is_some();
        ring.unread |= was_started;
        let kick = std::mem::take(&mut ring.kick);
        if !matches!(kick, Kick::None) {
            self.actions.push_back(Action::QueueDescriptors { queue, call_changed: false });
            self.actions.extend(kick.into_fd().map(Action::CloseDescriptor));
        }
        self.publish_ring(index);
        if was_started {
            self.table.note_taken();
        }
        self.leave_pages(areas);
        was_started
    }

    /// Pages of a ring that was stopped or moved are not asked for any more: the guest may have unmapped them by the
    /// time that they would be, and has a fault in its log then.
    fn leave_pages(&mut self, areas: Option<[(IovaRange, Access); 3]>) {
        let rings = &self.rings;
        let is_needed = |page| rings.iter().filter_map(Ring::areas).flatten().any(|(area, _)| area.overlaps(page));
        self.misses.unwant(areas.into_iter().flatten(), is_needed);
    }

    /// Stops the rings that will lie outside memory: the drain before it goes is theirs too, and while it is there, how
    /// far they got can be read.
    pub(super) fn stop_rings_without(&mut self, plan: &Plan) {
        for index in 0..self.rings.len() {
            let is_started = self.rings.get(index).is_some_and(|ring| ring.started.is_some());
            if is_started && let Err(error) = self.ring_addresses(index, |user, len| plan.guest_address(user, len)) {
                tracing::warn!(ring = index, %error, "ring stopped");
                self.locate_used_index(index);
                self.end_ring(index);
            }
        }
    }

    /// Makes a ring untouchable that may go on one day.
    fn end_ring(&mut self, index: usize) {
        let areas = self.rings.get(index).and_then(Ring::areas);
        if let Some(ring) = self.rings.get_mut(index) {
            ring.started = None;
            ring.unread = true;
        }
        self.publish_ring(index);
        self.table.note_taken();
        self.leave_pages(areas);
    }

    /// Where workers find the ring: IOVAs as told, or guest addresses converted from user addresses with `guest`.
    fn ring_addresses(
        &self,
        index: usize,
        guest: impl Fn(u64, u64) -> Option<u64>,
    ) -> Result<Option<Addresses>, RingError> {
        let Some(ring) = self.rings.get(index) else { return Ok(None) };
        let Some(address) = ring.address.filter(|_| ring.is_complete()) else { return Ok(None) };
        let at = told(&address);
        let parts = areas(at, ring.size)?;
        if self.session.iommu() {
            return Ok(Some(at));
        }
        let convert = |part: usize, what| {
            let range = parts.get(part).map_or(IovaRange::ALL, |(range, _)| *range);
            guest(range.first(), range.len_minus_one().saturating_add(1))
                .ok_or(RingError::OutsideMemory { what, address: range.first() })
        };
        let at = Addresses {
            desc: convert(0, "descriptor table")?,
            avail: convert(1, "available ring")?,
            used: convert(2, "used ring")?,
        };
        areas(at, ring.size)?;
        Ok(Some(at))
    }

    fn ring_addresses_now(&self, index: usize) -> Result<Option<Addresses>, RingError> {
        self.ring_addresses(index, |user, len| self.memory.guest_address(user, len))
    }

    /// Starts a ring once everything it needs is there. `Ok(false)`: not yet, or running already.
    ///
    /// The first of them starts with an empty table. An UPDATE may answer a MISS of the run before, and nothing that
    /// came while no ring ran was followed by an invalidation. Only who cannot be asked again is believed.
    pub(super) fn try_start(&mut self, index: usize) -> Result<bool, RingError> {
        if self.rings.get(index).is_none_or(|ring| ring.started.is_some()) {
            return Ok(false);
        }
        let Some(at) = self.ring_addresses_now(index)? else { return Ok(false) };
        if self.session.iommu() && self.session.had_channel && !self.is_running() {
            // Before workers see that a ring runs.
            self.clear_table();
        }
        if let Some(ring) = self.rings.get_mut(index) {
            ring.started = Some(at);
            ring.progress = None;
        }
        self.publish_ring(index);
        self.locate_used_index(index);
        tracing::debug!(ring = index, "ring started");
        Ok(true)
    }

    /// Brings started rings in line with changed memory or features. Rings that lie outside memory now are stopped.
    pub(super) fn refresh_rings(&mut self) {
        for index in 0..self.rings.len() {
            if self.rings.get(index).is_some_and(|ring| ring.started.is_some()) {
                match self.ring_addresses_now(index) {
                    Ok(at @ Some(_)) => {
                        let areas = self.rings.get(index).and_then(Ring::areas);
                        if let Some(ring) = self.rings.get_mut(index)
                            && ring.started != at
                        {
                            ring.started = at;
                            self.leave_pages(areas);
                        }
                        // It lies elsewhere, or features enabled or disabled it: as with SET_VRING_ENABLE.
                        if self.publish_ring(index) {
                            self.table.note_taken();
                        }
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(ring = index, %error, "ring stopped");
                        self.end_ring(index);
                    }
                }
            } else if let Err(error) = self.try_start(index) {
                tracing::debug!(ring = index, %error, "ring cannot start yet");
            }
        }
    }

    /// Remembers where the used index lies, while its translation is known.
    pub(super) fn locate_used_index(&mut self, index: usize) {
        let Some(at) = self.rings.get(index).and_then(|ring| ring.started) else { return };
        let Some(iova) = at.used.checked_add(USED_INDEX) else { return };
        let Some(leaf) = self.table.lookup(iova) else { return };
        let found = self.memory.locate(leaf.target + (iova - leaf.first));
        if let (Some(ring), Some(found)) = (self.rings.get_mut(index), found) {
            ring.used_index = Some(found);
        }
    }

    fn used_ring_is_readable(&self, index: usize) -> bool {
        let used = self.rings.get(index).and_then(|ring| ring.started?.used.checked_add(USED_INDEX));
        used.and_then(|iova| self.table.lookup(iova)).is_some_and(|leaf| leaf.access.allows(Access::READ))
    }

    /// The owner of a started ring has left it. Whoever may write the used ring but not read it begins at the base, so
    /// the next owner needs one from which on nothing is done yet. Where it can be read nothing is published: when a
    /// record changes, the workers of all other rings forget what they have asked for and look everything up.
    pub fn owner_left(&mut self, queue: u16) {
        let index = usize::from(queue);
        if self.used_ring_is_readable(index) {
            return;
        }
        self.locate_used_index(index);
        // Where the used ring never was in reach nobody did anything in this run.
        let served = |ring: &&mut Ring| ring.started.is_some() && ring.used_index.is_some();
        if let Some(ring) = self.rings.get_mut(index).filter(served) {
            ring.base = ring.reached(&self.memory);
            ring.progress = None;
            self.publish_ring(index);
        }
    }

    /// Reads how far stopped rings got, once nobody touches them.
    pub(super) fn read_stopped_rings(&mut self) {
        for ring in self.rings.iter_mut().filter(|ring| ring.unread) {
            ring.base = ring.reached(&self.memory);
            ring.used_index = None;
            ring.progress = None;
            ring.unread = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Addresses = Addresses { desc: 0xffff_e000, avail: 0xffff_f000, used: 0xffff_f240 };

    #[test]
    fn sizes_are_powers_of_two_up_to_the_limit() {
        assert_eq!(check_size(256), Ok(256));
        assert_eq!(check_size(32_768), Ok(32_768));
        for bad in [0, 3, 65_536, 32_769, u32::MAX] {
            assert_eq!(check_size(bad), Err(RingError::Size(bad)));
        }
    }

    #[test]
    fn areas_are_checked_for_alignment_and_wrap() {
        let [desc, avail, used] = areas(AT, 256).expect("well-formed");
        assert_eq!(desc.0.last(), 0xffff_efff);
        assert_eq!(avail.0.last(), 0xffff_f000 + 6 + 512 - 1);
        assert_eq!(used.0.last(), 0xffff_f240 + 6 + 2048 - 1);
        assert!(areas(Addresses { desc: AT.desc + 8, ..AT }, 256).is_err());
        assert!(areas(Addresses { avail: AT.avail + 1, ..AT }, 256).is_err());
        assert!(areas(Addresses { used: AT.used + 2, ..AT }, 256).is_err());
        assert!(areas(Addresses { desc: !15, ..AT }, 256).is_err());
    }

    #[test]
    fn a_ring_that_is_stopped_shows_workers_nothing() {
        let mut ring = Ring { size: 256, enable: Some(true), ..Ring::default() };
        assert_eq!(ring.record(true, 7), QueueRecord { session_generation: 7, ..QueueRecord::default() });
        ring.started = Some(AT);
        let record = ring.record(true, 7);
        assert!(record.started && record.enabled && record.used == AT.used);
    }

    #[test]
    fn without_protocol_features_a_ring_starts_enabled() {
        let ring = Ring { size: 256, started: Some(AT), ..Ring::default() };
        assert!(ring.record(false, 0).enabled);
        assert!(!ring.record(true, 0).enabled);
    }
}
