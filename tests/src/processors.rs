//! Which thread runs on which processor.

use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The first two processors that the calling thread may use; none if there is only one.
#[must_use]
pub fn first_two() -> Option<(usize, usize)> {
    let set = current();
    let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu));
    Some((allowed.next()?, allowed.next()?))
}

/// Where the calling thread may run.
#[must_use]
pub fn current() -> CpuSet {
    sched_getaffinity(None).unwrap_or_default()
}

/// Lets the calling thread run there again.
pub fn restore(set: &CpuSet) {
    // An Err costs steadiness, nothing else; here and below.
    let _ = sched_setaffinity(None, set);
}

/// Binds the calling thread.
pub fn bind(cpu: Option<usize>) {
    if let Some(cpu) = cpu {
        restore(&single(cpu));
    }
}

/// Binds a thread of any process.
///
/// # Errors
/// The system's: there is no such thread, or it is another user's.
pub fn bind_thread(thread: Pid, cpu: usize) -> io::Result<()> {
    Ok(sched_setaffinity(Some(thread), &single(cpu))?)
}

fn single(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}
