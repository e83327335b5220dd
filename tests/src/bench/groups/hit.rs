//! Random hits: ours in pinned bursts, peers with their lock taken for each lookup and for each burst.

use std::hint::black_box;

use iotlb_client::{Access, Fault, Reader};
use iotlb_proto::sync::{AtomicU64, Ordering};

use super::{ACCESS_LEN, BURST, Outcome, Run, visits};
use crate::bench::measure::{Contestant, interleave};
use crate::bench::peers::{self, Ordered, PAGE, Page, VmMemory};
use crate::bench::report::{Curve, Row, Target};
use crate::bench::rig::Rig;

/// Table sizes with a target: entries, wanted factor with the peer's lock taken a lookup, and a burst.
const SIZES: [(u64, f64, f64); 3] = [(64, 20.0, 15.0), (2_048, 40.0, 30.0), (262_144, 50.0, 45.0)];
/// Table sizes of the curve, as powers of two.
const CURVE: std::ops::RangeInclusive<u32> = 6..=20;
/// The same for a quick run.
const CURVE_QUICK: std::ops::RangeInclusive<u32> = 6..=11;

/// Measures the group.
///
/// # Errors
/// The service does not stand.
pub fn run(run: &mut Run) -> Outcome {
    let mut rig = Rig::start()?;
    let mut curve = Curve::new("Random hit", "live 4 KiB entries", "ns a lookup");
    for power in if run.quick { CURVE_QUICK } else { CURVE } {
        let entries = 1_u64 << power;
        eprintln!("hit: {entries} entries");
        let pages = rig.fill(entries)?;
        let reader = rig.worker.reader()?;
        assert_hit(&reader, &pages);
        let target = SIZES.iter().find(|size| size.0 == entries);
        let rounds = if target.is_some() { run.rounds() } else { run.point_rounds() };
        let found = measure(&reader, &pages, rounds);
        for (name, value) in [
            ("iotlbd", found.ours),
            ("vm-memory Iotlb, RwLock a lookup", found.locked),
            ("vm-memory Iotlb, RwLock a burst", found.burst),
            ("BTreeMap, RwLock a lookup", found.ordered),
            ("one L1 load", found.l1),
        ] {
            curve.add(name, entries, value);
        }
        if let Some(&(_, per_lookup, per_burst)) = target {
            rows(run, entries, &found, per_lookup, per_burst);
        }
        if entries == 1 << 18 {
            against_small(run, &reader, &visits(&pages))?;
        }
    }
    run.curves.push(curve);
    dependent_and_pin(run)
}

struct Found {
    ours: f64,
    locked: f64,
    burst: f64,
    ordered: f64,
    l1: f64,
}

fn measure(reader: &Reader, pages: &[Page], rounds: usize) -> Found {
    let visits = visits(pages);
    let vm_memory = VmMemory::with(pages);
    let ordered = Ordered::with(pages);
    let whole = visits.len() as u64;
    let (mut at, mut at_locked, mut at_ordered) = (0, 0, 0);
    // The other one of the same tree starts elsewhere: neither finds the lines that the other has just brought.
    let mut at_burst = visits.len() / 2;
    let samples = interleave(
        rounds,
        &mut [
            Contestant::new("ours", |count| at = bursts(reader, &visits, at, count)).after(whole),
            Contestant::new("vm-memory, lock a lookup", |count| {
                at_locked = each(&visits, at_locked, count, |iova| vm_memory.lookup_locked(iova, 64));
            })
            .after(whole),
            Contestant::new("vm-memory, lock a burst", |count| {
                at_burst = vm_memory_bursts(&vm_memory, &visits, at_burst, count);
            })
            .after(whole),
            Contestant::new("B-tree, lock a lookup", |count| {
                at_ordered = each(&visits, at_ordered, count, |iova| ordered.lookup_locked(iova));
            })
            .after(whole),
            Contestant::new("L1 load", l1_chain),
        ],
    );
    let [ours, locked, burst, ordered, l1] = [0, 1, 2, 3, 4].map(|n| samples[n].median_ns);
    Found { ours, locked, burst, ordered, l1 }
}

/// The large table against one of 64 entries, in turn: figures of different minutes are no comparison.
fn against_small(run: &mut Run, large: &Reader, large_visits: &[u64]) -> Outcome {
    let mut rig = Rig::start()?;
    let small_visits = visits(&rig.fill(64)?);
    let small = rig.worker.reader()?;
    let (mut at, mut at_small) = (0, 0);
    let samples = interleave(
        run.rounds(),
        &mut [
            Contestant::new("large", |count| at = bursts(large, large_visits, at, count))
                .after(large_visits.len() as u64),
            Contestant::new("small", |count| at_small = bursts(&small, &small_visits, at_small, count))
                .after(small_visits.len() as u64),
        ],
    );
    let [large, small] = [0, 1].map(|n| samples[n].median_ns);
    let name = "random hit, 262144 against 64 entries";
    run.rows.push(Row::new(name, "ns", large, small, "ours, 64 entries", Target::None));
    Ok(())
}

fn rows(run: &mut Run, entries: u64, found: &Found, per_lookup: f64, per_burst: f64) {
    let ours = found.ours;
    let name = |what: &str| format!("random hit, {entries} entries{what}");
    let mut push = |what: &str, peer, peer_name, target| {
        run.rows.push(Row::new(name(what), "ns", ours, peer, peer_name, target));
    };
    push("", found.locked, "vm_memory::Iotlb, RwLock a lookup", Target::FasterAtLeast(per_lookup));
    push(", lock a burst", found.burst, "vm_memory::Iotlb, RwLock a burst", Target::FasterAtLeast(per_burst));
    push(", B-tree", found.ordered, "RwLock<BTreeMap>", Target::None);
    let floor = if entries == 2_048 { Target::CostsAtMost(3.0) } else { Target::None };
    push(", against one L1 load", found.l1, "L1 load-to-use", floor);
}

/// Lookups that each wait for the one before, and what a pin costs alone.
fn dependent_and_pin(run: &mut Run) -> Outcome {
    eprintln!("hit: chain, pin");
    let mut rig = Rig::start()?;
    let pages = rig.fill(2_048)?;
    let visits = visits(&pages);
    let reader = rig.worker.reader()?;
    assert_hit(&reader, &pages);
    let (pinning, independent) = (rig.worker.reader()?, rig.worker.reader()?);
    let word = AtomicU64::new(0);
    let (mut at_chain, mut at) = (0, visits.len() / 2);
    let samples = interleave(
        run.rounds(),
        &mut [
            Contestant::new("pin + unpin", |count| {
                for _ in 0..count {
                    black_box(pinning.pin().expect("the daemon lives"));
                }
            }),
            Contestant::new("locked operation", |count| {
                for _ in 0..count {
                    black_box(&word).fetch_or(1, Ordering::Relaxed);
                }
            }),
            Contestant::new("chain", |count| at_chain = dependent(&reader, &visits, at_chain, count)),
            Contestant::new("independent", |count| at = bursts(&independent, &visits, at, count)),
            Contestant::new("L1 load", l1_chain),
        ],
    );
    let [pin, locked, chain, bursts, l1] = [0, 1, 2, 3, 4].map(|n| samples[n].median_ns);
    run.rows.push(Row::new("pin + unpin", "ns", pin, locked, "one locked operation", Target::CostsAtMost(2.0)));
    run.rows.push(Row::new("dependent hits, 2048 entries", "ns", chain, l1, "L1 load-to-use", Target::None));
    let name = "dependent hits against independent ones, 2048 entries";
    run.rows.push(Row::new(name, "ns", chain, bursts, "ours, independent", Target::None));
    Ok(())
}

/// The benchmark is of hits: every page must be there, as a page of its own.
fn assert_hit(reader: &Reader, pages: &[Page]) {
    for page in pages {
        let guard = reader.pin().expect("the daemon lives");
        let found = guard.translate(page.iova, PAGE, Access::READ_WRITE).expect("a hit");
        assert_eq!(found.total_len() as u64, PAGE);
    }
}

/// `count` lookups in pinned bursts, from visit `at` on; returns where it stopped.
pub fn bursts(reader: &Reader, visits: &[u64], at: usize, count: u64) -> usize {
    bursts_or(reader, visits, at, count, |fault| panic!("a miss among hits: {fault}"))
}

/// As [`bursts`], where pages come and go meanwhile.
pub fn changing_bursts(reader: &Reader, visits: &[u64], at: usize, count: u64) -> usize {
    bursts_or(reader, visits, at, count, |_| 0)
}

#[inline(always)]
fn bursts_or(reader: &Reader, visits: &[u64], mut at: usize, count: u64, missed: impl Fn(Fault) -> usize) -> usize {
    let mut left = count;
    let mut sum = 0_usize;
    while left > 0 {
        let guard = reader.pin().expect("the daemon lives");
        for &iova in next(visits, &mut at, &mut left, BURST) {
            sum = sum.wrapping_add(match guard.translate(iova, ACCESS_LEN, Access::READ) {
                Ok(mut segments) => segments.next().map_or(0, |segment| segment.as_ptr().addr()),
                Err(fault) => missed(fault),
            });
        }
    }
    black_box(sum);
    at
}

/// As [`bursts`], but each address is known only when the lookup before it is done.
fn dependent(reader: &Reader, visits: &[u64], mut at: usize, count: u64) -> usize {
    let mut left = count;
    let mut last = 0_u64;
    while left > 0 {
        let guard = reader.pin().expect("the daemon lives");
        for &iova in next(visits, &mut at, &mut left, BURST) {
            // Adds 0, but only we know that: pointers to user memory have no bit 63.
            let iova = iova + (last >> 63);
            let mut found = guard.translate(iova, ACCESS_LEN, Access::READ).expect("a hit");
            last = found.next().map_or(0, |segment| segment.as_ptr().addr() as u64);
        }
    }
    black_box(last);
    at
}

fn each(visits: &[u64], mut at: usize, count: u64, lookup: impl Fn(u64) -> u64) -> usize {
    let mut left = count;
    let mut sum = 0_u64;
    while left > 0 {
        for &iova in next(visits, &mut at, &mut left, BURST) {
            sum = sum.wrapping_add(lookup(iova));
        }
    }
    black_box(sum);
    at
}

fn vm_memory_bursts(peer: &VmMemory, visits: &[u64], mut at: usize, count: u64) -> usize {
    let mut left = count;
    let mut sum = 0_u64;
    while left > 0 {
        let guard = peer.0.read().expect("nobody panics with it");
        for &iova in next(visits, &mut at, &mut left, BURST) {
            sum = sum.wrapping_add(peers::lookup(&guard, iova, 64));
        }
    }
    black_box(sum);
    at
}

/// The next visits, at most `most` and at most `left`, which they are taken from; behind the last comes the first. They
/// are one slice, so that to go from one to the next costs next to nothing: it is no part of a lookup.
#[inline(always)]
fn next<'a>(visits: &'a [u64], at: &mut usize, left: &mut u64, most: u64) -> &'a [u64] {
    let rest = match visits.get(*at..) {
        Some(rest) if !rest.is_empty() => rest,
        _ => {
            assert!(!visits.is_empty(), "nothing to visit");
            *at = 0;
            visits
        }
    };
    let len = rest.len().min(usize::try_from(most.min(*left)).unwrap_or(usize::MAX));
    *at += len;
    *left -= len as u64;
    &rest[..len]
}

/// Leads to itself.
struct Ring {
    next: &'static Ring,
}

static RING: Ring = Ring { next: &RING };

/// Loads that each wait for the one before: the time from address to value in the first-level cache. What is loaded is
/// the next address itself, so there is nothing else in a step: a mask or a bound would be part of it.
pub fn l1_chain(count: u64) {
    // The compiler does not know where the ring leads.
    let mut at = black_box(&RING);
    for _ in 0..count {
        at = at.next;
    }
    black_box(at);
}
