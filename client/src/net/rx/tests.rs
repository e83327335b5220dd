//! Packets into the rings of drivers that know more or less.

use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_SIZE;

use super::*;
use crate::net::header::FLAG_DATA_VALID;
use crate::queue::vring::testing::{Buffer, Driver, FakeMemory};

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10_0000;
const DATA_PAGES: u64 = 32;
const MODERN: u64 = virtio::VERSION_1 | virtio::EVENT_IDX | virtio::INDIRECT_DESC;
const MERGEABLE: u64 = MODERN | virtio::NET_MRG_RXBUF;

fn memory() -> FakeMemory {
    let memory = FakeMemory::new(40);
    for (page, iova) in (0..).zip([DESC, AVAIL, USED]) {
        memory.map(iova, page, Access::READ_WRITE);
    }
    for page in 0..DATA_PAGES {
        memory.map(DATA + page * PAGE_SIZE, 3 + usize::try_from(page).expect("few"), Access::READ_WRITE);
    }
    memory.resolve_everything();
    memory
}

fn buffer(page: u64, len: u32) -> Buffer {
    Buffer { iova: DATA + page * PAGE_SIZE, len, writable: true }
}

/// A packet: header bytes that can be told apart, then `len` bytes of frame.
fn packet(len: usize) -> Vec<u8> {
    let header = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0xee, 0xee];
    header.into_iter().chain((0..len).map(|at| (at * 7).to_le_bytes()[0])).collect()
}

struct Setup<'m> {
    memory: &'m FakeMemory,
    driver: Driver<'m>,
    ring: Vring,
    backlog: Backlog,
    features: u64,
}

impl<'m> Setup<'m> {
    fn new(memory: &'m FakeMemory, features: u64) -> Setup<'m> {
        let driver = Driver::new(memory, 8, DESC, AVAIL, USED, 0);
        Setup { memory, driver, ring: Vring::default(), backlog: Backlog::default(), features }
    }

    fn deliver(&mut self) -> Delivered {
        deliver(&mut self.ring, self.memory, &self.driver.record, self.features, &mut self.backlog)
    }
}

#[test]
fn a_large_packet_is_spread_over_mergeable_buffers() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    let heads: Vec<_> = (0..4).map(|page| setup.driver.post(&[buffer(page, 1500)]).expect("room")).collect();
    setup.backlog.push(packet(3000));
    setup.backlog.push(packet(60));
    let done = setup.deliver();
    assert!(done.call && done.fault.is_none() && !done.starved);
    assert_eq!((done.packets, done.chains, done.bytes), (2, 4, 3012 + 72));
    assert_eq!(setup.driver.collect(), [(heads[0], 1500), (heads[1], 1500), (heads[2], 12), (heads[3], 72)]);
    let sent = packet(3000);
    let mut got = memory.driver_read(DATA, 1500);
    got.extend(memory.driver_read(DATA + PAGE_SIZE, 1500));
    got.extend(memory.driver_read(DATA + 2 * PAGE_SIZE, 12));
    assert_eq!(got[..10], sent[..10]);
    assert_eq!(got[10..12], [3, 0], "three buffers");
    assert_eq!(got[12..], sent[12..]);
    assert_eq!(memory.driver_read(DATA + 3 * PAGE_SIZE + 10, 2), [1, 0]);
    assert!(setup.backlog.is_empty());
}

#[test]
fn without_mergeable_buffers_a_packet_gets_one_chain_or_is_dropped() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MODERN);
    let head = setup.driver.post(&[buffer(0, 12), buffer(1, 2000)]).expect("room");
    setup.backlog.push(packet(2001));
    setup.backlog.push(packet(2000));
    let done = setup.deliver();
    assert_eq!((done.packets, done.too_large, done.starved), (1, 1, false));
    assert_eq!(setup.driver.collect(), [(head, 2012)]);
    assert_eq!(memory.driver_read(DATA + 10, 2), [1, 0], "section 5.1.6.4.1 asks for 1");
    assert_eq!(memory.driver_read(DATA + PAGE_SIZE, 2000), packet(2000)[12..]);
}

#[test]
fn the_longest_chain_that_linux_makes_is_served() {
    const GUEST_PAGE: u32 = 0x1_0000;
    // So many pages of 64 KiB for each packet: one, and as many fragments as the guest's kernel was built for.
    for pages in [1 + 17, 1 + 45] {
        let memory = memory();
        // Each in a place of its own for the guest. Here one page is as good as the other.
        let place = |page: u32| DATA + u64::from(page + 1) * 2 * u64::from(GUEST_PAGE);
        for iova in (0..pages).flat_map(|page| (place(page)..).step_by(4096).take(16)) {
            memory.map(iova, 3, Access::READ_WRITE);
        }
        let mut setup = Setup::new(&memory, virtio::VERSION_1);
        setup.driver = Driver::new(&memory, 64, DESC, AVAIL, USED, 0);
        let header = Buffer { iova: place(0), len: 12, writable: true };
        let rest = Buffer { iova: place(0) + 16, len: GUEST_PAGE - 16, writable: true };
        let others = (1..pages).map(|page| Buffer { iova: place(page), len: GUEST_PAGE, writable: true });
        let head = setup.driver.post(&[header, rest].into_iter().chain(others).collect::<Vec<_>>()).expect("room");
        setup.backlog.push(packet(100));
        let done = setup.deliver();
        let Some(RingFault::Miss(set)) = done.fault else { panic!("{:?}", done.fault) };
        // And one for the header: what lies between that and the rest may have no translation.
        assert_eq!(set.required, usize::try_from(pages).expect("few") + 1, "a request for each page of the guest");
        assert!(memory.resolve(&set));
        let done = setup.deliver();
        assert_eq!((done.packets, done.chains, done.fault), (1, 1, None));
        assert_eq!(setup.driver.collect(), [(head, 112)]);
        assert_eq!(memory.driver_read(place(0) + 16, 100), packet(100)[12..]);
    }
}

#[test]
fn an_old_guest_gets_the_short_header() {
    let memory = memory();
    let mut setup = Setup::new(&memory, 0);
    let head = setup.driver.post(&[buffer(0, 110)]).expect("room");
    setup.backlog.push(packet(100));
    let done = setup.deliver();
    assert_eq!((done.packets, done.bytes), (1, 110));
    assert_eq!(setup.driver.collect(), [(head, 110)]);
    assert_eq!(memory.driver_read(DATA, 10), packet(0)[..10]);
    assert_eq!(memory.driver_read(DATA + 10, 100), packet(100)[12..]);
}

#[test]
fn only_a_guest_that_takes_checksum_flags_is_told_that_one_is_right() {
    let memory = memory();
    for (features, flags) in [(MODERN, 0), (MODERN | virtio::NET_GUEST_CSUM, FLAG_DATA_VALID)] {
        let mut setup = Setup::new(&memory, features);
        setup.driver.post(&[buffer(0, 200)]).expect("room");
        let mut sent = packet(100);
        sent[0] = FLAG_DATA_VALID;
        setup.backlog.push(sent);
        assert_eq!(setup.deliver().packets, 1);
        assert_eq!(memory.driver_read(DATA, 1), [flags]);
    }
}

#[test]
fn too_few_buffers_wait_and_the_kick_is_for_the_next_one() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    setup.driver.post(&[buffer(0, 1000)]).expect("room");
    setup.driver.post(&[buffer(1, 1000)]).expect("room");
    setup.backlog.push(packet(2500));
    let done = setup.deliver();
    assert!(done.starved && done.packets == 0 && done.fault.is_none());
    // Two are posted: the driver kicks when it posts the third, which has index 2.
    assert_eq!(setup.driver.avail_event(), 2);
    assert_eq!((setup.driver.used_idx(), setup.backlog.len()), (0, 1));
    setup.driver.post(&[buffer(2, 1000)]).expect("room");
    let done = setup.deliver();
    assert_eq!((done.packets, done.chains, done.starved), (1, 3, false));
}

#[test]
fn an_empty_backlog_wants_no_kicks_and_consumes_nothing() {
    let memory = memory();
    let mut setup = Setup::new(&memory, virtio::VERSION_1);
    setup.driver.post(&[buffer(0, 1000)]).expect("room");
    let done = setup.deliver();
    assert!(done.call, "the start of a ring");
    assert!(!setup.deliver().call);
    assert_eq!((setup.driver.used_flags(), setup.driver.used_idx()), (1, 0));
}

#[test]
fn a_packet_that_the_whole_ring_cannot_hold_is_dropped() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    for page in 0..8 {
        setup.driver.post(&[buffer(page, 100)]).expect("room");
    }
    setup.backlog.push(packet(1000));
    setup.backlog.push(packet(700));
    let done = setup.deliver();
    assert_eq!((done.too_large, done.packets, done.chains), (1, 1, 8));
}

#[test]
fn buffers_without_room_do_not_stop_it() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    setup.driver.post(&[Buffer { writable: false, ..buffer(0, 100) }]).expect("room");
    setup.driver.post(&[buffer(1, 5)]).expect("room");
    setup.driver.post(&[buffer(2, 100)]).expect("room");
    setup.backlog.push(packet(50));
    assert_eq!(setup.deliver().chains, 3);
    let written: Vec<_> = setup.driver.collect().into_iter().map(|(_, len)| len).collect();
    assert_eq!(written, [0, 5, 57]);
    assert_eq!(memory.driver_read(DATA + PAGE_SIZE, 5), packet(50)[..5]);
    assert_eq!(memory.driver_read(DATA + 2 * PAGE_SIZE + 7, 50), packet(50)[12..]);
}

#[test]
fn a_miss_in_the_second_buffer_leaves_the_packet_where_it_is() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    let heads: Vec<_> = (0..3).map(|page| setup.driver.post(&[buffer(page, 1000)]).expect("room")).collect();
    setup.backlog.push(packet(500));
    setup.backlog.push(packet(1200));
    memory.invalidate(DATA + 2 * PAGE_SIZE);
    let done = setup.deliver();
    let Some(RingFault::Miss(set)) = done.fault else { panic!("{:?}", done.fault) };
    assert_eq!(done.packets, 1, "the first packet arrived");
    assert_eq!(setup.driver.collect(), [(heads[0], 512)]);
    assert!(memory.resolve(&set));
    assert_eq!(setup.deliver().packets, 1);
    assert_eq!(setup.driver.collect(), [(heads[1], 1000), (heads[2], 212)]);
    assert_eq!(memory.driver_read(DATA + PAGE_SIZE + 12, 988), packet(1200)[12..1000]);
}

#[test]
fn a_disabled_ring_receives_nothing() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    setup.driver.post(&[buffer(0, 1000)]).expect("room");
    setup.driver.record.enabled = false;
    setup.backlog.push(packet(100));
    assert_eq!(setup.deliver().packets, 0);
    assert_eq!((setup.driver.used_idx(), setup.backlog.len()), (0, 1));
}

#[test]
fn a_pin_is_not_held_for_more_than_a_burst() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MERGEABLE);
    setup.driver = Driver::new(&memory, 128, DESC, AVAIL, USED, 0);
    for _ in 0..100 {
        setup.driver.post(&[buffer(0, 100)]).expect("room");
        setup.backlog.push(packet(50));
    }
    assert_eq!(setup.deliver().packets, PACKETS_PER_PIN as u64);
    assert_eq!(setup.deliver().packets, 100 - PACKETS_PER_PIN as u64);
}

#[test]
fn packets_that_are_dropped_count_against_the_burst_too() {
    let memory = memory();
    let mut setup = Setup::new(&memory, MODERN);
    setup.driver.post(&[buffer(0, 50)]).expect("room");
    for _ in 0..100 {
        setup.backlog.push(packet(60));
    }
    let done = setup.deliver();
    assert_eq!((done.too_large, done.more), (PACKETS_PER_PIN as u64, true));
    let done = setup.deliver();
    assert_eq!((done.too_large, done.more), (100 - PACKETS_PER_PIN as u64, false));
}
