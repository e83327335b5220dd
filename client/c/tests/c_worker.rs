//! Programs in C, compiled against the header and linked with the library, before a daemon that is driven by hand.

#[path = "../../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use iotlb_proto::access::Access;
use iotlb_proto::control::{DaemonMessage, QueueLease, WorkerMessage};
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::layout::worker::PROGRESS_VALID;
use iotlb_proto::sync::Ordering;
use iotlb_proto::table::QueueRecord;
use iotlb_proto::worker::Answer;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use support::program::Program;
use support::{Daemon, Memory, Next, eventfd, take_count, wait_readable, wait_until};

/// Compiles a program of this crate. Warnings are errors.
fn compiled(source: &str, folder: &Path, is_static: bool) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The libraries lie beside this test.
    let test = std::env::current_exe().expect("this program has a path");
    let libraries = test.parent().expect("a folder");
    let program = folder.join(Path::new(source).file_stem().expect("a name"));
    let mut command = Command::new("cc");
    command.args(["-std=c11", "-D_GNU_SOURCE", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2", "-g", "-o"]);
    command.arg(&program).arg(root.join(source)).arg("-I").arg(root.join("include"));
    if is_static {
        command.arg(libraries.join("libiotlb.a")).args(["-lgcc_s", "-lpthread", "-lm", "-ldl"]);
    } else {
        command.arg("-L").arg(libraries).arg("-liotlb").arg(format!("-Wl,-rpath,{}", libraries.display()));
    }
    let output = command.output().expect("a C compiler (Debian: gcc, libc6-dev)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// Where a program attaches.
fn listener(path: &Path) -> OwnedFd {
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).expect("a short path")).expect("bind");
    rustix::net::listen(&listener, 2).expect("listen");
    listener
}

/// Lets the next program attach; returns its label.
fn admit(daemon: &mut Daemon, listener: &OwnedFd) -> String {
    assert!(wait_readable(listener.as_fd(), support::PATIENCE), "the program does not connect");
    daemon.adopt(rustix::net::accept_with(listener, SocketFlags::CLOEXEC).expect("accept"));
    let WorkerMessage::Hello(hello) = daemon.receive().0 else { panic!("not a HELLO") };
    daemon.send(&DaemonMessage::Welcome(daemon.welcome()), &daemon.welcome_fds());
    hello.label
}

/// Waits for the end of a program.
fn ended(mut program: Program) {
    let mut status = None;
    wait_until("the program ends", || {
        status = program.try_wait().expect("wait");
        status.is_some()
    });
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
}

fn whole(is_static: bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let program = compiled("tests/c/whole.c", folder.path(), is_static);
    let path = folder.path().join("control.sock");
    let listener = listener(&path);
    let running = Program::start(Command::new(program).arg(&path));
    // One comes over a socket that the program has connected by itself, and goes.
    let mut daemon = Daemon::new();
    assert_eq!(admit(&mut daemon, &listener), "by hand");
    while daemon.try_receive().is_some() {}
    let mut daemon = Daemon::new();
    assert_eq!(admit(&mut daemon, &listener), "whole");

    let memory = Memory::new(16 * PAGE_SIZE);
    memory.poke(5 * PAGE_SIZE - 4, b"left");
    memory.poke(9 * PAGE_SIZE, b"back");
    daemon.add_region(1, 0, &memory);
    daemon.finish_map();
    let record = QueueRecord {
        started: true,
        enabled: false,
        size: 64,
        desc: 0x10000,
        avail: 0x10800,
        used: 0x11000,
        base: 9,
        session_generation: 0,
    };
    let session_generation = daemon.table().bump_session();
    daemon.table().publish_queue(1, &QueueRecord { session_generation, ..record });
    daemon.map(0x12000, PAGE_SIZE, 0, Access::READ);
    daemon.unmap(0x12000, PAGE_SIZE);
    // In two places of memory, which is how a range gets two pieces.
    daemon.map(0x10000, PAGE_SIZE, 4 * PAGE_SIZE, Access::READ_WRITE);
    daemon.map(0x11000, PAGE_SIZE, 9 * PAGE_SIZE, Access::READ_WRITE);
    let serving = daemon.serve_misses(|table, request| match request.range.first() {
        iova @ (0x30000 | 0x31000) => {
            table.insert(IovaRange::page_of(iova), PAGE_SIZE, Access::READ).expect("room");
            Next::Answer(Answer::Resolved)
        }
        0x33000 => Next::Silence,
        _ => Next::Last(Answer::Denied),
    });
    // The program goes on when it sees this one.
    daemon.map(0x20000, PAGE_SIZE, 0, Access::READ);
    serving.join().expect("all were asked for");

    let claim = |expected: &[u16]| {
        let WorkerMessage::ClaimQueues { claim, queues } = daemon.receive().0 else { panic!("not a claim") };
        assert_eq!(queues, expected);
        claim
    };
    let released = |expected: u16| {
        let message = daemon.receive().0;
        assert!(matches!(message, WorkerMessage::ReleaseQueue { queue, .. } if queue == expected), "{message:?}");
    };
    let refused = claim(&[2]);
    let reason = "it is somebody else's".to_owned();
    daemon.send(&DaemonMessage::LeaseRefused { queue: 2, claim: refused, reason }, &[]);
    let claim = claim(&[1, 0]);
    let (kick, call, err) = (eventfd(), eventfd(), eventfd());
    rustix::io::write(&kick, &1_u64.to_ne_bytes()).expect("kick");
    let lease = |queue, set_up| QueueLease { queue, claim, kick: set_up, call: set_up, err: set_up };
    daemon.send(&DaemonMessage::Lease(lease(1, true)), &[kick.as_fd(), call.as_fd(), err.as_fd()]);
    daemon.send(&DaemonMessage::Lease(lease(0, false)), &[]);
    let WorkerMessage::QueueError { queue: 1, reason } = daemon.receive().0 else { panic!("not an error report") };
    assert_eq!(reason, "broken \u{fffd}");
    assert!(take_count(&call) >= 1, "the driver was not interrupted");
    assert_eq!(daemon.segment.progress[1].load(Ordering::SeqCst), PROGRESS_VALID | 0x8001);
    released(0);
    released(1);

    let WorkerMessage::ClaimQueues { queues, .. } = daemon.receive().0 else { panic!("not a claim") };
    assert_eq!(queues, [3]);
    daemon.send(&DaemonMessage::Revoke, &[]);
    while daemon.try_receive().is_some() {}
    ended(running);
    assert_eq!(memory.peek(5 * PAGE_SIZE - 4, 4), b"leLY");
    assert_eq!(memory.peek(9 * PAGE_SIZE, 4), b"HAck");
}

#[test]
fn all_of_the_header_works_with_the_shared_library() {
    whole(false);
}

#[test]
fn and_with_the_static_one() {
    whole(true);
}

#[test]
fn the_example_copies_what_it_has_to_ask_for() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = compiled("examples/peek.c", folder.path(), false);
    let path = folder.path().join("control.sock");
    let listener = listener(&path);
    // From the last bytes of a page to the middle of the one after the next.
    let (iova, length) = (0x7000 - 4, 4 + PAGE_SIZE + 100);
    let mut command = Command::new(&program);
    command.arg(&path).args([format!("{iova:#x}"), length.to_string()]);
    let copied = folder.path().join("copied");
    let running = Program::start(command.stdout(File::create(&copied).expect("a file")));
    let mut daemon = Daemon::new();
    assert_eq!(admit(&mut daemon, &listener), "peek");
    let memory = Memory::new(3 * PAGE_SIZE);
    let bytes: Vec<u8> = (0..3 * PAGE_SIZE).map(|at| u8::try_from(at % 251).expect("small")).collect();
    memory.poke(0, &bytes);
    daemon.add_region(1, 0, &memory);
    daemon.finish_map();
    // Pages come in order, and lie in another.
    let serving = daemon.serve_misses(|table, request| {
        let page = request.range.first() & !(PAGE_SIZE - 1);
        let target = 2 * PAGE_SIZE - (page - 0x6000);
        table.insert(IovaRange::page_of(page), target, Access::READ).expect("room");
        if page == 0x8000 { Next::Last(Answer::Resolved) } else { Next::Answer(Answer::Resolved) }
    });
    ended(running);
    let copied = std::fs::read(copied).expect("what was copied");
    serving.join().expect("all were asked for");
    let page = usize::try_from(PAGE_SIZE).expect("small");
    let expected = [&bytes[3 * page - 4..], &bytes[page..2 * page], &bytes[..100]].concat();
    assert!(copied == expected, "{} bytes, others than those of the guest", copied.len());
}
