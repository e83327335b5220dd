//! The guest's side of the demo: maps, unmaps and reuses pages under load, in turn strictly and lazily, and reboots now
//! and then.

use std::path::Path;
use std::time::{Duration, Instant};

use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::vhost_user::features::virtio;

use super::oracle::{DIRECTORY_IOVA, GHOSTS, POISON, Random, SLOTS, Stamps};
use crate::sim::ring::DriverRing;
use crate::sim::viommu::LAZY_FLUSH;
use crate::sim::{FrontEnd, FrontEndOptions, Guest, IovaSpace, RingAddresses, SimError};

/// Guest memory begins here, so that a guest address is never an offset by accident.
const GUEST_ADDRESS: u64 = 0x1_0000_0000;
/// Pages beside the mapped ones: rings, directory, and what a lazy batch holds back.
const SPARE_PAGES: u64 = 128;
/// IOVAs in circulation: few, so that each comes back soon.
const IOVAS: u64 = 512;
/// Lazily unmapped pages that are flushed together.
const LAZY_BATCH: usize = 48;
/// How long the guest stays strict, then lazy.
const PHASE: Duration = Duration::from_millis(500);
/// The guest reboots after so many phases.
const REBOOT_EVERY: u128 = 4;
/// One mapping in so many is replaced by an update in place, without an invalidation.
const IN_PLACE_ONE_IN: u64 = 8;
/// Mappings replaced between two looks at the misses.
const STRICT_STEP: usize = 2;
/// The same while lazy, where most steps send nothing.
const LAZY_STEP: usize = 2;
/// How long misses are served between two steps.
const PAUSE: Duration = Duration::from_micros(300);
/// One mapping in so many is sent to the device before it asks.
const UNASKED_ONE_IN: u64 = 8;

/// How the guest unmaps just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Each page is invalidated at once.
    Strict,
    /// Pages are collected, and then everything is flushed.
    Lazy,
}

/// A mistake made on purpose, to see that the oracle notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PlantedFault {
    /// Pages are taken back before the acknowledgement, as if the daemon had not waited for its readers.
    EarlyReuse,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    iova: u64,
    page: u64,
}

/// The guest under load.
#[derive(Debug)]
pub struct Load {
    front_end: FrontEnd,
    iovas: IovaSpace,
    stamps: Stamps,
    random: Random,
    rings: Vec<RingAddresses>,
    directory: u64,
    slots: Vec<Mapping>,
    ghosts: u64,
    lazy: Vec<Mapping>,
    generation: u64,
    started: Instant,
    flushes: u64,
    reboots: u64,
    fault: Option<PlantedFault>,
}

impl Load {
    /// Connects to the daemon, starts the device with two idle rings and maps the first pages.
    pub fn start(socket: &Path, seed: u64, fault: Option<PlantedFault>) -> Result<Load, SimError> {
        let guest = Guest::new(GUEST_ADDRESS, (SLOTS + SPARE_PAGES) * PAGE_SIZE)?;
        let mut front_end = FrontEnd::connect(socket, guest, FrontEndOptions::default())?;
        if front_end.features() & virtio::ACCESS_PLATFORM == 0 {
            return Err(SimError::Missing { what: "ACCESS_PLATFORM (bit 33)" });
        }
        let mut iovas = IovaSpace::new(IOVAS);
        let rings = start_rings(&mut front_end, &mut iovas)?;
        let directory = front_end.guest.allocate()?;
        front_end.guest.fill_page(directory, 0)?;
        front_end.viommu.map(DIRECTORY_IOVA, directory, Access::READ)?;
        let mut load = Load {
            front_end,
            iovas,
            stamps: Stamps::new(seed),
            random: Random::new(seed),
            rings,
            directory,
            slots: Vec::new(),
            ghosts: 0,
            lazy: Vec::new(),
            generation: 0,
            started: Instant::now(),
            flushes: 0,
            reboots: 0,
            fault,
        };
        load.fill_all_slots()?;
        Ok(load)
    }

    /// What the guest does just now.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.phases().is_multiple_of(2) { Phase::Strict } else { Phase::Lazy }
    }

    /// The front-end, for its statistics.
    #[must_use]
    pub fn front_end(&self) -> &FrontEnd {
        &self.front_end
    }

    /// Whole-space flushes so far.
    #[must_use]
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Reboots so far.
    #[must_use]
    pub fn reboots(&self) -> u64 {
        self.reboots
    }

    /// Replaces a few mappings, then serves misses for a while.
    pub fn step(&mut self) -> Result<(), SimError> {
        if u128::from(self.reboots) < self.phases() / REBOOT_EVERY {
            self.reboot()?;
        }
        match self.phase() {
            Phase::Strict => {
                if !self.lazy.is_empty() {
                    self.flush()?;
                }
                for _ in 0..STRICT_STEP {
                    if self.random.below(IN_PLACE_ONE_IN) == 0 {
                        self.replace_in_place()?;
                    } else {
                        self.replace_strictly()?;
                    }
                }
            }
            Phase::Lazy => {
                for _ in 0..LAZY_STEP {
                    self.replace_lazily()?;
                }
                if self.lazy.len() >= LAZY_BATCH {
                    self.flush()?;
                }
            }
        }
        self.front_end.serve_until(&[], PAUSE).map(drop)
    }

    /// Stops the device and disconnects.
    pub fn finish(mut self) -> Result<(), SimError> {
        self.front_end.serve_misses()?;
        self.front_end.stop().map(drop)
    }

    fn phases(&self) -> u128 {
        self.started.elapsed().as_millis() / PHASE.as_millis()
    }

    /// Device reset and start: all pages change hands, and no invalidation is sent. What the device may still do ends
    /// with the answers to the stop.
    fn reboot(&mut self) -> Result<(), SimError> {
        self.front_end.stop()?;
        for slot in 0..SLOTS + GHOSTS {
            self.publish(slot, 0)?;
        }
        for mapping in std::mem::take(&mut self.slots) {
            self.front_end.viommu.unmap(mapping.iova)?;
            self.take_back(mapping)?;
        }
        for mapping in std::mem::take(&mut self.lazy) {
            self.take_back(mapping)?;
        }
        self.reboots += 1;
        self.front_end.start(&self.rings)?;
        self.fill_all_slots()
    }

    /// Another page under the same IOVA, told to the device by an update alone.
    fn replace_in_place(&mut self) -> Result<(), SimError> {
        let slot = slot_index(self.random.below(SLOTS));
        let old = self.slots[slot];
        self.front_end.viommu.unmap(old.iova)?;
        let new = self.map_page_at(old.iova)?;
        if self.fault == Some(PlantedFault::EarlyReuse) {
            poison(&self.front_end, &[old])?;
        }
        self.front_end.push_update(old.iova)?;
        poison(&self.front_end, &[old])?;
        self.front_end.guest.release(old.page);
        self.slots[slot] = new;
        Ok(())
    }

    fn replace_strictly(&mut self) -> Result<(), SimError> {
        let slot = self.random.below(SLOTS);
        let index = slot_index(slot);
        let old = self.slots[index];
        // Half of the time the workers go on asking for the page that goes away: a driver's bug, and the hardest test.
        if self.random.below(2) == 0 {
            self.publish(slot, 0)?;
        }
        self.haunt(old.iova)?;
        self.front_end.viommu.unmap(old.iova)?;
        if self.fault == Some(PlantedFault::EarlyReuse) {
            self.front_end.invalidate_and(old.iova, PAGE_SIZE, |front_end| poison(front_end, &[old]))?;
        } else {
            self.front_end.invalidate(old.iova, PAGE_SIZE)?;
        }
        self.take_back(old)?;
        self.fill_slot(slot)
    }

    fn replace_lazily(&mut self) -> Result<(), SimError> {
        let slot = self.random.below(SLOTS);
        let old = self.slots[slot_index(slot)];
        self.front_end.unmap_lazily(old.iova)?;
        self.haunt(old.iova)?;
        self.lazy.push(old);
        self.fill_slot(slot)
    }

    fn flush(&mut self) -> Result<(), SimError> {
        let taken = std::mem::take(&mut self.lazy);
        for (number, (first, size)) in LAZY_FLUSH.into_iter().enumerate() {
            if self.fault == Some(PlantedFault::EarlyReuse) && number == 0 {
                self.front_end.invalidate_and(first, size, |front_end| poison(front_end, &taken))?;
            } else {
                self.front_end.invalidate(first, size)?;
            }
        }
        self.flushes += 1;
        taken.into_iter().try_for_each(|mapping| self.take_back(mapping))
    }

    /// The device has let go of the page: poison it and put it, and the IOVA, back into circulation.
    fn take_back(&mut self, mapping: Mapping) -> Result<(), SimError> {
        poison(&self.front_end, &[mapping])?;
        self.front_end.guest.release(mapping.page);
        self.iovas.release(mapping.iova);
        Ok(())
    }

    fn fill_slot(&mut self, slot: u64) -> Result<(), SimError> {
        let mapping = self.map_page()?;
        self.slots[slot_index(slot)] = mapping;
        self.publish(slot, mapping.iova)?;
        if self.random.below(UNASKED_ONE_IN) == 0 {
            self.front_end.push_update(mapping.iova)?;
        }
        Ok(())
    }

    fn fill_all_slots(&mut self) -> Result<(), SimError> {
        for slot in 0..SLOTS {
            let mapping = self.map_page()?;
            self.slots.push(mapping);
            self.publish(slot, mapping.iova)?;
        }
        Ok(())
    }

    fn map_page(&mut self) -> Result<Mapping, SimError> {
        let iova = self.iovas.allocate()?;
        self.map_page_at(iova)
    }

    /// The page freed last under `iova`. It carries its stamp before it can be found.
    fn map_page_at(&mut self, iova: u64) -> Result<Mapping, SimError> {
        let mapping = Mapping { iova, page: self.front_end.guest.allocate()? };
        self.generation += 1;
        self.front_end.guest.fill_page(mapping.page, self.stamps.stamp(mapping.iova, self.generation))?;
        self.front_end.viommu.map(mapping.iova, mapping.page, Access::READ_WRITE)?;
        Ok(mapping)
    }

    fn publish(&self, slot: u64, iova: u64) -> Result<(), SimError> {
        self.front_end.guest.store_word(self.directory + slot * 8, iova)
    }

    fn haunt(&mut self, iova: u64) -> Result<(), SimError> {
        self.ghosts = (self.ghosts + 1) % GHOSTS;
        self.publish(SLOTS + self.ghosts, iova)
    }
}

fn poison(front_end: &FrontEnd, mappings: &[Mapping]) -> Result<(), SimError> {
    mappings.iter().try_for_each(|mapping| front_end.guest.fill_page(mapping.page, POISON))
}

fn slot_index(slot: u64) -> usize {
    usize::try_from(slot).unwrap_or(usize::MAX)
}

/// Two empty rings: the daemon asks for translations only while a ring is started.
fn start_rings(front_end: &mut FrontEnd, iovas: &mut IovaSpace) -> Result<Vec<RingAddresses>, SimError> {
    let mut addresses = Vec::new();
    for index in 0..2 {
        let mut ring = [(0, 0); 2];
        for part in &mut ring {
            *part = (front_end.guest.allocate()?, iovas.allocate()?);
            front_end.viommu.map(part.1, part.0, Access::READ_WRITE)?;
        }
        let size = front_end.options().queue_size;
        let pages = [ring[0].0, ring[1].0];
        let ring = DriverRing::new(&front_end.guest, index, size, pages, [ring[0].1, ring[1].1], false)?;
        addresses.push(ring.addresses());
    }
    front_end.start(&addresses)?;
    Ok(addresses)
}
