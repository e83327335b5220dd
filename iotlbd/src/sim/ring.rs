//! The driver's side of a split virtqueue in guest memory (virtio 1.2, section 2.7). Addresses in descriptors are
//! IOVAs.

use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::{Ordering, fence};

use super::front_end::RingAddresses;
use super::{Guest, SimError};

/// Largest ring that fits the two pages a ring gets here.
pub const RING_SIZE_MAX: u16 = 256;
/// Where the used ring begins in the second page: behind the available ring of the largest size, 64-byte aligned.
const USED_OFFSET: u64 = 0x240;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
/// Used ring's flags: the device polls and wants no kick.
const USED_NO_NOTIFY: u16 = 1;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where.
    pub iova: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads.
    pub device_writes: bool,
}

/// The driver's side of one ring.
#[derive(Debug)]
pub struct DriverRing {
    index: u16,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    addresses: RingAddresses,
    event_idx: bool,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    avail_index: u16,
    published: u16,
    last_used: u16,
}

impl DriverRing {
    /// An empty ring of `size` descriptors in two zeroed pages of the guest, which the device finds at `iovas`.
    pub fn new(
        guest: &Guest,
        index: u16,
        size: u16,
        pages: [u64; 2],
        iovas: [u64; 2],
        event_idx: bool,
    ) -> Result<DriverRing, SimError> {
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(SimError::Usage { what: format!("ring size {size}: a power of two up to {RING_SIZE_MAX}") });
        }
        for page in pages {
            guest.fill_page(page, 0)?;
        }
        Ok(DriverRing {
            index,
            size,
            desc: pages[0],
            avail: pages[1],
            used: pages[1] + USED_OFFSET,
            addresses: RingAddresses { desc: iovas[0], avail: iovas[1], used: iovas[1] + USED_OFFSET, base: 0 },
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail_index: 0,
            published: 0,
            last_used: 0,
        })
    }

    /// Where the device finds the ring.
    #[must_use]
    pub fn addresses(&self) -> RingAddresses {
        self.addresses
    }

    /// Free descriptors.
    #[must_use]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains the device has not returned.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }

    /// Puts a chain into the ring; the device sees it after [`DriverRing::publish`]. Returns its head.
    pub fn add(&mut self, guest: &Guest, buffers: &[Buffer]) -> Result<u16, SimError> {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return Err(self.error(format!("no room for {} buffers", buffers.len())));
        }
        let ids: Vec<u16> = self.free.split_off(self.free.len() - buffers.len());
        for (place, buffer) in buffers.iter().enumerate() {
            let next = ids.get(place + 1).copied();
            let flags = if buffer.device_writes { FLAG_WRITE } else { 0 } | if next.is_some() { FLAG_NEXT } else { 0 };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&buffer.iova.to_le_bytes());
            bytes[8..12].copy_from_slice(&buffer.len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.unwrap_or(0).to_le_bytes());
            guest.write(self.desc + u64::from(ids[place]) * 16, &bytes)?;
        }
        let head = ids[0];
        guest.store_u16(self.avail + 4 + u64::from(self.avail_index % self.size) * 2, head)?;
        self.avail_index = self.avail_index.wrapping_add(1);
        self.chains[usize::from(head)] = ids;
        Ok(head)
    }

    /// Shows the device what was added. Returns whether it wants a kick.
    pub fn publish(&mut self, guest: &Guest) -> Result<bool, SimError> {
        // Partner: the device reads the index before the entries and descriptors behind it.
        fence(Ordering::Release);
        guest.store_u16(self.avail + 2, self.avail_index)?;
        // Partner: the device writes its wish before it looks at the index once more; one of both sees the other.
        fence(Ordering::SeqCst);
        let added = self.avail_index.wrapping_sub(self.published);
        self.published = self.avail_index;
        if self.event_idx {
            let event = guest.load_u16(self.used + 4 + u64::from(self.size) * 8)?;
            return Ok(self.avail_index.wrapping_sub(event).wrapping_sub(1) < added);
        }
        Ok(added != 0 && guest.load_u16(self.used)? & USED_NO_NOTIFY == 0)
    }

    /// The next chain the device returned: its head and the bytes it says it wrote.
    pub fn take_used(&mut self, guest: &Guest) -> Result<Option<(u16, u32)>, SimError> {
        let device_index = guest.load_u16(self.used + 2)?;
        if device_index == self.last_used {
            return Ok(None);
        }
        if device_index.wrapping_sub(self.last_used) > self.size {
            return Err(self.error(format!("used index jumped from {} to {device_index}", self.last_used)));
        }
        // Partner: the device writes entry and data before the index.
        fence(Ordering::Acquire);
        let mut entry = [0; 8];
        guest.read(self.used + 4 + u64::from(self.last_used % self.size) * 8, &mut entry)?;
        let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
        let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
        let chain = usize::try_from(id).ok().and_then(|id| self.chains.get_mut(id)).map(std::mem::take);
        let Some(chain) = chain.filter(|chain| !chain.is_empty()) else {
            return Err(self.error(format!("the device returned descriptor {id}, which it does not hold")));
        };
        let head = chain[0];
        self.free.extend(chain);
        self.last_used = self.last_used.wrapping_add(1);
        if self.event_idx {
            guest.store_u16(self.avail + 4 + u64::from(self.size) * 2, self.last_used)?;
            // Partner: the device reads the event after it wrote its index. The caller looks at the index again.
            fence(Ordering::SeqCst);
        }
        Ok(Some((head, len)))
    }

    fn error(&self, what: String) -> SimError {
        SimError::Ring { queue: self.index, what }
    }
}

const _: () = {
    let size = RING_SIZE_MAX as u64;
    assert!(size * 16 <= PAGE_SIZE);
    assert!(4 + size * 2 + 2 <= USED_OFFSET);
    assert!(USED_OFFSET + 4 + size * 8 + 2 <= PAGE_SIZE);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(event_idx: bool) -> (Guest, DriverRing) {
        let mut guest = Guest::new(0, 4 * PAGE_SIZE).expect("memfd");
        let pages = [guest.allocate().expect("page"), guest.allocate().expect("page")];
        let ring = DriverRing::new(&guest, 0, 4, pages, [0x1_0000, 0x2_0000], event_idx).expect("valid size");
        (guest, ring)
    }

    fn device_returns(guest: &Guest, ring: &DriverRing, index: u16, id: u32) {
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&id.to_le_bytes());
        guest.write(ring.used + 4 + u64::from(index % ring.size) * 8, &entry).expect("in memory");
        guest.store_u16(ring.used + 2, index.wrapping_add(1)).expect("in memory");
    }

    #[test]
    fn descriptors_go_round() {
        let (guest, mut ring) = ring(false);
        let buffer = Buffer { iova: 0x5000, len: 64, device_writes: true };
        for round in 0..10 {
            let head = ring.add(&guest, &[buffer, buffer]).expect("room");
            assert!(ring.publish(&guest).expect("in memory"));
            assert_eq!(ring.take_used(&guest).expect("nothing wrong"), None);
            device_returns(&guest, &ring, round, u32::from(head));
            assert_eq!(ring.take_used(&guest).expect("nothing wrong"), Some((head, 0)));
            assert_eq!((ring.free(), ring.in_flight()), (4, 0));
        }
    }

    #[test]
    fn a_device_cannot_return_what_it_does_not_hold() {
        let (guest, mut ring) = ring(false);
        device_returns(&guest, &ring, 0, 3);
        assert!(ring.take_used(&guest).is_err());
        device_returns(&guest, &ring, 0, 4_000_000);
        assert!(ring.take_used(&guest).is_err());
        guest.store_u16(ring.used + 2, 5).expect("in memory");
        assert!(ring.take_used(&guest).is_err());
    }

    #[test]
    fn kicks_follow_the_event_index() {
        let (guest, mut ring) = ring(true);
        let buffer = Buffer { iova: 0x5000, len: 64, device_writes: false };
        ring.add(&guest, &[buffer]).expect("room");
        assert!(ring.publish(&guest).expect("in memory"), "the device waits for index 0");
        ring.add(&guest, &[buffer]).expect("room");
        assert!(!ring.publish(&guest).expect("in memory"), "the device has not asked again");
        guest.store_u16(ring.used + 4 + 4 * 8, 2).expect("in memory");
        ring.add(&guest, &[buffer]).expect("room");
        assert!(ring.publish(&guest).expect("in memory"));
    }
}
