//! The promise itself: what was taken away is not read any more once the grace period has passed.

mod support;

use std::sync::Arc;
use std::time::Instant;

use iotlb_client::{Access, Attachment, Fault};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::{AtomicU64, Ordering};
use support::{Daemon, Memory, wait_until};

const READERS: u64 = 2;
const PAGES: u64 = 8;
const IOVA: u64 = 0x40_0000;
const GOOD: u8 = 0x11;
const POISON: u8 = 0xee;

#[derive(Default)]
struct Seen {
    stop: AtomicU64,
    good: AtomicU64,
    missed: AtomicU64,
    stale: AtomicU64,
}

/// Reads the pages in turn. Between translating and reading it gives others the processor, as an interrupt might.
fn read_on(attachment: &Attachment, seen: &Seen) {
    let reader = attachment.reader().expect("a reader");
    let mut page = 0;
    while seen.stop.load(Ordering::Relaxed) == 0 {
        page = (page + 1) % PAGES;
        let guard = reader.pin().expect("the daemon lives");
        match guard.translate(IOVA + page * PAGE_SIZE, 64, Access::READ) {
            Ok(segments) => {
                std::thread::yield_now();
                let mut bytes = [0; 64];
                segments.for_each(|segment| segment.copy_to(&mut bytes));
                let count = if bytes.contains(&POISON) { &seen.stale } else { &seen.good };
                count.fetch_add(1, Ordering::Relaxed);
            }
            Err(Fault::Miss { .. }) => {
                seen.missed.fetch_add(1, Ordering::Relaxed);
            }
            Err(fault) => panic!("{fault}"),
        }
    }
}

/// One page comes, goes, and is used for something else.
fn round(daemon: &Daemon, memory: &Memory, page: u64, wait: bool) {
    let fill = |byte| memory.poke(page * PAGE_SIZE, &[byte; 64]);
    fill(GOOD);
    daemon.map(IOVA + page * PAGE_SIZE, PAGE_SIZE, page * PAGE_SIZE, Access::READ);
    std::thread::yield_now();
    daemon.unmap(IOVA + page * PAGE_SIZE, PAGE_SIZE);
    let epoch = daemon.table().begin_grace().expect("something was removed");
    if wait {
        let start = Instant::now();
        while !daemon.segment.is_drained(epoch) {
            assert!(start.elapsed() < support::PATIENCE, "a reader does not unpin");
            std::thread::yield_now();
        }
    }
    daemon.table().grace_completed(epoch);
    fill(POISON);
}

fn run(wait: bool, rounds: u64, enough: impl Fn(&Seen) -> bool) -> Arc<Seen> {
    let (daemon, memory, attachment) = Daemon::with_memory(PAGES);
    let seen = Arc::new(Seen::default());
    let readers: Vec<_> = (0..READERS)
        .map(|_| {
            let (attachment, seen) = (attachment.clone(), Arc::clone(&seen));
            std::thread::spawn(move || read_on(&attachment, &seen))
        })
        .collect();
    let mut done = 0;
    wait_until("enough was seen", || {
        for _ in 0..rounds {
            round(&daemon, &memory, done % PAGES, wait);
            done += 1;
        }
        enough(&seen)
    });
    seen.stop.store(1, Ordering::Relaxed);
    for reader in readers {
        reader.join().expect("the readers do not panic");
    }
    seen
}

#[test]
fn nothing_is_read_after_it_was_taken() {
    let enough = |seen: &Seen| seen.good.load(Ordering::Relaxed) > 50 && seen.missed.load(Ordering::Relaxed) > 50;
    let seen = run(true, 50, enough);
    assert_eq!(seen.stale.load(Ordering::Relaxed), 0);
}

#[test]
fn without_the_wait_it_would_be() {
    let seen = run(false, 10, |seen| seen.stale.load(Ordering::Relaxed) > 0);
    assert!(seen.stale.load(Ordering::Relaxed) > 0);
}
