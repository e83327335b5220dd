//! The program itself: command line, signals, descriptors.

mod server_support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use iotlb_proto::access::Access;
use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::sync::Ordering;
use iotlb_proto::worker::Answer;
use iotlbd::sim::front_end::{FrontEnd, FrontEndOptions};
use iotlbd::sim::guest::Guest;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};
use server_support::not_tested::not_tested;
use server_support::program::Program;
use server_support::{RawWorker, TIMEOUT_MS, connect, hear, say, started_front_end, watchdog};

const CHILD_CONTROL: &str = "IOTLBD_TEST_CHILD_CONTROL";

/// Within how many seconds an idle daemon must have had one without a wake-up.
const IDLE_SECONDS_MAX: usize = 5;

/// A daemon as a process, with its sockets in a directory of its own.
struct Daemon {
    child: Program,
    directory: tempfile::TempDir,
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_iotlbd"));
    command.arg(format!("--control-socket={}", directory.join("control").display()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn with_socket(directory: &Path) -> Command {
    let mut command = command(directory);
    command.arg(format!("--socket-path={}", directory.join("front-end").display()));
    command
}

fn wait_for(control: &Path) {
    // Nothing tells when somebody listens there but trying; the watchdog bounds it. The name comes a moment before.
    while iotlb_proto::socket::PacketSocket::connect(control, 1000).is_err() {
        std::thread::yield_now();
    }
}

impl Daemon {
    fn start() -> Daemon {
        Daemon::start_with("--log-level=info")
    }

    fn start_with(flag: &str) -> Daemon {
        Daemon::start_as(|command| command.arg(flag))
    }

    fn start_as(change: impl FnOnce(&mut Command) -> &mut Command) -> Daemon {
        let directory = tempfile::tempdir().expect("temporary directory");
        let child = Program::start(change(&mut with_socket(directory.path())));
        wait_for(&directory.path().join("control"));
        let daemon = Daemon { child, directory };
        // Attaching waits until it serves.
        RawWorker::attach(&daemon.control()).leave();
        daemon
    }

    fn control(&self) -> PathBuf {
        self.directory.path().join("control")
    }

    fn front_end(&self) -> PathBuf {
        self.directory.path().join("front-end")
    }

    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("readable").count()
    }

    /// Mappings of segments that it shares with workers.
    fn segments(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).expect("readable");
        maps.lines().filter(|line| line.contains("memfd:iotlbd-worker")).count()
    }

    /// Processor time it used so far, in clock ticks, and how often its threads went to sleep.
    fn activity(&self) -> (u64, u64) {
        let process = format!("/proc/{}", self.child.id());
        let stat = std::fs::read_to_string(format!("{process}/stat")).expect("readable");
        // The name, in parentheses, is the only field that may contain a space. It is the 2nd; utime is the 14th.
        let fields: Vec<&str> = stat.rsplit(')').next().expect("one").split_whitespace().collect();
        let ticks = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
        let mut sleeps = 0;
        for task in std::fs::read_dir(format!("{process}/task")).expect("readable") {
            let status = std::fs::read_to_string(task.expect("readable").path().join("status")).expect("readable");
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("there");
            sleeps += line.trim().parse::<u64>().expect("a number");
        }
        (ticks, sleeps)
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("small")).expect("not 0");
        kill_process(pid, signal).expect("signalled");
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().expect("ended");
        let mut log = String::new();
        self.child.stderr.take().expect("piped").read_to_string(&mut log).expect("readable");
        let left: Vec<_> = std::fs::read_dir(self.directory.path()).expect("readable").collect();
        assert!(left.is_empty(), "left behind: {left:?}\n{log}");
        (status, log)
    }
}

fn fails(command: &mut Command) -> String {
    let output = command.output().expect("runs");
    assert!(!output.status.success(), "it should not have worked");
    String::from_utf8(output.stderr).expect("text")
}

fn guest() -> Guest {
    Guest::new(0, 1 << 20).expect("guest")
}

/// Says what the program finds `signal` to do when it starts: whoever runs the tests may have it ignored.
fn with_disposition(command: &mut Command, signal: Signal, disposition: libc::sighandler_t) -> &mut Command {
    // SAFETY: between fork and exec only signal is called, which is async-signal-safe, with one of the dispositions
    // that are no function.
    unsafe {
        command.pre_exec(move || match libc::signal(signal.as_raw(), disposition) {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    }
}

#[test]
fn signals_end_it_cleanly() {
    let _watchdog = watchdog();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let daemon = Daemon::start_as(|command| with_disposition(command, signal, libc::SIG_DFL));
        let _front_end = FrontEnd::connect(&daemon.front_end(), guest(), FrontEndOptions::default()).expect("served");
        let _worker = RawWorker::attach(&daemon.control());
        daemon.signal(signal);
        let (status, log) = daemon.end();
        assert!(status.success(), "{log}");
    }
}

#[test]
fn signals_that_are_ignored_from_the_start_stay_so() {
    let _watchdog = watchdog();
    for signal in [Signal::HUP, Signal::QUIT] {
        let daemon = Daemon::start_as(|command| with_disposition(command, signal, libc::SIG_IGN));
        daemon.signal(signal);
        // The signal came before them. One that is about to end may still let the first in.
        for _ in 0..2 {
            RawWorker::attach(&daemon.control()).leave();
        }
        daemon.signal(Signal::TERM);
        let (status, log) = daemon.end();
        assert!(status.success(), "{log}");
    }
}

#[test]
fn a_terminal_that_closes_ends_no_wait_for_workers() {
    let _watchdog = watchdog();
    let daemon = Daemon::start_as(|command| {
        // The worker is this process: it must not be killed for its pin.
        command.args(["--stall-revoke-ms=3600000", "--stall-kill-ms=3600000"]);
        with_disposition(command, Signal::HUP, libc::SIG_DFL)
    });
    let _front_end = started_front_end(&daemon.front_end());
    let worker = RawWorker::attach(&daemon.control());
    worker.pin();
    daemon.signal(Signal::HUP);
    worker.wait_until_held();
    // The shell says it too, or whoever ends the session does; only TERM counts, once.
    daemon.signal(Signal::HUP);
    daemon.signal(Signal::TERM);
    // The signals came before it.
    say(&worker.socket, &WorkerMessage::ClaimQueues { claim: 1, queues: vec![0] });
    while !matches!(hear(&worker.socket).expect("it still serves").0, DaemonMessage::Lease(_)) {}
    worker.unpin();
    let (status, log) = daemon.end();
    assert!(status.success(), "{log}");
}

#[test]
fn a_second_daemon_is_told_why_not() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let error = fails(&mut with_socket(daemon.directory.path()));
    assert!(error.contains("--socket-path") && error.contains("another iotlbd is serving"), "{error}");
    let mut other_front = command(daemon.directory.path());
    let error = fails(other_front.arg(format!("--socket-path={}", daemon.directory.path().join("other").display())));
    assert!(error.contains("--control-socket") && error.contains("another iotlbd is serving"), "{error}");
    RawWorker::attach(&daemon.control()).leave();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn a_killed_daemon_leaves_nothing_in_the_way_of_the_next() {
    let _watchdog = watchdog();
    let Daemon { mut child, directory } = Daemon::start();
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(directory.path().join("control").exists(), "nobody cleaned up");
    let child = Program::start(&mut with_socket(directory.path()));
    let daemon = Daemon { child, directory };
    // The old socket refuses until the new one is in its place.
    wait_for(&daemon.control());
    RawWorker::attach(&daemon.control()).leave();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn wrong_flags_are_named_with_the_fix() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let long = "x".repeat(120);
    for (flag, words) in [
        (format!("--socket-path={}", directory.path().join(long).display()), &["--socket-path", "107"][..]),
        (format!("--socket-path={}", directory.path().join("no/s").display()), &["--socket-path", "create it first"]),
        (String::from("--fd=99"), &["--fd=99", "not open"]),
        (String::from("--log-level=info"), &["--socket-path", "missing"]),
        (String::from("--queue-pairs=1000"), &["--queue-pairs", "1..=128"]),
        (String::from("--cpu=one"), &["--cpu", "invalid digit"]),
    ] {
        let error = fails(command(directory.path()).arg(&flag));
        for word in words {
            assert!(error.contains(word), "{flag}: `{word}` is not in: {error}");
        }
    }
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let _watchdog = watchdog();
    let output = Command::new(env!("CARGO_BIN_EXE_iotlbd"))
        .args(["--socket-path=/nowhere/at/all", "--print-capabilities", "--no-such-flag"])
        .output()
        .expect("runs");
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(json["type"], "net");
}

/// Starts the daemon with `fd` inherited as descriptor 3.
fn with_descriptor(directory: &Path, fd: &OwnedFd) -> Program {
    let number = fd.as_raw_fd();
    let mut command = command(directory);
    command.arg("--fd=3");
    // SAFETY: between fork and exec only dup2 and fcntl are called, which are async-signal-safe; `number` is open in
    // the parent, hence in the child.
    unsafe {
        command.pre_exec(move || {
            let result = if number == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(number, 3) };
            if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    Program::start(&mut command)
}

#[test]
fn a_listening_descriptor_serves_one_front_end_after_the_other() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let elsewhere = tempfile::tempdir().expect("temporary directory");
    let path = elsewhere.path().join("front-end");
    let listener = OwnedFd::from(UnixListener::bind(&path).expect("binds"));
    let child = with_descriptor(directory.path(), &listener);
    drop(listener);
    let daemon = Daemon { child, directory };
    for _ in 0..3 {
        drop(FrontEnd::connect(&path, guest(), FrontEndOptions::default()).expect("served"));
    }
    wait_for(&daemon.control());
    RawWorker::attach(&daemon.control()).leave();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn a_connected_descriptor_is_served_and_then_it_ends() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let (ours, theirs) = UnixStream::pair().expect("pair");
    let theirs = OwnedFd::from(theirs);
    let child = with_descriptor(directory.path(), &theirs);
    drop(theirs);
    let daemon = Daemon { child, directory };
    drop(FrontEnd::over(ours, guest(), FrontEndOptions::default()).expect("served"));
    let (status, log) = daemon.end();
    assert!(status.success(), "{log}");
}

#[test]
fn a_descriptor_that_leads_nowhere_is_refused() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
    let output = with_descriptor(directory.path(), &socket).wait_with_output().expect("ends");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("--fd=3") && error.contains("neither listening nor connected"), "{error}");
}

#[test]
fn a_descriptor_that_nobody_passed_on_is_refused_as_such() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    // The first numbers that are free when it starts: what it opened by itself before would be there.
    for fd in 3..8 {
        let mut command = command(directory.path());
        command.arg(format!("--fd={fd}"));
        // SAFETY: between fork and exec only close_range is called, which is a plain system call here, and which does
        // not close what the standard library needs until then.
        unsafe {
            command.pre_exec(|| {
                match libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let output = command.output().expect("runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        assert!(error.contains(&format!("--fd={fd}:")) && error.contains("not open in this process"), "{error}");
    }
}

#[test]
fn the_daemon_takes_as_many_descriptors_as_it_may() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let limit = getrlimit(Resource::Nofile);
    let mut command = with_socket(directory.path());
    // SAFETY: between fork and exec only setrlimit is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(100), ..limit })?));
    }
    let daemon = Daemon { child: Program::start(&mut command), directory };
    wait_for(&daemon.control());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).expect("readable");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("a line");
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[3], words[4], "{line}");
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

/// A limit for the daemon's descriptors under which one more fits, going by those it has now.
fn room_for_one(daemon: &Daemon) -> u64 {
    let taken: Vec<u64> = std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id()))
        .expect("our child")
        .map(|entry| entry.expect("an entry").file_name().to_str().expect("digits").parse().expect("a number"))
        .collect();
    (0..).filter(|number| !taken.contains(number)).nth(1).expect("numbers have no end")
}

#[test]
fn a_worker_that_cannot_be_named_for_want_of_descriptors_is_reported() {
    let _watchdog = watchdog();
    let (near, _far) = UnixStream::pair().expect("a pair");
    if nix::sys::socket::getsockopt(&near, nix::sys::socket::sockopt::PeerPidfd).is_err() {
        not_tested("SO_PEERPIDFD takes Linux 6.5");
        return;
    }
    let mut daemon = Daemon::start();
    let (tell, told) = std::sync::mpsc::channel();
    let log = BufReader::new(daemon.child.stderr.take().expect("piped"));
    let reader = std::thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    let pid = Pid::from_child(&daemon.child);
    let limit = prlimit(Some(pid), Resource::Nofile, getrlimit(Resource::Nofile)).expect("our child");
    // What it had to close before may still be open: then this is not the limit that was meant. The watchdog ends it.
    loop {
        let short = Rlimit { current: Some(room_for_one(&daemon)), ..limit };
        prlimit(Some(pid), Resource::Nofile, short).expect("our child");
        let worker = connect(&daemon.control());
        let mut fds = [PollFd::new(&worker, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 200_000_000 })).expect("poll");
        prlimit(Some(pid), Resource::Nofile, limit).expect("our child");
        drop(worker);
        // Answered, if only after a pause: all before it is logged.
        RawWorker::attach(&daemon.control()).leave();
        let named = |line: &String| line.contains("WARN") && line.contains("does not name the process");
        if told.try_iter().any(|line| named(&line)) {
            break;
        }
    }
    daemon.signal(Signal::TERM);
    assert!(daemon.child.wait().expect("ended").success());
    drop(told);
    // An Err is what it has when nobody listens.
    let _ = reader.join().expect("no panic");
}

#[test]
fn front_ends_that_talk_nonsense_are_closed_and_the_next_is_served() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    for bytes in [&[0xff_u8; 64][..], b"hello?", &[1, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f]] {
        let mut stream = UnixStream::connect(daemon.front_end()).expect("connects");
        stream.write_all(bytes).expect("sends");
        stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
        // Until it is closed from the other side. Whatever is answered before is not looked at.
        let _ = stream.read_to_end(&mut Vec::new());
    }
    drop(FrontEnd::connect(&daemon.front_end(), guest(), FrontEndOptions::default()).expect("served"));
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn each_mistake_is_logged_in_one_line_and_a_flood_of_them_in_a_few() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let mut stream = UnixStream::connect(daemon.front_end()).expect("connects");
    // SET_VRING_NUM without a payload.
    let request = [8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    stream.write_all(&request.repeat(1000)).expect("sends");
    stream.shutdown(std::net::Shutdown::Write).expect("half-closed");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the daemon closes it");
    for _ in 0..100 {
        // It is not a HELLO.
        let worker = connect(&daemon.control());
        worker.send_blocking(&[0xff; 16], &[], TIMEOUT_MS).expect("sends");
        hear(&worker).expect("a refusal");
    }
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.end();
    assert!(status.success(), "{log}");
    let lines = |words: &str| log.lines().filter(|line| line.contains(words)).count();
    assert!((1..=20).contains(&lines("expected 8 to 8")), "{log}");
    assert!((1..=20).contains(&lines("cannot be decoded")), "{log}");
    assert_eq!(lines("closed by the front-end"), 1, "{log}");
}

#[test]
fn a_second_front_end_waits_for_the_first() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let first = FrontEnd::connect(&daemon.front_end(), guest(), FrontEndOptions::default()).expect("served");
    let path = daemon.front_end();
    let second = std::thread::spawn(move || FrontEnd::connect(&path, guest(), FrontEndOptions::default()));
    drop(first);
    drop(second.join().expect("no panic").expect("served in its turn"));
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn nothing_leaks_over_many_connections() {
    let _watchdog = watchdog();
    // All these connections fill the log, which goes to a pipe that is read at the end only: that must not hang it
    // either.
    let daemon = Daemon::start_with("--log-level=debug");
    let round = || {
        RawWorker::attach(&daemon.control()).leave();
        drop(server_support::connect(&daemon.control()));
        drop(FrontEnd::connect(&daemon.front_end(), guest(), FrontEndOptions::default()).expect("served"));
        drop(UnixStream::connect(daemon.front_end()).expect("connects"));
    };
    for _ in 0..5 {
        round();
    }
    // The last ones may still be on their way out: a front-end that is served, and a worker let in, come after them.
    let settled = || {
        let mut fewest = usize::MAX;
        for _ in 0..20 {
            drop(FrontEnd::connect(&daemon.front_end(), guest(), FrontEndOptions::default()).expect("served"));
            RawWorker::attach(&daemon.control()).leave();
            fewest = fewest.min(daemon.descriptors());
        }
        fewest
    };
    let before = settled();
    for _ in 0..200 {
        round();
    }
    let after = settled();
    assert!(after <= before, "{before} descriptors before, {after} after");
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

/// Not a test: the worker process that is killed in the next one.
#[test]
fn child_that_attaches_and_hangs() {
    let Some(control) = std::env::var_os(CHILD_CONTROL) else { return };
    let worker = RawWorker::attach(Path::new(&control));
    claim_when_free(&worker);
    worker.pin();
    println!("attached");
    std::io::stdout().flush().expect("flushes");
    // Until the parent kills this process, or is gone.
    let _ = std::io::stdin().read(&mut [0; 1]);
}

/// Leases queue 0, as soon as its owner is gone.
fn claim_when_free(worker: &RawWorker) {
    for claim in 1.. {
        say(&worker.socket, &WorkerMessage::ClaimQueues { claim, queues: vec![0] });
        match hear(&worker.socket).expect("an answer").0 {
            DaemonMessage::Lease(_) => return,
            DaemonMessage::LeaseRefused { .. } => std::thread::yield_now(),
            other => panic!("unexpected: {other:?}"),
        }
    }
}

#[test]
fn nothing_leaks_when_workers_are_killed() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let witness = RawWorker::attach(&daemon.control());
    // A worker that left is forgotten a moment later, and its descriptors are closed after that: the lowest of some
    // counts is the true one. Where a segment is left for good, the watchdog ends this.
    let settled = || {
        let counts = (0..20).map(|_| {
            RawWorker::attach(&daemon.control()).leave();
            while daemon.segments() != 1 {
                std::thread::yield_now();
            }
            daemon.descriptors()
        });
        counts.min().expect("some")
    };
    let before = settled();
    for _ in 0..50 {
        let mut child = Program::start(
            Command::new(std::env::current_exe().expect("own path"))
                .args(["--exact", "child_that_attaches_and_hangs", "--nocapture"])
                .env(CHILD_CONTROL, daemon.control())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        );
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.expect("readable").contains("attached")), "the child ended too early");
        child.kill().expect("killed");
        child.wait().expect("ended");
    }
    // Each of them had queue 0, so all are gone when it is free.
    claim_when_free(&witness);
    let after = settled();
    assert!(after <= before, "{before} descriptors before, {after} after");
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn an_idle_daemon_sleeps() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let worker = RawWorker::attach(&daemon.control());
    let _front_end = started_front_end(&daemon.front_end());
    let regions = worker.hear_memory_map();
    assert!(regions > 0, "the worker has the guest's memory");
    // A daemon that is woken up shows it in the count; otherwise the count would show nothing. One that is still busy
    // from before may serve a worker without having slept.
    let before = daemon.activity();
    while daemon.activity().1 == before.1 {
        RawWorker::attach(&daemon.control()).leave();
    }
    // What one wall-clock second costs is the thing measured here, hence the sleep. The end of the work before and its
    // timers may fall into the first ones; what wakes an idle daemon again and again falls into all of them. Meanwhile
    // the worker reads, which is none of the daemon's business.
    let mut seconds = Vec::new();
    while seconds.len() < IDLE_SECONDS_MAX {
        let (ticks, sleeps) = daemon.activity();
        for _ in 0..200 {
            worker.pin();
            assert!(worker.table.lookup(u64::MAX).is_none());
            worker.unpin();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let now = daemon.activity();
        // The sleeps of a thread that ended are gone from the sum.
        let used = (now.0 - ticks, now.1.abs_diff(sleeps));
        seconds.push(used);
        if used == (0, 0) {
            break;
        }
    }
    assert!(seconds.contains(&(0, 0)), "clock ticks and wake-ups in each second of nothing to do: {seconds:?}");
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn a_processor_that_is_not_there_is_named_with_those_that_are() {
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().expect("temporary directory");
    let error = fails(with_socket(directory.path()).arg("--cpu=1000"));
    assert!(error.contains("--cpu=1000") && error.contains("no such processor") && error.contains("it may use "));
    let left: Vec<_> = std::fs::read_dir(directory.path()).expect("readable").collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

#[test]
fn the_loop_stays_on_its_processor() {
    let _watchdog = watchdog();
    let own = std::fs::read_to_string("/proc/thread-self/status").expect("readable");
    let first = allowed(&own).split(['-', ',']).next().expect("one").to_owned();
    let daemon = Daemon::start_with(&format!("--cpu={first}"));
    // The loop's thread is the first of the process.
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).expect("readable");
    assert_eq!(allowed(&status), first);
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

/// Processors of a task, from its status file.
fn allowed(status: &str) -> &str {
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).expect("there").trim()
}

#[test]
fn with_busy_polling_it_serves_without_ever_asking_for_a_doorbell() {
    let _watchdog = watchdog();
    let daemon = Daemon::start_with("--busy-poll");
    let worker = RawWorker::attach(&daemon.control());
    let front_end = started_front_end(&daemon.front_end());
    assert!(worker.hear_memory_map() > 0);
    let wanted = || worker.table.header().wake.doorbell_wanted.load(Ordering::Relaxed);
    for ticket in 0..200 {
        // The answer comes although nobody rings.
        let range = IovaRange::page_of(0x2_0000 + 2 * PAGE_SIZE);
        worker.segment.cells[0].post(ticket, range, Access::READ);
        worker.segment.mark_posted(0);
        assert_eq!(wanted(), 0, "the daemon sleeps");
        let answer = loop {
            match worker.segment.cells[0].answer(ticket) {
                Some(answer) => break answer,
                None => std::thread::yield_now(),
            }
        };
        assert_eq!(answer, Answer::Resolved, "the used ring's page came with the start");
    }
    // Leaving, too, works without a sleep to wake up from.
    drop(front_end);
    worker.leave();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}

#[test]
fn a_doorbell_cannot_hang_the_daemon() {
    let _watchdog = watchdog();
    let daemon = Daemon::start();
    let worker = RawWorker::attach(&daemon.control());
    assert!(rustix::io::write(worker.doorbell.as_fd(), &1_u64.to_ne_bytes()).is_ok(), "it may ring");
    // However often it rings, or however full it makes the counter, the daemon goes on.
    let _ = rustix::io::write(worker.doorbell.as_fd(), &(u64::MAX - 2).to_ne_bytes());
    let flags = rustix::fs::fcntl_getfl(&worker.doorbell).expect("flags");
    rustix::fs::fcntl_setfl(&worker.doorbell, flags - rustix::fs::OFlags::NONBLOCK).expect("set");
    RawWorker::attach(&daemon.control()).leave();
    worker.leave();
    daemon.signal(Signal::TERM);
    assert!(daemon.end().0.success());
}
