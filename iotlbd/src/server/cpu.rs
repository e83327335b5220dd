//! Which processor the loop runs on.

use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Why a thread cannot be bound to a processor.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// There is no such processor, or this process may not use it.
    #[error("--cpu={cpu}: there is no such processor, or this process may not use it; it may use {allowed}")]
    NotAllowed {
        /// Asked for.
        cpu: usize,
        /// What there is, as in `0-3,6`.
        allowed: String,
    },
    /// The operating system said something else.
    #[error("--cpu={cpu}: cannot bind the loop to it: {source}")]
    Refused {
        /// Asked for.
        cpu: usize,
        /// Why not.
        source: Errno,
    },
}

/// Processors that this process may keep busy: its affinity and its share, as a container's limits give it.
pub(super) fn available() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Binds the calling thread to a processor.
pub(super) fn bind_thread(cpu: usize) -> Result<(), CpuError> {
    let not_allowed = || CpuError::NotAllowed { cpu, allowed: allowed() };
    if cpu >= CpuSet::MAX_CPU {
        return Err(not_allowed());
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    match sched_setaffinity(None, &set) {
        Ok(()) => Ok(()),
        // None of the set is there and allowed.
        Err(Errno::INVAL) => Err(not_allowed()),
        Err(source) => Err(CpuError::Refused { cpu, source }),
    }
}

/// The processors of the calling thread, as in `0-3,6`.
fn allowed() -> String {
    match sched_getaffinity(None) {
        Ok(set) => ranges((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu))),
        Err(_) => String::from("those of `taskset -p`"),
    }
}

fn ranges(numbers: impl Iterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let texts: Vec<String> = ranges
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    texts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_bound_to_a_processor_it_has_and_to_no_other() {
        std::thread::spawn(|| {
            let set = sched_getaffinity(None).expect("the kernel knows");
            let first = (0..CpuSet::MAX_CPU).find(|cpu| set.is_set(*cpu)).expect("it runs somewhere");
            assert_eq!(bind_thread(first), Ok(()));
            let now = sched_getaffinity(None).expect("the kernel knows");
            assert_eq!((now.count(), now.is_set(first)), (1, true));
            for absent in [CpuSet::MAX_CPU - 1, CpuSet::MAX_CPU, usize::MAX] {
                let error = bind_thread(absent).expect_err("no machine has it").to_string();
                assert!(error.contains("--cpu") && error.ends_with(&first.to_string()), "{error}");
            }
        })
        .join()
        .expect("no panic");
    }

    #[test]
    fn processors_are_listed_as_ranges() {
        assert_eq!(ranges([0, 1, 2, 5, 7, 8].into_iter()), "0-2,5,7-8");
        assert_eq!(ranges(std::iter::empty()), "");
    }
}
