//! The demo with a daemon that acknowledges before its readers are done (feature `planted-faults`): the oracle, which
//! knows nothing of the daemon's insides, must notice. Where it does not, a clean run of the demo says nothing.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest the run may take. It is of a few seconds; only a hang gets here.
const WATCHDOG: Duration = Duration::from_secs(120);

#[test]
fn a_daemon_that_does_not_wait_is_noticed() {
    // What it prints is one line: it fits a pipe that nobody reads until the end.
    let mut child = Command::new(env!("CARGO_BIN_EXE_iotlbd"))
        .args(["demo", "--seconds", "3", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("cargo has built the program");
    let deadline = Instant::now() + WATCHDOG;
    while child.try_wait().expect("a child of ours").is_none() {
        if Instant::now() > deadline {
            child.kill().expect("a child of ours");
            panic!("the demo hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().expect("readable");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let summary: serde_json::Value = serde_json::from_str(&text).expect("one JSON object");
    assert!(summary["stale_reads"].as_u64().is_some_and(|reads| reads > 0), "{summary}");
}
