//! The one rule, through real sockets: an invalidation is acknowledged when no worker can still use what it took.

mod server_support;

use std::io::{BufRead, BufReader, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use iotlb_proto::epoch::grace::FIRST_EPOCH;
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::layout::table::NODE_ENTRIES;
use iotlb_proto::sync::Ordering;
use iotlb_proto::tree::SLICE_WORDS;
use iotlb_proto::worker::Answer;
use iotlbd::server::ServerError;
use iotlbd::sim::SimError;
use iotlbd::sim::channel::Channel;
use iotlbd::sim::front_end::{FrontEnd, FrontEndOptions};
use iotlbd::sim::wire::{Iotlb, MessageHeader, code};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};
use server_support::program::Program;
use server_support::{RawWorker, Running, TIMEOUT_MS, hear, say, started_front_end, started_front_end_with, watchdog};

const IOVA: u64 = 0x10_0000;
const CHILD_CONTROL: &str = "IOTLBD_TEST_CHILD_CONTROL";

fn front_end(server: &Running) -> FrontEnd {
    started_front_end(&server.front_end())
}

/// Maps a page and tells the server.
fn publish(front_end: &mut FrontEnd) {
    let page = front_end.guest.allocate().expect("a page");
    front_end.viommu.map(IOVA, page, Access::READ_WRITE).expect("maps");
    front_end.push_update(IOVA).expect("acknowledged");
}

/// Not a test: the worker process that [`child`] starts.
#[test]
fn child_that_pins_and_hangs() {
    let Some(control) = std::env::var_os(CHILD_CONTROL) else { return };
    let _watchdog = watchdog();
    let worker = RawWorker::attach(control.as_ref());
    say(&worker.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    assert!(matches!(hear(&worker.socket), Ok((DaemonMessage::Lease(_), _))));
    worker.pin();
    println!("pinned");
    std::io::stdout().flush().expect("flushes");
    // Until the parent kills this process, or is gone.
    let _ = std::io::stdin().read(&mut [0; 1]);
}

/// Not a test: the worker process that lets go when it is told to give up, and pins again; told twice, it leaves.
#[test]
fn child_that_gives_nothing_up() {
    let Some(control) = std::env::var_os(CHILD_CONTROL) else { return };
    let _watchdog = watchdog();
    let worker = RawWorker::attach(control.as_ref());
    worker.pin();
    println!("pinned");
    std::io::stdout().flush().expect("flushes");
    for _ in 0..2 {
        while !matches!(hear(&worker.socket).expect("a message").0, DaemonMessage::Revoke) {}
        worker.unpin();
        worker.pin();
    }
}

/// A worker process that owns queue 0 and holds a pin.
fn child(server: &Running) -> Program {
    child_of(server, "child_that_pins_and_hangs")
}

/// A worker process that holds a pin.
fn child_of(server: &Running, what: &str) -> Program {
    let mut child = Program::start(
        Command::new(std::env::current_exe().expect("own path"))
            .args(["--exact", what, "--nocapture"])
            .env(CHILD_CONTROL, server.control())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    assert!(lines.any(|line| line.expect("readable").contains("pinned")), "the child ended too early");
    child
}

#[test]
fn nobody_pinned_nothing_held() {
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    for _ in 0..50 {
        publish(&mut front_end);
        assert!(worker.table.lookup(IOVA).is_some());
        front_end.unmap(IOVA).expect("acknowledged");
        assert!(worker.table.lookup(IOVA).is_none());
    }
    server.stop();
}

#[test]
fn a_pin_holds_the_reply_until_it_ends() {
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    worker.pin();
    let mut held = false;
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        worker.wait_until_held();
        assert!(worker.table.lookup(IOVA).is_none(), "unpublished before it is waited for");
        held = true;
        worker.unpin();
        Ok(())
    });
    result.expect("acknowledged");
    assert!(held);
    server.stop();
}

#[test]
fn workers_that_take_turns_holding_pins_do_not_hold_the_reply() {
    let _watchdog = watchdog();
    let server = Running::start();
    let [one, other] = [(); 2].map(|()| RawWorker::attach(&server.control()));
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    one.pin();
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        one.wait_until_held();
        // The other one was free. A reader that pins now reads the new epoch, so this is none.
        other.segment.announce(1);
        other.segment.slot(0).store(FIRST_EPOCH, Ordering::Release);
        one.unpin();
        Ok(())
    });
    result.expect("acknowledged: each was seen free once");
    other.unpin();
    server.stop();
}

#[test]
fn who_attaches_while_the_reply_waits_does_not_hold_it() {
    let _watchdog = watchdog();
    let server = Running::start();
    let old = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    old.pin();
    let mut new = None;
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        old.wait_until_held();
        // Never seen free, but the table that it reads was without the page before it had it.
        let worker = RawWorker::attach(&server.control());
        worker.segment.announce(1);
        worker.segment.slot(0).store(FIRST_EPOCH, Ordering::Release);
        new = Some(worker);
        old.unpin();
        Ok(())
    });
    result.expect("acknowledged: nobody who was there holds it");
    let new = new.expect("attached");
    new.unpin();
    // It counts for the next one, as everybody does.
    front_end.push_update(IOVA).expect("acknowledged");
    new.pin();
    let mut held = false;
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        new.wait_until_held();
        held = true;
        new.unpin();
        Ok(())
    });
    result.expect("acknowledged");
    assert!(held);
    server.stop();
}

#[test]
fn an_invalidation_nobody_waits_for_any_more_is_no_figure_of_the_next_session() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stats.json");
    let server = Running::start_with(|config| config.stats = Some(path.clone()));
    let worker = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    worker.pin();
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        worker.wait_until_held();
        Err(SimError::Closed { what: "anything, as this front-end goes" })
    });
    assert!(result.is_err(), "no acknowledgement came");
    drop(front_end);
    // The end is noticed while the pin still holds the answer. Relaxed: only the flag itself matters.
    while worker.table.header().state.flags.load(Ordering::Relaxed) != 0 {
        std::thread::yield_now();
    }
    worker.unpin();
    drop(started_front_end(&server.front_end()));
    server.stop();
    let text = std::fs::read_to_string(&path).expect("written");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value.pointer("/invalidate_ns/count"), Some(&serde_json::Value::from(0)), "{text}");
}

#[test]
fn each_of_several_invalidations_sent_together_is_a_figure() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stats.json");
    let server = Running::start_with(|config| config.stats = Some(path.clone()));
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    let main = front_end.channels().0.try_clone_to_owned().expect("a duplicate");
    let main = Channel::new(main.into(), Duration::from_millis(TIMEOUT_MS.into()));
    let header = MessageHeader::request(code::IOTLB_INVALIDATE, Iotlb::LEN, true).encode();
    let one = [&header[..], &Iotlb::invalidate(IOVA, PAGE_SIZE).encode()].concat();
    let sent = send(&main, &[&one[..], &one].concat(), SendFlags::empty()).expect("sends");
    assert_eq!(sent, 2 * one.len(), "seen in one look");
    for _ in 0..2 {
        assert_eq!(main.receive("an acknowledgement").expect("acknowledged").body, [0; 8]);
    }
    drop((main, front_end));
    server.stop();
    let text = std::fs::read_to_string(&path).expect("written");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for count in ["/invalidate_ns/count", "/counters/invalidations"] {
        assert_eq!(value.pointer(count), Some(&serde_json::Value::from(2)), "{count}: {text}");
    }
}

#[test]
fn death_ends_the_wait_and_frees_the_queues() {
    let _watchdog = watchdog();
    let server = Running::start();
    let witness = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    let mut child = child(&server);
    say(&witness.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    loop {
        match hear(&witness.socket).expect("an answer").0 {
            DaemonMessage::LeaseRefused { queue: 0, .. } => break,
            DaemonMessage::AddRegion(_) | DaemonMessage::MemoryMap { .. } => {}
            other => panic!("queue 0 is the child's: {other:?}"),
        }
    }
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        witness.wait_until_held();
        child.kill().expect("killed");
        Ok(())
    });
    result.expect("acknowledged");
    child.wait().expect("ended");
    say(&witness.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    assert!(matches!(hear(&witness.socket), Ok((DaemonMessage::Lease(lease), _)) if lease.queue == 0));
    server.stop();
}

#[test]
fn a_closed_connection_is_no_drain() {
    let _watchdog = watchdog();
    let server = Running::start();
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    let RawWorker { socket, segment, table, .. } = {
        let worker = RawWorker::attach(&server.control());
        worker.pin();
        worker
    };
    drop(socket);
    let witness = RawWorker::attach(&server.control());
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        witness.wait_until_held();
        assert!(table.lookup(IOVA).is_none());
        iotlb_proto::epoch::unpin(&segment.slot(0));
        Ok(())
    });
    result.expect("acknowledged");
    server.stop();
}

#[test]
fn a_stalled_worker_is_revoked() {
    let _watchdog = watchdog();
    let server = Running::start_with(|config| {
        config.stall.report_ms = 1;
        config.stall.revoke_ms = 20;
    });
    let worker = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    worker.pin();
    let result = front_end.invalidate_and(IOVA, PAGE_SIZE, |_| {
        loop {
            if let DaemonMessage::Revoke = hear(&worker.socket).expect("a message").0 {
                break;
            }
        }
        // Its slot stays pinned: what counts is that it says so.
        say(&worker.socket, &WorkerMessage::Revoked);
        Ok(())
    });
    result.expect("acknowledged");
    server.stop();
}

#[test]
fn a_stalled_process_is_killed() {
    let _watchdog = watchdog();
    let server = Running::start_with(|config| {
        config.stall.report_ms = 1;
        config.stall.revoke_ms = 20;
        config.stall.kill_ms = 100;
    });
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    let mut child = child(&server);
    front_end.invalidate(IOVA, PAGE_SIZE).expect("acknowledged");
    let status = child.wait().expect("ended");
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    server.stop();
}

/// The removal takes many slices, and nobody says anything until it is done: a server that slept in between would sleep
/// for ever.
#[test]
fn the_server_does_not_sleep_over_a_long_removal() {
    const REGION: u64 = 1 << 32;
    const SLICES: usize = 32;
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    // Without slots the front-end would send all its memory anew.
    let options = FrontEndOptions { memory_slots: true, ..FrontEndOptions::default() };
    let mut front_end = started_front_end_with(&server.front_end(), options);
    front_end.add_region(REGION, 1 << 20).expect("acknowledged");
    // One page in each node of the tree: all of a node is looked at, whatever it holds.
    let nodes = u64::try_from(SLICES * SLICE_WORDS / NODE_ENTRIES).expect("fits");
    let iovas: Vec<u64> = (0..nodes).map(|n| REGION + n * PAGE_SIZE * NODE_ENTRIES as u64).collect();
    for &iova in &iovas {
        front_end.viommu.map(iova, REGION, Access::READ_WRITE).expect("maps");
        front_end.push_update(iova).expect("acknowledged");
        front_end.viommu.unmap(iova).expect("unmaps");
        assert!(worker.table.lookup(iova).is_some());
    }
    front_end.remove_region(REGION).expect("acknowledged");
    assert!(iovas.iter().all(|&iova| worker.table.lookup(iova).is_none()));
    server.stop();
}

#[test]
fn stopping_drains_the_front_end_first() {
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    worker.pin();
    let control = server.control();
    let stopper = std::thread::spawn(move || server.stop());
    worker.wait_until_held();
    assert!(control.exists(), "the server is gone although a worker holds guest memory");
    assert!(worker.liveness.alive());
    worker.unpin();
    stopper.join().expect("stopped in good order");
}

/// Two ends of a connection of which the first takes long to close: until the second was read to its end.
fn slow_to_close() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let mut slow = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
    let (other, _) = listener.accept().expect("accepts");
    slow.set_nonblocking(true).expect("set");
    while slow.write(&[0; 4096]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&slow, Some(Duration::from_secs(60))).expect("set");
    (slow, other)
}

#[test]
fn a_server_that_does_not_wait_is_dead_for_workers_when_its_front_end_hears_of_the_end() {
    let _watchdog = watchdog();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("stats.json");
    let server = Running::start_with(|config| config.stats = Some(path.clone()));
    let worker = RawWorker::attach(&server.control());
    let mut stream = UnixStream::connect(server.front_end()).expect("connects");
    // GET_FEATURES. The answer says that there is a front-end to drain.
    stream.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).expect("sends");
    stream.read_exact(&mut [0; 20]).expect("an answer");
    worker.pin();
    server.tell();
    worker.wait_until_held();
    // The server does not read on. What is closed with the connection keeps it there, so that what it did before can be
    // told from what it does afterwards.
    let (slow, mut other) = slow_to_close();
    let fds = [slow.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(&stream, &[IoSlice::new(&[1])], &mut control, SendFlags::empty()).expect("sends");
    drop(slow);
    server.tell();
    let end = stream.read(&mut [0; 1]);
    assert!(matches!(&end, Ok(0)) || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset));
    // Now the front-end takes everything pending for done: no worker may pin any more.
    assert!(!worker.liveness.alive(), "the front-end heard of the end first");
    std::io::copy(&mut other, &mut std::io::sink()).expect("all that was sent");
    assert!(matches!(server.ended(), Err(ServerError::Forced)));
    let text = std::fs::read_to_string(&path).expect("the figures are written at this end too");
    let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(value.pointer("/counters/requests"), Some(&serde_json::Value::from(1)), "{text}");
}

#[test]
fn a_miss_wakes_a_sleeping_server() {
    let _watchdog = watchdog();
    let server = Running::start();
    let worker = RawWorker::attach(&server.control());
    // No front-end, so the server answers by itself.
    let range = IovaRange::from_len(IOVA, 16).expect("range");
    worker.segment.cells[9].post(77, range, Access::READ);
    worker.segment.mark_posted(9);
    if worker.table.header().wake.doorbell_wanted.load(Ordering::Relaxed) != 0 {
        rustix::io::write(&worker.doorbell, &1_u64.to_ne_bytes()).expect("rings");
    }
    let answer = loop {
        if let Some(answer) = worker.segment.cells[9].answer(77) {
            break answer;
        }
        std::thread::yield_now();
    };
    assert_eq!(answer, Answer::Stopped);
    server.stop();
}

#[test]
fn who_was_told_to_give_up_and_did_not_is_killed_though_it_lets_go_each_time() {
    let _watchdog = watchdog();
    let server = Running::start_with(|config| {
        config.stall.report_ms = 1;
        config.stall.revoke_ms = 20;
        config.stall.kill_ms = 200;
    });
    let mut worker = child_of(&server, "child_that_gives_nothing_up");
    let mut front_end = front_end(&server);
    publish(&mut front_end);
    let ended = loop {
        front_end.push_update(IOVA).expect("acknowledged");
        front_end.invalidate_and(IOVA, PAGE_SIZE, |_| Ok(())).expect("acknowledged");
        if let Some(ended) = worker.try_wait().expect("a child") {
            break ended;
        }
    };
    assert_eq!(ended.signal(), Some(9), "told again and again, and served as before: {ended}");
    server.stop();
}
