//! The demo as a user runs it: real processes, real sockets, a real daemon.

#[path = "../../tests/src/program.rs"]
mod program;

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use program::end_with_test;
use rustix::process::Signal;
use serde_json::Value;

/// Longest any run may take. The runs are of a few seconds; only a hang gets here.
const WATCHDOG: Duration = Duration::from_secs(120);

/// Runs the program to its end and hands out what it printed.
fn iotlbd(arguments: &[&str]) -> Output {
    collect(start(arguments))
}

fn start(arguments: &[&str]) -> Child {
    command(arguments).spawn().expect("cargo has built the program")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_iotlbd"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    end_with_test(&mut command);
    command
}

fn collect(mut child: Child) -> Output {
    let read = |mut stream: Box<dyn Read + Send>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("a pipe");
            bytes
        })
    };
    let stdout = read(Box::new(child.stdout.take().expect("piped")));
    let stderr = read(Box::new(child.stderr.take().expect("piped")));
    let status = wait(&mut child);
    Output { status, stdout: stdout.join().expect("no panic"), stderr: stderr.join().expect("no panic") }
}

fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + WATCHDOG;
    loop {
        if let Some(status) = child.try_wait().expect("a child of ours") {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().expect("a child of ours");
            panic!("the program hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The one JSON object that is all of standard output.
fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", text(&output.stdout), text(&output.stderr)))
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} is no number in {value}"))
}

#[test]
fn a_run_sees_no_stale_read_and_says_so_in_json() {
    let output = iotlbd(&["demo", "--seconds", "3", "--workers", "3", "--json", "--seed", "7"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let summary = json(&output);
    assert!(summary["seconds"].as_f64().is_some_and(|seconds| seconds >= 3.0), "{summary}");
    assert_eq!(number(&summary, "/workers"), 3);
    assert_eq!(number(&summary, "/seed"), 7);
    assert_eq!(number(&summary, "/stale_reads"), 0);
    for field in ["/hits", "/misses", "/updates", "/invalidations", "/flushes", "/reboots"] {
        assert!(number(&summary, field) > 0, "{field} in {summary}");
    }
    assert_eq!(number(&summary, "/lookups"), number(&summary, "/hits") + number(&summary, "/misses"));
    for latency in ["/miss_latency_ns", "/drain_latency_ns"] {
        let (p50, p99) = (number(&summary, &format!("{latency}/p50")), number(&summary, &format!("{latency}/p99")));
        assert!(0 < p50 && p50 <= p99, "{latency} in {summary}");
    }
    assert!(text(&output.stderr).contains("lookups/s"), "a line a second: {}", text(&output.stderr));
}

#[test]
fn a_page_reused_before_its_acknowledgement_is_noticed() {
    let output = iotlbd(&["demo", "--seconds", "3", "--json", "--plant-fault", "early-reuse"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(number(&json(&output), "/stale_reads") > 0);
}

#[test]
fn the_summary_is_readable_without_json() {
    let output = iotlbd(&["demo", "--seconds", "1"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let summary = text(&output.stdout);
    assert!(summary.contains("stale reads") && summary.contains("no worker saw a page"), "{summary}");
}

#[test]
fn one_worker_is_not_enough() {
    let output = iotlbd(&["demo", "--workers", "1"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("--workers"), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());
}

/// Child processes of `pid`, with the first part of their command lines.
fn children_of(pid: u32) -> Vec<(u32, String)> {
    let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let name = |child: u32| {
        let line = std::fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        text(&line).replace('\0', " ")
    };
    list.split_whitespace().filter_map(|child| child.parse().ok()).map(|child| (child, name(child))).collect()
}

/// A long demo in which the daemon and two workers run; killed when a test fails.
struct LongDemo {
    child: Option<Child>,
    /// Where its sockets are: a demo that is killed cannot take them away.
    _directory: tempfile::TempDir,
    children: Vec<(u32, String)>,
}

impl LongDemo {
    fn start() -> LongDemo {
        LongDemo::of(command(&["demo", "--seconds", "600", "--json"]))
    }

    /// A demo that finds `signal` to do this when it starts: whoever runs the tests may have it ignored.
    fn start_with(seconds: &str, signal: Signal, disposition: libc::sighandler_t) -> LongDemo {
        let mut command = command(&["demo", "--seconds", seconds, "--json"]);
        // SAFETY: between fork and exec only signal is called, which is async-signal-safe, with one of the dispositions
        // that are no function.
        unsafe {
            command.pre_exec(move || match libc::signal(signal.as_raw(), disposition) {
                libc::SIG_ERR => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        LongDemo::of(command)
    }

    fn of(mut command: Command) -> LongDemo {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let child = command.env("TMPDIR", directory.path()).spawn().expect("cargo has built the program");
        let mut demo = LongDemo { child: Some(child), _directory: directory, children: Vec::new() };
        let deadline = Instant::now() + WATCHDOG;
        while demo.children.iter().filter(|(_, line)| line.contains("demo-worker")).count() < 2 {
            assert!(Instant::now() < deadline, "no workers: {:?}", demo.children);
            std::thread::sleep(Duration::from_millis(10));
            demo.children = children_of(demo.id());
        }
        demo
    }

    fn id(&self) -> u32 {
        self.child.as_ref().expect("not collected yet").id()
    }

    /// Waits for the end of the demo, and then for that of its children.
    fn collect(&mut self) -> Output {
        let output = collect(self.child.take().expect("not collected yet"));
        self.children.iter().for_each(|(pid, _)| wait_gone(*pid));
        output
    }
}

impl Drop for LongDemo {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("a child of ours");
            child.wait().expect("a child of ours");
        }
    }
}

fn wait_gone(pid: u32) {
    let deadline = Instant::now() + WATCHDOG;
    // A zombie has no command line; the init of a container may never collect it.
    while std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        assert!(Instant::now() < deadline, "process {pid} outlived the demo");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process number");
    rustix::process::kill_process(pid, signal).expect("a process of ours");
}

#[test]
fn a_dead_worker_or_daemon_ends_the_demo_with_a_clear_error() {
    for (victim, how, name) in [
        ("demo-worker", Signal::KILL, "worker-"),
        // The demo has this one blocked, for itself.
        ("demo-worker", Signal::TERM, "worker-"),
        ("--control-socket", Signal::KILL, "the daemon"),
    ] {
        let mut demo = LongDemo::start();
        // The daemon is the child that is no worker.
        let (pid, _) = demo
            .children
            .iter()
            .find(
                |(_, line)| if victim == "demo-worker" { line.contains(victim) } else { !line.contains("demo-worker") },
            )
            .expect("three children");
        signal(*pid, how);
        let output = demo.collect();
        assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
        let message = text(&output.stderr);
        assert!(message.contains("ended unexpectedly") && message.contains(name), "{message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_signal_ends_the_demo_early_and_well() {
    for which in [Signal::INT, Signal::HUP, Signal::QUIT] {
        let mut demo = LongDemo::start_with("600", which, libc::SIG_DFL);
        signal(demo.id(), which);
        let output = demo.collect();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert_eq!(number(&json(&output), "/stale_reads"), 0);
    }
}

#[test]
fn a_signal_that_is_ignored_does_not_end_the_demo() {
    let mut demo = LongDemo::start_with("3", Signal::HUP, libc::SIG_IGN);
    signal(demo.id(), Signal::HUP);
    let output = demo.collect();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let summary = json(&output);
    assert!(summary["seconds"].as_f64().is_some_and(|seconds| seconds >= 3.0), "{summary}");
}

#[test]
fn nobody_outlives_a_killed_demo() {
    let mut demo = LongDemo::start();
    signal(demo.id(), Signal::KILL);
    assert_eq!(demo.collect().status.code(), None);
}

#[test]
fn the_pinger_fails_clearly_without_a_daemon() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("nobody.sock");
    let arguments = ["demo-front-end", "--timeout-ms=50", "--socket-path", path_text(&path)];
    let output = iotlbd(&arguments);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("nobody.sock"), "{}", text(&output.stderr));
    // A peer that says nothing runs into the watchdog.
    let silent = directory.path().join("silent.sock");
    let _listener = UnixListener::bind(&silent).expect("a fresh path");
    let output = iotlbd(&["demo-front-end", "--timeout-ms=50", "--socket-path", path_text(&silent)]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("GET_FEATURES"), "{}", text(&output.stderr));
}

fn path_text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}
