//! The ring against a driver that keeps the rules, and against one that does not.

use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;

use super::testing::{Buffer, Driver, FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE, FakeMemory};
use super::{Broken, Burst, Limits, Miss, MissPlace, RingFault, Vring};

mod random;

const FEATURES: u64 = virtio::EVENT_IDX | virtio::INDIRECT_DESC | virtio::VERSION_1;
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x20_0000;
const USED: u64 = 0x30_0000;
const DATA: u64 = 0x40_0000;
const DATA_PAGES: u64 = 16;

/// Memory with ring tables and data pages mapped, neighbours nowhere near each other. Nothing is in the IOTLB.
fn memory(table_pages: u64) -> FakeMemory {
    let pages = usize::try_from(3 * table_pages + DATA_PAGES).expect("few");
    let memory = FakeMemory::new(pages);
    // An odd stride walks through all pages in an order without neighbours.
    let mut stride = pages / 2 - 1;
    while pages.is_multiple_of(stride) || gcd(stride, pages) != 1 {
        stride -= 1;
    }
    let mut next = 0;
    for (base, count) in [(DESC, table_pages), (AVAIL, table_pages), (USED, table_pages), (DATA, DATA_PAGES)] {
        for page in 0..count {
            memory.map(base + page * PAGE_SIZE, next, Access::READ_WRITE);
            next = (next + stride) % pages;
        }
    }
    memory
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn driver(memory: &FakeMemory, size: u16) -> Driver<'_> {
    Driver::new(memory, size, DESC, AVAIL, USED, 0)
}

fn begin<'g>(ring: &'g mut Vring, memory: &'g FakeMemory, driver: &Driver<'_>) -> Burst<'g, FakeMemory> {
    ring.begin(memory, &driver.record, FEATURES).expect("all is present")
}

fn read_only(iova: u64, len: u32) -> Buffer {
    Buffer { iova, len, writable: false }
}

fn writable(iova: u64, len: u32) -> Buffer {
    Buffer { iova, len, writable: true }
}

fn misses_of(fault: RingFault) -> super::MissSet {
    match fault {
        RingFault::Miss(set) => set,
        other => panic!("expected misses, got {other}"),
    }
}

#[test]
fn a_chain_is_read_written_and_given_back() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let sent: Vec<u8> = (0..=255).cycle().take(5000).map(|byte: u8| byte ^ 0x5a).collect();
    memory.driver_write(DATA + 100, &sent);
    // 5,000 bytes from inside a page: three pages that are no neighbours.
    let head = driver.post(&[read_only(DATA + 100, 5000), writable(DATA + 0x4ffe, 4)]).expect("room");

    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let chain = burst.next_chain().expect("present").expect("posted");
    assert_eq!((chain.head(), chain.readable_len(), chain.writable_len()), (head, 5000, 4));
    let mut got = vec![0; 6000];
    assert_eq!(chain.read(0, &mut got), 5000);
    assert_eq!(&got[..5000], &sent[..]);
    assert_eq!(chain.read(4000, &mut got[..10]), 10);
    assert_eq!(&got[..10], &sent[4000..4010]);
    assert_eq!(chain.write(1, b"xyzw"), 3);
    burst.complete(chain, 4);
    assert!(burst.next_chain().expect("fine").is_none());
    assert_eq!(driver.used_idx(), 0, "not visible before it is published");
    assert!(burst.publish());
    assert_eq!(driver.collect(), [(head, 4)]);
    assert_eq!(memory.driver_read(DATA + 0x4fff, 3), b"xyz");
    drop(burst);
    assert_eq!(ring.position(), 1);
}

#[test]
fn a_miss_lists_every_page_and_consumes_nothing() {
    let memory = memory(1);
    let mut driver = driver(&memory, 8);
    driver.post(&[read_only(DATA + 10, 4096), writable(DATA + 0x5000, 1), writable(DATA + 0x8fff, 2)]).expect("room");
    driver.post(&[read_only(DATA + 0xb000, 8)]).expect("room");

    let mut ring = Vring::default();
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("nothing is present"));
    assert_eq!(set.place, MissPlace::Tables);
    let miss = |iova, len, access| Miss { iova, len, access };
    assert_eq!(
        set.misses,
        [miss(DESC, 128, Access::READ), miss(AVAIL, 22, Access::READ), miss(USED, 70, Access::READ_WRITE)],
        "all three tables in one batch"
    );
    assert!(memory.resolve(&set));

    let mut burst = begin(&mut ring, &memory, &driver);
    let set = misses_of(burst.next_chain().expect_err("no data page is present"));
    assert_eq!(set.place, MissPlace::Chain { position: 0 });
    assert_eq!(
        set.misses,
        [
            miss(DATA + 10, 4096, Access::READ),
            miss(DATA + 0x5000, 1, Access::WRITE),
            miss(DATA + 0x8fff, 2, Access::WRITE),
            miss(DATA + 0xb000, 8, Access::READ),
        ]
    );
    assert_eq!(set.required, 3, "the last one is read-ahead");
    drop(burst);
    assert_eq!((ring.position(), driver.used_idx()), (0, 0));

    assert!(memory.resolve(&set));
    let mut burst = begin(&mut ring, &memory, &driver);
    for len in [4096, 8] {
        let chain = burst.next_chain().expect("resolved").expect("posted");
        assert_eq!(chain.readable_len(), len);
        burst.complete(chain, 0);
    }
}

#[test]
fn look_ahead_ends_with_the_bytes_that_wait_and_with_the_limit() {
    let memory = memory(1);
    let mut driver = driver(&memory, 8);
    for number in 0..6 {
        // Every other page, so that no two become one miss.
        driver.post(&[writable(DATA + number * 2 * PAGE_SIZE, 1000)]).expect("room");
    }
    let mut resolved = Vring::default();
    let tables = misses_of(resolved.begin(&memory, &driver.record, FEATURES).expect_err("nothing is present"));
    assert!(memory.resolve(&tables));
    for (lookahead, bytes, expected) in [
        (64, usize::MAX, 6),
        (64, 3000, 3),
        (64, 3001, 4),
        (64, 1, 1),
        (64, 0, 1),
        (2, usize::MAX, 3),
        (0, usize::MAX, 1),
    ] {
        let mut ring = Vring::new(Limits { lookahead, ..Limits::default() });
        let mut burst = begin(&mut ring, &memory, &driver);
        burst.look_ahead_for(bytes);
        let set = misses_of(burst.next_chain().expect_err("no data page is present"));
        assert_eq!((set.misses.len(), set.required), (expected, 1), "{lookahead} chains, {bytes} bytes");
    }
}

#[test]
fn a_missing_indirect_table_is_a_miss_and_not_a_short_chain() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    // The table straddles two pages.
    driver.post_indirect(DATA + 0xff8, &[read_only(DATA + 0x3000, 16), writable(DATA + 0x4000, 100)]).expect("room");
    memory.invalidate(DATA + 0x1000);
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let set = misses_of(burst.next_chain().expect_err("half of the table is missing"));
    assert_eq!(set.misses, [Miss { iova: DATA + 0x1000, len: 24, access: Access::READ }], "what is needed of it");
    assert!(memory.resolve(&set));
    let chain = burst.next_chain().expect("resolved").expect("posted");
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 100));
}

#[test]
fn tables_may_lie_on_pages_that_are_not_neighbours() {
    // 1,024 entries: four pages of descriptors, one and a bit of available ring, two and a bit of used ring.
    let memory = memory(4);
    memory.resolve_everything();
    let mut driver = driver(&memory, 1024);
    let mut ring = Vring::default();
    for round in 0..3000_u32 {
        let head = driver.post(&[writable(DATA + u64::from(round % 1000) * 7, 3)]).expect("room");
        let mut burst = begin(&mut ring, &memory, &driver);
        let chain = burst.next_chain().expect("present").expect("posted");
        assert_eq!(chain.head(), head);
        burst.complete(chain, 3);
        let _ = burst.publish();
        assert_eq!(driver.collect(), [(head, 3)]);
    }
}

#[test]
fn a_used_element_may_straddle_two_pages() {
    let memory = memory(2);
    memory.resolve_everything();
    // Entries start at 4 + 4092: the ring itself is aligned to 4 only.
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED + 0xff0, 0);
    let mut ring = Vring::default();
    for round in 0..9 {
        let head = driver.post(&[writable(DATA, 50)]).expect("room");
        let mut burst = begin(&mut ring, &memory, &driver);
        let chain = burst.next_chain().expect("present").expect("posted");
        burst.complete(chain, 0x2a + round);
        let _ = burst.publish();
        assert_eq!(driver.collect(), [(head, 0x2a_u32.saturating_add(u32::try_from(round).expect("small")).min(50))]);
    }
}

#[test]
fn an_invalidation_is_seen_at_the_next_pin() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let mut ring = Vring::default();
    drop(begin(&mut ring, &memory, &driver));
    let before = memory.translations.get();
    drop(begin(&mut ring, &memory, &driver));
    assert_eq!(memory.translations.get(), before, "nothing changed, so nothing is translated again");

    // The guest moves its used ring to another page, at the same IOVA.
    memory.invalidate(USED);
    memory.map(USED, usize::try_from(3 + DATA_PAGES - 1).expect("few"), Access::READ_WRITE);
    memory.driver_write(USED, &[0; 4096]);
    let head = driver.post(&[read_only(DATA, 1)]).expect("room");
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("gone"));
    assert_eq!(set.misses, [Miss { iova: USED, len: 70, access: Access::READ_WRITE }]);
    assert!(memory.resolve(&set));
    let mut burst = begin(&mut ring, &memory, &driver);
    let chain = burst.next_chain().expect("present").expect("posted");
    burst.complete(chain, 0);
    let _ = burst.publish();
    assert_eq!(driver.collect(), [(head, 0)]);
}

#[test]
fn what_is_not_completed_goes_back_and_what_is_completed_is_published() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let heads: Vec<_> = (0..3).map(|_| driver.post(&[writable(DATA, 100)]).expect("room")).collect();
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let first = burst.next_chain().expect("present").expect("posted");
    let _second = burst.next_chain().expect("present").expect("posted");
    burst.complete(first, 7);
    assert_eq!(burst.posted(), Ok(1));
    drop(burst);
    assert_eq!(driver.collect(), [(heads[0], 7)]);

    let mut burst = begin(&mut ring, &memory, &driver);
    assert!(burst.publish(), "the call for what the last burst published is still owed");
    assert!(!burst.publish());
    let taken = [burst.next_chain(), burst.next_chain()].map(|chain| chain.expect("present").expect("posted").head());
    assert_eq!(taken, heads[1..]);
    burst.put_back();
    assert_eq!(burst.posted(), Ok(2));

    // A burst that does not end leaves no chain behind either.
    assert!(burst.next_chain().expect("present").is_some());
    std::mem::forget(burst);
    let mut burst = begin(&mut ring, &memory, &driver);
    let first = burst.next_chain().expect("present").expect("posted");
    assert_eq!(first.head(), heads[1]);
    burst.complete(first, 7);
}

#[test]
fn several_chains_become_visible_with_one_store() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let heads: Vec<_> = (0..4).map(|_| driver.post(&[writable(DATA, 100)]).expect("room")).collect();
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let chains: Vec<_> = (0..4).map(|_| burst.next_chain().expect("present").expect("posted")).collect();
    for (len, chain) in chains.into_iter().enumerate() {
        burst.complete(chain, len);
        assert_eq!(driver.used_idx(), 0);
    }
    let _ = burst.publish();
    let expected: Vec<_> = heads.into_iter().zip(0..).collect();
    assert_eq!(driver.collect(), expected);
}

#[test]
fn a_successor_goes_on_at_the_commit_point_and_calls_once() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED, 0xfffe);
    driver.set_used_event(0x1234);
    let heads: Vec<_> = (0..4).map(|_| driver.post(&[writable(DATA, 100)]).expect("room")).collect();
    let mut killed = Vring::default();
    let mut burst = begin(&mut killed, &memory, &driver);
    for _ in 0..3 {
        let chain = burst.next_chain().expect("present").expect("posted");
        burst.complete(chain, 1);
    }
    let _ = burst.publish();
    let chain = burst.next_chain().expect("present").expect("posted");
    burst.complete(chain, 1);
    std::mem::forget(burst); // SIGKILL: written to the ring, not committed

    driver.record.base = 0; // stale
    let mut successor = Vring::default();
    let mut burst = begin(&mut successor, &memory, &driver);
    assert!(burst.publish(), "whatever the driver wants, it is called once");
    assert!(!burst.publish());
    let chain = burst.next_chain().expect("present").expect("posted");
    assert_eq!(chain.head(), heads[3]);
    burst.complete(chain, 2);
    let _ = burst.publish();
    assert_eq!(driver.collect(), [(heads[0], 1), (heads[1], 1), (heads[2], 1), (heads[3], 2)]);
}

#[test]
fn another_queues_change_moves_nothing_but_a_restart_does() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    let mut ring = Vring::default();
    driver.post(&[writable(DATA, 1)]).expect("room");
    let mut burst = begin(&mut ring, &memory, &driver);
    let chain = burst.next_chain().expect("present").expect("posted");
    burst.complete(chain, 1);
    assert!(burst.publish());
    drop(burst);

    memory.bump_queue();
    driver.record.enabled = false;
    let mut burst = begin(&mut ring, &memory, &driver);
    assert!(!burst.publish(), "no call is owed");
    assert_eq!(burst.posted(), Ok(0));
    drop(burst);

    // The guest resets the device and sets up the same ring at the same place.
    memory.bump_queue();
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED, 0);
    let head = driver.post(&[writable(DATA, 1)]).expect("room");
    let mut burst = begin(&mut ring, &memory, &driver);
    assert!(burst.publish());
    assert_eq!(burst.next_chain().expect("present").expect("posted").head(), head);
}

#[test]
fn stopped_rings_and_those_of_an_older_session_are_not_touched() {
    let memory = memory(1);
    let mut driver = driver(&memory, 4);
    let mut ring = Vring::default();
    driver.record.started = false;
    assert_eq!(ring.begin(&memory, &driver.record, FEATURES).err(), Some(RingFault::Stopped));
    driver.record.started = true;
    driver.record.session_generation = 0;
    assert_eq!(ring.begin(&memory, &driver.record, FEATURES).err(), Some(RingFault::Stopped));
    assert_eq!(memory.translations.get(), 0);
}

#[test]
fn a_used_ring_that_may_only_be_written_starts_from_the_base() {
    let memory = memory(1);
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED, 7);
    memory.map(USED, 2, Access::WRITE);
    let mut driver_used = 7_u16;
    memory.driver_write(USED, &[0; 64]);
    let mut ring = Vring::default();
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("not present"));
    assert!(!memory.resolve(&set), "reading the used ring is denied");
    assert!(!ring.denied(DESC, Access::READ, &driver.record), "no way around that");
    assert!(ring.denied(USED, Access::READ_WRITE, &driver.record));
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("not present"));
    assert!(memory.resolve(&set));
    assert!(!ring.denied(USED, Access::WRITE, &driver.record));
    for _ in 0..3 {
        driver.post(&[read_only(DATA, 1)]).expect("room");
        memory.resolve_everything();
        let mut burst = begin(&mut ring, &memory, &driver);
        let chain = burst.next_chain().expect("present").expect("posted");
        burst.complete(chain, 0);
        let _ = burst.publish();
        driver_used += 1;
        assert_eq!(driver.used_idx(), driver_used);
        drop(burst);
        // Neither another queue's change nor an invalidation makes it start again.
        memory.bump_queue();
        memory.invalidate(USED);
        let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("gone"));
        assert!(memory.resolve(&set));
    }
}

#[test]
fn a_used_ring_that_can_be_read_after_all_is_read() {
    let memory = memory(1);
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED, 7);
    // A predecessor has come further since the ring was set up.
    driver.record.base = 3;
    let mut ring = Vring::default();
    misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("not present"));
    // The guest had not mapped it yet: a denial does not tell that from a page that may only be written.
    assert!(ring.denied(USED, Access::READ_WRITE, &driver.record));
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("not present"));
    assert!(set.misses.iter().any(|miss| miss.access == Access::WRITE), "{set:?}");
    assert!(memory.resolve(&set));
    assert_eq!(begin(&mut ring, &memory, &driver).posted(), Ok(0), "what it did is not done again");
    memory.invalidate(USED);
    let set = misses_of(ring.begin(&memory, &driver.record, FEATURES).expect_err("gone"));
    assert_eq!(set.misses, [Miss { iova: USED, len: 38, access: Access::READ_WRITE }]);
}

#[test]
fn a_denied_chain_can_be_given_back_unread() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    let bad = driver.post(&[read_only(0xdead_0000, 64)]).expect("room");
    let good = driver.post(&[read_only(DATA, 64)]).expect("room");
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let set = misses_of(burst.next_chain().expect_err("nobody mapped it"));
    assert!(!memory.resolve(&set));
    assert_eq!(set.place, MissPlace::Chain { position: 0 });
    assert_eq!(burst.reject_through(0), Ok(1));
    let chain = burst.next_chain().expect("present").expect("posted");
    assert_eq!(chain.head(), good);
    burst.complete(chain, 0);
    assert_eq!(burst.reject_next(), Ok(false));
    let _ = burst.publish();
    assert_eq!(driver.collect(), [(bad, 0), (good, 0)]);
}

#[test]
fn a_denied_chain_takes_those_in_front_along_and_none_behind() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    let heads = [DATA, DATA, 0xdead_0000, DATA].map(|iova| driver.post(&[writable(iova, 64)]).expect("room"));
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    let first = burst.next_chain().expect("present").expect("posted");
    burst.complete(first, 64);
    burst.next_chain().expect("present").expect("posted");
    let set = misses_of(burst.next_chain().expect_err("nobody mapped it"));
    assert_eq!(set.place, MissPlace::Chain { position: 2 });
    burst.put_back();
    // Neither what was completed nor what was not posted.
    for position in [0, 4, u16::MAX] {
        assert_eq!(burst.reject_through(position), Ok(0), "{position}");
    }
    assert_eq!(burst.reject_through(2), Ok(2));
    assert_eq!(burst.posted(), Ok(1));
    let _ = burst.publish();
    assert_eq!(driver.collect(), [(heads[0], 64), (heads[1], 0), (heads[2], 0)]);
}

#[test]
fn chains_are_rejected_across_the_end_of_the_positions() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = Driver::new(&memory, 4, DESC, AVAIL, USED, u16::MAX - 1);
    let heads = [DATA, DATA, 0xdead_0000, DATA].map(|iova| driver.post(&[writable(iova, 64)]).expect("room"));
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    for position in [u16::MAX - 2, 2] {
        assert_eq!(burst.reject_through(position), Ok(0), "{position}");
    }
    assert_eq!(burst.reject_through(0), Ok(3));
    assert_eq!(burst.posted(), Ok(1));
    let _ = burst.publish();
    assert_eq!(driver.collect(), [0, 1, 2].map(|number| (heads[number], 0)));
}

#[test]
fn what_was_rejected_before_the_ring_broke_counts() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    let good = driver.post(&[writable(DATA, 64)]).expect("room");
    driver.post_head(99);
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    assert_eq!(burst.reject_through(1), Ok(1));
    let _ = burst.publish();
    drop(burst);
    assert_eq!(driver.collect(), [(good, 0)]);
    assert_eq!(ring.broken(), Some(Broken::Head { head: 99, size: 4 }));
}

#[test]
fn remapping_is_passed_on_and_consumes_nothing() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    driver.post(&[read_only(DATA, 64)]).expect("room");
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    memory.remapping.set(true);
    assert_eq!(burst.next_chain().err(), Some(RingFault::Remapping));
    memory.remapping.set(false);
    assert!(burst.next_chain().expect("present").is_some());
}

#[test]
fn another_memory_with_the_same_generations_is_another_memory() {
    let (first, second) = (memory(1), memory(1));
    first.resolve_everything();
    second.resolve_everything();
    let mut old = driver(&first, 8);
    let mut ring = Vring::default();
    old.post(&[read_only(DATA, 1)]).expect("room");
    let mut burst = begin(&mut ring, &first, &old);
    let chain = burst.next_chain().expect("present").expect("posted");
    burst.complete(chain, 0);
    drop(burst);
    assert_eq!(ring.position(), 1);
    // The same ring to the last bit, but for how far it is.
    let mut new = Driver::new(&second, 8, DESC, AVAIL, USED, 5);
    new.record = old.record;
    let head = new.post(&[writable(DATA, 64)]).expect("room");
    let mut burst = begin(&mut ring, &second, &new);
    let chain = burst.next_chain().expect("present").expect("posted");
    assert_eq!(chain.write(0, b"second"), 6);
    burst.complete(chain, 6);
    assert!(burst.publish(), "nobody knows what its driver was told");
    drop(burst);
    assert_eq!(ring.position(), 6);
    assert_eq!((new.collect(), second.driver_read(DATA, 6)), (vec![(head, 6)], b"second".to_vec()));
    assert_eq!((old.used_idx(), first.driver_read(DATA, 6)), (1, vec![0xa5; 6]), "of the first nothing is touched");
}

#[test]
fn what_was_denied_or_broken_in_another_memory_is_forgotten() {
    let (first, second) = (memory(1), memory(1));
    first.resolve_everything();
    second.resolve_everything();
    let mut old = driver(&first, 8);
    old.post_head(99);
    let mut ring = Vring::default();
    assert!(ring.denied(USED, Access::READ_WRITE, &old.record));
    assert!(begin(&mut ring, &first, &old).next_chain().is_err());
    let mut new = driver(&second, 8);
    new.post(&[read_only(DATA, 1)]).expect("room");
    assert!(begin(&mut ring, &second, &new).next_chain().expect("sound").is_some());
    assert!(ring.denied(USED, Access::READ_WRITE, &new.record), "reading the used ring was tried again");
}

#[test]
fn a_driver_that_moves_the_used_index_gets_what_it_says() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut ring = Vring::default();
    // Posted: 0 to 3.
    for (used, taken, breaks) in
        [(0, 4, false), (2, 2, false), (4, 0, false), (1, 3, false), (5, 0, true), (0x8000, 0, true), (0xffff, 0, true)]
    {
        let mut driver = driver(&memory, 4);
        for _ in 0..4 {
            driver.post(&[read_only(DATA, 1)]).expect("room");
        }
        memory.driver_write(USED + 2, &u16::to_le_bytes(used));
        let mut burst = begin(&mut ring, &memory, &driver);
        let mut count = 0;
        let end = loop {
            match burst.next_chain() {
                Ok(Some(chain)) => burst.complete(chain, 0),
                end => break end.map(|_| ()),
            }
            count += 1;
        };
        drop(burst);
        assert_eq!((count, end.is_err()), (taken, breaks), "{used:#x}");
        if breaks {
            assert!(matches!(ring.broken(), Some(Broken::AvailIndex { .. })));
            // Set up anew.
            memory.bump_queue();
        }
    }
}

/// Lets a driver break one rule, and tells how the ring puts it.
fn broken_by(features: u64, limits: Limits, act: impl FnOnce(&mut Driver<'_>)) -> Broken {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 4);
    act(&mut driver);
    let mut ring = Vring::new(limits);
    let fault = match ring.begin(&memory, &driver.record, features) {
        Ok(mut burst) => burst.next_chain().expect_err("hostile"),
        Err(fault) => fault,
    };
    let RingFault::Broken(broken) = fault else { panic!("expected a broken ring, got {fault}") };
    // It rests until it is set up anew, whatever the driver does now.
    assert_eq!(ring.begin(&memory, &driver.record, features).err(), Some(RingFault::Broken(broken)));
    assert_eq!(ring.broken(), Some(broken));
    memory.bump_queue();
    let fresh = Driver::new(&memory, 4, DESC, AVAIL, USED, 0);
    assert!(ring.begin(&memory, &fresh.record, features).is_ok());
    assert!(memory.guard_page_is_intact());
    broken
}

#[test]
fn hostile_rings_break_with_a_reason() {
    let broken = |act: &dyn Fn(&mut Driver<'_>)| broken_by(FEATURES, Limits::default(), act);
    assert_eq!(broken(&|d| d.record.size = 0), Broken::Size { size: 0 });
    assert_eq!(broken(&|d| d.record.size = 12), Broken::Size { size: 12 });
    assert_eq!(broken(&|d| d.record.desc += 8), Broken::Misaligned { iova: DESC + 8, align: 16 });
    assert_eq!(broken(&|d| d.record.avail += 1), Broken::Misaligned { iova: AVAIL + 1, align: 2 });
    assert_eq!(broken(&|d| d.record.used += 2), Broken::Misaligned { iova: USED + 2, align: 4 });
    assert!(matches!(broken(&|d| d.record.desc = u64::MAX - 15), Broken::Wrapped { .. }));
    assert_eq!(broken(&|d| d.set_avail_idx(5)), Broken::AvailIndex { avail: 5, position: 0, size: 4 });
    assert_eq!(broken(&|d| d.set_avail_idx(0xffff)), Broken::AvailIndex { avail: 0xffff, position: 0, size: 4 });
    assert_eq!(broken(&|d| d.post_head(4)), Broken::Head { head: 4, size: 4 });
    assert_eq!(
        broken(&|d| {
            d.write_descriptor(0, DATA, 1, FLAG_NEXT, 9);
            d.post_head(0);
        }),
        Broken::Next { next: 9, size: 4 }
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor(0, DATA, 1, FLAG_NEXT, 1);
            d.write_descriptor(1, DATA, 1, FLAG_NEXT, 0);
            d.post_head(0);
        }),
        Broken::Loop { head: 0 }
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor(2, DATA, 1, FLAG_NEXT | FLAG_WRITE, 1);
            d.write_descriptor(1, DATA, 1, 0, 0);
            d.post_head(2);
        }),
        Broken::Order { head: 2 }
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor(0, u64::MAX - 5, 64, 0, 0);
            d.post_head(0);
        }),
        Broken::Wrapped { iova: u64::MAX - 5, len: 64 }
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor(0, DATA, u32::MAX, 0, 0);
            d.post_head(0);
        }),
        Broken::TooLong { head: 0, max: 3 << 20 }
    );
}

#[test]
fn hostile_indirect_tables_break_with_a_reason() {
    let broken = |act: &dyn Fn(&mut Driver<'_>)| broken_by(FEATURES, Limits::default(), act);
    let table = |d: &mut Driver<'_>, len: u32, flags: u16| {
        d.write_descriptor(0, DATA, len, FLAG_INDIRECT | flags, 1);
        d.post_head(0);
    };
    for len in [0, 8, 17, 16 * 1025, u32::MAX] {
        assert_eq!(broken(&|d| table(d, len, 0)), Broken::IndirectLength { len });
    }
    assert_eq!(broken(&|d| table(d, 16, FLAG_NEXT)), Broken::Indirect { head: 0 });
    assert_eq!(
        broken(&|d| {
            d.write_descriptor_at(DATA, 0, DATA, 16, FLAG_INDIRECT, 0);
            table(d, 16, 0);
        }),
        Broken::Indirect { head: 0 },
        "nested"
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor_at(DATA, 0, DATA, 16, FLAG_NEXT, 0);
            table(d, 32, 0);
        }),
        Broken::Loop { head: 0 }
    );
    assert_eq!(
        broken(&|d| {
            d.write_descriptor_at(DATA, 0, DATA, 16, FLAG_NEXT, 2);
            table(d, 32, 0);
        }),
        Broken::Next { next: 2, size: 2 }
    );
    let not_negotiated = broken_by(virtio::VERSION_1, Limits::default(), |d| {
        d.post_indirect(DATA, &[read_only(DATA, 1)]);
    });
    assert!(matches!(not_negotiated, Broken::Indirect { .. }));
}

#[test]
fn flags_rule_calls_and_kicks_without_event_indexes() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let mut ring = Vring::default();
    let mut serve = |driver: &mut Driver<'_>| {
        driver.post(&[read_only(DATA, 1)]).expect("room");
        let mut burst = ring.begin(&memory, &driver.record, virtio::VERSION_1).expect("present");
        burst.disable_kick();
        assert_eq!(driver.used_flags(), 1);
        let chain = burst.next_chain().expect("present").expect("posted");
        burst.complete(chain, 0);
        let call = burst.publish();
        assert_eq!(burst.enable_kick(), Ok(false));
        assert_eq!(driver.used_flags(), 0);
        driver.collect();
        call
    };
    assert!(serve(&mut driver));
    driver.set_avail_flags(1);
    assert!(!serve(&mut driver), "NO_INTERRUPT");
    driver.set_avail_flags(0);
    assert!(serve(&mut driver));
}

#[test]
fn a_chain_posted_while_kicks_are_enabled_is_noticed() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 8);
    let mut ring = Vring::default();
    let mut burst = begin(&mut ring, &memory, &driver);
    assert!(burst.next_chain().expect("fine").is_none());
    driver.post(&[read_only(DATA, 1)]).expect("room");
    assert_eq!(burst.enable_kick(), Ok(true));
    assert_eq!(driver.avail_event(), 0);
}

#[test]
fn event_indexes_hold_over_the_wrap() {
    let memory = memory(1);
    memory.resolve_everything();
    let mut driver = driver(&memory, 16);
    let mut ring = Vring::default();
    let (mut completed, mut calls) = (0_u64, 0_u64);
    // The driver wants to be called at every 1,000th entry; batches of 1 to 5 step over 65,536 twice.
    let mut wanted = 1000_u64;
    driver.set_used_event(999);
    while completed < 150_000 {
        let batch = 1 + completed % 5;
        for _ in 0..batch {
            driver.post(&[read_only(DATA, 1)]).expect("room");
        }
        let mut burst = begin(&mut ring, &memory, &driver);
        while let Some(chain) = burst.next_chain().expect("present") {
            burst.complete(chain, 0);
        }
        let call = burst.publish();
        assert_eq!(burst.enable_kick(), Ok(false));
        completed += batch;
        assert_eq!(u64::from(driver.avail_event()), completed & 0xffff);
        let due = completed >= wanted || completed == batch;
        assert_eq!(call, due, "after {completed}, wanted at {wanted}");
        if completed >= wanted {
            wanted += 1000;
            driver.set_used_event(u16::try_from((wanted - 1) & 0xffff).expect("masked"));
        }
        calls += u64::from(call);
        assert_eq!(driver.collect().len(), usize::try_from(batch).expect("small"));
    }
    assert_eq!(calls, 1 + 150);
}
