//! Edits of much, a slice at a time: what each slice may do, and what is true between two.

use iotlb_proto::access::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::table::{NODE_ENTRIES, segment_size};
use iotlb_proto::table::memory::NODES_MIN;
use iotlb_proto::table::{TableConfig, TableWriter, TargetRemoval};

const PAGE: u64 = 4096;
/// Bytes below a node of the lowest level.
const NODE_BYTES: u64 = PAGE * NODE_ENTRIES as u64;
/// Nodes of the lowest level in a dense table; so many that they hang below two upper ones.
const DENSE: u64 = NODE_ENTRIES as u64 + 4;

fn table(nodes: u32) -> TableWriter {
    let size = segment_size(nodes).expect("fits") as u64;
    TableWriter::create(&TableConfig { size, generation: 1 }).expect("table").0
}

fn insert(table: &mut TableWriter, iova: u64, target: u64) {
    table.insert(IovaRange::page_of(iova), target, Access::READ).expect("room");
}

/// A table of full nodes whose pages lead to themselves.
fn dense() -> TableWriter {
    let mut table = table(2048);
    for iova in (0..DENSE * NODE_BYTES).step_by(4096) {
        insert(&mut table, iova, iova);
    }
    table.set_slice_words(1);
    table
}

fn complete_grace(table: &mut TableWriter) {
    if let Some(epoch) = table.begin_grace() {
        table.grace_completed(epoch);
    }
    assert!(table.is_quiet());
}

#[test]
fn a_removal_by_target_takes_a_node_a_slice_and_goes_on_where_it_was() {
    let mut table = dense();
    let mut removal = TargetRemoval::new(0, u64::MAX);
    let (mut left, mut slices) = (table.stats().entries, 0);
    while !removal.is_done() {
        let removed = table.remove_targets(&mut removal);
        assert!(removed <= NODE_ENTRIES as u64, "{removed} entries in one slice");
        assert!(removed == 0 || !table.is_quiet(), "each slice is a take");
        left -= removed;
        slices += 1;
        assert_eq!(table.stats().entries, left);
        // In order of address: what is left is whole.
        let gone = DENSE * NODE_BYTES - left * PAGE;
        assert!(gone == 0 || table.lookup(gone - 1).is_none());
        assert_eq!(table.lookup(gone).map(|found| found.target), (left > 0).then_some(gone));
    }
    assert_eq!(left, 0);
    assert!(slices >= DENSE, "{slices} slices");
    assert_eq!(table.remove_targets(&mut removal), 0, "it is done");
    complete_grace(&mut table);
    while table.tidy() {}
    assert_eq!((table.stats().nodes_used, table.stats().nodes_retired), (0, 0));
}

#[test]
fn only_what_leads_there_goes() {
    let mut table = table(64);
    // Three nodes: every other page, all, none.
    let inside = |page: u64| match page / NODE_ENTRIES as u64 {
        0 => page.is_multiple_of(2),
        node => node == 1,
    };
    let pages = 3 * NODE_ENTRIES as u64;
    for page in 0..pages {
        insert(&mut table, page * PAGE, if inside(page) { 0x7000 } else { 0x9000 });
    }
    table.insert(IovaRange::from_len(1 << 30, 1 << 30).expect("range"), 0, Access::READ).expect("room");
    table.insert(IovaRange::from_len(1 << 40, 1 << 30).expect("range"), 0x8000, Access::READ).expect("room");
    table.set_slice_words(1);
    let mut removal = TargetRemoval::new(0x7fff, 0x7fff);
    while !removal.is_done() {
        table.remove_targets(&mut removal);
    }
    for page in 0..pages {
        assert_eq!(table.lookup(page * PAGE).is_none(), inside(page), "page {page}");
    }
    assert!(table.lookup(1 << 30).is_none(), "a superpage that leads there among other places");
    assert!(table.lookup(1 << 40).is_some(), "a superpage that begins behind it");
}

#[test]
fn targets_that_are_none_take_nothing() {
    let mut table = dense();
    let mut removal = TargetRemoval::new(1, 0);
    assert!(removal.is_done());
    assert_eq!((table.remove_targets(&mut removal), table.is_quiet()), (0, true));
}

/// The tree may go, come back, and grow, between slices: the bookmark is an address.
#[test]
fn a_removal_by_target_survives_changes_of_the_tree() {
    let mut table = dense();
    let mut removal = TargetRemoval::new(0, u64::MAX);
    for _ in 0..3 {
        table.remove_targets(&mut removal);
    }
    table.clear();
    table.remove_targets(&mut removal);
    assert!(removal.is_done(), "nothing is left to look at");
    assert_eq!(table.lookup(DENSE * NODE_BYTES - 1), None);

    let mut table = dense();
    let mut removal = TargetRemoval::new(0, u64::MAX);
    for _ in 0..3 {
        table.remove_targets(&mut removal);
    }
    insert(&mut table, 1 << 50, 0);
    while !removal.is_done() {
        table.remove_targets(&mut removal);
    }
    assert_eq!(table.stats().entries, 0, "the tree grew");
}

#[test]
fn everything_is_gone_at_once_and_put_away_in_slices() {
    let mut table = dense();
    let used = table.stats().nodes_used;
    assert!(table.clear() > 0);
    table.for_each(|found| panic!("{found:?} is left"));
    assert!(!table.is_quiet() && !table.is_tidy());
    assert_eq!(table.stats().nodes_retired, 0, "nothing was walked");
    // The root, then a node above the lowest level in each slice.
    for _ in 0..2 {
        assert!(table.tidy());
    }
    let half = table.stats().nodes_retired;
    assert!((1..used).contains(&half), "{half} of {used} after two slices");
    while table.tidy() {}
    let stats = table.stats();
    assert_eq!((stats.entries, stats.nodes_used, stats.nodes_retired), (0, 0, used), "free before the grace period");
    complete_grace(&mut table);
    while table.tidy() {}
    assert_eq!(table.stats().nodes_retired, 0);
}

/// What is walked after the grace period of its stamp is free; what was taken off after that one began is not.
#[test]
fn a_node_is_free_when_it_was_walked_and_its_grace_period_passed() {
    let mut table = table(64);
    for at in [0, NODE_BYTES] {
        insert(&mut table, at, 0);
        insert(&mut table, (1 << 45) + at, 0);
    }
    table.set_slice_words(1);
    let half = IovaRange::from_len(0, 1 << 45).expect("range");
    table.remove(half);
    let epoch = table.begin_grace().expect("something was removed");
    table.remove(IovaRange::ALL);
    let used = table.stats().nodes_used;
    table.grace_completed(epoch);
    while table.tidy() {}
    let stats = table.stats();
    assert_eq!(stats.nodes_used, 0);
    assert!((1..used).contains(&stats.nodes_retired), "{} of {used}", stats.nodes_retired);
    complete_grace(&mut table);
    while table.tidy() {}
    assert_eq!(table.stats().nodes_retired, 0);
}

/// Nobody tidies: an insert does what it needs, and nothing is evicted while there is something to put away.
#[test]
fn an_insert_finds_room_in_what_is_not_put_away() {
    for words in [1, 100, 10_000] {
        let mut table = table(NODES_MIN);
        table.set_slice_words(words);
        for round in 0_u64..50 {
            // A leaf each in nodes of their own, which take most of the table. The last makes the tree higher.
            for at in (0..40).map(|n| n * NODE_BYTES).chain([7 << 40]) {
                let mut tries = 0;
                while table.insert(IovaRange::page_of(at), round << 12, Access::READ).is_err() {
                    tries += 1;
                    assert!(tries < 2, "no room after a grace period");
                    complete_grace(&mut table);
                }
                assert_eq!(table.lookup(at).map(|found| found.target), Some(round << 12));
            }
            table.clear();
        }
        assert_eq!(table.stats().evictions, 0, "slices of {words} words");
    }
}

#[test]
fn a_superpage_takes_the_place_of_much_at_once() {
    let mut table = dense();
    let all = IovaRange::from_len(0, NODE_BYTES * NODE_ENTRIES as u64).expect("range");
    table.insert(all, 1 << 40, Access::READ).expect("room");
    assert!(!table.is_quiet() && !table.is_tidy());
    assert_eq!(table.lookup(5).map(|found| found.address(5)), Some((1 << 40) + 5));
    while table.tidy() {}
    assert_eq!(table.stats().entries, 1 + 4 * NODE_ENTRIES as u64);
}
