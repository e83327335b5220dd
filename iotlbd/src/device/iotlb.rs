//! UPDATE and INVALIDATE.
//!
//! An UPDATE says what a range means from now on, so whatever was known of the range before is void in any case: a part
//! that this side cannot reach (outside every region, no permission, an address that wraps) answers non-zero *and*
//! takes away what the range meant so far. Being without a translation costs a miss; keeping an old one costs the
//! guest's memory. An INVALIDATE takes each UPDATE that it touches as a whole ([`super::extents`]).
//!
//! For the same reason translations count from the start of the first ring to the end of the last. Front-ends send no
//! invalidations for a device of which no ring runs, and QEMU may answer a MISS after it stopped the device, or between
//! two runs. So the table is cleared when the last ring stops, and again when the next one starts: what an UPDATE
//! brought in between is asked for anew. A front-end without a back-end channel is never asked, so it answers nothing
//! late, and what it says before a ring starts counts.

use iotlb_proto::iova::IovaRange;
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage};

use super::machine::Device;
use super::miss::pages_of;
use super::request::RequestError;
use super::ring::Ring;
use super::take::{Due, Job, Part};

impl Device {
    /// Handles an IOTLB message of the front-end. `due` is the reply for success.
    pub(super) fn iotlb(&mut self, message: &IotlbMessage, due: Due) -> Result<Job, RequestError> {
        match message.kind {
            IotlbKind::Update => self.update(message, due),
            IotlbKind::Invalidate => Ok(self.invalidate(message, due)),
            IotlbKind::Miss | IotlbKind::AccessFail => Err(RequestError::WrongDirection(message.kind)),
        }
    }

    fn update(&mut self, message: &IotlbMessage, due: Due) -> Result<Job, RequestError> {
        if !self.session.iommu() {
            return Err(RequestError::NoIommu);
        }
        if message.size == 0 {
            return Err(RequestError::EmptyUpdate { iova: message.iova });
        }
        let mut job = Job::give(due);
        let range = IovaRange::from_len(message.iova, message.size);
        let pieces = range.and_then(|range| self.memory.split_user(message.user_address, range.len_minus_one()));
        let (range, pieces) = match (range, pieces) {
            (Some(range), Some(pieces)) if !message.access.is_none() => (range, pieces),
            _ => {
                let range = IovaRange::from_invalidate(message.iova, message.size);
                job.ask_rings = self.holds_ring_page(range);
                job.parts.push(Part::Remove { range });
                self.refuse_update(&mut job, message);
                return Ok(job);
            }
        };
        self.extents.add(range);
        let mut refused = false;
        for piece in pieces {
            let first = range.first() + piece.offset;
            let Some(range) = IovaRange::new(first, first + piece.len_minus_one) else { continue };
            match piece.arena {
                Some(target) => job.parts.push(Part::Insert { range, target, access: message.access }),
                None => {
                    refused = true;
                    job.ask_rings |= self.holds_ring_page(range);
                    job.parts.push(Part::Remove { range });
                }
            }
        }
        if refused {
            self.refuse_update(&mut job, message);
        } else {
            self.counters.updates += 1;
        }
        Ok(job)
    }

    fn refuse_update(&mut self, job: &mut Job, message: &IotlbMessage) {
        self.counters.refused += 1;
        if self.may_complain() {
            tracing::warn!(?message, "UPDATE names memory outside the memory table or no permission, or wraps");
        }
        job.due = job.due.refused();
    }

    /// Whether the table has a page of a started ring in `range`, which goes and is to be asked for again. What is not
    /// there is not: ring pages that are always refused would be asked for on and on, for each other's sake.
    fn holds_ring_page(&self, range: IovaRange) -> bool {
        let areas = self.rings.iter().filter_map(Ring::areas).flatten();
        let mut pages = areas.filter_map(|(area, _)| area.intersection(range)).flat_map(pages_of);
        pages.any(|page| self.table.lookup(page).is_some())
    }

    fn invalidate(&mut self, message: &IotlbMessage, due: Due) -> Job {
        self.counters.invalidations += 1;
        let mut job = Job::take(due);
        if !self.session.iommu() {
            // Without IOMMU nothing is translated by the front-end, so there is nothing it could take back.
            if self.may_complain() {
                tracing::warn!("INVALIDATE without ACCESS_PLATFORM: nothing to do");
            }
            return job;
        }
        let range = self.extents.widen(IovaRange::from_invalidate(message.iova, message.size));
        // Each pair of queues brings the same once more. Where nothing goes, nothing has to be asked for: with 64 pairs
        // the look at all of their ring pages, for every one of 64 messages, would take longer than the messages.
        job.ask_rings = self.table.remove(range) > 0
            && self.rings.iter().filter_map(Ring::areas).flatten().any(|(area, _)| area.overlaps(range));
        job
    }
}
