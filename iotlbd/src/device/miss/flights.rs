//! MISS messages that are out, in the order they were sent.

use std::collections::{BTreeSet, VecDeque};

use hdrhistogram::Histogram;
use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_MASK;

/// Most MISS messages without a reply. A Unix socket of default size holds about 278 unread ones; the front-end reads
/// them one by one, so more in flight would not be answered sooner.
pub(super) const IN_FLIGHT_MAX: usize = 64;
/// Digits kept of a page's time: two tell one per cent apart.
const PAGE_DIGITS: u8 = 2;

/// A message whose reply is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) page: u64,
    /// The address in that page that the message named.
    pub(super) iova: u64,
    pub(super) number: u64,
    pub(super) access: Access,
    /// It asked for a reply.
    pub(super) replies: bool,
    sent_ns: u64,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Flights {
    /// Those that a reply ends, to them or to a later one.
    due: VecDeque<Flight>,
    /// Pages that were sent without asking for a reply, because the front-end does not give any.
    silent: BTreeSet<u64>,
    /// The number of the last message, which is how many there were.
    sent: u64,
    /// When the last page came that was asked for.
    came_ns: u64,
    /// How long the front-end was busy with each page, in nanoseconds: from the message, or from the page before if
    /// that came later, since the front-end takes one after the other. Of pages that were seen together the first has
    /// all of the time.
    page_ns: Histogram<u64>,
}

impl Default for Flights {
    fn default() -> Flights {
        Flights {
            due: VecDeque::new(),
            silent: BTreeSet::new(),
            sent: 0,
            came_ns: 0,
            // Grows with the times that come: an idle device has none.
            page_ns: Histogram::new(PAGE_DIGITS).expect("0 to 5 digits"),
        }
    }
}

impl Flights {
    /// The number of the last message. The first has 1.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// How long the front-end was busy with each page that it was asked for.
    pub(super) fn page_ns(&self) -> &Histogram<u64> {
        &self.page_ns
    }

    /// How many messages may still go out.
    pub(super) fn room(&self) -> usize {
        IN_FLIGHT_MAX.saturating_sub(self.due.len() + self.silent.len())
    }

    /// A message for the page of `iova` goes out, which asks for a reply if `replies`.
    pub(super) fn depart(&mut self, iova: u64, access: Access, replies: bool, now_ns: u64) {
        self.sent += 1;
        let page = iova & !PAGE_MASK;
        self.due.push_back(Flight { page, iova, number: self.sent, access, replies, sent_ns: now_ns });
    }

    /// The same to a front-end that replies to no message.
    pub(super) fn depart_silently(&mut self, page: u64) {
        self.sent += 1;
        self.silent.insert(page);
    }

    /// Takes the time of what is there now, if it was asked for with message `number`; returns whether it was.
    pub(super) fn came(&mut self, number: u64, now_ns: u64) -> bool {
        // Numbers follow each other, unless the front-end gave replies up for a while: such a time is not taken.
        let place = self.due.front().and_then(|oldest| usize::try_from(number.checked_sub(oldest.number)?).ok());
        let flight = place.and_then(|place| self.due.get(place)).filter(|flight| flight.number == number);
        let Some(flight) = flight else { return false };
        // An Err cannot be: it grows up to any number.
        let _ = self.page_ns.record(now_ns.saturating_sub(flight.sent_ns.max(self.came_ns)));
        self.came_ns = now_ns;
        true
    }

    /// Whether a reply is due.
    pub(super) fn expects_reply(&self) -> bool {
        self.due.iter().any(|flight| flight.replies)
    }

    /// Takes out the oldest message whose reply is due.
    pub(super) fn land(&mut self) -> Option<Flight> {
        self.due.pop_front()
    }

    /// Takes out a message without a reply. `false`: there was none for the page.
    pub(super) fn land_silently(&mut self, page: u64) -> bool {
        self.silent.remove(&page)
    }

    /// No reply will come any more.
    pub(super) fn forget(&mut self) {
        self.due.clear();
        self.silent.clear();
    }
}

#[cfg(test)]
impl Flights {
    /// Messages whose reply is due.
    pub(super) fn due(&self) -> &VecDeque<Flight> {
        &self.due
    }

    /// Pages of messages without a reply.
    pub(super) fn silent(&self) -> &BTreeSet<u64> {
        &self.silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_the_time_since_its_message_or_the_page_before() {
        let mut flights = Flights::default();
        for page in [1, 2, 3] {
            flights.depart(page << 12, Access::READ, page == 3, 1_000);
        }
        assert!(flights.came(1, 11_000) && flights.came(3, 31_000));
        assert!(!flights.came(4, 40_000) && !flights.came(0, 40_000), "there is no such message");
        assert_eq!(flights.page_ns().len(), 2);
        assert!(flights.page_ns().equivalent(flights.page_ns().max(), 20_000));
        flights.land();
        assert!(!flights.came(1, 50_000), "it has landed");
        assert!(flights.came(2, 50_000));
    }

    #[test]
    fn a_time_is_never_taken_from_another_message() {
        let mut flights = Flights::default();
        flights.depart(1 << 12, Access::READ, true, 1_000);
        flights.depart_silently(2);
        flights.depart(3 << 12, Access::READ, true, 1_000);
        assert!(!flights.came(2, 2_000), "of that one nothing is known");
        assert!(!flights.came(3, 2_000), "nor is it looked for behind a gap");
        assert!(flights.came(1, 2_000));
    }
}
