//! What cannot be tested on a machine is said in every run. The tests of other crates take this file by its path.
#![allow(unreachable_pub)] // there it is a private module

use std::io::Write;

/// Says that the running test leaves out something, and why. `tests/run` counts these lines, and repeats them at its
/// end.
///
/// Not by a print macro: what those write the harness shows only of a test that fails.
pub fn not_tested(why: &str) {
    // The harness names a test's thread after the test.
    let thread = std::thread::current();
    let line = format!("NOT TESTED: {}: {why}\n", thread.name().unwrap_or("?"));
    // In one piece, because tests run beside each other. An Err: nobody is there to be told.
    let _ = std::io::stderr().write_all(line.as_bytes());
}
