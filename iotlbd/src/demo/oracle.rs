//! The stale-read oracle: what a page holds while it is mapped, and what a worker may see of it.
//!
//! The front-end fills a page with the stamp of its IOVA and mapping *before* the mapping can be found, and overwrites
//! it with poison only *after* the invalidation was acknowledged. So within one pin, every word read through one
//! translation of an IOVA is one and the same stamp of that IOVA. Anything else (poison, the stamp of another IOVA, or
//! of another mapping of this one) means that the page changed hands under a pin.
//!
//! The workers learn which IOVAs to read from the *directory*, a guest page that is mapped as long as the demo runs.

use iotlb_client::Segment;
use iotlb_proto::sync::{AtomicU64, Ordering};

/// IOVA of the directory. It is far from those that are mapped and unmapped.
pub const DIRECTORY_IOVA: u64 = 0x4000_0000;
/// Directory words that name mapped IOVAs; 0 = none just now.
pub const SLOTS: u64 = 256;
/// Directory words behind the slots that name IOVAs unmapped lately. Until the acknowledgement the device may still use
/// them: nobody is closer to a stale read.
pub const GHOSTS: u64 = 64;

/// What a page holds that the guest took back.
pub const POISON: u64 = 0xdead_dead_dead_dead;

const GENERATION_BITS: u32 = 24;

/// Makes stamps and tells them apart.
#[derive(Clone, Copy, Debug)]
pub struct Stamps {
    key: u64,
}

/// What a word says about the page it was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The page belongs to the IOVA, by its mapping of this generation.
    Mapped(u64),
    /// The guest has taken the page back.
    Poison,
    /// The page belongs to somebody else.
    Foreign,
}

impl Stamps {
    /// Stamps of one run; front-end and workers use the same key.
    #[must_use]
    pub fn new(key: u64) -> Stamps {
        Stamps { key }
    }

    /// What the page of mapping `generation` at `iova` is filled with.
    #[must_use]
    pub fn stamp(&self, iova: u64, generation: u64) -> u64 {
        self.tag(iova) << GENERATION_BITS | generation & ((1 << GENERATION_BITS) - 1)
    }

    /// Judges a word read through `iova`.
    #[must_use]
    pub fn judge(&self, iova: u64, word: u64) -> Verdict {
        if word == POISON {
            Verdict::Poison
        } else if word >> GENERATION_BITS == self.tag(iova) {
            Verdict::Mapped(word & ((1 << GENERATION_BITS) - 1))
        } else {
            Verdict::Foreign
        }
    }

    /// Forty bits that differ from IOVA to IOVA.
    fn tag(&self, iova: u64) -> u64 {
        mix(self.key ^ iova) >> GENERATION_BITS
    }
}

/// Small random numbers, the same for the same seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.word() % bound
    }
}

/// The finaliser of splitmix64: every input bit reaches every output bit.
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// One word of a translated piece of guest memory; `None` when the word is not wholly inside or not aligned. Acquire:
/// partner of the front-end's store of a directory word.
#[must_use]
pub fn load_word(segment: &Segment<'_>, offset: usize) -> Option<u64> {
    if offset.checked_add(size_of::<u64>())? > segment.len() {
        return None;
    }
    let pointer = segment.as_ptr().wrapping_add(offset).cast::<u64>();
    if !pointer.is_aligned() {
        return None;
    }
    // SAFETY: the word lies within the segment, which the guard it borrows keeps mapped, and is aligned. Every process
    // of the demo stores such words atomically.
    Some(unsafe { AtomicU64::from_ptr(pointer) }.load(Ordering::Acquire))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::IovaSpace;

    #[test]
    fn a_stamp_names_its_iova_and_mapping_and_nothing_else() {
        let stamps = Stamps::new(0x1234_5678);
        let mut space = IovaSpace::new(1024);
        let iovas: Vec<u64> = (0..1024).map(|_| space.allocate().expect("1024 of them")).collect();
        for &iova in &iovas {
            let word = stamps.stamp(iova, 77);
            assert_eq!(stamps.judge(iova, word), Verdict::Mapped(77));
            assert_eq!(stamps.judge(iova, POISON), Verdict::Poison);
            assert_eq!(stamps.judge(iova, 0), Verdict::Foreign);
            assert_ne!(word, POISON);
            let others = iovas.iter().filter(|&&other| other != iova);
            assert!(others.clone().all(|&other| stamps.judge(other, word) == Verdict::Foreign));
        }
        assert_ne!(stamps.judge(iovas[0], Stamps::new(9).stamp(iovas[0], 77)), Verdict::Mapped(77));
    }

    #[test]
    fn one_seed_one_sequence() {
        let (mut a, mut b) = (Random::new(5), Random::new(5));
        assert!((0..100).all(|_| a.word() == b.word()));
        assert!((0..100).all(|_| a.below(7) < 7));
    }
}
