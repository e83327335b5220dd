//! A pin: everything that may be done with guest memory.

use std::marker::PhantomData;

use iotlb_proto::iova::{IovaRange, PAGE_MASK};
use iotlb_proto::layout::table::FLAG_RUNNING;
use iotlb_proto::sync::{AtomicU64, Ordering};
use iotlb_proto::table::QueueRecord;
use iotlb_proto::tree::entry;

use crate::Access;
use crate::queue::vring::Source;
use crate::reader::Reader;
use crate::segments::{Piece, Segment, Segments};
use crate::shared::Shared;

/// Why a range has no translation now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The table does not hold it, or not with that access: unpin, then [`Reader::resolve`] or [`Reader::request`].
    #[error("no translation of {iova:#x} for {access} in the table")]
    Miss {
        /// First address that is missing.
        iova: u64,
        /// The access that was wanted.
        access: Access,
    },
    /// The table may point into memory that this process has not mapped yet: unpin, then [`Reader::wait_mapped`].
    #[error("the guest's memory map is changing")]
    Remapping,
    /// The range is empty or wraps, or lies in memory that could not be mapped (the log says why).
    #[error("the range is empty, wraps, or lies in memory that could not be mapped")]
    Invalid,
}

/// A pin. While it lives, the daemon acknowledges nothing that would take away what it can reach; so keep it short.
///
/// A worker that holds a pin for too long is revoked: its control thread makes all guest memory unreachable, and a
/// thread that touches it afterwards, still under the old pin, gets a SIGSEGV. That is what revocation means; a pin
/// that ends in time never meets it.
///
/// It stays in its thread:
///
/// ```compile_fail,E0277
/// fn needs_send<T: Send>() {}
/// needs_send::<iotlb_client::Guard<'static>>();
/// ```
///
/// and what it yields stays in it:
///
/// ```compile_fail,E0515
/// fn escapes<'r>(reader: &'r iotlb_client::Reader) -> iotlb_client::Segments<'r> {
///     let guard = reader.pin().unwrap();
///     guard.translate(0, 1, iotlb_client::Access::READ).unwrap()
/// }
/// ```
///
/// and nothing but its drop ends the pin: the slot that says so cannot be reached:
///
/// ```compile_fail,E0599
/// fn unpins(attachment: &iotlb_client::Attachment) {
///     attachment.segment().slots[0].word.store(0, iotlb_proto::sync::Ordering::Release);
/// }
/// ```
#[derive(Debug)]
pub struct Guard<'r> {
    // Two words and no more. A pin's fence waits for all stores before it, those of the pin before included; a guard of
    // a dozen words that went through memory cost more than the fence itself. What changes under a pin is the reader's:
    // where it stands here, it and all else here is loaded again after each call.
    reader: &'r Reader,
    shared: &'r Shared,
    /// The slot belongs to the thread that pinned.
    _not_send: PhantomData<*mut ()>,
}

impl<'r> Guard<'r> {
    #[inline(always)]
    pub(crate) fn new(reader: &'r Reader, shared: &'r Shared) -> Guard<'r> {
        Guard { reader, shared, _not_send: PhantomData }
    }

    /// Where the `len` bytes from `iova` are, if the device may access them like that: all of them, or none.
    /// With [`Access::NONE`], whether and where there is any translation.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn translate(&self, iova: u64, len: u64, access: Access) -> Result<Segments<'_>, Fault> {
        self.reader.count_lookups(1);
        if let Some(segment) = self.quick(iova, len, access) {
            return Ok(Segments::new(self, segment, (0, 0)));
        }
        // Its parts are put together here, so that the usual case need not go through memory.
        let (first, rest) = self.not_quick(iova, len, access)?;
        Ok(Segments::new(self, first, rest))
    }

    /// The `len` bytes from `iova`, when they are one piece of memory under one leaf and the device may access them
    /// like that. `None` says nothing but that: [`Guard::translate`] tells pieces from faults.
    #[inline]
    #[must_use]
    pub fn translate_one(&self, iova: u64, len: u64, access: Access) -> Option<Segment<'_>> {
        self.reader.count_lookups(1);
        match self.quick(iova, len, access) {
            Some(segment) => Some(segment),
            None => self.within_leaf(iova, len, access),
        }
    }

    /// The range, when it lies in one 4 KiB page below 512 GiB, and nothing at all is unusual about it. This is
    /// what nearly every lookup is; each test is a branch that nearly always goes the same way.
    #[inline(always)]
    pub(crate) fn quick(&self, iova: u64, len: u64, access: Access) -> Option<Segment<'_>> {
        // Acquire pairs with the release in the writer's `edit`: the entry's memory map comes with it.
        let leaf = self.page_word(iova)?.load(Ordering::Acquire);
        if entry::is_leaf_for(leaf, access) { self.within_page(leaf, iova, len) } else { None }
    }

    /// As [`Guard::quick`], for who comes back to the same few places under one pin: one load there instead of three.
    #[inline(always)]
    pub(crate) fn near(&self, iova: u64, len: u64, access: Access) -> Option<Segment<'_>> {
        let leaf = match self.shared.table.page_near(self.reader.near_nodes(), iova, access) {
            Some(leaf) => leaf,
            None => self.not_near(iova, access)?,
        };
        self.within_page(leaf, iova, len)
    }

    /// The entry of a page whose node was not kept, or has been emptied or replaced since.
    #[cold]
    #[inline(never)]
    fn not_near(&self, iova: u64, access: Access) -> Option<u64> {
        if self.reader.keep_near(iova) {
            self.shared.table.page_near(self.reader.near_nodes(), iova, access)
        } else {
            None
        }
    }

    /// The word of the 4 KiB page around `iova`, not loaded yet; `None` when it is not one of the usual ones.
    #[inline(always)]
    pub(crate) fn page_word(&self, iova: u64) -> Option<&AtomicU64> {
        let last = self.reader.last_nodes();
        if last.are_around(iova) { last.word(iova) } else { self.page_word_elsewhere(iova) }
    }

    /// The same in a GiB whose node is not kept.
    #[cold]
    #[inline(never)]
    fn page_word_elsewhere(&self, iova: u64) -> Option<&AtomicU64> {
        let last = self.reader.last_nodes();
        self.shared.table.keep_node(last, iova);
        last.word(iova)
    }

    /// The range, when the entry is a 4 KiB leaf that holds all of it, and nothing at all is unusual about it.
    #[inline(always)]
    pub(crate) fn within_page(&self, leaf: u64, iova: u64, len: u64) -> Option<Segment<'_>> {
        let (inside, target) = (iova & PAGE_MASK, entry::target(leaf));
        // `len - 1` of an empty range is larger than any page. The arena has whole pages.
        let in_page = len.wrapping_sub(1) <= PAGE_MASK && inside.wrapping_add(len.wrapping_sub(1)) <= PAGE_MASK;
        if !in_page || target >= self.reader.arena().size || self.reader.map_changed() {
            return None;
        }
        self.segment(target | inside, len)
    }

    /// The range, when any leaf of the tree holds all of it, and nothing else is unusual about it.
    #[cold]
    #[inline(never)]
    pub(crate) fn within_leaf(&self, iova: u64, len: u64, access: Access) -> Option<Segment<'_>> {
        let leaf = self.shared.table.lookup_leaf(iova)?;
        // As in `within_page`, where any leaf is larger but the one that covers the whole space.
        if len.wrapping_sub(1) > leaf.last(iova) - iova || len == 0 || !leaf.access().allows(access) {
            return None;
        }
        let offset = leaf.address(iova);
        if self.map_differs() || !self.in_arena(offset, len) {
            return None;
        }
        self.segment(offset, len)
    }

    /// Whether the table may hold entries into regions that are not mapped. The other side may change during the pin:
    /// regions are added then, and none is taken away that an entry this pin can reach points into, since the daemon
    /// says so only after the grace period that took the entries away.
    #[inline]
    fn map_differs(&self) -> bool {
        self.reader.map_generation() != self.shared.complete_generation()
    }

    #[inline]
    fn in_arena(&self, offset: u64, len: u64) -> bool {
        let size = self.reader.arena().size;
        offset <= size && len <= size - offset
    }

    /// `len` bytes at an arena offset. The caller has seen that they lie in the arena.
    #[inline]
    fn segment(&self, offset: u64, len: u64) -> Option<Segment<'_>> {
        debug_assert!(self.in_arena(offset, len));
        // Both fit: the arena is no larger than the address space.
        let (offset, len) = (usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
        // SAFETY: the callers have compared the offset with the arena's size, so the sum lies in the arena's own
        // reservation, or just behind it. The reader keeps the arena.
        let pointer = unsafe { self.reader.arena().base.add(offset) };
        Some(Segment::new(pointer, len))
    }

    #[cold]
    #[inline(never)]
    fn not_quick(&self, iova: u64, len: u64, access: Access) -> Result<(Segment<'_>, (usize, usize)), Fault> {
        match self.within_leaf(iova, len, access) {
            Some(segment) => Ok((segment, (0, 0))),
            None => self.translate_slowly(iova, len, access),
        }
    }

    /// The first piece, and where the others are among those the reader keeps.
    #[cold]
    #[inline(never)]
    fn translate_slowly(&self, iova: u64, len: u64, access: Access) -> Result<(Segment<'_>, (usize, usize)), Fault> {
        let pieces = self.reader.keep_pieces(self.walk(iova, len, access).pieces());
        let pieces = pieces.inspect_err(|_| self.reader.count_fault())?;
        // A range that has no piece has a fault.
        let ((offset, len), rest) = pieces.ok_or(Fault::Invalid)?;
        Ok((self.segment(offset, len).ok_or(Fault::Invalid)?, rest))
    }

    /// One of the pieces that [`Guard::translate_slowly`] kept.
    pub(crate) fn kept_piece(&self, at: usize) -> Option<Segment<'_>> {
        let (offset, len) = self.reader.kept_piece(at)?;
        self.segment(offset, len)
    }

    /// Translates leaf by leaf, without allocation. An empty range yields [`Fault::Invalid`].
    #[inline]
    pub(crate) fn walk(&self, iova: u64, len: u64, access: Access) -> Walk<'_> {
        Walk { guard: self, left: Left::of(iova, len), access }
    }

    /// The next piece of `range`, by one lookup.
    #[inline]
    fn piece(&self, range: IovaRange, access: Access) -> Result<(Piece, u64), Fault> {
        let iova = range.first();
        let leaf = self.shared.table.lookup(iova).filter(|leaf| leaf.access.allows(access));
        let Some(leaf) = leaf else {
            let access = if access.is_none() { Access::READ } else { access };
            return Err(Fault::Miss { iova, access });
        };
        if self.reader.map_generation() > self.shared.mapped_generation() {
            return Err(Fault::Remapping);
        }
        let last = leaf.last.min(range.last());
        // A daemon that rewrites a range under this look-up could have it end before it.
        let len = last.checked_sub(iova).and_then(|rest| rest.checked_add(1)).ok_or(Fault::Invalid)?;
        let offset = leaf.target.wrapping_add(iova.wrapping_sub(leaf.first));
        if !self.in_arena(offset, len) {
            return Err(Fault::Invalid);
        }
        // After the generation: who sees a generation sees which of its regions were refused.
        if !self.shared.arena.is_complete() && !self.shared.arena.is_mapped(offset, len) {
            return Err(Fault::Invalid);
        }
        Ok(((offset, len), last))
    }

    /// Copies `buf.len()` bytes from `iova` on. Nothing is copied when there is a fault. An empty buffer always works.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        match self.translate_one(iova, buf.len() as u64, Access::READ) {
            Some(segment) => segment.copy_to(buf),
            None => self.read_slowly(iova, buf)?,
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn read_slowly(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let mut rest = buf;
        if rest.is_empty() {
            return Ok(());
        }
        let (first, others) = self.translate_slowly(iova, rest.len() as u64, Access::READ)?;
        for segment in Segments::new(self, first, others) {
            let Some((now, later)) = rest.split_at_mut_checked(segment.len()) else { break };
            segment.copy_to(now);
            rest = later;
        }
        Ok(())
    }

    /// Copies `buf` to `iova` and on. Nothing is copied when there is a fault. An empty buffer always works.
    ///
    /// # Errors
    /// See [`Fault`].
    #[inline]
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<(), Fault> {
        match self.translate_one(iova, buf.len() as u64, Access::WRITE) {
            Some(segment) => segment.copy_from(buf),
            None => self.write_slowly(iova, buf)?,
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn write_slowly(&self, iova: u64, buf: &[u8]) -> Result<(), Fault> {
        let mut rest = buf;
        if rest.is_empty() {
            return Ok(());
        }
        let (first, others) = self.translate_slowly(iova, rest.len() as u64, Access::WRITE)?;
        for segment in Segments::new(self, first, others) {
            let Some((now, later)) = rest.split_at_checked(segment.len()) else { break };
            segment.copy_from(now);
            rest = later;
        }
        Ok(())
    }

    /// A ring as the front-end set it up; `None` for an index no device has.
    #[must_use]
    pub fn queue_record(&self, queue: u16) -> Option<QueueRecord> {
        self.shared.table.queue(queue)
    }

    /// Which attachment it is of: a number that no other in this process ever has.
    pub(crate) fn source(&self) -> Source {
        self.shared.source
    }

    /// Grows with every translation that was taken away. A pointer that is kept across pins is void when it changed,
    /// and with its attachment. Ask *before* the translation that yields the pointer, and a guard of the same reader:
    /// what that translates from then on is no older than the generation.
    #[inline]
    #[must_use]
    pub fn removal_generation(&self) -> u64 {
        // Acquire pairs with the daemon's release; a removal that the pin is too late for has bumped it before the
        // fence that orders both.
        let generation = self.shared.table.header().epoch.removal_generation.load(Ordering::Acquire);
        // A node kept from before still says what was there before the removal. That serves the pin, but not a pointer
        // kept under this generation; so what is looked up from here on begins at the root word again.
        self.reader.forget_nodes();
        generation
    }

    /// Grows with every front-end session and device reset.
    #[inline]
    #[must_use]
    pub fn session_generation(&self) -> u64 {
        // Acquire, as are the ones below: pairs with the daemon's release.
        self.shared.table.header().state.session_generation.load(Ordering::Acquire)
    }

    /// Grows whenever a queue record changed.
    #[inline]
    #[must_use]
    pub fn queue_generation(&self) -> u64 {
        // As in `session_generation`.
        self.shared.table.header().state.queue_generation.load(Ordering::Acquire)
    }

    /// Virtio feature bits the driver acknowledged; 0 before it did.
    #[inline]
    #[must_use]
    pub fn acked_features(&self) -> u64 {
        // As in `session_generation`.
        self.shared.table.header().state.acked_features.load(Ordering::Acquire)
    }

    /// Whether a front-end is connected and its session may be served.
    #[inline]
    #[must_use]
    pub fn running(&self) -> bool {
        // As in `session_generation`.
        self.shared.table.header().state.flags.load(Ordering::Acquire) & FLAG_RUNNING != 0
    }

    pub(crate) fn reader(&self) -> &Reader {
        self.reader
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        self.reader.unpin();
    }
}

/// What of a range is still to be translated.
#[derive(Clone, Copy, Debug)]
enum Left {
    Range(IovaRange),
    Nothing,
    Invalid,
}

impl Left {
    #[inline]
    fn of(iova: u64, len: u64) -> Left {
        IovaRange::from_len(iova, len).map_or(Left::Invalid, Left::Range)
    }
}

/// The pieces of a range, each by a lookup of its own; ends with the first fault.
#[derive(Debug)]
pub(crate) struct Walk<'g> {
    guard: &'g Guard<'g>,
    left: Left,
    access: Access,
}

impl Walk<'_> {
    #[inline]
    fn next_piece(&mut self) -> Option<Result<Piece, Fault>> {
        let range = match self.left {
            Left::Range(range) => range,
            Left::Nothing => return None,
            Left::Invalid => {
                self.left = Left::Nothing;
                return Some(Err(Fault::Invalid));
            }
        };
        self.left = Left::Nothing;
        Some(self.guard.piece(range, self.access).map(|(piece, last)| {
            if last < range.last()
                && let Some(rest) = IovaRange::new(last + 1, range.last())
            {
                self.left = Left::Range(rest);
            }
            piece
        }))
    }

    fn pieces(mut self) -> impl Iterator<Item = Result<Piece, Fault>> {
        std::iter::from_fn(move || self.next_piece())
    }
}

impl<'g> Iterator for Walk<'g> {
    type Item = Result<Segment<'g>, Fault>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let guard = self.guard;
        Some(self.next_piece()?.and_then(|(offset, len)| guard.segment(offset, len).ok_or(Fault::Invalid)))
    }
}

impl std::iter::FusedIterator for Walk<'_> {}
