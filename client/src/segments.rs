//! What a translation yields: one or more pieces of guest memory.
//!
//! Contiguous I/O virtual addresses are not contiguous memory, so even a two-byte field can come in two pieces.

use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::ptr::NonNull;

use vm_memory::VolatileSlice;

use crate::guard::Guard;

/// A piece of guest memory. It cannot outlive the borrow of the guard it came from, and so not the pin.
///
/// The guest may change the bytes at any moment: never make a Rust slice or reference of them. Copy.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'g> {
    pointer: NonNull<u8>,
    len: usize,
    _guard: PhantomData<&'g ()>,
}

impl<'g> Segment<'g> {
    /// `pointer` must be good for plain accesses to `len` bytes as long as the guard lives.
    #[inline]
    pub(crate) fn new(pointer: NonNull<u8>, len: usize) -> Segment<'g> {
        Segment { pointer, len, _guard: PhantomData }
    }

    /// Address of the first byte in this process.
    #[inline]
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// Bytes; not 0.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always `false`: an empty range has no translation.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The piece as a volatile slice, to copy from and to. Only write to it when write access was asked for.
    #[inline]
    #[must_use]
    pub fn volatile(&self) -> VolatileSlice<'g> {
        // SAFETY: the bytes lie in the arena, mapped as long as the pin that `'g` stands for (upheld by the daemon's
        // grace period); volatile slices allow for concurrent changes by the guest.
        unsafe { VolatileSlice::new(self.pointer.as_ptr(), self.len) }
    }

    /// Copies from the piece's start: as many bytes as both have.
    #[inline]
    pub fn copy_to(&self, buf: &mut [u8]) {
        let len = buf.len().min(self.len);
        // SAFETY: `len` bytes of guest memory are mapped as long as the pin that `'g` stands for; they were never
        // lent out as Rust memory, so they cannot overlap `buf`. The guest may change them during the copy: any bytes
        // are valid.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer.as_ptr().cast_const(), buf.as_mut_ptr(), len) }
    }

    /// Copies to the piece's start: as many bytes as both have. Only when write access was asked for.
    #[inline]
    pub fn copy_from(&self, buf: &[u8]) {
        let len = buf.len().min(self.len);
        // SAFETY: as in `copy_to`; the arena is mapped for writing.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), self.pointer.as_ptr(), len) }
    }
}

/// The pieces of one translation, in order. Pieces after the first are kept with the reader until the pin ends: no
/// allocation once its list has grown to what the worker's ranges need.
#[derive(Clone, Debug)]
pub struct Segments<'g> {
    guard: &'g Guard<'g>,
    next: Option<Segment<'g>>,
    /// Where the pieces after `next` are in the reader's list.
    rest: (usize, usize),
}

impl<'g> Segments<'g> {
    #[inline]
    pub(crate) fn new(guard: &'g Guard<'g>, first: Segment<'g>, rest: (usize, usize)) -> Segments<'g> {
        Segments { guard, next: Some(first), rest }
    }

    /// Bytes still to come.
    #[must_use]
    pub fn total_len(&self) -> usize {
        self.clone().map(|segment| segment.len()).sum()
    }
}

impl<'g> Iterator for Segments<'g> {
    type Item = Segment<'g>;

    #[inline]
    fn next(&mut self) -> Option<Segment<'g>> {
        let current = self.next.take()?;
        let (at, end) = self.rest;
        if at < end {
            self.rest = (at + 1, end);
            self.next = self.guard.kept_piece(at);
        }
        Some(current)
    }
}

impl FusedIterator for Segments<'_> {}

/// A piece of the arena: offset and length. Checked against the arena's size by who made it.
pub(crate) type Piece = (u64, u64);

/// The first piece of a translation, and where the others are in the list.
pub(crate) type Kept = (Piece, (usize, usize));

/// The pieces of the translations of one pin, but for the first of each.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    list: Vec<Piece>,
}

/// Pieces whose room is kept for the next pin. A range that came in more of them is not the usual case.
const KEPT_PIECES: usize = 1024;

impl Pieces {
    /// Adds a translation: joins neighbours, returns the first piece and where the others are. A fault takes back what
    /// was added.
    pub(crate) fn add<E>(&mut self, pieces: impl Iterator<Item = Result<Piece, E>>) -> Result<Option<Kept>, E> {
        let start = self.list.len();
        let mut first: Option<Piece> = None;
        for piece in pieces {
            let (offset, len) = piece.inspect_err(|_| self.list.truncate(start))?;
            let last = if self.list.len() > start { self.list.last_mut() } else { first.as_mut() };
            match last {
                Some(last) if last.0 + last.1 == offset => last.1 += len,
                Some(_) => self.list.push((offset, len)),
                None => first = Some((offset, len)),
            }
        }
        Ok(first.map(|first| (first, (start, self.list.len()))))
    }

    pub(crate) fn get(&self, at: usize) -> Option<Piece> {
        self.list.get(at).copied()
    }

    pub(crate) fn clear(&mut self) {
        self.list.clear();
        self.list.shrink_to(KEPT_PIECES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(kept: &mut Pieces, pieces: &[Piece]) -> Vec<Piece> {
        let added = kept.add(pieces.iter().copied().map(Ok::<_, ()>)).expect("no fault among them");
        let Some((first, (start, end))) = added else { return Vec::new() };
        std::iter::once(first).chain((start..end).map(|at| kept.get(at).expect("it was added"))).collect()
    }

    #[test]
    fn neighbours_become_one_piece() {
        let mut kept = Pieces::default();
        assert_eq!(collect(&mut kept, &[]), []);
        assert_eq!(collect(&mut kept, &[(0x1000, 16), (0x1010, 16)]), [(0x1000, 32)]);
        for pieces in 1..12 {
            let apart: Vec<_> = (1..=pieces).map(|i| (i * 0x1000, 8)).collect();
            assert_eq!(collect(&mut kept, &apart), apart);
            let halves: Vec<_> = (1..=pieces).flat_map(|i| [(i * 0x1000, 4), (i * 0x1000 + 4, 4)]).collect();
            assert_eq!(collect(&mut kept, &halves), apart);
        }
    }

    #[test]
    fn translations_do_not_join_each_other_and_a_fault_leaves_nothing() {
        let mut kept = Pieces::default();
        assert_eq!(collect(&mut kept, &[(0, 8), (16, 8)]), [(0, 8), (16, 8)]);
        assert_eq!(collect(&mut kept, &[(24, 8), (64, 8)]), [(24, 8), (64, 8)]);
        assert_eq!(kept.add([Ok((0, 8)), Ok((16, 8)), Err("gone")].into_iter()), Err("gone"));
        assert_eq!((kept.get(0), kept.get(1), kept.get(2)), (Some((16, 8)), Some((64, 8)), None));
        kept.clear();
        assert_eq!(kept.get(0), None);
    }
}
