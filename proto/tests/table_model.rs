//! The table against a naive model: a list of ranges, cut and replaced as the protocol says.
//!
//! A cache may know less than the model, never something else. With whole pages and room enough it must know the same.

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::table::segment_size;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::memory::NODES_MIN;
use iotlb_proto::table::writer::TARGET_LIMIT;
use iotlb_proto::table::{QueueRecord, TableConfig, TableWriter, TargetRemoval, Translation};
use iotlb_proto::tree::SLICE_WORDS;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Insert { first: u64, len: u64, target: u64, access: u8 },
    Remove { first: u64, size: u64 },
    RemoveTargets { first: u64, len: u64 },
    Clear,
    Tidy,
    Grace,
}

#[derive(Default)]
struct Model(Vec<Translation>);

impl Model {
    fn remove(&mut self, range: IovaRange) {
        let mut next = Vec::new();
        for old in self.0.drain(..) {
            if range.last() < old.first || old.last < range.first() {
                next.push(old);
                continue;
            }
            if old.first < range.first() {
                next.push(Translation { last: range.first() - 1, ..old });
            }
            if range.last() < old.last {
                let first = range.last() + 1;
                next.push(Translation { first, target: old.address(first), ..old });
            }
        }
        self.0 = next;
    }

    fn insert(&mut self, range: IovaRange, target: u64, access: Access) {
        self.remove(range);
        self.0.push(Translation { first: range.first(), last: range.last(), target, access });
    }

    fn remove_targets(&mut self, first: u64, last: u64) {
        for old in self.0.clone() {
            let end = old.target + (old.last - old.first);
            let (low, high) = (first.max(old.target), last.min(end));
            if let Some(targets) = IovaRange::new(low, high) {
                let cut = IovaRange::from_len(old.first + (low - old.target), targets.len_minus_one() + 1);
                self.remove(cut.expect("inside the old range"));
            }
        }
    }

    fn find(&self, iova: u64) -> Option<(u64, Access)> {
        let range = self.0.iter().find(|range| range.first <= iova && iova <= range.last)?;
        Some((range.address(iova), range.access))
    }
}

/// Runs the operations in slices of so many words; `exact`: what the model knows, the table must know.
fn run(ops: &[Op], nodes: u32, exact: bool, slice_words: usize) -> Result<(), TestCaseError> {
    let size = segment_size(nodes).expect("fits") as u64;
    let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
    table.set_slice_words(slice_words);
    let mut model = Model::default();
    let mut points = vec![0, u64::MAX];
    for op in ops {
        match *op {
            Op::Insert { first, len, target, access } => {
                let Some(range) = IovaRange::from_len(first, len) else { continue };
                let access = Access::from_bits(access).expect("1 to 3");
                let mut tries = 0;
                while table.insert(range, target, access).is_err() {
                    tries += 1;
                    prop_assert!(tries < 3, "no room after {tries} grace periods");
                    complete_grace(&mut table);
                }
                // What was just put in is there, however small the table.
                for at in [first, first + len / 2, range.last()] {
                    let found = table.lookup(at).map(|found| (found.address(at), found.access));
                    prop_assert_eq!(found, Some((target + (at - first), access)), "at {:#x} after {:?}", at, op);
                }
                model.insert(range, target, access);
                points.extend([
                    first.wrapping_sub(1),
                    first,
                    first + len / 2,
                    range.last(),
                    range.last().wrapping_add(1),
                ]);
            }
            Op::Remove { first, size } => {
                let range = IovaRange::from_invalidate(first, size);
                table.remove(range);
                model.remove(range);
                points.extend([first.wrapping_sub(1), first, range.last(), range.last().wrapping_add(1)]);
            }
            Op::RemoveTargets { first, len } => {
                let last = first.saturating_add(len);
                let mut removal = TargetRemoval::new(first, last);
                for slice in 1_u32.. {
                    if removal.is_done() {
                        break;
                    }
                    table.remove_targets(&mut removal);
                    // Half done: some of it may be there, and nothing else. There may be thousands of slices.
                    let looked_at = if slice.is_power_of_two() { &points[..] } else { &[] };
                    for &iova in looked_at {
                        if let Some(found) = table.lookup(iova) {
                            let found = Some((found.address(iova), found.access));
                            prop_assert_eq!(found, model.find(iova), "at {:#x} during {:?}", iova, op);
                        }
                    }
                }
                model.remove_targets(first, last);
            }
            Op::Clear => {
                table.clear();
                model.0.clear();
                table.for_each(|found| panic!("{found:?} is left"));
            }
            Op::Tidy => _ = table.tidy(),
            Op::Grace => complete_grace(&mut table),
        }
        for &iova in &points {
            let found = table.lookup(iova).map(|found| (found.address(iova), found.access));
            let expected = model.find(iova);
            if found.is_some() || exact {
                prop_assert_eq!(found, expected, "at {:#x} after {:?}", iova, op);
            }
        }
        let mut count = 0;
        table.for_each(|_| count += 1);
        let entries = table.stats().entries;
        prop_assert!(if table.is_tidy() { count == entries } else { count <= entries }, "{} of {}", count, entries);
    }
    table.clear();
    settle(&mut table);
    let stats = table.stats();
    prop_assert_eq!((stats.nodes_used, stats.nodes_retired), (0, 0), "nodes leaked");
    Ok(())
}

/// Inserts, with the grace periods that the table asks for.
fn put(table: &mut TableWriter, range: IovaRange, target: u64, access: Access) {
    for _ in 0..3 {
        if table.insert(range, target, access).is_ok() {
            return;
        }
        complete_grace(table);
    }
    panic!("no room for {range} after three grace periods: {:?}", table.stats());
}

fn complete_grace(table: &mut TableWriter) {
    if let Some(epoch) = table.begin_grace() {
        table.grace_completed(epoch);
    }
    assert!(table.is_quiet());
}

/// Completes a grace period and puts everything away that may be.
fn settle(table: &mut TableWriter) {
    while table.tidy() {}
    complete_grace(table);
    while table.tidy() {}
}

/// Removes by target, however many slices it takes; returns how many leaves and ranges went.
fn remove_targets(table: &mut TableWriter, first: u64, last: u64) -> u64 {
    let mut removal = TargetRemoval::new(first, last);
    let mut removed = 0;
    while !removal.is_done() {
        removed += table.remove_targets(&mut removal);
    }
    removed
}

/// From so few words that each slice is one step to the usual.
fn slice_words() -> impl Strategy<Value = usize> {
    prop_oneof![1 => Just(1), 2 => 1_usize..2000, 3 => Just(SLICE_WORDS)]
}

/// Addresses that collide often, near the ends of levels and of the space.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..40,
        500_u64..530,
        (1_u64 << 18) - 4..(1 << 18) + 4,
        0xfee00_u64..0xfef10,
        (1_u64 << 36) - 3..(1 << 36) + 3,
        (1_u64 << 52) - 600..(1 << 52),
    ]
}

fn page_count() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1_u64..6, 1 => 500_u64..1100, 1 => Just(1_u64 << 18), 1 => Just(1 << 27)]
}

fn whole_pages() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (page(), page_count(), 0_u64..1 << 30, 1_u8..4).prop_map(|(first, len, target, access)| Op::Insert {
            first: first << 12, len: len << 12, target: target << 12, access
        }),
        4 => (page(), page_count()).prop_map(|(first, size)| Op::Remove { first: first << 12, size: size << 12 }),
        1 => Just(Op::Clear),
        1 => Just(Op::Remove { first: 0xfef0_0000, size: 0xffff_ffff_0110_0000 }),
        1 => Just(Op::Remove { first: 0, size: 0xfee0_0000 }),
        2 => Just(Op::Tidy),
        2 => Just(Op::Grace),
    ]
}

fn ragged() -> impl Strategy<Value = Op> {
    let address = || (page(), 0_u64..4096).prop_map(|(page, byte)| page << 12 | byte);
    let len = || prop_oneof![1_u64..9000, Just(4096_u64), Just(1 << 30)];
    prop_oneof![
        4 => whole_pages(),
        4 => (address(), len(), 0_u64..1 << 40, 1_u8..4)
            .prop_map(|(first, len, target, access)| Op::Insert { first, len, target, access }),
        2 => (address(), len(), 1_u8..4)
            .prop_map(|(first, len, access)| Op::Insert { first, len, target: first & 0xffff_ffff, access }),
        3 => (address(), len()).prop_map(|(first, size)| Op::Remove { first, size }),
        1 => (0_u64..1 << 40, 0_u64..1 << 38).prop_map(|(first, len)| Op::RemoveTargets { first, len }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn whole_pages_are_translated_exactly(
        ops in proptest::collection::vec(whole_pages(), 1..40),
        words in slice_words(),
    ) {
        run(&ops, 4096, true, words)?;
    }

    #[test]
    fn bytes_are_never_translated_wrongly(ops in proptest::collection::vec(ragged(), 1..60), words in slice_words()) {
        run(&ops, 4096, false, words)?;
    }

    #[test]
    fn a_tiny_table_forgets_but_never_lies(ops in proptest::collection::vec(ragged(), 1..120), words in slice_words()) {
        run(&ops, NODES_MIN, false, words)?;
    }
}

#[test]
fn an_insert_finds_room_in_a_full_table_and_recent_leaves_stay() {
    let size = segment_size(NODES_MIN).expect("fits") as u64;
    let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
    let mut recent_lost = 0;
    for n in 0_u64..5000 {
        // One leaf a lowest node: the worst case.
        let range = IovaRange::from_len(n << 21, 4096).expect("range");
        put(&mut table, range, n << 12, Access::READ);
        assert_eq!(table.lookup(n << 21).map(|found| found.target), Some(n << 12), "leaf {n}");
        if n >= 8 && table.lookup((n - 8) << 21).is_none() {
            recent_lost += 1;
        }
    }
    assert!(table.stats().evictions > 4000);
    assert_eq!(recent_lost, 0, "eviction took what was inserted a moment ago");
}

/// A tree of superpages alone has no lowest-level node that could go.
#[test]
fn eviction_spares_recent_superpages_too() {
    let size = segment_size(NODES_MIN).expect("fits") as u64;
    let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
    for n in 0_u64..1000 {
        // One leaf in a node of the level above the lowest.
        let range = IovaRange::from_len(n << 30, 2 << 20).expect("range");
        put(&mut table, range, n << 21, Access::READ);
        for recent in n.saturating_sub(8)..=n {
            assert_eq!(table.lookup(recent << 30).map(|found| found.target), Some(recent << 21), "{recent} after {n}");
        }
    }
    assert!(table.stats().evictions > 500);
}

/// A front-end that repeats itself about many small leaves gets fewer large ones, not a walk over all of them.
#[test]
fn repeating_a_dense_range_merges_it() {
    let (mut table, _fd) = TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("table");
    let pages = 4096_u64;
    for n in 0..pages {
        table.insert(IovaRange::page_of(n << 12), n << 12, Access::READ).expect("room");
    }
    assert_eq!(table.stats().entries, pages);
    table.insert(IovaRange::from_len(0, pages << 12).expect("range"), 0, Access::READ).expect("room");
    assert_eq!(table.stats().entries, pages / 512);
    complete_grace(&mut table);
    for n in 0..pages {
        assert_eq!(table.lookup(n << 12).map(|found| found.address(n << 12)), Some(n << 12));
    }
}

#[test]
fn the_same_again_takes_nothing_and_narrower_does() {
    let (mut table, _fd) = TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("table");
    let range = IovaRange::from_len(0x5000, 0x3000).expect("range");
    table.insert(range, 0x9000, Access::READ).expect("room");
    assert!(table.is_quiet(), "giving needs no grace period");
    table.insert(range, 0x9000, Access::READ).expect("room");
    table.insert(range, 0x9000, Access::READ_WRITE).expect("room");
    assert!(table.is_quiet(), "neither does giving more");
    table.insert(range, 0x9000, Access::READ).expect("room");
    assert!(!table.is_quiet(), "less is a take");
    complete_grace(&mut table);
    table.insert(range, 0xa000, Access::READ).expect("room");
    assert!(!table.is_quiet(), "another target is a take");
    complete_grace(&mut table);
    assert_eq!(table.remove(IovaRange::from_len(0x8000, 0x1000).expect("range")), 0);
    assert!(table.is_quiet(), "removing nothing takes nothing");
}

#[test]
fn an_identity_map_of_a_guest_is_a_few_words() {
    let (mut table, _fd) = TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("table");
    let guest = IovaRange::from_len(0, 512 << 20).expect("range");
    table.insert(guest, 0, Access::READ_WRITE).expect("room");
    assert!(table.stats().entries <= 512 && table.stats().nodes_used <= 3, "{:?}", table.stats());
    let page = IovaRange::from_len(0x1234_5000, 0x1000).expect("range");
    assert_eq!(table.remove(page), 1);
    assert!(table.lookup(0x1234_5678).is_none());
    assert_eq!(table.lookup(0x1234_4fff).map(|found| found.address(0x1234_4fff)), Some(0x1234_4fff));
    assert_eq!(table.lookup(0x1234_6000).map(|found| found.address(0x1234_6000)), Some(0x1234_6000));
}

#[test]
fn removal_without_a_free_node_drops_the_whole_superpage() {
    let size = segment_size(NODES_MIN).expect("fits") as u64;
    let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
    table.insert(IovaRange::from_len(1 << 40, 1 << 30).expect("range"), 0, Access::READ).expect("room");
    let mut n = 0_u64;
    // Use up nearly every node.
    while table.insert(IovaRange::from_len(n << 21, 4096).expect("range"), 0, Access::READ).is_ok() {
        n += 1;
        let stats = table.stats();
        if stats.nodes_total - stats.nodes_used < 16 {
            break;
        }
    }
    for n in 0..32_u64 {
        let page = (1 << 40) + (n << 25);
        table.remove(IovaRange::from_len(page, 4096).expect("range"));
        assert!(table.lookup(page).is_none());
    }
    assert!(table.lookup((1 << 40) + (1 << 29) + 4096).is_none(), "the leaf was dropped whole");
}

/// A tree that is high because of one address, and nearly full: what is free does not suffice for the path down to a
/// low address.
#[test]
fn a_low_insert_into_a_high_and_full_tree_is_published() {
    let size = segment_size(NODES_MIN).expect("fits") as u64;
    let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
    let page = |first: u64| IovaRange::from_len(first, 4096).expect("range");
    table.insert(page(u64::MAX - 4095), 0, Access::READ).expect("room");
    table.insert(IovaRange::from_len(1 << 60, 64 << 30).expect("range"), 0, Access::READ).expect("room");
    // Each hole takes a lowest node and the one above it, as long as four are free.
    for hole in 0..32_u64 {
        table.remove(page((1 << 60) + (hole << 30)));
    }
    let stats = table.stats();
    assert!(stats.nodes_total - stats.nodes_used - stats.nodes_retired < 5, "{stats:?}");
    put(&mut table, page(0), 0x5000, Access::READ);
    assert_eq!(table.lookup(0).map(|found| found.target), Some(0x5000));
    table.clear();
    complete_grace(&mut table);
    assert_eq!(table.stats().nodes_used, 0, "nodes leaked");
}

/// The edges of the new range lie in superpages, which are split before the pages are put in.
#[test]
fn ragged_edges_inside_superpages_leave_room_for_the_pages_between() {
    let size = segment_size(NODES_MIN).expect("fits") as u64;
    for holes in 0..64_u64 {
        let (mut table, _fd) = TableWriter::create(&TableConfig { size, generation: 1 }).expect("table");
        table.insert(IovaRange::from_len(1 << 60, 1 << 55).expect("range"), 0, Access::READ).expect("room");
        for hole in 0..holes {
            table.remove(IovaRange::from_len((1 << 60) + (1 << 50) + (hole << 21), 4096).expect("range"));
        }
        let first = (1 << 60) + (1 << 48) - 0x800;
        let range = IovaRange::from_len(first, 0x3000).expect("range");
        put(&mut table, range, 0x4800, Access::WRITE);
        for at in [first, first + 0x1000, range.last()] {
            assert_eq!(table.lookup(at).map(|found| found.address(at)), Some(0x4800 + (at - first)), "{holes} holes");
        }
        table.clear();
        complete_grace(&mut table);
        assert_eq!(table.stats().nodes_used, 0, "nodes leaked");
    }
}

fn bytes(first: u64, len: u64) -> IovaRange {
    IovaRange::from_len(first, len).expect("range")
}

fn small_table() -> TableWriter {
    TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("table").0
}

#[test]
fn every_kind_of_taking_needs_a_grace_period_and_bumps_the_removal_generation() {
    type Step = fn(&mut TableWriter);
    let cases: [(&str, Step); 12] = [
        ("clear", |table| _ = table.clear()),
        ("remove a page", |table| _ = table.remove(bytes(0x3000, 1))),
        ("remove a superpage with all else", |table| _ = table.remove(bytes(0, 1 << 40))),
        ("cut a superpage", |table| _ = table.remove(bytes(0x20_0000, 4096))),
        ("remove targets", |table| _ = remove_targets(table, 0x3000, 0x3000)),
        ("remove the first target", |table| _ = remove_targets(table, 0x2000, 0x3000)),
        ("remove the last target", |table| _ = remove_targets(table, 0x3fff, 0x4000)),
        ("remove bytes", |table| _ = table.remove(bytes((1 << 30) + 8, 1))),
        ("remove the targets of bytes", |table| _ = remove_targets(table, (1 << 30) + 12, (1 << 30) + 12)),
        ("replace a subtree by a superpage", |table| table.insert(bytes(0, 2 << 20), 0, Access::READ).expect("room")),
        ("replace a part of a superpage", |table| {
            table.insert(bytes(0x20_0000, 4096), 0x9000, Access::READ).expect("room");
        }),
        ("no translation", |table| table.note_taken()),
    ];
    for (name, step) in cases {
        let mut table = small_table();
        table.insert(bytes(0x3000, 4096), 0x3000, Access::READ_WRITE).expect("room");
        table.insert(bytes(0x20_0000, 2 << 20), 0x20_0000, Access::READ_WRITE).expect("room");
        table.insert(bytes((1 << 30) + 4, 16), (1 << 30) + 8, Access::READ).expect("room");
        complete_grace(&mut table);
        let generation = |table: &TableWriter| table.memory().header().epoch.removal_generation.load(Ordering::Relaxed);
        let before = generation(&table);
        step(&mut table);
        assert!(!table.is_quiet(), "{name}");
        assert_eq!(generation(&table), before + 1, "{name}");
        complete_grace(&mut table);
    }
}

#[test]
fn copies_of_the_byte_ranges_wait_for_a_grace_period_and_removal_does_not() {
    let mut table = small_table();
    for n in 0..3_u64 {
        table.insert(bytes(n << 13 | 1, 8), 0x1000, Access::READ).expect("a free copy");
    }
    let next = bytes(3 << 13 | 1, 8);
    assert!(table.insert(next, 0x1000, Access::READ).is_err(), "readers may look at all the other copies");
    complete_grace(&mut table);
    for n in 3..6_u64 {
        table.insert(bytes(n << 13 | 1, 8), 0x1000, Access::READ).expect("freed copies");
    }
    // None is free: the range is ended where it is, all of it.
    let before = table.begin_grace().expect("copies were replaced");
    assert_eq!(table.remove(bytes(4 << 13 | 3, 1)), 1);
    assert!(table.begin_grace().expect("more was removed") > before);
    assert!(table.lookup(4 << 13 | 1).is_none() && table.lookup(4 << 13 | 3).is_none());
    assert_eq!(table.stats().entries, 5);
    complete_grace(&mut table);
    // And it stays away when the array is copied next.
    table.insert(bytes(9 << 13 | 1, 8), 0x1000, Access::READ).expect("freed copies");
    assert!(table.lookup(4 << 13 | 1).is_none());
    assert_eq!(table.stats().entries, 6);
}

#[test]
fn a_full_array_of_byte_ranges_keeps_the_newest() {
    let mut table = small_table();
    for n in (0..600_u64).rev() {
        let range = bytes(n << 13 | 1, 8);
        put(&mut table, range, 0x1000, Access::READ);
        assert!(table.lookup(range.first()).is_some(), "range {n}");
    }
}

#[test]
fn targets_the_words_cannot_hold_replace_without_being_published() {
    let mut table = small_table();
    let page = bytes(0x3000, 4096);
    for target in [TARGET_LIMIT - 4095, TARGET_LIMIT, u64::MAX - 4095, u64::MAX] {
        table.insert(page, 0x5000, Access::READ).expect("room");
        table.insert(page, target, Access::READ).expect("nothing to publish");
        assert!(table.lookup(0x3000).is_none(), "{target:#x}");
    }
    table.insert(page, TARGET_LIMIT - 4096, Access::READ).expect("room");
    assert_eq!(table.lookup(0x3fff).map(|found| found.address(0x3fff)), Some(TARGET_LIMIT - 1));
    table.insert(IovaRange::ALL, 0, Access::READ).expect("nothing to publish");
    assert_eq!(table.stats().entries, 0);
}

#[test]
fn generations_grow_by_one_and_are_published() {
    let mut table = small_table();
    let memory = |table: &TableWriter| table.memory().header().state.memory_map_generation.load(Ordering::Relaxed);
    let queues = |table: &TableWriter| table.memory().header().state.queue_generation.load(Ordering::Relaxed);
    let session = |table: &TableWriter| table.memory().header().state.session_generation.load(Ordering::Relaxed);
    for n in 1..3 {
        assert_eq!((table.bump_memory_map(), memory(&table)), (n, n));
        assert_eq!((table.bump_session(), session(&table)), (n, n));
        table.publish_queue(7, &QueueRecord::default());
        assert_eq!(queues(&table), n);
    }
    table.publish_queue(u16::MAX, &QueueRecord::default());
    assert_eq!(queues(&table), 2, "there is no such queue");
}

#[test]
fn what_is_unlinked_during_a_grace_period_is_reused_only_after_the_next() {
    let mut table = small_table();
    table.insert(bytes(0, 4096), 0, Access::READ).expect("room");
    table.insert(bytes(1 << 21, 4096), 0, Access::READ).expect("room");
    table.remove(bytes(0, 4096));
    let epoch = table.begin_grace().expect("a page was removed");
    table.remove(bytes(1 << 21, 4096));
    table.grace_completed(epoch);
    assert!(!table.is_quiet());
    // The second page's node and the root; the first page's node is free.
    assert_eq!((table.stats().nodes_used, table.stats().nodes_retired), (0, 2));
    complete_grace(&mut table);
    assert_eq!(table.stats().nodes_retired, 0);
}

#[test]
fn clearing_counts_what_it_takes() {
    let mut table = small_table();
    table.insert(bytes(0x3000, 8192), 0x3000, Access::READ).expect("room");
    assert_eq!((table.clear(), table.is_quiet()), (2, false));
    complete_grace(&mut table);
    assert_eq!((table.clear(), table.is_quiet()), (0, true));
}

#[test]
fn byte_ranges_are_cut_in_two_and_give_way_to_pages() {
    let mut table = small_table();
    table.insert(bytes(0x3001, 100), 0x7005, Access::READ).expect("a free copy");
    table.remove(bytes(0x3011, 4));
    let found = |table: &TableWriter, iova| table.lookup(iova).map(|found| found.address(iova));
    assert_eq!((found(&table, 0x3010), found(&table, 0x3011)), (Some(0x7014), None));
    assert_eq!((found(&table, 0x3014), found(&table, 0x3015)), (None, Some(0x7019)));
    assert_eq!(table.stats().entries, 2);
    table.insert(bytes(0x3000, 4096), 0x9000, Access::READ).expect("a free copy");
    assert_eq!(table.stats().entries, 1, "hidden ranges would come to light again");
}
