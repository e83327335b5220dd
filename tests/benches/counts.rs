//! `cargo bench -p iotlb-tests --bench counts`: instructions of the hot paths, counted by callgrind, compared with
//! `docs/bench/instructions.json`. Fails when a path takes over 5 % more than is written there; tells when it takes 5 %
//! less. `-- --write` replaces what is written there.
//!
//! Instructions, unlike times, are the same in every run, so a regression shows on any machine. Each path is a function
//! of its own, and only what happens below it is counted. The difference of two lengths leaves the function's own entry
//! out.
//!
//! A worker under valgrind needs Linux 6.5, or a valgrind that knows `pidfd_open` (3.19 does not); where neither is,
//! the paths of a worker are left out, which is said.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use iotlb_client::{Access, AttachOptions, Attachment, Guard, Reader};
use iotlb_proto::iova::IovaRange;
use iotlb_proto::socket::PacketSocket;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::worker::{Answer, WorkerSegment};
use iotlb_tests::bench::measure::Shuffle;
use iotlb_tests::bench::peers::PAGE;
use iotlb_tests::bench::rig::{self, Rig};
use iotlb_tests::bench::session::{BATCH, Session};
use iotlb_tests::not_tested::not_tested;
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use vm_memory::{Bytes, GuestAddress};

/// Live entries behind every path: the middle size of the other benchmarks.
const ENTRIES: u64 = 2_048;
/// Operations of the shorter run; the longer one has twice as many. A multiple of [`BURST`].
const COUNT: usize = 4_096;
/// Addresses a call of `translate_burst`.
const BURST: usize = 32;
/// More than what is written down, by this part: a regression.
const SLACK: f64 = 0.05;

/// Runs a path so many times. Those of a worker need the control socket of a daemon whose table is filled.
type Run = fn(usize, &Path);

/// Name, which is also part of the counted function's name, and what runs it.
const WORKER_PATHS: [(&str, Run); 5] = [
    ("lookup", with_reader::<0>),
    ("translate", with_reader::<1>),
    ("pin_unpin", with_reader::<2>),
    ("burst_address", with_reader::<3>),
    ("guest_memory_read", with_reader::<4>),
];
const OTHER_PATHS: [(&str, Run); 7] = [
    ("insert", |count, _| edit(count, true)),
    ("remove", |count, _| edit(count, false)),
    ("miss_post", |count, _| miss(count, true)),
    ("miss_answer", |count, _| miss(count, false)),
    ("update_message", |count, _| messages(count, true)),
    ("invalidate_message", |count, _| messages(count, false)),
    ("missed_page", |count, _| missed_pages(count)),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name, count, socket] = arguments.as_slice()
        && flag == "--one"
    {
        let count = count.parse().expect("written by this program");
        let mut paths = WORKER_PATHS.iter().chain(&OTHER_PATHS);
        let (_, run) = paths.find(|(path, _)| path == name).expect("written by this program");
        return run(count, Path::new(socket));
    }
    if arguments == [PIDFD] {
        std::process::exit(i32::from(pidfd_open(getpid(), PidfdFlags::empty()).is_err()));
    }
    let write = arguments.iter().any(|argument| argument == "--write");
    let worker_paths = if workers_attach() { &WORKER_PATHS[..] } else { &[] };
    if worker_paths.is_empty() {
        let names = WORKER_PATHS.map(|(name, _)| name).join(", ");
        not_tested(&format!("{names}: they take Linux 6.5, or a valgrind that knows pidfd_open"));
        if write {
            eprintln!("counts: what is written down are the figures of all paths, so nothing is");
            std::process::exit(1);
        }
    }
    // Out here: valgrind has no vDSO, without which parts of the daemon do not run, and is slow.
    let mut rig = Rig::start().expect("a daemon, a front-end and a worker on this machine");
    rig.fill(ENTRIES).expect("the front-end maps pages");
    let socket = rig.control_socket();
    let paths = worker_paths.iter().chain(&OTHER_PATHS);
    let counted: BTreeMap<&str, f64> = paths.map(|(name, _)| (*name, instructions(name, &socket))).collect();
    if write {
        let text = serde_json::to_string_pretty(&counted).expect("names and numbers");
        std::fs::write(kept(), text + "\n").expect("docs/bench can be written");
    }
    let text = std::fs::read_to_string(kept()).expect("docs/bench/instructions.json exists");
    let expected: BTreeMap<String, f64> = serde_json::from_str(&text).expect("an object of numbers");
    let mut more = false;
    for (name, now) in counted {
        let before = expected.get(name).copied().unwrap_or(f64::NAN);
        let verdict = if now < before * (1.0 - SLACK) {
            "fewer: write them down"
        } else if now <= before * (1.0 + SLACK) {
            "as before"
        } else {
            more = true;
            "MORE"
        };
        println!("{name:<18} {now:>8.2} instructions, written down {before:>8.2}: {verdict}");
    }
    drop(rig);
    std::process::exit(i32::from(more));
}

/// Has this program try whether it can open a pidfd of itself.
const PIDFD: &str = "--pidfd";

/// Whether a worker under valgrind has a pidfd of itself to say HELLO with, in either way that the client knows.
fn workers_attach() -> bool {
    let (one, _other) = PacketSocket::pair().expect("a socket pair");
    one.peer_pidfd().is_ok()
        || valgrind("none").arg(own_path()).arg(PIDFD).output().is_ok_and(|ran| ran.status.success())
}

fn valgrind(tool: &str) -> Command {
    let mut command = Command::new("valgrind");
    command.arg(format!("--tool={tool}"));
    command
}

fn own_path() -> PathBuf {
    std::env::current_exe().expect("the running program has a path")
}

fn kept() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/bench/instructions.json")
}

/// Instructions of one operation.
fn instructions(name: &str, socket: &Path) -> f64 {
    let (short, long) = (collected(name, COUNT, socket), collected(name, 2 * COUNT, socket));
    (long - short) / COUNT as f64
}

/// Instructions below the functions of that path.
fn collected(name: &str, count: usize, socket: &Path) -> f64 {
    let output = valgrind("callgrind")
        .arg("--callgrind-out-file=/dev/null")
        .arg(format!("--toggle-collect=*counted_{name}*"))
        .arg(own_path())
        .args(["--one", name, &count.to_string()])
        .arg(socket)
        .output()
        .expect("valgrind is installed (Debian: valgrind)");
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|line| line.split("Collected :").nth(1)?.trim().parse().ok());
    match collected {
        Some(collected) if output.status.success() => collected,
        _ => panic!("valgrind: {}\n{text}", output.status),
    }
}

fn with_reader<const WHAT: usize>(count: usize, socket: &Path) {
    let worker = Attachment::connect(socket, &AttachOptions::default()).expect("the daemon takes workers");
    let mut reader = worker.reader().expect("a reader slot");
    assert!(reader.wait_mapped(10_000), "guest memory is not mapped");
    let pages = rig::pages(ENTRIES);
    let mut shuffle = Shuffle::new(42);
    let visits: Vec<(u64, u64)> = (0..count)
        .map(|_| {
            (pages[usize::try_from(shuffle.below(ENTRIES)).expect("an index")].iova + shuffle.below(PAGE - 64), 64)
        })
        .collect();
    match WHAT {
        0 => counted_lookup(&reader.pin().expect("the daemon lives"), &visits),
        1 => counted_translate(&reader.pin().expect("the daemon lives"), &visits),
        2 => counted_pin_unpin(&reader, count),
        3 => counted_burst_address(&reader.pin().expect("the daemon lives"), &visits),
        _ => counted_guest_memory_read(&reader.pin().expect("the daemon lives"), &visits),
    }
}

#[inline(never)]
fn counted_lookup(guard: &Guard<'_>, visits: &[(u64, u64)]) {
    for &(iova, len) in visits {
        black_box(guard.translate_one(iova, len, Access::READ).expect("a hit").as_ptr());
    }
}

#[inline(never)]
fn counted_translate(guard: &Guard<'_>, visits: &[(u64, u64)]) {
    for &(iova, len) in visits {
        let mut segments = guard.translate(iova, len, Access::READ).expect("a hit");
        black_box(segments.next().expect("a piece").as_ptr());
    }
}

#[inline(never)]
fn counted_pin_unpin(reader: &Reader, count: usize) {
    for _ in 0..count {
        black_box(reader.pin().expect("the daemon lives"));
    }
}

#[inline(never)]
fn counted_burst_address(guard: &Guard<'_>, visits: &[(u64, u64)]) {
    let mut out = [None; BURST];
    for burst in visits.chunks(BURST) {
        assert_eq!(guard.translate_burst(burst, Access::READ, &mut out), BURST);
        black_box(&out);
    }
}

/// As a virtio queue reads a descriptor.
#[inline(never)]
fn counted_guest_memory_read(guard: &Guard<'_>, visits: &[(u64, u64)]) {
    for &(iova, _) in visits {
        black_box(guard.read_obj::<[u64; 2]>(GuestAddress(iova)).expect("a hit"));
    }
}

/// Pages of one node come and go; others of it stay.
fn edit(count: usize, inserts: bool) {
    let config = TableConfig { size: 1 << 20, generation: 1 };
    let (mut table, _fd) = TableWriter::create(&config).expect("a table");
    let pages = rig::pages(ENTRIES);
    for page in &pages {
        table.insert(IovaRange::page_of(page.iova), page.target, Access::READ_WRITE).expect("there is room");
    }
    for page in pages.iter().step_by(2).cycle().take(count) {
        let range = IovaRange::page_of(page.iova);
        if inserts {
            table.remove(range);
            counted_insert(&mut table, range, page.target);
        } else {
            counted_remove(&mut table, range);
            table.insert(range, page.target, Access::READ_WRITE).expect("there is room");
        }
    }
}

#[inline(never)]
fn counted_insert(table: &mut TableWriter, range: IovaRange, target: u64) {
    table.insert(range, target, Access::READ_WRITE).expect("there is room");
}

#[inline(never)]
fn counted_remove(table: &mut TableWriter, range: IovaRange) {
    assert_eq!(table.remove(range), 1);
}

/// A miss goes into a cell and back.
fn miss(count: usize, post: bool) {
    let (daemon, fd) = WorkerSegment::create(1).expect("a segment");
    let worker = WorkerSegment::open(fd.as_fd(), 1).expect("the same segment");
    for ticket in 0..u32::try_from(count).expect("thousands") {
        if post {
            counted_miss_post(&worker, ticket);
            daemon.take_posted(|_| ());
        } else {
            worker.cells[70].post(ticket, IovaRange::page_of(0x1000), Access::READ);
            worker.mark_posted(70);
            counted_miss_answer(&daemon, &worker, ticket);
        }
    }
}

#[inline(never)]
fn counted_miss_post(worker: &WorkerSegment, ticket: u32) {
    worker.cells[70].post(ticket, IovaRange::page_of(0x1000), Access::READ);
    worker.mark_posted(70);
}

/// The daemon takes the request and answers; the worker takes the answer.
#[inline(never)]
fn counted_miss_answer(daemon: &WorkerSegment, worker: &WorkerSegment, ticket: u32) {
    daemon.take_posted(|cell| {
        let request = daemon.cells[usize::from(cell)].take().expect("sane").expect("posted");
        assert!(!daemon.cells[usize::from(cell)].store_answer(request.ticket, Answer::Resolved));
    });
    assert_eq!(worker.cells[70].answer(ticket), Some(Answer::Resolved));
}

/// Messages of the front-end, from the socket to the acknowledgement. Pages of one node come and go.
fn messages(count: usize, updates: bool) {
    let mut session = Session::start().expect("a device");
    for _ in 0..count / BATCH {
        session.send_updates().expect("room");
        if updates {
            counted_update_message(&mut session);
        } else {
            session.answer(BATCH).expect("updates");
        }
        session.acknowledged(BATCH).expect("acknowledged");
        session.send_invalidations().expect("room");
        if updates {
            session.answer(BATCH).expect("invalidations");
        } else {
            counted_invalidate_message(&mut session);
        }
        session.acknowledged(BATCH).expect("acknowledged");
    }
}

#[inline(never)]
fn counted_update_message(session: &mut Session) {
    session.answer(BATCH).expect("updates");
}

#[inline(never)]
fn counted_invalidate_message(session: &mut Session) {
    session.answer(BATCH).expect("invalidations");
}

/// Pages of a worker's misses, from the posted cell to its answer, the front-end's UPDATE included.
fn missed_pages(count: usize) {
    let mut session = Session::start().expect("a device");
    for ticket in 0..u32::try_from(count / BATCH).expect("thousands") {
        // Here already, so that only the daemon's work is counted.
        session.send_updates().expect("room");
        let resolved = session.resolved();
        counted_missed_page(&mut session, ticket);
        assert_eq!(session.resolved(), resolved + 1);
        session.acknowledged(BATCH).expect("acknowledged");
        session.send_invalidations().expect("room");
        session.answer(BATCH).expect("invalidations");
        session.acknowledged(BATCH).expect("acknowledged");
    }
}

#[inline(never)]
fn counted_missed_page(session: &mut Session, ticket: u32) {
    session.miss(ticket);
    assert_eq!(session.carry_out().expect("misses"), BATCH);
    session.answer(BATCH).expect("updates");
    session.reply();
    session.carry_out().expect("no more");
}
