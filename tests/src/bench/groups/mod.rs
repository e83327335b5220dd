//! What is measured, in groups that can be run alone.
//!
//! | group | rows |
//! | --- | --- |
//! | [`hit`] | random hits, a chain of hits, pin and unpin, against peers; the curve over table sizes |
//! | [`burst`] | many lookups in one call against one by one, in large tables |
//! | [`neighbour`] | the same lookups while another process does them too |
//! | [`edit`] | the writer: insert, remove, a million at once, nothing at all |
//! | [`footprint`] | bytes an entry, a worker, an idle device |
//! | [`growth`] | curves over readers, devices and queues |

pub mod burst;
pub mod edit;
pub mod footprint;
pub mod growth;
pub mod hit;
pub mod neighbour;

use super::measure::Shuffle;
use super::peers::{PAGE, Page};
use super::report::{Curve, Row};

/// What a group returns. A benchmark has one reader, who wants the text.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A run under way: what was found so far.
#[derive(Debug, Default)]
pub struct Run {
    /// Comparisons.
    pub rows: Vec<Row>,
    /// Growth curves.
    pub curves: Vec<Curve>,
    /// Few rounds and small sizes: only to see that everything still runs.
    pub quick: bool,
}

impl Run {
    /// Rounds of every contestant.
    #[must_use]
    pub fn rounds(&self) -> usize {
        if self.quick { 3 } else { 21 }
    }

    /// Rounds of every contestant of one point of a curve.
    #[must_use]
    pub fn point_rounds(&self) -> usize {
        if self.quick { 3 } else { 9 }
    }
}

/// A group: its name, and what measures it.
pub type Group = (&'static str, fn(&mut Run) -> Outcome);

/// All groups of this crate, in the order of the table.
pub const ALL: &[Group] = &[
    ("hit", hit::run),
    ("burst", burst::run),
    ("neighbour", neighbour::run),
    ("edit", edit::run),
    ("footprint", footprint::run),
    ("growth", growth::run),
    ("daemon", |run| super::daemon::rows(&mut run.rows)),
];

/// Addresses visited in turn, at least, where there are fewer pages: short enough to stay in the second-level cache.
const VISITS_MIN: usize = 1 << 14;
/// Bytes asked for with each lookup.
pub const ACCESS_LEN: u64 = 64;
/// Lookups under one pin, as a datapath does them.
pub const BURST: u64 = 32;

/// Addresses to visit: random pages, random places inside. As many as there are pages, so that a large table is not
/// measured by a part of it that fits a cache; a power of two.
#[must_use]
pub fn visits(pages: &[Page]) -> Vec<u64> {
    let mut shuffle = Shuffle::new(42);
    (0..pages.len().next_power_of_two().max(VISITS_MIN))
        .filter_map(|_| pages.get(usize::try_from(shuffle.below(pages.len() as u64)).ok()?))
        .map(|page| page.iova + shuffle_offset(page.iova))
        .collect()
}

/// A place in a page where an access still fits; the same for the same page.
fn shuffle_offset(iova: u64) -> u64 {
    Shuffle::new(iova | 1).below(PAGE - ACCESS_LEN)
}
