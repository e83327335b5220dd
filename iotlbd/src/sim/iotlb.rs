//! The IOTLB side of a session: misses answered, pages unmapped strictly and lazily.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use iotlb_proto::access::Access;
use iotlb_proto::iova::{PAGE_MASK, PAGE_SIZE};

use super::SimError;
use super::channel::poll_fds;
use super::front_end::FrontEnd;
use super::viommu::{LAZY_FLUSH, MappedPage};
use super::wire::{BACKEND_IOTLB, Iotlb, MessageHeader, code};

const KIND_MISS: u8 = 1;
const KIND_ACCESS_FAIL: u8 = 4;

/// What happened on the IOTLB, as the front-end saw it.
#[derive(Clone, Debug)]
pub struct IotlbStats {
    /// Misses that came.
    pub misses: u64,
    /// Of these, for pages the guest has not mapped.
    pub denied: u64,
    /// "Permission denied" notes that came.
    pub access_fails: u64,
    /// Translations sent.
    pub updates: u64,
    /// Invalidations sent and acknowledged; every message of a flush and every queue pair's copy counts.
    pub invalidations: u64,
    /// From sending an invalidation to its acknowledgement, in ns.
    pub drain_ns: Histogram<u64>,
    /// From sending an update to its acknowledgement, in ns.
    pub update_ns: Histogram<u64>,
}

impl IotlbStats {
    /// Nothing happened yet.
    #[must_use]
    pub fn new() -> IotlbStats {
        IotlbStats {
            misses: 0,
            denied: 0,
            access_fails: 0,
            updates: 0,
            invalidations: 0,
            drain_ns: latency_histogram(),
            update_ns: latency_histogram(),
        }
    }
}

impl Default for IotlbStats {
    fn default() -> IotlbStats {
        IotlbStats::new()
    }
}

/// Longest latency that is told from longer ones, in ns: a minute, longer than every watchdog.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// A histogram of latencies in ns, two digits exact. Record with `saturating_record`.
#[must_use]
pub fn latency_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 2)
        .unwrap_or_else(|_| unreachable!("bounds and digits are in the allowed ranges"))
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// One of the caller's descriptors can be read: its place in the list.
    Ready(usize),
    /// The time is over.
    TimedOut,
}

impl FrontEnd {
    /// Unmaps one page strictly: out of the page table, INVALIDATE, acknowledgement. When this returns no back-end
    /// process uses the page through `iova`. Returns what was mapped.
    pub fn unmap(&mut self, iova: u64) -> Result<MappedPage, SimError> {
        let mapped = self.viommu.unmap(iova)?;
        self.invalidate(iova, PAGE_SIZE)?;
        Ok(mapped)
    }

    /// Unmaps one page lazily: out of the page table only. The device may use the page until [`FrontEnd::flush`].
    pub fn unmap_lazily(&mut self, iova: u64) -> Result<MappedPage, SimError> {
        self.viommu.unmap(iova)
    }

    /// A lazy flush: everything but the interrupt window, in the two ranges an Intel vIOMMU uses.
    pub fn flush(&mut self) -> Result<(), SimError> {
        for (first, size) in LAZY_FLUSH {
            self.invalidate(first, size)?;
        }
        Ok(())
    }

    /// Sends INVALIDATE and waits for its acknowledgement, once for each queue pair as QEMU does.
    pub fn invalidate(&mut self, iova: u64, size: u64) -> Result<(), SimError> {
        self.invalidate_and(iova, size, |_| Ok(()))
    }

    /// As [`FrontEnd::invalidate`], and calls `meanwhile` between sending the first message and waiting for its
    /// acknowledgement. What `meanwhile` does to the pages is what a daemon that acknowledges too early would allow:
    /// tests use it to prove that the stale-read oracle is awake.
    pub fn invalidate_and(
        &mut self,
        iova: u64,
        size: u64,
        meanwhile: impl FnOnce(&mut FrontEnd) -> Result<(), SimError>,
    ) -> Result<(), SimError> {
        let body = Iotlb::invalidate(iova, size).encode();
        let mut meanwhile = Some(meanwhile);
        for _ in 0..self.options.queue_pairs {
            let sent = Instant::now();
            let header = MessageHeader::request(code::IOTLB_INVALIDATE, Iotlb::LEN, true);
            self.main.send(code::IOTLB_INVALIDATE.1, header, &body, &[])?;
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile(self)?;
            }
            self.expect_zero(code::IOTLB_INVALIDATE)?;
            self.stats.drain_ns.saturating_record(nanoseconds_since(sent));
            self.stats.invalidations += 1;
        }
        Ok(())
    }

    /// Sends the translation of a mapped page unasked, and waits for the acknowledgement.
    pub fn push_update(&mut self, iova: u64) -> Result<(), SimError> {
        let page = iova & !PAGE_MASK;
        let mapped = self
            .viommu
            .walk(page)
            .ok_or_else(|| SimError::Usage { what: format!("IOVA {page:#x} is not mapped, nothing to send") })?;
        self.update(page, mapped)
    }

    /// Answers the misses that have arrived, one after the other, and returns how many there were. Does not wait.
    pub fn serve_misses(&mut self) -> Result<usize, SimError> {
        let mut served = 0;
        while let Some(channel) = &self.back_end {
            if !channel.readable()? {
                break;
            }
            self.serve_one()?;
            served += 1;
        }
        Ok(served)
    }

    /// Answers misses until one of `fds` can be read or `timeout` is over. The device's own doings come first: a
    /// guest's driver waits for them.
    pub fn serve_until(&mut self, fds: &[BorrowedFd<'_>], timeout: Duration) -> Result<Wake, SimError> {
        let deadline = Instant::now() + timeout;
        loop {
            let Some(channel) = &self.back_end else {
                return Err(SimError::Usage { what: "there is no back-end channel".to_owned() });
            };
            let mut watched = vec![channel.as_fd(), self.main.as_fd()];
            watched.extend_from_slice(fds);
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = poll_fds(&watched, left).map_err(|source| SimError::Receive { what: "anything", source })?;
            if let Some(index) = ready[2..].iter().position(|ready| *ready) {
                return Ok(Wake::Ready(index));
            }
            if ready[0] {
                self.serve_one()?;
            } else if ready[1] {
                // Nothing is due on the main channel: either its end, or a message nobody asked for.
                let message = self.main.receive("the next miss")?;
                return Err(SimError::Protocol { what: format!("{:?} came unasked", message.header) });
            } else if left.is_zero() {
                return Ok(Wake::TimedOut);
            }
        }
    }

    /// One miss as QEMU serves it: UPDATE on the main channel, wait for its acknowledgement, then the answer on the
    /// back-end channel if one is wanted.
    fn serve_one(&mut self) -> Result<(), SimError> {
        let Some(channel) = &self.back_end else { return Ok(()) };
        let message = channel.receive("a miss")?;
        let status = match (message.header.request, Iotlb::decode(&message.body)) {
            (BACKEND_IOTLB, Some(request)) if request.kind == KIND_MISS => u64::from(!self.answer_miss(request)?),
            (BACKEND_IOTLB, Some(request)) if request.kind == KIND_ACCESS_FAIL => {
                self.stats.access_fails += 1;
                1
            }
            _ => {
                let what = format!("{:?} on the back-end channel is not a miss", message.header);
                return Err(SimError::Protocol { what });
            }
        };
        if message.header.needs_reply()
            && let Some(channel) = &self.back_end
        {
            let header = MessageHeader::reply(message.header.request);
            channel.send("the answer to a miss", header, &status.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    fn answer_miss(&mut self, request: Iotlb) -> Result<bool, SimError> {
        self.stats.misses += 1;
        let wanted = Access::from_bits(request.permission).filter(|access| !access.is_none());
        let Some(wanted) = wanted else {
            return Err(SimError::Protocol { what: format!("permission {} in a miss", request.permission) });
        };
        let mapped = self.viommu.walk(request.iova);
        match mapped {
            // QEMU looks no closer than this, and then hands out read-write.
            Some(mapped) if !self.options.exact_permissions || mapped.access.allows(wanted) => {
                self.update(request.iova & !PAGE_MASK, mapped)?;
                Ok(true)
            }
            _ => {
                self.stats.denied += 1;
                Ok(false)
            }
        }
    }

    fn update(&mut self, iova: u64, mapped: MappedPage) -> Result<(), SimError> {
        let access = if self.options.exact_permissions { mapped.access } else { Access::READ_WRITE };
        let user_address = self.guest.user_address(mapped.page)?;
        let sent = Instant::now();
        self.acknowledged(code::IOTLB_UPDATE, &Iotlb::update(iova, PAGE_SIZE, user_address, access).encode(), &[])?;
        self.stats.update_ns.saturating_record(nanoseconds_since(sent));
        self.stats.updates += 1;
        Ok(())
    }
}

/// Time since `start` in ns; more than 584 years do not happen.
#[must_use]
pub fn nanoseconds_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
