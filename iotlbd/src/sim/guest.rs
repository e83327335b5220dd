//! Guest memory: memfd regions mapped into the front-end, and pages handed out and taken back.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use iotlb_proto::iova::{PAGE_MASK, PAGE_SIZE};
use iotlb_proto::sync::{AtomicU64, Ordering};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::SimError;

/// 64-bit words in a page.
pub const PAGE_WORDS: u64 = PAGE_SIZE / 8;

/// One region of guest memory.
#[derive(Debug)]
pub struct Region {
    guest_address: u64,
    size: u64,
    file: File,
    map: MmapRaw,
}

impl Region {
    /// Guest physical address of the first byte.
    #[must_use]
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the region lies in the front-end, as QEMU would tell a back-end.
    #[must_use]
    pub fn user_address(&self) -> u64 {
        self.map.as_ptr().addr() as u64
    }

    /// The memory itself.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn new(guest_address: u64, size: u64) -> Result<Region, SimError> {
        if size == 0 || size & PAGE_MASK != 0 || guest_address & PAGE_MASK != 0 {
            return Err(SimError::Usage { what: format!("region {guest_address:#x}+{size:#x} is not whole pages") });
        }
        let failed = |what| move |source| SimError::System { what, source };
        let fd = memfd_create("iotlb-sim-guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
            .map_err(|errno| SimError::System { what: "create guest memory", source: errno.into() })?;
        let file = File::from(fd);
        file.set_len(size).map_err(failed("size guest memory"))?;
        let len = usize::try_from(size)
            .map_err(|_| SimError::Usage { what: "region larger than the address space".to_owned() })?;
        let map = MmapOptions::new().len(len).map_raw(&file).map_err(failed("map guest memory"))?;
        Ok(Region { guest_address, size, file, map })
    }
}

/// The guest: its memory, and which pages of it are free. Other processes write the memory at the same time, so every
/// access is a plain copy of words or bytes and never a reference.
#[derive(Debug)]
pub struct Guest {
    regions: Vec<Region>,
    free: Vec<u64>,
}

impl Guest {
    /// A guest with one region at `guest_address`; all its pages are free. Sizes in bytes, whole pages.
    pub fn new(guest_address: u64, size: u64) -> Result<Guest, SimError> {
        let mut guest = Guest { regions: Vec::new(), free: Vec::new() };
        guest.add_region(guest_address, size)?;
        Ok(guest)
    }

    /// Adds a region. The daemon learns of it from [`super::FrontEnd::add_region`].
    pub fn add_region(&mut self, guest_address: u64, size: u64) -> Result<&Region, SimError> {
        let overlap = self.regions.iter().any(|region| {
            guest_address < region.guest_address + region.size && region.guest_address < guest_address + size
        });
        if overlap {
            return Err(SimError::Usage { what: format!("region {guest_address:#x}+{size:#x} overlaps another") });
        }
        self.regions.push(Region::new(guest_address, size)?);
        // The lowest page is handed out first, so that a run with one seed is the same each time.
        self.free.extend((0..size / PAGE_SIZE).rev().map(|page| guest_address + page * PAGE_SIZE));
        Ok(&self.regions[self.regions.len() - 1])
    }

    /// Takes a region away, with the free pages in it.
    pub fn remove_region(&mut self, guest_address: u64) -> Option<Region> {
        let index = self.regions.iter().position(|region| region.guest_address == guest_address)?;
        let region = self.regions.remove(index);
        self.free.retain(|page| !(region.guest_address..region.guest_address + region.size).contains(page));
        Some(region)
    }

    /// The regions, in the order they were added.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A free page: its guest physical address. The page freed last comes first, so that reuse is quick.
    pub fn allocate(&mut self) -> Result<u64, SimError> {
        self.free.pop().ok_or(SimError::OutOfPages)
    }

    /// Gives a page back.
    pub fn release(&mut self, page: u64) {
        debug_assert!(!self.free.contains(&page), "page {page:#x} freed twice");
        self.free.push(page);
    }

    /// Where `guest_address` lies in the front-end's address space.
    pub fn user_address(&self, guest_address: u64) -> Result<u64, SimError> {
        let (region, offset) = self.find(guest_address, 1)?;
        Ok(region.user_address() + offset as u64)
    }

    /// Copies bytes out of the guest.
    pub fn read(&self, guest_address: u64, bytes: &mut [u8]) -> Result<(), SimError> {
        let source = self.pointer(guest_address, bytes.len())?;
        for (index, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: `pointer` checked that all bytes lie in a live mapping owned by `self`. Volatile, because
            // other processes may write at any time.
            *byte = unsafe { source.add(index).read_volatile() };
        }
        Ok(())
    }

    /// Copies bytes into the guest.
    pub fn write(&self, guest_address: u64, bytes: &[u8]) -> Result<(), SimError> {
        let target = self.pointer(guest_address, bytes.len())?;
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: as in `read`; the mapping is writable.
            unsafe { target.add(index).write_volatile(*byte) };
        }
        Ok(())
    }

    /// A little-endian 16-bit ring field, read in one access.
    pub fn load_u16(&self, guest_address: u64) -> Result<u16, SimError> {
        let source = self.aligned::<u16>(guest_address)?;
        // SAFETY: `aligned` checked bounds and alignment in a live mapping owned by `self`.
        Ok(u16::from_le(unsafe { source.read_volatile() }))
    }

    /// Stores a little-endian 16-bit ring field in one access.
    pub fn store_u16(&self, guest_address: u64, value: u16) -> Result<(), SimError> {
        let target = self.aligned::<u16>(guest_address)?;
        // SAFETY: as in `load_u16`; the mapping is writable.
        unsafe { target.write_volatile(value.to_le()) };
        Ok(())
    }

    /// Stores a word that other processes read without a lock. Release: what was stored before it (a page's stamp)
    /// is visible to whoever loads the word with acquire.
    pub fn store_word(&self, guest_address: u64, value: u64) -> Result<(), SimError> {
        self.word(guest_address)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Loads a word; acquire, partner of [`Guest::store_word`].
    pub fn load_word(&self, guest_address: u64) -> Result<u64, SimError> {
        Ok(self.word(guest_address)?.load(Ordering::Acquire))
    }

    /// Fills the page at `guest_address` with one word.
    pub fn fill_page(&self, guest_address: u64, value: u64) -> Result<(), SimError> {
        // One check for the page; the words inside cannot fail after it.
        self.find(guest_address, PAGE_SIZE)?;
        for index in 0..PAGE_WORDS {
            // Relaxed: the message or word that publishes the page orders these stores.
            self.word(guest_address + index * 8)?.store(value, Ordering::Relaxed);
        }
        Ok(())
    }

    fn word(&self, guest_address: u64) -> Result<&AtomicU64, SimError> {
        let pointer = self.aligned::<u64>(guest_address)?;
        // SAFETY: `aligned` checked bounds and alignment; the mapping lives as long as `self`, which the reference
        // borrows, and every process uses these words only as atomics or by plain copies of the device.
        Ok(unsafe { AtomicU64::from_ptr(pointer) })
    }

    fn aligned<T>(&self, guest_address: u64) -> Result<*mut T, SimError> {
        let pointer = self.pointer(guest_address, size_of::<T>())?.cast::<T>();
        if pointer.is_aligned() {
            Ok(pointer)
        } else {
            Err(SimError::Usage { what: format!("guest address {guest_address:#x} is not aligned") })
        }
    }

    fn pointer(&self, guest_address: u64, len: usize) -> Result<*mut u8, SimError> {
        let (region, offset) = self.find(guest_address, len as u64)?;
        Ok(region.map.as_mut_ptr().wrapping_add(offset))
    }

    fn find(&self, guest_address: u64, len: u64) -> Result<(&Region, usize), SimError> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = guest_address.checked_sub(region.guest_address)?;
                let end = offset.checked_add(len)?;
                (end <= region.size).then_some((region, usize::try_from(offset).ok()?))
            })
            .ok_or_else(|| SimError::Usage { what: format!("guest address {guest_address:#x}+{len:#x} is no memory") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_last_freed_first() {
        let mut guest = Guest::new(0x10_0000, 4 * PAGE_SIZE).expect("memfd");
        let first = guest.allocate().expect("four pages");
        let second = guest.allocate().expect("three pages");
        assert_eq!((first, second), (0x10_0000, 0x10_1000));
        guest.release(first);
        assert_eq!(guest.allocate().expect("page"), first);
        guest.allocate().expect("page");
        guest.allocate().expect("page");
        assert!(matches!(guest.allocate(), Err(SimError::OutOfPages)));
    }

    #[test]
    fn accesses_stay_inside_a_region() {
        let mut guest = Guest::new(0, PAGE_SIZE).expect("memfd");
        guest.write(PAGE_SIZE - 4, &[1, 2, 3, 4]).expect("inside");
        let mut bytes = [0; 4];
        guest.read(PAGE_SIZE - 4, &mut bytes).expect("inside");
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert!(guest.write(PAGE_SIZE - 3, &[1, 2, 3, 4]).is_err());
        assert!(guest.store_word(u64::MAX - 3, 1).is_err());
        assert!(guest.store_u16(1, 1).is_err());
        assert!(guest.add_region(0, PAGE_SIZE).is_err());
        guest.add_region(0x1_0000, PAGE_SIZE).expect("free");
        guest.fill_page(0x1_0000, 7).expect("inside");
        assert_eq!(guest.load_word(0x1_0ff8).expect("inside"), 7);
        assert!(guest.remove_region(0x1_0000).is_some());
        assert!(guest.load_word(0x1_0ff8).is_err());
    }
}
