//! Misses: asked for, answered, refused, given up.

mod support;

use std::sync::mpsc;

use iotlb_client::{Access, Answer, Fault, RequestError, ResolveError};
use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::layout::worker::{CELL_CAPACITY, CELL_PAGES_MAX};
use iotlb_proto::sync::Ordering;
use support::{Daemon, Next, PATIENCE, PATIENCE_MS, wait_until};

const RW: Access = Access::READ_WRITE;

#[test]
fn a_missing_page_is_fetched() {
    let (daemon, memory, attachment) = Daemon::with_memory(16);
    memory.poke(0x3000, b"hello");
    let server = daemon.serve_misses(|table, request| {
        assert_eq!((request.range.first(), request.range.last()), (0x7000, 0x7004));
        assert_eq!(request.access, Access::READ);
        table.insert(request.range.page_aligned(), 0x3000, RW).expect("room");
        Next::Last(Answer::Resolved)
    });
    let mut reader = attachment.reader().expect("a reader");
    let mut bytes = [0; 5];
    let Err(Fault::Miss { iova: 0x7000, access }) = reader.pin().expect("pin").read(0x7000, &mut bytes) else {
        panic!("not a miss");
    };
    reader.resolve(0x7000, 5, access, PATIENCE_MS).expect("resolved");
    reader.pin().expect("pin").read(0x7000, &mut bytes).expect("mapped");
    assert_eq!(&bytes, b"hello");
    server.join().expect("one request, as expected");
    reader.resolve(0x7000, 5, access, 0).expect("nothing to ask for, so no server is needed");
    assert_eq!(daemon.segment.counters.misses.load(Ordering::SeqCst), 1);
}

#[test]
fn a_missing_permission_is_fetched_too() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x7000, 0x1000, 0x3000, Access::READ);
    let server = daemon.serve_misses(|table, request| {
        assert_eq!(request.access, Access::WRITE);
        table.insert(request.range.page_aligned(), 0x3000, RW).expect("room");
        Next::Last(Answer::Resolved)
    });
    let mut reader = attachment.reader().expect("a reader");
    reader.resolve(0x7000, 5, Access::WRITE, PATIENCE_MS).expect("resolved");
    server.join().expect("one request, as expected");
}

#[test]
fn refusals_have_names() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    for (answer, error) in [
        (Answer::Denied, ResolveError::Denied),
        (Answer::TimedOut, ResolveError::TimedOut),
        (Answer::Stopped, ResolveError::Stopped),
        (Answer::Invalid, ResolveError::Invalid),
    ] {
        let server = daemon.serve_misses(move |_, _| Next::Last(answer));
        assert_eq!(reader.resolve(0x7000, 5, Access::READ, PATIENCE_MS), Err(error));
        server.join().expect("one request, as expected");
    }
    let counters = &daemon.segment.counters;
    assert_eq!(counters.denied.load(Ordering::SeqCst), 1);
    assert_eq!(counters.timed_out.load(Ordering::SeqCst), 1);
    assert_eq!(counters.misses.load(Ordering::SeqCst), 4);
}

#[test]
fn senseless_ranges_are_not_asked_for() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    assert_eq!(reader.resolve(0x7000, 0, RW, PATIENCE_MS), Err(ResolveError::Invalid));
    assert_eq!(reader.resolve(u64::MAX, 2, RW, PATIENCE_MS), Err(ResolveError::Invalid));
    assert_eq!(reader.resolve(0x7000, 1, Access::NONE, PATIENCE_MS), Err(ResolveError::Invalid));
    let too_long = CELL_PAGES_MAX * PAGE_SIZE + 1;
    assert_eq!(reader.request(0x7000, 0, RW).err(), Some(RequestError::Invalid));
    assert_eq!(reader.request(0x7000, too_long, RW).err(), Some(RequestError::Invalid));
    assert_eq!(reader.request(0x7fff, too_long - 1, RW).err(), Some(RequestError::Invalid), "touches one page more");
    assert_eq!(reader.request(0x7000, 1, Access::NONE).err(), Some(RequestError::Invalid));
    assert!(!daemon.segment.has_posted());
}

#[test]
fn who_is_pinned_does_not_wait() {
    let (_daemon, _memory, attachment) = Daemon::with_memory(16);
    let (mut other, _memory_2, attachment_2) = Daemon::with_memory(16);
    let pinned = attachment_2.reader().expect("a reader");
    let mut reader = attachment.reader().expect("a reader");
    let guard = pinned.pin().expect("pin");
    assert_eq!(reader.resolve(0x7000, 1, RW, PATIENCE_MS), Err(ResolveError::Pinned), "a pin on another device");
    assert!(!reader.wait_mapped(PATIENCE_MS));
    drop(guard);
    std::mem::forget(reader.pin().expect("pin"));
    assert_eq!(reader.resolve(0x7000, 1, RW, PATIENCE_MS), Err(ResolveError::Pinned), "a pin of its own");
    other.kill();
}

#[test]
fn a_reader_whose_guard_was_forgotten_waits_in_no_thread() {
    let (_daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    let mut ticket = reader.request(0x7000, 1, RW).expect("posted");
    std::mem::forget(reader.pin().expect("pin"));
    std::thread::spawn(move || {
        // Without the pin the first two would time out, as nobody answers.
        assert_eq!(reader.resolve(0x8000, 1, RW, 1), Err(ResolveError::Pinned));
        assert_eq!(reader.wait(&mut ticket, 1), Err(ResolveError::Pinned));
        assert!(!reader.wait_mapped(PATIENCE_MS), "else there would be nothing to wait for");
    })
    .join()
    .expect("no panic");
}

#[test]
fn long_ranges_are_split_and_the_rest_is_asked_for_later() {
    let (daemon, _memory, attachment) = Daemon::with_memory(2048);
    let pages = 2048;
    // Every seventh page is there already.
    for page in (0..pages).step_by(7) {
        daemon.map(page * PAGE_SIZE, PAGE_SIZE, page * PAGE_SIZE, RW);
    }
    let mut asked = 0;
    let (report, total) = mpsc::channel();
    let server = daemon.serve_misses(move |table, request| {
        let aligned = request.range.page_aligned();
        asked += aligned.len_minus_one() / PAGE_SIZE + 1;
        assert!(table.lookup(request.range.first()).is_none(), "asked for what is there");
        table.insert(aligned, aligned.first(), RW).expect("room");
        if asked == pages - pages.div_ceil(7) {
            report.send(asked).expect("the test waits");
            return Next::Last(Answer::Resolved);
        }
        Next::Answer(Answer::Resolved)
    });
    let mut reader = attachment.reader().expect("a reader");
    reader.resolve(5, pages * PAGE_SIZE - 10, RW, PATIENCE_MS).expect("resolved");
    assert_eq!(total.recv_timeout(PATIENCE).expect("all pages"), pages - pages.div_ceil(7));
    server.join().expect("no page was asked for twice");
    assert_eq!(reader.pin().expect("pin").translate(0, pages * PAGE_SIZE, RW).map(Iterator::count), Ok(1));
}

#[test]
fn the_end_of_a_long_range_is_asked_for_apart() {
    for (pages, first_of_end, said) in
        [(8, Some(6), Answer::Resolved), (8, Some(6), Answer::Denied), (7, None, Answer::Resolved)]
    {
        let (daemon, _memory, attachment) = Daemon::with_memory(8);
        let (report, requests) = mpsc::channel();
        let server = daemon.serve_misses(move |table, request| {
            let last = request.range.page_aligned();
            report.send((last.first() / PAGE_SIZE, last.len_minus_one() / PAGE_SIZE + 1)).expect("the test waits");
            let is_end = last.last() / PAGE_SIZE + 1 == pages;
            if is_end && said != Answer::Resolved {
                return Next::Last(said);
            }
            table.insert(last, last.first(), RW).expect("room");
            if is_end { Next::Last(Answer::Resolved) } else { Next::Answer(Answer::Resolved) }
        });
        let mut reader = attachment.reader().expect("a reader");
        let result = reader.resolve(0, pages * PAGE_SIZE, RW, PATIENCE_MS);
        assert_eq!(result, if said == Answer::Denied { Err(ResolveError::Denied) } else { Ok(()) });
        server.join().expect("nothing else was asked for");
        let requests: Vec<(u64, u64)> = requests.try_iter().collect();
        let expected = first_of_end.map_or(vec![(0, pages)], |first| vec![(0, first), (first, pages - first)]);
        assert_eq!(requests, expected);
    }
}

#[test]
fn a_page_that_never_stays_is_given_up() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut asked = 0;
    let server = daemon.serve_misses(move |_, _| {
        asked += 1;
        // "Resolved", but removed again before the worker could look.
        if asked == 8 { Next::Last(Answer::Resolved) } else { Next::Answer(Answer::Resolved) }
    });
    let mut reader = attachment.reader().expect("a reader");
    assert_eq!(reader.resolve(0x7000, 1, RW, PATIENCE_MS), Err(ResolveError::TimedOut));
    server.join().expect("eight rounds");
    assert_eq!(daemon.segment.counters.misses.load(Ordering::SeqCst), 8);
}

#[test]
fn the_callers_time_is_kept() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    assert_eq!(reader.resolve(0x7000, 1, RW, 1), Err(ResolveError::TimedOut), "nobody answers");
    assert!(daemon.segment.has_posted());
}

#[test]
fn the_daemons_death_ends_the_wait() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    let segment = std::sync::Arc::clone(&daemon.segment);
    let waiting = std::thread::spawn(move || reader.resolve(0x7000, 1, RW, PATIENCE_MS));
    wait_until("the worker sleeps", || segment.cells.iter().any(|cell| cell.sleeping.load(Ordering::SeqCst) != 0));
    daemon.kill();
    assert_eq!(waiting.join().expect("thread"), Err(ResolveError::DaemonDead));
    let mut reader = attachment.reader();
    assert!(reader.as_mut().is_err());
}

#[test]
fn a_revocation_ends_the_wait() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    let segment = std::sync::Arc::clone(&daemon.segment);
    let waiting = std::thread::spawn(move || {
        let result = reader.resolve(0x7000, 1, RW, PATIENCE_MS);
        (result, reader.request(0x7000, 1, RW).err())
    });
    wait_until("the worker sleeps", || segment.cells.iter().any(|cell| cell.sleeping.load(Ordering::SeqCst) != 0));
    daemon.send(&DaemonMessage::Revoke, &[]);
    assert_eq!(daemon.receive().0, WorkerMessage::Revoked);
    let result = waiting.join().expect("thread");
    assert_eq!(result, (Err(ResolveError::Revoked), Some(RequestError::Revoked)));
}

#[test]
fn requests_are_polled_for() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    let mut ticket = reader.request(0x7000, 0x2000, RW).expect("posted");
    assert_eq!(reader.poll(&mut ticket), None);
    assert_eq!(support::take_count(&daemon.doorbell), 0, "the daemon did not ask for a doorbell");
    let server = daemon.serve_misses(|table, request| {
        table.insert(request.range, 0, RW).expect("room");
        Next::Last(Answer::Resolved)
    });
    wait_until("the answer", || reader.poll(&mut ticket).is_some());
    assert_eq!(reader.poll(&mut ticket), Some(Answer::Resolved), "and once more");
    server.join().expect("one request");
    assert!(reader.pin().expect("pin").translate(0x7000, 0x2000, RW).is_ok());
    let _ticket = reader.request(0x9000, 1, RW).expect("posted");
    assert_eq!(support::take_count(&daemon.doorbell), 1, "the server of this test sleeps");
}

#[test]
fn a_request_may_be_posted_under_a_pin_of_another_reader() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let pinned = attachment.reader().expect("a reader");
    let mut reader = attachment.reader().expect("a reader");
    let _guard = pinned.pin().expect("pin");
    let _ticket = reader.request(0x7000, 1, RW).expect("it does not wait");
    assert!(daemon.segment.has_posted());
}

#[test]
fn cells_come_back_answered_or_abandoned() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    let mut held: Vec<_> = (0..CELL_CAPACITY).map(|_| reader.request(0x7000, 1, RW).expect("a cell")).collect();
    assert_eq!(reader.request(0x7000, 1, RW).err(), Some(RequestError::Full));
    // Given up before they are answered: no cell is free yet, because the daemon may still write it.
    held.truncate(CELL_CAPACITY / 2);
    assert_eq!(reader.request(0x7000, 1, RW).err(), Some(RequestError::Full));
    let mut left = CELL_CAPACITY;
    let server = daemon.serve_misses(move |_, _| {
        left -= 1;
        if left == 0 { Next::Last(Answer::Denied) } else { Next::Answer(Answer::Denied) }
    });
    server.join().expect("all were answered");
    for ticket in &mut held {
        assert_eq!(reader.poll(ticket), Some(Answer::Denied));
    }
    let again: Vec<_> = (0..CELL_CAPACITY).map_while(|_| reader.request(0x7000, 1, RW).ok()).collect();
    assert_eq!(again.len(), CELL_CAPACITY);
    assert_eq!(reader.request(0x7000, 1, RW).err(), Some(RequestError::Full));
    let server = daemon.serve_misses(|_, _| Next::Last(Answer::Denied));
    server.join().expect("one was answered");
    drop(again);
    assert!(reader.request(0x7000, 1, RW).is_ok(), "the answered one is free");
}

#[test]
fn threads_that_miss_together_share_the_cells() {
    let (daemon, _memory, attachment) = Daemon::with_memory(2048);
    let threads = 12;
    let mut answered = 0;
    let server = daemon.serve_misses(move |table, request| {
        if table.lookup(request.range.first()).is_none() {
            table.insert(request.range.page_aligned(), request.range.page_aligned().first(), RW).expect("room");
        }
        answered += 1;
        if answered == threads * 64 { Next::Last(Answer::Resolved) } else { Next::Answer(Answer::Resolved) }
    });
    let workers: Vec<_> = (0..threads)
        .map(|thread| {
            let mut reader = attachment.reader().expect("a reader");
            std::thread::spawn(move || {
                // Every second page of its own part, so that no two are asked for at once: 64 cells in two batches.
                for page in 0..64 {
                    reader.resolve((thread * 128 + page * 2) * PAGE_SIZE, 1, RW, PATIENCE_MS).expect("resolved");
                }
            })
        })
        .collect();
    for worker in workers {
        worker.join().expect("resolved");
    }
    server.join().expect("each page once");
}
