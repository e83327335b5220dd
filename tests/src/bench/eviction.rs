//! Caches with nothing in them that is of use.

use std::hint::black_box;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes walked where the system does not say how large the last cache is; and at least.
const WALK_MIN: usize = 64 << 20;
/// At most: a walk of a second would be no better.
const WALK_MAX: usize = 1 << 30;

/// Twice as much memory as fits the last cache.
#[derive(Debug)]
pub struct Eviction(Vec<u64>);

impl Eviction {
    /// Takes the memory.
    #[must_use]
    pub fn prepare() -> Eviction {
        let bytes = (2 * last_cache().unwrap_or(0)).clamp(WALK_MIN, WALK_MAX);
        // Not zero: pages that nobody has written are all the same one.
        Eviction(vec![1; bytes / size_of::<u64>()])
    }

    /// Walks all of it, which leaves nothing else in the caches of this processor.
    pub fn walk(&self) {
        let sum = self.0.iter().step_by(LINE / size_of::<u64>()).fold(0_u64, |sum, word| sum.wrapping_add(*word));
        black_box(sum);
    }
}

/// Bytes of the largest cache of the first processor.
fn last_cache() -> Option<usize> {
    let folders = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    folders
        .filter_map(|folder| {
            let text = std::fs::read_to_string(folder.ok()?.path().join("size")).ok()?;
            Some(text.trim().strip_suffix('K')?.parse::<usize>().ok()? * 1024)
        })
        .max()
}
