//! From a head to a translated chain (section 2.7.5).

use iotlb_proto::access::Access;

use super::chain::Parts;
use super::fault::{Broken, MissList, MissPlace, RingFault};
use super::memory::{RingMemory, translate_or_list};
use super::table::TableView;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: usize = 16;

/// Descriptors a chain may have, in the ring or in an indirect table. The specification allows as many as the ring has
/// entries; devices built on iovecs take 1,024, so drivers know that limit, and it bounds the work that a hostile guest
/// can cause under one pin. An indirect table may be longer than the ring: drivers do post a packet of 19 pieces on a
/// ring of 16.
const DESCRIPTORS_MAX: u16 = 1024;

/// A descriptor as copied from the guest.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[expect(clippy::cast_possible_truncation, reason = "takes the fields of a packed word apart")]
    fn from_words([address, rest]: [u64; 2]) -> Descriptor {
        Descriptor { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// What stays the same for all chains of a burst.
pub(super) struct Walk<'a, M: ?Sized> {
    pub(super) memory: &'a M,
    pub(super) descriptors: TableView<'a>,
    pub(super) size: u16,
    pub(super) indirect: bool,
    pub(super) bytes_max: u64,
    /// The chain.
    pub(super) place: MissPlace,
}

impl<M: RingMemory + ?Sized> Walk<'_, M> {
    /// Translates the chain from `head` into `parts`. `Ok(false)`: pages are missing and were listed.
    pub(super) fn chain(
        &self,
        head: u16,
        parts: &mut Parts,
        scratch: &mut Vec<u8>,
        misses: &mut MissList,
    ) -> Result<bool, RingFault> {
        parts.clear();
        let mut sum = Sum { head, bytes: 0, max: self.bytes_max, complete: true };
        let mut index = head;
        for _ in 0..self.size.min(DESCRIPTORS_MAX) {
            if index >= self.size {
                return Err(Broken::Next { next: index, size: self.size }.into());
            }
            let descriptor = Descriptor::from_words(self.descriptors.read_descriptor(index));
            if descriptor.flags & FLAG_INDIRECT != 0 {
                if !self.indirect || descriptor.flags & FLAG_NEXT != 0 {
                    return Err(Broken::Indirect { head }.into());
                }
                self.indirect_table(descriptor, &mut sum, parts, scratch, misses)?;
                return Ok(sum.complete);
            }
            self.buffer(descriptor, &mut sum, parts, misses)?;
            if descriptor.flags & FLAG_NEXT == 0 || misses.is_full() {
                return Ok(sum.complete);
            }
            index = descriptor.next;
        }
        Err(Broken::Loop { head }.into())
    }

    /// Copies an indirect table once, then walks the copy. It ends the chain.
    fn indirect_table(
        &self,
        table: Descriptor,
        sum: &mut Sum,
        parts: &mut Parts,
        scratch: &mut Vec<u8>,
        misses: &mut MissList,
    ) -> Result<(), RingFault> {
        let bytes = table.len as usize;
        let entries = bytes / DESCRIPTOR_SIZE;
        if entries == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE) || entries > usize::from(DESCRIPTORS_MAX) {
            return Err(Broken::IndirectLength { len: table.len }.into());
        }
        scratch.clear();
        scratch.resize(bytes, 0);
        let mut filled = 0;
        let present = translate_or_list(
            self.memory,
            table.address,
            bytes as u64,
            Access::READ,
            self.place,
            misses,
            // SAFETY: visited pieces are valid for reading while the memory is borrowed, which it is here.
            &mut |piece| filled += unsafe { piece.copy_out(0, &mut scratch[filled..]) },
        )?;
        if !present {
            sum.complete = false;
            return Ok(());
        }
        let (copied, _) = scratch.as_chunks::<DESCRIPTOR_SIZE>();
        let mut index = 0;
        for _ in 0..entries {
            let Some(raw) = copied.get(usize::from(index)) else {
                return Err(Broken::Next { next: index, size: u16::try_from(entries).unwrap_or(u16::MAX) }.into());
            };
            let raw = u128::from_le_bytes(*raw);
            #[expect(clippy::cast_possible_truncation, reason = "takes the two words apart")]
            let descriptor = Descriptor::from_words([raw as u64, (raw >> 64) as u64]);
            if descriptor.flags & FLAG_INDIRECT != 0 {
                return Err(Broken::Indirect { head: sum.head }.into());
            }
            self.buffer(descriptor, sum, parts, misses)?;
            if descriptor.flags & FLAG_NEXT == 0 || misses.is_full() {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(Broken::Loop { head: sum.head }.into())
    }

    fn buffer(
        &self,
        descriptor: Descriptor,
        sum: &mut Sum,
        parts: &mut Parts,
        misses: &mut MissList,
    ) -> Result<(), RingFault> {
        let writable = descriptor.flags & FLAG_WRITE != 0;
        if !writable && sum.has_writable(parts) {
            return Err(Broken::Order { head: sum.head }.into());
        }
        sum.add(descriptor.len, writable, parts)?;
        if descriptor.len == 0 {
            return Ok(());
        }
        let (access, pieces) =
            if writable { (Access::WRITE, &mut parts.writable) } else { (Access::READ, &mut parts.readable) };
        let len = u64::from(descriptor.len);
        let mut visit = |piece| pieces.push(piece);
        if !translate_or_list(self.memory, descriptor.address, len, access, self.place, misses, &mut visit)? {
            sum.complete = false;
        }
        Ok(())
    }
}

/// What a walk adds up.
struct Sum {
    head: u16,
    bytes: u64,
    max: u64,
    complete: bool,
}

impl Sum {
    /// By length, not by pieces: a buffer whose pages are missing counts too.
    fn has_writable(&self, parts: &Parts) -> bool {
        parts.writable_len > 0
    }

    fn add(&mut self, len: u32, writable: bool, parts: &mut Parts) -> Result<(), Broken> {
        // 32,768 descriptors of 32 bits each do not overflow 64 bits.
        self.bytes += u64::from(len);
        if self.bytes > self.max {
            return Err(Broken::TooLong { head: self.head, max: self.max });
        }
        if writable {
            parts.writable_len += len as usize;
        } else {
            parts.readable_len += len as usize;
        }
        Ok(())
    }
}
