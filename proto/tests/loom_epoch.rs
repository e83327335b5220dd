//! Models of pin, publish, grace period and node reuse: loom runs every interleaving, and every value a weak memory
//! model lets a load return.
//!
//! The *data* of a page is a word that is read relaxed, so that nothing but the algorithm under test can order it. Page
//! content turns to `POISON` when the front-end was told that the translation is gone; a reader must never see it.
//!
//! Each rule of the algorithm has a test in which it is broken on purpose. These tests pass when loom finds the fault:
//! a model that cannot see the mistake would be worth nothing.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test -p iotlb-proto --release --test loom_epoch`

#![cfg(loom)]

use iotlb_proto::access::Access;
use iotlb_proto::epoch;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::MissCell;
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering, full_fence};
use iotlb_proto::table::{QueueRecord, TableMemory, TableWriter};
use iotlb_proto::worker::Answer;
use std::sync::Arc;

const POISON: u64 = 0xdead;
const NODES: u32 = 12;

/// What reader and writer share: the table, one reader slot, and the content of pages by target page number.
struct Shared {
    table: TableMemory,
    slot: AtomicU64,
    pages: [AtomicU64; 3],
}

impl Shared {
    fn new() -> Arc<Shared> {
        Arc::new(Shared {
            table: TableMemory::model(NODES),
            slot: AtomicU64::new(0),
            pages: std::array::from_fn(|_| AtomicU64::new(1)),
        })
    }

    fn epoch(&self) -> &AtomicU64 {
        &self.table.header().epoch.word
    }

    fn wait(&self, target: u64) {
        while !epoch::is_drained(&self.slot, target) {
            loom::thread::yield_now();
        }
    }

    /// The page with this number is the guest's again.
    fn poison(&self, number: usize) {
        self.pages[number].store(POISON, Ordering::Relaxed);
    }

    /// Looks `iova` up and reads the page behind it, as a pinned reader does.
    fn read(&self, iova: u64) {
        if let Some(found) = self.table.lookup(iova) {
            let content = self.pages[(found.address(iova) >> 12) as usize].load(Ordering::Relaxed);
            assert_ne!(content, POISON, "stale read of {iova:#x}");
        }
    }
}

fn page(number: u64) -> IovaRange {
    IovaRange::from_len(number << 12, 4096).expect("a page")
}

fn insert(table: &mut TableWriter, number: u64, target: u64) {
    table.insert(page(number), target << 12, Access::READ_WRITE).expect("room");
}

fn grace(shared: &Shared, table: &mut TableWriter) {
    if let Some(target) = table.begin_grace() {
        shared.wait(target);
        table.grace_completed(target);
    }
    assert!(table.is_quiet());
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    loom::model::Builder::new().check(model);
}

/// One reader that pins as `pin` does and reads page 0 (and page 1), against `writer`.
fn reader_against(
    pin: fn(&AtomicU64, &AtomicU64) -> u64,
    pages: &'static [u64],
    writer: impl FnOnce(&Shared, &mut TableWriter) + Send + 'static + Clone + Sync,
) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        for &number in pages {
            insert(&mut table, number, number);
        }
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                pin(&shared.slot, shared.epoch());
                for &number in pages {
                    shared.read(number << 12);
                }
                epoch::unpin(&shared.slot);
            })
        };
        writer.clone()(&shared, &mut table);
        reader.join().expect("reader");
    });
}

#[test]
fn an_acknowledged_removal_is_never_read_again() {
    reader_against(epoch::pin, &[0], |shared, table| {
        table.remove(page(0));
        grace(shared, table);
        shared.poison(0);
    });
}

#[test]
fn a_replaced_translation_is_never_read_again() {
    reader_against(epoch::pin, &[0], |shared, table| {
        insert(table, 0, 2);
        grace(shared, table);
        shared.poison(0);
    });
}

#[test]
fn a_reader_that_pins_twice_holds_back_both_times() {
    check(|| {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        insert(&mut table, 0, 0);
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                for _ in 0..2 {
                    epoch::pin(&shared.slot, shared.epoch());
                    shared.read(0);
                    epoch::unpin(&shared.slot);
                }
            })
        };
        table.remove(page(0));
        grace(&shared, &mut table);
        shared.poison(0);
        reader.join().expect("reader");
    });
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_no_writer_fence() {
    reader_against(epoch::pin, &[0], |shared, table| {
        table.remove(page(0));
        // As `Grace::begin`, less its fence.
        shared.epoch().store(2, Ordering::Release);
        shared.wait(2);
        shared.poison(0);
    });
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_epoch_that_is_not_released() {
    reader_against(epoch::pin, &[0], |shared, table| {
        table.remove(page(0));
        // As `Grace::begin`, but that whoever finds the epoch finds only the epoch.
        shared.epoch().store(2, Ordering::Relaxed);
        full_fence();
        shared.wait(2);
        shared.poison(0);
    });
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_pin_by_exchange_alone() {
    fn pin(slot: &AtomicU64, epoch: &AtomicU64) -> u64 {
        slot.swap(epoch.load(Ordering::Relaxed), Ordering::SeqCst)
    }
    reader_against(pin, &[0], |shared, table| {
        table.remove(page(0));
        grace(shared, table);
        shared.poison(0);
    });
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_no_wait() {
    reader_against(epoch::pin, &[0], |shared, table| {
        table.remove(page(0));
        table.begin_grace();
        shared.poison(0);
    });
}

/// Page 1 is evicted while the grace period for page 0 runs; then the front-end invalidates page 1 as well.
fn evict_during_grace(shared: &Shared, table: &mut TableWriter, acknowledge: impl FnOnce(&mut TableWriter)) {
    table.remove(page(0));
    let target = table.begin_grace().expect("page 0 was removed");
    table.remove(page(1));
    shared.wait(target);
    table.grace_completed(target);
    shared.poison(0);
    assert_eq!(table.remove(page(1)), 0, "nothing is left to remove");
    acknowledge(table);
    shared.poison(1);
}

#[test]
fn an_entry_evicted_during_a_grace_period_waits_for_the_next() {
    reader_against(epoch::pin, &[0, 1], |shared, table| {
        evict_during_grace(shared, table, |table| grace(shared, table));
    });
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_reply_because_nothing_was_removed_since_the_last_completed_grace() {
    reader_against(epoch::pin, &[0, 1], |shared, table| {
        // The wrong rule: the last grace period has completed, and this take removed nothing. So answer.
        evict_during_grace(shared, table, |_| ());
    });
}

/// The reader looks page 0 up while its node is removed and, after `between`, used for pages 2 and 3.
fn reuse_a_node(between: impl Fn(&Shared, &mut TableWriter) + Send + Sync + 'static) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        // Two levels: page 3 makes the tree that high, then only page 0 stays.
        insert(&mut table, 3, 1);
        insert(&mut table, 0, 0);
        table.remove(page(3));
        let target = table.begin_grace().expect("page 3 was removed");
        table.grace_completed(target);
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                if let Some(found) = shared.table.lookup(0) {
                    assert_eq!(found.address(0), 0, "a node was reused under a reader");
                }
                epoch::unpin(&shared.slot);
            })
        };
        table.remove(page(0));
        between(&shared, &mut table);
        insert(&mut table, 2, 2);
        reader.join().expect("reader");
    });
}

#[test]
fn a_node_is_reused_only_after_a_grace_period() {
    reuse_a_node(grace);
}

#[test]
#[should_panic(expected = "a node was reused under a reader")]
fn planted_node_reuse_without_waiting() {
    reuse_a_node(|_, table| {
        let target = table.begin_grace().expect("page 0 was removed");
        table.grace_completed(target);
    });
}

/// Page 1 of a superpage is changed, which splits it; page 0 stays what it is, for every reader at every moment.
fn split_a_superpage(change: fn(&mut TableWriter)) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        // Page 3 makes the tree two levels high; only then pages 0 and 1 are one leaf.
        insert(&mut table, 3, 2);
        table.insert(IovaRange::from_len(0, 8192).expect("range"), 0, Access::READ).expect("room");
        assert_eq!(table.stats().entries, 2, "no superpage");
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                let kept = shared.table.lookup(0).expect("page 0 never goes");
                assert_eq!(kept.address(0), 0);
                shared.read(4096);
                epoch::unpin(&shared.slot);
            })
        };
        change(&mut table);
        grace(&shared, &mut table);
        shared.poison(1);
        reader.join().expect("reader");
    });
}

#[test]
fn a_superpage_split_by_a_removal_is_seen_whole_or_split() {
    split_a_superpage(|table| assert_eq!(table.remove(page(1)), 1));
}

#[test]
fn a_superpage_split_by_an_update_is_seen_whole_or_split() {
    split_a_superpage(|table| insert(table, 1, 2));
}

/// The reader looks page 0 up while the subtree around it is taken off, all pages of it with one store; after `between`
/// its nodes are used for page 2.
fn reuse_a_subtree(between: impl Fn(&Shared, &mut TableWriter) + Send + Sync + 'static) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        // Three levels, so that what hangs below the root has nodes of its own.
        insert(&mut table, 7, 1);
        insert(&mut table, 0, 0);
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                if let Some(found) = shared.table.lookup(0) {
                    assert_eq!(found.address(0), 0, "a node was reused under a reader");
                }
                epoch::unpin(&shared.slot);
            })
        };
        table.remove(IovaRange::from_len(0, 4 << 12).expect("range"));
        assert!(!table.is_tidy(), "nothing was taken off");
        between(&shared, &mut table);
        while table.tidy() {}
        insert(&mut table, 2, 2);
        reader.join().expect("reader");
    });
}

#[test]
fn a_subtree_that_is_walked_before_its_grace_period_is_reused_after_it() {
    reuse_a_subtree(|shared, table| {
        while table.tidy() {}
        grace(shared, table);
    });
}

#[test]
fn a_subtree_that_is_walked_after_its_grace_period_is_reused_at_once() {
    reuse_a_subtree(grace);
}

#[test]
#[should_panic(expected = "a node was reused under a reader")]
fn planted_reuse_of_a_subtree_without_waiting() {
    reuse_a_subtree(|_, table| {
        let target = table.begin_grace().expect("pages were removed");
        table.grace_completed(target);
    });
}

/// A split superpage is whole again; the node it was split into is used for page 2 after `between`.
fn reuse_a_split(between: impl Fn(&Shared, &mut TableWriter) + Send + Sync + 'static) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        insert(&mut table, 3, 1);
        insert(&mut table, 0, 0);
        table.remove(page(3));
        let target = table.begin_grace().expect("page 3 was removed");
        table.grace_completed(target);
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                let kept = shared.table.lookup(0).expect("a node was reused under a reader");
                assert_eq!(kept.address(0), 0, "a node was reused under a reader");
                epoch::unpin(&shared.slot);
            })
        };
        table.insert(IovaRange::from_len(0, 8192).expect("range"), 0, Access::READ_WRITE).expect("room");
        between(&shared, &mut table);
        insert(&mut table, 2, 2);
        reader.join().expect("reader");
    });
}

#[test]
fn a_merged_superpage_gives_its_node_away_after_a_grace_period() {
    reuse_a_split(grace);
}

#[test]
#[should_panic(expected = "a node was reused under a reader")]
fn planted_reuse_of_a_merged_node_without_waiting() {
    reuse_a_split(|_, table| {
        let target = table.begin_grace().expect("the lower leaf was replaced");
        table.grace_completed(target);
    });
}

/// A byte-granular range is replaced, and the copy of the array it was in is used again after `between`.
fn reuse_a_side_copy(between: impl Fn(&Shared, &mut TableWriter) + Send + Sync + 'static) {
    check(move || {
        let bytes = |first| IovaRange::from_len(first, 16).expect("bytes");
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        table.insert(bytes(0x40), 0x1040, Access::READ).expect("a free copy");
        let target = table.begin_grace().expect("a copy was replaced");
        table.grace_completed(target);
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                let found = shared.table.lookup_side(0x44).expect("a copy was reused under a reader");
                let whole = (found.first, found.last) == (0x40, 0x4f) && matches!(found.target, 0x1040 | 0x2040);
                assert!(whole, "a copy was reused under a reader");
                epoch::unpin(&shared.slot);
            })
        };
        table.insert(bytes(0x40), 0x2040, Access::READ).expect("a free copy");
        between(&shared, &mut table);
        // Sorted before the other range, so it takes its place in the array.
        table.insert(bytes(0x10), 0x1010, Access::READ).expect("a free copy");
        reader.join().expect("reader");
    });
}

#[test]
fn a_side_copy_is_reused_only_after_a_grace_period() {
    reuse_a_side_copy(grace);
}

#[test]
#[should_panic(expected = "a copy was reused under a reader")]
fn planted_side_copy_reuse_without_waiting() {
    reuse_a_side_copy(|_, table| {
        let target = table.begin_grace().expect("a copy was replaced");
        table.grace_completed(target);
    });
}

/// Two readers with a slot each; `wait` is how the writer waits for both.
fn two_readers(wait: fn(&[AtomicU64; 2], u64)) {
    // Three threads: more switches than these find nothing new, and take long.
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let shared = Shared::new();
        let slots: Arc<[AtomicU64; 2]> = Arc::new(std::array::from_fn(|_| AtomicU64::new(0)));
        let mut table = TableWriter::over(shared.table.clone());
        insert(&mut table, 0, 0);
        let readers = [0, 1].map(|own| {
            let (shared, slots) = (Arc::clone(&shared), Arc::clone(&slots));
            loom::thread::spawn(move || {
                epoch::pin(&slots[own], shared.epoch());
                shared.read(0);
                epoch::unpin(&slots[own]);
            })
        });
        table.remove(page(0));
        let target = table.begin_grace().expect("page 0 was removed");
        wait(&slots, target);
        table.grace_completed(target);
        shared.poison(0);
        for reader in readers {
            reader.join().expect("reader");
        }
    });
}

/// One slot after the other: each is done with once it was seen free.
fn wait_for(slots: &[AtomicU64], target: u64) {
    for slot in slots {
        while !epoch::is_drained(slot, target) {
            loom::thread::yield_now();
        }
    }
}

#[test]
fn a_removal_waits_for_every_reader() {
    two_readers(|slots, target| wait_for(slots, target));
}

#[test]
#[should_panic(expected = "stale read")]
fn planted_the_second_reader_is_not_waited_for() {
    two_readers(|slots, target| wait_for(&slots[..1], target));
}

/// Whoever finds an entry into new memory sees the generation that announced the memory.
fn generation_and_entry(range: IovaRange, publish: impl Fn(&mut TableWriter, IovaRange) + Send + Sync + 'static) {
    check(move || {
        let shared = Shared::new();
        let mut table = TableWriter::over(shared.table.clone());
        let reader = {
            let shared = Arc::clone(&shared);
            loom::thread::spawn(move || {
                epoch::pin(&shared.slot, shared.epoch());
                if shared.table.lookup(range.first()).is_some() {
                    // Relaxed: the load of the entry alone has to bring it.
                    let generation = shared.table.header().state.memory_map_generation.load(Ordering::Relaxed);
                    assert_eq!(generation, 1, "an entry into memory that nobody announced");
                }
                epoch::unpin(&shared.slot);
            })
        };
        publish(&mut table, range);
        reader.join().expect("reader");
    });
}

fn announce_then_insert(table: &mut TableWriter, range: IovaRange) {
    table.bump_memory_map();
    table.insert(range, range.first(), Access::READ).expect("room");
}

#[test]
fn new_memory_is_announced_before_the_first_entry_into_it() {
    generation_and_entry(page(0), announce_then_insert);
    generation_and_entry(IovaRange::from_len(0x40, 16).expect("bytes"), announce_then_insert);
}

#[test]
#[should_panic(expected = "an entry into memory that nobody announced")]
fn planted_memory_announced_after_the_entry() {
    generation_and_entry(page(0), |table, range| {
        table.insert(range, range.first(), Access::READ).expect("room");
        table.bump_memory_map();
    });
}

#[test]
fn a_queue_record_is_copied_whole_or_not_at_all() {
    let record = |n: u16| QueueRecord {
        started: n == 2,
        enabled: n == 2,
        size: n,
        desc: n.into(),
        avail: n.into(),
        used: n.into(),
        base: n,
        session_generation: n.into(),
    };
    // The record has nine words, each stored and loaded.
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let memory = TableMemory::model(NODES);
        let mut table = TableWriter::over(memory.clone());
        table.publish_queue(0, &record(1));
        let reader = loom::thread::spawn(move || QueueRecord::load(&memory.queues()[0]));
        table.publish_queue(0, &record(2));
        if let Some(copy) = reader.join().expect("reader") {
            assert!(copy == record(1) || copy == record(2), "torn: {copy:?}");
        }
        assert_eq!(QueueRecord::load(&table.memory().queues()[0]), Some(record(2)));
    });
}

#[test]
fn a_sleeping_worker_is_seen_or_sees_the_answer() {
    check(|| {
        let cell = Arc::new(MissCell {
            first: AtomicU64::new(0),
            request: AtomicU64::new(0),
            state: AtomicU32::new(0),
            sleeping: AtomicU32::new(0),
        });
        cell.post(7, page(0), Access::READ);
        let worker = {
            let cell = Arc::clone(&cell);
            loom::thread::spawn(move || {
                cell.set_sleeping(true);
                cell.answer(7).is_none()
            })
        };
        let wakes = cell.store_answer(7, Answer::Resolved);
        let sleeps = worker.join().expect("worker");
        assert!(wakes || !sleeps, "a lost wake-up");
    });
}

/// `mark_posted` and `set_doorbell_wanted` are the two halves of one store-buffer pattern; here on bare words.
#[test]
fn a_posted_miss_is_seen_or_its_doorbell_rung() {
    check(|| {
        let posted = Arc::new(AtomicU64::new(0));
        let wanted = Arc::new(AtomicU64::new(0));
        let worker = {
            let (posted, wanted) = (Arc::clone(&posted), Arc::clone(&wanted));
            loom::thread::spawn(move || {
                posted.fetch_or(1, Ordering::Release);
                full_fence();
                wanted.load(Ordering::Relaxed) != 0
            })
        };
        wanted.store(1, Ordering::Relaxed);
        full_fence();
        let seen = posted.load(Ordering::Relaxed) != 0;
        let rung = worker.join().expect("worker");
        assert!(seen || rung, "the daemon sleeps on a posted miss");
    });
}
