//! What happens to a ring under one pin.

use std::marker::PhantomData;

use iotlb_proto::sync::{Ordering, full_fence};
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;

use super::chain::{Chain, Parts};
use super::event;
use super::fault::{Broken, MissList, MissPlace, RingFault};
use super::memory::RingMemory;
use super::ring::{INDEX_OFFSET, Limits, RING_HEADER, RingState, U16_SIZE, USED_SIZE};
use super::table::TableView;
use super::walk::Walk;

/// `avail.flags`: the driver does not want to be called.
const NO_INTERRUPT: u16 = 1;
/// `used.flags`: the device does not want to be kicked.
const NO_NOTIFY: u16 = 1;

/// Storage of chains that is kept for the next ones.
const SPARE_MAX: usize = 64;

/// A ring under a pin. When it ends, chains that were taken and not completed are back in the ring, and
/// completed ones are published (the call that they may deserve is remembered).
#[derive(Debug)]
pub struct Burst<'g, M: RingMemory + ?Sized> {
    memory: &'g M,
    state: &'g mut RingState,
    desc: TableView<'g>,
    avail: TableView<'g>,
    used: TableView<'g>,
    size: u16,
    event_idx: bool,
    indirect: bool,
    limits: Limits,
    /// Bytes of the chains from the next one on that the caller soon has a use for; see [`Burst::look_ahead_for`].
    ahead_bytes: usize,
}

impl<'g, M: RingMemory + ?Sized> Burst<'g, M> {
    #[expect(clippy::too_many_arguments, reason = "called from one place, with its own locals")]
    pub(super) fn new(
        memory: &'g M,
        state: &'g mut RingState,
        desc: TableView<'g>,
        avail: TableView<'g>,
        used: TableView<'g>,
        record: &QueueRecord,
        features: u64,
        limits: Limits,
    ) -> Burst<'g, M> {
        let event_idx = features & virtio::EVENT_IDX != 0;
        let indirect = features & virtio::INDIRECT_DESC != 0;
        Burst {
            memory,
            state,
            desc,
            avail,
            used,
            size: record.size,
            event_idx,
            indirect,
            limits,
            ahead_bytes: usize::MAX,
        }
    }

    /// The next chain, whole and translated; `None` when the driver has posted no more. Nothing is consumed by an
    /// error.
    ///
    /// # Errors
    ///
    /// [`RingFault::Miss`] with the missing pages of this chain and of those behind it, [`RingFault::Unmapped`],
    /// [`RingFault::Remapping`], [`RingFault::Broken`].
    pub fn next_chain(&mut self) -> Result<Option<Chain<'g>>, RingFault> {
        let position = self.state.next_used.wrapping_add(self.state.taken);
        if !self.is_posted(position)? {
            return Ok(None);
        }
        let mut misses = MissList::default();
        let mut parts = self.state.spare.pop().unwrap_or_default();
        let walked = self.walk(position, &mut parts, &mut misses);
        match walked {
            Ok((head, true)) => {
                self.state.taken += 1;
                Ok(Some(Chain { head, position, parts, guard: PhantomData }))
            }
            Ok((_, false)) => {
                let required = misses.len();
                self.look_ahead(position, &mut parts, &mut misses);
                self.keep(parts);
                Err(RingFault::Miss(misses.into_set(required, MissPlace::Chain { position })))
            }
            Err(fault) => {
                self.keep(parts);
                Err(self.note(fault))
            }
        }
    }

    /// Says for how many bytes of the chains from the next one on the caller soon has a use: the look-ahead ends with
    /// the chain that holds the last of them. Unlimited at first. A chain counts as none while its indirect table is
    /// missing.
    pub fn look_ahead_for(&mut self, bytes: usize) {
        self.ahead_bytes = bytes;
    }

    /// Chains that are posted and not taken yet.
    ///
    /// # Errors
    ///
    /// [`RingFault::Broken`].
    pub fn posted(&mut self) -> Result<u16, RingFault> {
        let position = self.state.next_used.wrapping_add(self.state.taken);
        self.load_avail()?;
        Ok(self.state.avail_seen.wrapping_sub(position))
    }

    /// Writes the used element of `chain`, the oldest that was taken: `written` bytes were stored in it. The
    /// driver sees it after [`Burst::publish`].
    ///
    /// # Panics
    ///
    /// When a chain that was taken earlier is not completed yet (a mistake of the caller, not of the guest).
    pub fn complete(&mut self, chain: Chain<'g>, written: usize) {
        assert!(chain.position == self.state.next_used && self.state.taken > 0, "chains are completed in order");
        let written = written.min(chain.writable_len());
        self.state.taken -= 1;
        // A chain is limited to far less than 4 GiB.
        self.push_used(chain.head, u32::try_from(written).unwrap_or(u32::MAX));
        self.keep(chain.parts);
    }

    /// Gives all chains back that were taken and not completed.
    pub fn put_back(&mut self) {
        self.state.taken = 0;
    }

    /// Completes the chain at `position`, whose pages were denied, with nothing written and without looking at its
    /// buffers; those in front of it as well, since `used.idx` is all that the ring keeps of its position, and chains
    /// leave in order. Returns how many there were: none if that chain is not among those that are posted, fewer if the
    /// driver broke the ring half way, which the next call says.
    ///
    /// # Errors
    ///
    /// [`RingFault::Broken`], and nothing was completed.
    pub fn reject_through(&mut self, position: u16) -> Result<u16, RingFault> {
        let count = position.wrapping_sub(self.state.next_used).wrapping_add(1);
        if !(1..=self.posted()?).contains(&count) {
            return Ok(0);
        }
        for done in 0..count {
            match self.reject_next() {
                Ok(_) => {}
                Err(_) if done > 0 => return Ok(done),
                Err(fault) => return Err(fault),
            }
        }
        Ok(count)
    }

    /// Completes the next chain with nothing written and without looking at its buffers. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// [`RingFault::Broken`].
    ///
    /// # Panics
    ///
    /// When a chain that was taken is not completed yet (a mistake of the caller, not of the guest).
    pub fn reject_next(&mut self) -> Result<bool, RingFault> {
        assert!(self.state.taken == 0, "chains are completed in order");
        let position = self.state.next_used;
        if !self.is_posted(position)? {
            return Ok(false);
        }
        let head = self.head(position).map_err(|broken| self.note(broken.into()))?;
        self.push_used(head, 0);
        Ok(true)
    }

    /// Shows the driver everything that was completed, with one store. Returns whether it wants a call; signal it
    /// before the unpin.
    #[must_use = "the driver may wait for a call"]
    pub fn publish(&mut self) -> bool {
        let old = self.state.published;
        let new = self.state.next_used;
        if new != old {
            // Release: the used elements and the buffers come first. Partner: the driver's read barrier between its
            // load of `used.idx` and its loads of the elements (section 2.7.14).
            self.used.store_u16(INDEX_OFFSET, new, Ordering::Release);
            self.state.published = new;
        } else if !self.state.call_owed {
            return false;
        }
        // Store `used.idx`, then load what the driver wants. Partner: the driver's full barrier between its store of
        // `used_event` (or `avail.flags`) and its load of `used.idx`. One of the two sees the other's store.
        full_fence();
        let wanted = if self.event_idx {
            let used_event = self.avail.load_u16(RING_HEADER + usize::from(self.size) * U16_SIZE, Ordering::Relaxed);
            match self.state.signalled {
                Some(signalled) => event::passes(used_event, new, signalled),
                None => true,
            }
        } else {
            self.avail.load_u16(0, Ordering::Relaxed) & NO_INTERRUPT == 0
        };
        let call = wanted || self.state.call_owed;
        // With event indexes the interval since the last *check* counts: what was not wanted then was announced by a
        // new `used_event`, which a later check sees.
        self.state.signalled = Some(new);
        self.state.call_owed = false;
        call
    }

    /// Asks the driver for a kick when it posts something behind the chains that were taken; so ask *before* putting
    /// chains back that were too few. Returns whether there is something already: then work on, since no kick may come
    /// for it.
    ///
    /// # Errors
    ///
    /// [`RingFault::Broken`].
    pub fn enable_kick(&mut self) -> Result<bool, RingFault> {
        let position = self.state.next_used.wrapping_add(self.state.taken);
        if self.event_idx {
            let offset = RING_HEADER + usize::from(self.size) * USED_SIZE;
            self.used.store_u16(offset, position, Ordering::Relaxed);
        } else {
            self.used.store_u16(0, 0, Ordering::Relaxed);
        }
        // Store the wish, then load `avail.idx`. Partner: the driver's full barrier between its store of `avail.idx`
        // and its load of `avail_event` (or `used.flags`). One of the two sees the other's store.
        full_fence();
        self.load_avail()?;
        Ok(self.state.avail_seen != position)
    }

    /// Tells the driver that kicks are of no use now. A hint: with event indexes the old one simply lies behind.
    pub fn disable_kick(&mut self) {
        if !self.event_idx {
            self.used.store_u16(0, NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Whether the available ring reaches beyond `position`.
    fn is_posted(&mut self, position: u16) -> Result<bool, RingFault> {
        if self.state.avail_seen == position {
            self.load_avail()?;
        }
        Ok(self.state.avail_seen != position)
    }

    fn load_avail(&mut self) -> Result<(), RingFault> {
        // Acquire: the entries and descriptors that it announces are read later. Partner: the driver's write barrier
        // before its store of `avail.idx` (section 2.7.13.3).
        let avail = self.avail.load_u16(INDEX_OFFSET, Ordering::Acquire);
        let position = self.state.next_used;
        let ahead = avail.wrapping_sub(position);
        // Nor may it step back behind what was taken already.
        if ahead > self.size || ahead < self.state.taken {
            return Err(self.note(Broken::AvailIndex { avail, position, size: self.size }.into()));
        }
        self.state.avail_seen = avail;
        Ok(())
    }

    fn head(&self, position: u16) -> Result<u16, Broken> {
        let entry = usize::from(position & (self.size - 1));
        let head = self.avail.load_u16(RING_HEADER + entry * U16_SIZE, Ordering::Relaxed);
        if head < self.size { Ok(head) } else { Err(Broken::Head { head, size: self.size }) }
    }

    fn walk(&mut self, position: u16, parts: &mut Parts, misses: &mut MissList) -> Result<(u16, bool), RingFault> {
        let head = self.head(position)?;
        let walk = Walk {
            memory: self.memory,
            descriptors: self.desc,
            size: self.size,
            indirect: self.indirect,
            bytes_max: self.limits.chain_bytes_max,
            place: MissPlace::Chain { position },
        };
        let complete = walk.chain(head, parts, &mut self.state.scratch, misses)?;
        Ok((head, complete))
    }

    /// Lists what the chains behind `position` miss. Their faults come up when it is their turn.
    fn look_ahead(&mut self, position: u16, parts: &mut Parts, misses: &mut MissList) {
        if self.load_avail().is_err() {
            return;
        }
        misses.seal();
        let behind = self.state.avail_seen.wrapping_sub(position).saturating_sub(1);
        let mut bytes = parts.writable_len + parts.readable_len;
        for step in 1..=behind.min(self.limits.lookahead) {
            if bytes >= self.ahead_bytes
                || misses.is_full()
                || self.walk(position.wrapping_add(step), parts, misses).is_err()
            {
                return;
            }
            bytes = bytes.saturating_add(parts.writable_len + parts.readable_len);
        }
    }

    fn push_used(&mut self, head: u16, written: u32) {
        let entry = usize::from(self.state.next_used & (self.size - 1));
        self.used.write_used(RING_HEADER + entry * USED_SIZE, u32::from(head), written);
        self.state.next_used = self.state.next_used.wrapping_add(1);
    }

    fn keep(&mut self, mut parts: Parts) {
        if self.state.spare.len() < SPARE_MAX {
            parts.clear();
            self.state.spare.push(parts);
        }
    }

    fn note(&mut self, fault: RingFault) -> RingFault {
        if let RingFault::Broken(broken) = fault {
            self.state.broken = Some(broken);
        }
        fault
    }
}

impl<M: RingMemory + ?Sized> Drop for Burst<'_, M> {
    fn drop(&mut self) {
        self.state.taken = 0;
        if self.state.next_used != self.state.published && self.publish() {
            self.state.call_owed = true;
        }
    }
}
