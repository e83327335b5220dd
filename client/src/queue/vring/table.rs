//! One of a ring's three tables in this process. Its pages need not be neighbours.

use iotlb_proto::access::Access;
use iotlb_proto::sync::Ordering;

use super::fault::{Broken, MissList, MissPlace, RingFault};
use super::memory::{RawPiece, RingMemory, translate_or_list};

/// A translated table: pieces in order, each with its offset in the table.
#[derive(Debug, Default)]
pub(super) struct Table {
    pieces: Vec<(usize, RawPiece)>,
}

impl Table {
    /// Translates a table of `len` bytes. `Ok(None)`: what is missing was listed.
    ///
    /// Every piece is aligned to `align` and all but the last are a multiple of it long, so a word that is aligned
    /// within the table is aligned in memory, and whole in one piece.
    pub(super) fn translate<M: RingMemory + ?Sized>(
        memory: &M,
        iova: u64,
        len: usize,
        align: usize,
        access: Access,
        misses: &mut MissList,
    ) -> Result<Option<Table>, RingFault> {
        let mut table = Table::default();
        let mut offset = 0;
        let complete = translate_or_list(memory, iova, len as u64, access, MissPlace::Tables, misses, &mut |piece| {
            match table.pieces.last_mut() {
                Some((_, last)) if last.touches(&piece) => last.grow(piece.len()),
                _ => table.pieces.push((offset, piece)),
            }
            offset += piece.len();
        })?;
        if !complete {
            return Ok(None);
        }
        if table.pieces.iter().any(|(at, piece)| !at.is_multiple_of(align) || !piece.address().is_multiple_of(align)) {
            return Err(Broken::Misaligned { iova, align }.into());
        }
        Ok(Some(table))
    }

    /// A view to work with.
    ///
    /// # Safety
    ///
    /// For as long as the view lives, the memory that the table was translated from is valid, as
    /// [`RingMemory`] defines it: the guard is borrowed and the generations are those of the translation.
    pub(super) unsafe fn view(&self) -> TableView<'_> {
        TableView { table: self }
    }

    /// The piece around `offset` and the offset within it.
    fn locate(&self, offset: usize) -> (&RawPiece, usize) {
        let index = self.pieces.partition_point(|(start, _)| *start <= offset);
        let (start, piece) = &self.pieces[index - 1];
        (piece, offset - start)
    }
}

/// A table that may be used: holding one is the proof (see [`Table::view`]).
///
/// Offsets come from indexes masked by the ring size, never from the guest as they are, so they are inside.
#[derive(Clone, Copy, Debug)]
pub(super) struct TableView<'a> {
    table: &'a Table,
}

impl TableView<'_> {
    pub(super) fn load_u16(&self, offset: usize, ordering: Ordering) -> u16 {
        let (piece, at) = self.table.locate(offset);
        assert!(at + 2 <= piece.len());
        // SAFETY: the view vouches for the piece; inside by the line above; aligned because `translate` refuses others
        // and 16-bit fields sit at even offsets.
        unsafe { piece.load_u16(at, ordering) }
    }

    pub(super) fn store_u16(&self, offset: usize, value: u16, ordering: Ordering) {
        let (piece, at) = self.table.locate(offset);
        assert!(at + 2 <= piece.len());
        // SAFETY: as in `load_u16`; only the used ring is stored to, and it was translated for writing.
        unsafe { piece.store_u16(at, value, ordering) }
    }

    pub(super) fn read_descriptor(&self, index: u16) -> [u64; 2] {
        let (piece, at) = self.table.locate(usize::from(index) * 16);
        assert!(at + 16 <= piece.len());
        // SAFETY: the view vouches for the piece; inside by the line above; the descriptor table is aligned to 16.
        unsafe { piece.read_descriptor(at) }
    }

    pub(super) fn write_used(&self, offset: usize, id: u32, len: u32) {
        let (piece, at) = self.table.locate(offset);
        // The used ring is aligned to 4 only, so an element of 8 bytes may straddle two pieces.
        if at + 8 <= piece.len() {
            // SAFETY: the view vouches for the piece; inside by the line above; elements sit at multiples of 4.
            unsafe { piece.write_used(at, id, len) }
        } else {
            for (offset, word) in [(offset, id), (offset + 4, len)] {
                let (piece, at) = self.table.locate(offset);
                // SAFETY: the view vouches for the piece; `copy_in` bounds the copy; a word never straddles.
                unsafe { piece.copy_in(at, &word.to_le_bytes()) };
            }
        }
    }
}
