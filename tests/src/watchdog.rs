//! An end for tests that hang. The tests of other crates take this file by its path.
#![allow(dead_code, unreachable_pub)] // there it is a private module

use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Many times what any test takes, a whole one and on a slow machine: only a hang gets here. It is short enough for
/// `tests/run`, which gives a section 20 minutes, to say which test it was.
const LIMIT: Duration = Duration::from_secs(600);

/// Ends the whole test program when a test takes too long: a hang must not hang its caller.
#[derive(Debug)]
pub struct Watchdog(Sender<()>);

impl Watchdog {
    pub fn new() -> Watchdog {
        let (alive, ended) = channel();
        // The harness names a test's thread after the test.
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // Not by a print macro: what those write waits for the end of the test.
                let _ = std::io::stderr().write_all(format!("the watchdog bites: {test} hangs\n").as_bytes());
                std::process::abort();
            }
        });
        Watchdog(alive)
    }
}
