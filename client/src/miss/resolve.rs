//! Making a range available, with as many requests as that takes.

use std::time::{Duration, Instant};

use iotlb_proto::iova::{IovaRange, PAGE_MASK, PAGE_SHIFT};
use iotlb_proto::layout::worker::CELL_PAGES_MAX;
use smallvec::SmallVec;

use super::ticket::ring_if_wanted;
use super::{ResolveError, Spin, Ticket, pages};
use crate::guard::{Fault, Guard};
use crate::reader::Reader;
use crate::shared::slice_until;
use crate::{Access, Answer};

/// Rounds of asking for the same first missing page. The daemon answers *resolved* when it published the translation,
/// so a second round means that it was taken away again at once; a guest that does so on purpose must not keep a
/// worker busy.
const ROUNDS_MAX: u32 = 8;

/// Chunks that are asked for at a time, and perhaps one more for the end: the 64 readers of a worker share 256 cells.
const BATCH: usize = 32;

/// Pages at the end of a long request that are asked for apart: about as many as a front-end that answers one by one
/// handles while a thread wakes up.
const END_PAGES: u64 = 2;
/// Pages of a long request. The answer to a shorter one is not far from its end anyway.
const END_APART_FROM: u64 = 8;

/// Requests of a call that take no memory of their own: nearly every call has one.
const SHORT: usize = 2;

/// Lookups under one pin while searching for what is missing: some 10 microseconds.
const SCAN_LOOKUPS: u32 = 2048;

/// Ranges to be asked for, one request each.
type Chunks = SmallVec<[IovaRange; SHORT]>;

/// See [`Reader::resolve`].
pub(crate) fn resolve(
    reader: &mut Reader,
    iova: u64,
    len: u64,
    access: Access,
    deadline: Instant,
) -> Result<(), ResolveError> {
    if reader.must_not_wait() {
        return Err(ResolveError::Pinned);
    }
    let range = IovaRange::from_len(iova, len).ok_or(ResolveError::Invalid)?;
    if access.is_none() {
        return Err(ResolveError::Invalid);
    }
    let mut rounds = 0;
    let mut progress = None;
    loop {
        let wanted = match missing(reader, range, access)? {
            Missing::Nothing => return Ok(()),
            Missing::Memory => {
                if reader.shared().wait_mapped(deadline)? {
                    continue;
                }
                return Err(ResolveError::TimedOut);
            }
            Missing::Chunks(chunks) => chunks,
        };
        let first = wanted.first().map(|chunk| chunk.first());
        rounds = if first > progress { 1 } else { rounds + 1 };
        progress = progress.max(first);
        if rounds > ROUNDS_MAX {
            return Err(ResolveError::TimedOut);
        }
        if !ask(reader, wanted, access, deadline)? {
            rounds -= 1;
        }
    }
}

/// Posts all chunks for which there are cells, and waits for all answers. `false` when there was no cell at all.
fn ask(reader: &mut Reader, mut chunks: Chunks, access: Access, deadline: Instant) -> Result<bool, ResolveError> {
    // A thread that sleeps until the last page is there wakes up after it. So, while that pays, it sleeps for those
    // before it and spins for the end.
    let is_long = chunks.iter().map(|chunk| pages(*chunk)).sum::<u64>() >= END_APART_FROM;
    let spins_for_end = is_long && reader.end_spin().is_due();
    let end = if spins_for_end { take_end(&mut chunks) } else { None };
    let shared = reader.shared();
    let fill = |chunk: &IovaRange| Ticket::fill(shared, reader.slot(), *chunk, access);
    let mut tickets: SmallVec<[Ticket; SHORT]> = chunks.iter().map_while(fill).collect();
    let mut end = end.filter(|_| tickets.len() == chunks.len()).as_ref().and_then(fill);
    ring_if_wanted(shared);
    if tickets.is_empty() {
        // Other threads hold every cell. Theirs are answered within the daemon's time-out, so look again soon.
        shared.check()?;
        std::thread::sleep(slice_until(deadline).ok_or(ResolveError::TimedOut)?.min(Duration::from_millis(1)));
        return Ok(false);
    }
    wait_for_all(&mut tickets, reader.spin(), deadline)?;
    if let Some(end) = &mut end {
        wait_for_all(std::slice::from_mut(end), reader.end_spin(), deadline)?;
    } else if is_long {
        reader.end_spin().went_without();
    }
    Ok(true)
}

/// Waits until all are resolved, or one is refused.
fn wait_for_all(tickets: &mut [Ticket], spin: &mut Spin, deadline: Instant) -> Result<(), ResolveError> {
    let mut spinning = spin.begin();
    // From the last on: answers mostly come in order, so that this sleeps once.
    let result = tickets.iter_mut().rev().try_for_each(|ticket| match ticket.wait(&mut spinning, deadline)? {
        Answer::Resolved => Ok(()),
        Answer::Denied => Err(ResolveError::Denied),
        Answer::TimedOut => Err(ResolveError::TimedOut),
        Answer::Stopped => Err(ResolveError::Stopped),
        Answer::Invalid => Err(ResolveError::Invalid),
    });
    // A refusal that comes late is as good a reason not to spin.
    spin.answered(&spinning);
    result
}

/// Takes the last [`END_PAGES`] pages off, or all of the last chunk if it has no more. There is another chunk then, or
/// that one is longer.
fn take_end(chunks: &mut Chunks) -> Option<IovaRange> {
    let last = chunks.pop()?;
    let first_of_end = (last.last() & !PAGE_MASK).saturating_sub((END_PAGES - 1) << PAGE_SHIFT);
    let rest = first_of_end.checked_sub(1).and_then(|before| IovaRange::new(last.first(), before));
    chunks.extend(rest);
    if rest.is_some() { IovaRange::new(first_of_end, last.last()) } else { Some(last) }
}

/// What stands between a range and its translation.
enum Missing {
    Nothing,
    /// This process has not mapped all regions yet.
    Memory,
    /// These pages, the first [`BATCH`] chunks of them. Not empty.
    Chunks(Chunks),
}

/// Searches `range`, unpinning now and then.
fn missing(reader: &Reader, range: IovaRange, access: Access) -> Result<Missing, ResolveError> {
    let mut chunks = Chunks::new();
    let mut at = Some(range.first());
    while let Some(first) = at {
        let guard = reader.pin()?;
        let mut lookups = 0;
        while let Some(first) = at.filter(|_| lookups < SCAN_LOOKUPS) {
            lookups += 1;
            at = match step(&guard, first, range, access) {
                Ok(last) => last.checked_add(1).filter(|next| *next <= range.last()),
                Err(Fault::Miss { iova, .. }) => {
                    let last = (iova | PAGE_MASK).min(range.last());
                    if !add_page(&mut chunks, iova, last) {
                        return Ok(Missing::Chunks(chunks));
                    }
                    last.checked_add(1).filter(|next| *next <= range.last())
                }
                Err(Fault::Remapping) => return Ok(Missing::Memory),
                Err(Fault::Invalid) => return Err(ResolveError::Invalid),
            };
        }
        drop(guard);
        debug_assert!(at != Some(first), "every lookup gets on");
    }
    Ok(if chunks.is_empty() { Missing::Nothing } else { Missing::Chunks(chunks) })
}

/// The last address of the piece that begins at `first`.
fn step(guard: &Guard<'_>, first: u64, range: IovaRange, access: Access) -> Result<u64, Fault> {
    let last = (first | PAGE_MASK).min(range.last());
    if guard.quick(first, last - first + 1, access).is_some() {
        return Ok(last);
    }
    let len = (range.last() - first).saturating_add(1);
    match guard.walk(first, len, access).next() {
        Some(Ok(segment)) => Ok(first + (segment.len() as u64 - 1)),
        Some(Err(fault)) => Err(fault),
        None => Err(Fault::Invalid),
    }
}

/// Adds a missing page; `false` when the batch is full.
fn add_page(chunks: &mut Chunks, first: u64, last: u64) -> bool {
    if let Some(chunk) = chunks.last_mut()
        && chunk.last().checked_add(1) == Some(first)
        && let Some(longer) = IovaRange::new(chunk.first(), last)
        && pages(longer) <= CELL_PAGES_MAX
    {
        *chunk = longer;
        return true;
    }
    if chunks.len() == BATCH {
        return false;
    }
    chunks.extend(IovaRange::new(first, last));
    true
}

#[cfg(test)]
mod tests {
    use iotlb_proto::iova::PAGE_SIZE;

    use super::*;

    /// Chunks of so many pages each, with a gap in between, which begin and end within pages.
    fn chunks(counts: &[u64]) -> Chunks {
        let chunk = |(number, count): (u64, &u64)| {
            IovaRange::from_len((number << 20) + 5, count * PAGE_SIZE - 10).expect("below the end of the space")
        };
        (0..).zip(counts).map(chunk).collect()
    }

    fn lengths(chunks: &[IovaRange]) -> Vec<u64> {
        chunks.iter().map(|chunk| pages(*chunk)).collect()
    }

    #[test]
    fn the_end_and_the_rest_are_the_whole() {
        for (counts, body, end) in [
            (&[17, 15][..], &[17, 13][..], 2),
            (&[8], &[6], 2),
            (&[17, 3], &[17, 1], 2),
            (&[17, 2], &[17], 2),
            (&[17, 1], &[17], 1),
        ] {
            let whole = chunks(counts);
            let mut rest = whole.clone();
            let apart = take_end(&mut rest).expect("there is an end");
            assert_eq!((lengths(&rest), pages(apart)), (body.to_vec(), end), "of {counts:?}");
            assert_eq!(apart.last(), whole[whole.len() - 1].last());
            let last = whole[whole.len() - 1];
            if rest.len() == whole.len() {
                assert_eq!(rest[rest.len() - 1].last() + 1, apart.first(), "no gap, of {counts:?}");
                assert_eq!(rest[rest.len() - 1].first(), last.first());
            } else {
                assert_eq!((&rest[..], apart), (&whole[..whole.len() - 1], last), "of {counts:?}");
            }
        }
    }

    #[test]
    fn the_end_of_the_address_space_has_an_end() {
        let last = IovaRange::new(u64::MAX - 8 * PAGE_SIZE + 1, u64::MAX).expect("a range");
        let mut rest: Chunks = SmallVec::from_slice(&[last]);
        assert_eq!(take_end(&mut rest).map(|end| (pages(end), end.last())), Some((2, u64::MAX)));
        assert_eq!(lengths(&rest), [6]);
    }
}
