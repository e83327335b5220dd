//! Packets out of the ring of a driver.

use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::vhost_user::features::virtio;

use super::*;
use crate::net::backlog::BACKLOG_MAX;
use crate::queue::vring::testing::{Buffer, Driver, FakeMemory};

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x10_0000;
const MODERN: u64 = virtio::VERSION_1 | virtio::EVENT_IDX;

fn memory() -> FakeMemory {
    let memory = FakeMemory::new(40);
    for (page, iova) in (0..).zip([DESC, AVAIL, USED]) {
        memory.map(iova, page, Access::READ_WRITE);
    }
    for page in 0..32 {
        memory.map(DATA + page * PAGE_SIZE, 3 + usize::try_from(page).expect("few"), Access::READ_WRITE);
    }
    memory.resolve_everything();
    let bytes: Vec<u8> = (0..32 * 4096_usize).map(|at| (at % 251).to_le_bytes()[0]).collect();
    memory.driver_write(DATA, &bytes);
    memory
}

fn buffer(offset: u64, len: u32) -> Buffer {
    Buffer { iova: DATA + offset, len, writable: false }
}

fn run(ring: &mut Vring, memory: &FakeMemory, driver: &Driver<'_>, features: u64, backlog: &mut Backlog) -> Collected {
    collect(ring, memory, &driver.record, features, backlog, BACKLOG_MAX)
}

#[test]
fn packets_come_out_with_the_long_header() {
    let memory = memory();
    for (features, header_len) in [(MODERN, 12_u32), (0, 10)] {
        let mut driver = Driver::new(&memory, 8, DESC, AVAIL, USED, 0);
        let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
        let header = driver.post(&[buffer(0, header_len), buffer(5000, 6000)]).expect("room");
        let whole = driver.post(&[buffer(100, header_len + 14)]).expect("room");
        let done = run(&mut ring, &memory, &driver, features, &mut backlog);
        assert!(done.call && !done.more && done.fault.is_none());
        assert_eq!((done.chains, done.malformed, done.bytes), (2, 0, u64::from(2 * header_len) + 6014));
        assert_eq!(driver.collect(), [(header, 0), (whole, 0)]);
        let cut = header_len as usize;
        let first = backlog.front().expect("two packets");
        assert_eq!(first[..cut], memory.driver_read(DATA, cut));
        assert!(first[cut..HEADER_LEN].iter().all(|byte| *byte == 0));
        assert_eq!(first[HEADER_LEN..], memory.driver_read(DATA + 5000, 6000));
        backlog.pop();
        assert_eq!(
            backlog.front().expect("two packets")[HEADER_LEN..],
            memory.driver_read(DATA + 100 + cut as u64, 14)
        );
    }
}

#[test]
fn chains_that_hold_no_packet_are_given_back_and_counted() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 8, DESC, AVAIL, USED, 0);
    let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
    driver.post(&[buffer(0, 12 + 13)]).expect("room");
    driver.post(&[Buffer { writable: true, ..buffer(0, 100) }]).expect("room");
    driver.post(&[buffer(0, u32::try_from(PACKET_MAX + 1).expect("fits"))]).expect("room");
    driver.post(&[buffer(0, u32::try_from(PACKET_MAX).expect("fits"))]).expect("room");
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    assert_eq!((done.chains, done.malformed), (4, 3));
    assert_eq!(backlog.front().map(<[u8]>::len), Some(PACKET_MAX));
    assert_eq!(driver.collect().len(), 4);
}

#[test]
fn a_disabled_ring_is_emptied_without_a_look_at_its_buffers() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 8, DESC, AVAIL, USED, 0);
    let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
    driver.record.enabled = false;
    for _ in 0..3 {
        driver.post(&[Buffer { iova: 0xdead_0000, len: 100, writable: false }]).expect("room");
    }
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    assert_eq!((done.chains, backlog.len()), (3, 0));
    assert!(done.fault.is_none() && done.call);
    assert_eq!(driver.collect().len(), 3);
    assert_eq!(driver.avail_event(), 3);
}

#[test]
fn no_more_is_taken_than_finds_room() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 128, DESC, AVAIL, USED, 0);
    let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
    for _ in 0..100 {
        driver.post(&[buffer(0, 100)]).expect("room");
    }
    let done = collect(&mut ring, &memory, &driver.record, MODERN, &mut backlog, 7);
    assert!(done.more);
    assert_eq!((done.chains, backlog.len()), (7, 7));
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    assert!(done.more);
    assert_eq!(backlog.len(), 7 + PACKETS_PER_PIN);
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    assert!(!done.more);
    assert_eq!((backlog.len(), driver.used_idx()), (100, 100));
}

#[test]
fn a_miss_ends_the_burst_but_keeps_what_was_taken() {
    let memory = memory();
    let mut driver = Driver::new(&memory, 8, DESC, AVAIL, USED, 0);
    let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
    driver.post(&[buffer(0, 100)]).expect("room");
    driver.post(&[buffer(0, 12), buffer(2 * PAGE_SIZE, 100)]).expect("room");
    memory.invalidate(DATA + 2 * PAGE_SIZE);
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    let Some(RingFault::Miss(set)) = done.fault else { panic!("{:?}", done.fault) };
    assert_eq!((done.chains, backlog.len(), driver.used_idx()), (1, 1, 1));
    assert!(memory.resolve(&set));
    let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
    assert_eq!((done.chains, backlog.len(), driver.used_idx()), (1, 2, 2));
}

#[test]
fn pages_are_asked_for_as_far_as_the_packet_behind_a_large_one() {
    let memory = memory();
    for (len, expected) in [(u32::try_from(PACKET_MAX).expect("fits"), 2), (4096, 17)] {
        let mut driver = Driver::new(&memory, 32, DESC, AVAIL, USED, 0);
        let (mut ring, mut backlog) = (Vring::default(), Backlog::default());
        for page in 0..20 {
            // Nothing is mapped there; far apart, so that no two packets become one miss.
            driver.post(&[Buffer { iova: 0x1000_0000 + (page << 24), len, writable: false }]).expect("room");
        }
        let done = run(&mut ring, &memory, &driver, MODERN, &mut backlog);
        let Some(RingFault::Miss(set)) = done.fault else { panic!("{:?}", done.fault) };
        assert_eq!((set.misses.len(), set.required), (expected, 1), "packets of {len} bytes");
    }
}
