//! A descriptor chain, translated.

use std::marker::PhantomData;

use super::memory::RawPiece;

/// One request of the driver: bytes the device reads, then bytes it writes, all of them present for as long as the
/// guard that the chain borrows. Whatever is read from it is the guest's and hostile.
#[derive(Debug)]
pub struct Chain<'g> {
    pub(super) head: u16,
    /// Running index in the available ring.
    pub(super) position: u16,
    pub(super) parts: Parts,
    pub(super) guard: PhantomData<&'g ()>,
}

/// The storage of a chain, kept by the ring to be used again.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) readable: Vec<RawPiece>,
    pub(super) writable: Vec<RawPiece>,
    pub(super) readable_len: usize,
    pub(super) writable_len: usize,
}

impl Parts {
    pub(super) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
    }
}

impl Chain<'_> {
    /// Index of the first descriptor.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device reads.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.parts.readable_len
    }

    /// Bytes the device may write.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.parts.writable_len
    }

    /// Copies readable bytes from `offset` on; returns how many there were.
    pub fn read(&self, mut offset: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in &self.parts.readable {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            // SAFETY: translated for reading under the guard that this chain borrows.
            done += unsafe { piece.copy_out(offset, &mut to[done..]) };
            offset = 0;
            if done == to.len() {
                break;
            }
        }
        done
    }

    /// Copies `from` to the writable bytes from `offset` on; returns how many found room.
    pub fn write(&self, mut offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for piece in &self.parts.writable {
            if offset >= piece.len() {
                offset -= piece.len();
                continue;
            }
            // SAFETY: translated for writing under the guard that this chain borrows.
            done += unsafe { piece.copy_in(offset, &from[done..]) };
            offset = 0;
            if done == from.len() {
                break;
            }
        }
        done
    }
}
