//! Pin, unpin and grace periods across processes.
//!
//! # What it is for
//!
//! The daemon takes translations away from workers that read them without asking anybody. Before it tells the
//! front-end that a translation is gone, no reader anywhere may still use it; and before it uses a tree node for
//! something else, no reader may still walk through it. Both need the same thing: to know that every reader that
//! *could* have seen the old state is done. That is a grace period.
//!
//! # The parts
//!
//! The table holds one word, the **epoch**, which only the daemon writes. Every reader thread has one **slot**, a word
//! on a line of its own in its worker's segment, which only it writes: 0 while it is not reading, else the epoch it
//! found when it began.
//!
//! ```text
//! reader: pin     e = epoch                       writer: take   unlink (plain stores)
//!                 slot = e            (release)                  removal generation += 1
//!                 full fence F_r                                 epoch = E, one more than before  (release)
//!         read    loads of the table                             full fence F_w
//!         unpin   slot = 0            (release)          wait    until every slot was 0 or >= E  (acquire)
//! ```
//!
//! # Why that is enough
//!
//! Take a reader's pin and the writer's grace period with epoch E. Both fences are sequentially consistent, so F_r and
//! F_w have an order.
//!
//! * *F_w before F_r.* Whatever the writer stored before F_w is visible to every load after F_r: the reader finds
//!   nothing that was unlinked. It does no harm that the writer did not wait for it.
//! * *F_r before F_w.* The slot was stored before F_r, so the writer's loads after F_w see that store or a later one in
//!   the slot. Three values are possible.
//!   * The pin's own value, below E: the writer waits. The value must change for the wait to end, and the next value is
//!     the 0 of unpin, or a later pin's.
//!   * The pin's own value, at least E: the reader loaded the epoch from the store of E or a later one, each of them a
//!     release, and fenced afterwards. So that store synchronises with F_r, and the reader sees all that was unlinked
//!     before E was stored.
//!   * A later value. Every store to the slot is a release store that follows the pin's loads in program order, and the
//!     writer loads the slot with acquire: all loads of the old pin happened before the writer goes on.
//!
//! So when the wait is over, no reader can reach what was unlinked before E was stored. A single `xchg` in place of
//! store and F_r is not enough in this argument, nor in the model: an exchange orders its own word, it does not put the
//! *following* loads after it for everybody. (The processor of the day may do so; the language does not promise it.)
//! The release of the pin's store costs nothing on x86 and closes the third case where the reader has already pinned
//! again.
//!
//! The argument is about one pin and one slot, so slots need not be free at the same time: each is done with once it
//! was seen at 0 or at least E after F_w. A pin that comes later, with whatever epoch, is one of the first case.
//!
//! A worker that gets the table after F_w has nothing but pins of the first case, whatever its slots hold.
//!
//! A new reader slot is announced by a mark in the slot before it, stored before the first pin's F_r. A writer that
//! misses the mark has F_w before that F_r: first case.
//!
//! # Which grace period is enough
//!
//! Several takes share one grace period, and most invalidations find nothing to remove. The rule is in [`Grace`]: each
//! unlink is stamped with the epoch of its moment, and a take may be acknowledged when a grace period has completed
//! whose epoch is *above the stamp of the last unlink*, that is, one that was begun after it. "Nothing was removed
//! since the last completed grace period" would be wrong: something unlinked *while* a grace period runs, by an
//! eviction say, is not covered by it.
//!
//! # What it asks of readers
//!
//! A pin is a promise to come to an end: no lock, no blocking call, no waiting for a miss inside it. A reader that
//! breaks the promise holds up the guest, and the daemon ends it. Pins are not async-signal-safe: a handler that
//! interrupts a pin or unpin halfway must not use the same slot.

pub mod grace;
pub mod slot;

pub use grace::{Grace, Stamp};
pub use slot::{is_drained, is_pinned, pin, unpin};
