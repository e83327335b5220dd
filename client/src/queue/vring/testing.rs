//! Guest memory, an IOTLB and a driver for the ring tests.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;

use iotlb_proto::access::Access;
use iotlb_proto::iova::{PAGE_SHIFT, PAGE_SIZE};
use iotlb_proto::table::QueueRecord;

use super::fault::MissSet;
use super::memory::{Generations, RawPiece, RingMemory, Source};
use crate::Fault;

const PAGE: usize = 4096;

/// Pages of guest memory, behind an IOTLB whose entries can be there or not.
#[derive(Debug)]
pub(crate) struct FakeMemory {
    /// One page more than the guest has, never mapped; it must keep its pattern.
    words: Box<[UnsafeCell<u64>]>,
    /// What the guest's page tables say: IOVA page to physical page.
    page_table: RefCell<BTreeMap<u64, (usize, Access)>>,
    /// Which of them the IOTLB holds.
    present: RefCell<BTreeMap<u64, Access>>,
    pub(crate) generations: Cell<Generations>,
    pub(crate) remapping: Cell<bool>,
    pub(crate) translations: Cell<u64>,
}

/// What untouched memory holds.
const PATTERN: u64 = 0xa5a5_a5a5_a5a5_a5a5;

impl FakeMemory {
    pub(crate) fn new(pages: usize) -> FakeMemory {
        FakeMemory {
            words: (0..(pages + 1) * PAGE / 8).map(|_| UnsafeCell::new(PATTERN)).collect(),
            page_table: RefCell::default(),
            present: RefCell::default(),
            generations: Cell::new(Generations { source: Source::unique(), removal: 1, session: 1, queue: 1 }),
            remapping: Cell::new(false),
            translations: Cell::new(0),
        }
    }

    fn page_ptr(&self, page: usize) -> *mut u8 {
        self.words[page * PAGE / 8].get().cast::<u8>()
    }

    /// The guest maps one page.
    pub(crate) fn map(&self, iova: u64, page: usize, access: Access) {
        assert!(iova.is_multiple_of(PAGE_SIZE) && (page + 1) * PAGE < self.words.len() * 8);
        self.page_table.borrow_mut().insert(iova >> PAGE_SHIFT, (page, access));
    }

    /// The front-end invalidates one page.
    pub(crate) fn invalidate(&self, iova: u64) {
        self.present.borrow_mut().remove(&(iova >> PAGE_SHIFT));
        self.bump_removal();
    }

    pub(crate) fn invalidate_all(&self) {
        self.present.borrow_mut().clear();
        self.bump_removal();
    }

    pub(crate) fn bump_removal(&self) {
        let old = self.generations.get();
        self.generations.set(Generations { removal: old.removal + 1, ..old });
    }

    pub(crate) fn bump_queue(&self) {
        let old = self.generations.get();
        self.generations.set(Generations { queue: old.queue + 1, ..old });
    }

    /// The front-end answers misses; `false` when one of the required ones is denied.
    pub(crate) fn resolve(&self, set: &MissSet) -> bool {
        let mut granted = true;
        for (index, miss) in set.misses.iter().enumerate() {
            let range = miss.range();
            for page in (range.first() >> PAGE_SHIFT)..=(range.last() >> PAGE_SHIFT) {
                match self.page_table.borrow().get(&page) {
                    Some((_, access)) if access.allows(miss.access) => {
                        self.present.borrow_mut().insert(page, *access);
                    }
                    _ if index < set.required => granted = false,
                    _ => {}
                }
            }
        }
        granted
    }

    pub(crate) fn resolve_everything(&self) {
        let all = self.page_table.borrow().iter().map(|(page, (_, access))| (*page, *access)).collect();
        *self.present.borrow_mut() = all;
    }

    /// The driver's own access: no IOMMU in between. Addresses it did not map are dropped.
    pub(crate) fn driver_write(&self, iova: u64, bytes: &[u8]) {
        for (at, byte) in bytes.iter().enumerate() {
            let iova = iova.wrapping_add(at as u64);
            if let Some((page, _)) = self.page_table.borrow().get(&(iova >> PAGE_SHIFT)) {
                // SAFETY: inside the page, which `map` checked; the tests use one thread.
                unsafe { self.page_ptr(*page).add((iova % PAGE_SIZE) as usize).write(*byte) };
            }
        }
    }

    pub(crate) fn driver_read(&self, iova: u64, len: usize) -> Vec<u8> {
        (0..len as u64)
            .map(|at| {
                let iova = iova.wrapping_add(at);
                let (page, _) = self.page_table.borrow()[&(iova >> PAGE_SHIFT)];
                // SAFETY: as in `driver_write`.
                unsafe { self.page_ptr(page).add((iova % PAGE_SIZE) as usize).read() }
            })
            .collect()
    }

    /// Whether the page that nobody mapped is as it was.
    pub(crate) fn guard_page_is_intact(&self) -> bool {
        // SAFETY: plain reads of our own words, one thread.
        self.words[self.words.len() - PAGE / 8..].iter().all(|word| unsafe { *word.get() } == PATTERN)
    }
}

// SAFETY: pieces point into `words`, which lives as long as the memory and is never moved or freed before it; each
// memory is a source of its own.
unsafe impl RingMemory for FakeMemory {
    fn translate_pieces(
        &self,
        iova: u64,
        len: u64,
        access: Access,
        visit: &mut dyn FnMut(RawPiece),
    ) -> Result<(), Fault> {
        self.translations.set(self.translations.get() + 1);
        if self.remapping.get() {
            return Err(Fault::Remapping);
        }
        let last = len.checked_sub(1).and_then(|rest| iova.checked_add(rest)).ok_or(Fault::Invalid)?;
        let (present, page_table) = (self.present.borrow(), self.page_table.borrow());
        for page in (iova >> PAGE_SHIFT)..=(last >> PAGE_SHIFT) {
            let first = iova.max(page << PAGE_SHIFT);
            match present.get(&page) {
                Some(allowed) if allowed.allows(access) => {}
                _ => return Err(Fault::Miss { iova: first, access }),
            }
            let end = last.min((page << PAGE_SHIFT) + (PAGE_SIZE - 1));
            let (physical, _) = page_table[&page];
            // SAFETY: an offset below the page size, in a page that exists.
            let ptr = unsafe { self.page_ptr(physical).add((first % PAGE_SIZE) as usize) };
            visit(RawPiece::new(
                NonNull::new(ptr).expect("inside an allocation"),
                usize::try_from(end - first + 1).expect("at most a page"),
            ));
        }
        Ok(())
    }

    fn generations(&self) -> Generations {
        self.generations.get()
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) iova: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// The other side of the ring.
#[derive(Debug)]
pub(crate) struct Driver<'m> {
    memory: &'m FakeMemory,
    pub(crate) record: QueueRecord,
    pub(crate) avail_idx: u16,
    used_seen: u16,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
}

pub(crate) const FLAG_NEXT: u16 = 1;
pub(crate) const FLAG_WRITE: u16 = 2;
pub(crate) const FLAG_INDIRECT: u16 = 4;

impl<'m> Driver<'m> {
    /// A ring whose three tables are at the given addresses, starting at index `start`.
    pub(crate) fn new(memory: &'m FakeMemory, size: u16, desc: u64, avail: u64, used: u64, start: u16) -> Driver<'m> {
        let record = QueueRecord {
            started: true,
            enabled: true,
            size,
            desc,
            avail,
            used,
            base: start,
            session_generation: memory.generations.get().session,
        };
        let driver = Driver {
            memory,
            record,
            avail_idx: start,
            used_seen: start,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
        };
        memory.driver_write(avail, &vec![0; 6 + 2 * usize::from(size)]);
        memory.driver_write(used, &vec![0; 6 + 8 * usize::from(size)]);
        driver.set_avail_idx(start);
        memory.driver_write(used + 2, &start.to_le_bytes());
        driver
    }

    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.memory.driver_write(self.record.avail + 2, &idx.to_le_bytes());
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.memory.driver_write(self.record.avail, &flags.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.memory.driver_write(self.record.avail + 4 + 2 * u64::from(self.record.size), &event.to_le_bytes());
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.read_u16(self.record.used + 4 + 8 * u64::from(self.record.size))
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.read_u16(self.record.used)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.read_u16(self.record.used + 2)
    }

    fn read_u16(&self, iova: u64) -> u16 {
        u16::from_le_bytes(self.memory.driver_read(iova, 2).try_into().expect("two bytes"))
    }

    pub(crate) fn write_descriptor_at(&self, table: u64, index: u16, iova: u64, len: u32, flags: u16, next: u16) {
        let mut raw = Vec::with_capacity(16);
        raw.extend_from_slice(&iova.to_le_bytes());
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        self.memory.driver_write(table + u64::from(index) * 16, &raw);
    }

    pub(crate) fn write_descriptor(&self, index: u16, iova: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor_at(self.record.desc, index, iova, len, flags, next);
    }

    /// Puts `head` in the available ring, whatever it is.
    pub(crate) fn post_head(&mut self, head: u16) {
        let entry = u64::from(self.avail_idx % self.record.size);
        self.memory.driver_write(self.record.avail + 4 + 2 * entry, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.set_avail_idx(self.avail_idx);
    }

    /// Posts a chain in the descriptor table; `None` when there is no room.
    pub(crate) fn post(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        let ids = self.free.split_off(self.free.len() - buffers.len());
        for (at, buffer) in buffers.iter().enumerate() {
            let more = at + 1 < buffers.len();
            let flags = if more { FLAG_NEXT } else { 0 } | if buffer.writable { FLAG_WRITE } else { 0 };
            self.write_descriptor(ids[at], buffer.iova, buffer.len, flags, if more { ids[at + 1] } else { 0xffff });
        }
        let head = ids[0];
        self.chains.insert(head, ids);
        self.post_head(head);
        Some(head)
    }

    /// Posts a chain in an indirect table at `table`.
    pub(crate) fn post_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free.pop()?;
        let count = u16::try_from(buffers.len()).expect("few");
        for (at, buffer) in (0..count).zip(buffers) {
            let more = at + 1 < count;
            let flags = if more { FLAG_NEXT } else { 0 } | if buffer.writable { FLAG_WRITE } else { 0 };
            self.write_descriptor_at(table, at, buffer.iova, buffer.len, flags, at + 1);
        }
        self.write_descriptor(head, table, u32::from(count) * 16, FLAG_INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.post_head(head);
        Some(head)
    }

    /// What the device gave back since the last time: head and written length.
    pub(crate) fn collect(&mut self) -> Vec<(u16, u32)> {
        let mut done = Vec::new();
        while self.used_seen != self.used_idx() {
            let entry = u64::from(self.used_seen % self.record.size);
            let raw = self.memory.driver_read(self.record.used + 4 + 8 * entry, 8);
            let id = u32::from_le_bytes(raw[..4].try_into().expect("four bytes"));
            let len = u32::from_le_bytes(raw[4..].try_into().expect("four bytes"));
            let head = u16::try_from(id).expect("heads are 16 bits");
            self.free.extend(self.chains.remove(&head).unwrap_or_default());
            done.push((head, len));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        done
    }
}
