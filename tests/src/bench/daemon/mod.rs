//! What the daemon answers, and how fast: acknowledgements, misses, grace periods.
//!
//! | module | rows |
//! | --- | --- |
//! | [`ack`] | UPDATE and INVALIDATE against a bare echo |
//! | [`busy`] | a miss with a daemon that never sleeps, against a round trip |
//! | [`miss`] | a miss from worker to worker against the sum of its hops; 32 cold pages |
//! | [`front_end`] | a front-end that answers misses at once |
//! | [`echo`] | the bare echo |
//! | [`rhythm`] | how often peers that poll let others run |
//! | [`hops`] | the bare chains that a miss is measured against |
//! | [`drain`] | taking a page away while another process reads |
//! | [`scan`] | looking at readers, idle and at work |
//! | [`by_hand`] | a daemon made of its parts, whose table the benchmark writes |
//! | [`service`] | a daemon whose front-end is a pair of raw sockets |
//! | [`place`] | which thread runs where |

pub mod ack;
pub mod busy;
pub mod by_hand;
pub mod drain;
pub mod echo;
pub mod front_end;
pub mod hops;
pub mod miss;
pub mod place;
pub mod rhythm;
pub mod scan;
pub mod service;

use super::report::Row;
use crate::processors;

/// What can go wrong is of interest only as text: the run ends.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Adds all rows.
///
/// # Errors
/// Something does not start, or a daemon answers what it should not.
pub fn rows(rows: &mut Vec<Row>) -> Outcome {
    let place = place::Place::find();
    let former = processors::current();
    let result = ack::rows(rows, &place, &former)
        .and_then(|()| miss::rows(rows, &place, &former))
        .and_then(|()| busy::rows(rows, &place, &former))
        .and_then(|()| drain::rows(rows, &place))
        .and_then(|()| scan::rows(rows, &place));
    // What is measured after this runs where it likes.
    processors::restore(&former);
    result
}

/// The middle one, in nanoseconds.
pub(crate) fn median_ns(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// How long `work` took, in nanoseconds.
pub(crate) fn time_ns<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let start = std::time::Instant::now();
    let result = work();
    (start.elapsed().as_secs_f64() * 1e9, result)
}
