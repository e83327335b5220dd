//! `iotlbd demo`: the daemon, a simulated guest behind a vIOMMU, and worker processes that watch for stale reads.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`session`] | a run from start to summary |
//! | [`oracle`] | stamps, poison, the directory: how a stale read shows |
//! | [`load`] | the guest: maps, unmaps, reuses, strictly and lazily |
//! | [`worker`] | `demo-worker`, a hidden subcommand: a worker process |
//! | [`tally`] | counters of all of them over time |
//! | [`children`] | child processes that never outlive the demo |
//! | [`view`], [`screen`] | the live view |
//! | [`report`] | what workers report, and the summary |
//! | [`pinger`] | `demo-front-end`, a hidden subcommand: pings echo workers through a running daemon |

pub mod children;
pub mod load;
pub mod oracle;
pub mod pinger;
pub mod report;
pub mod screen;
pub mod session;
pub mod tally;
pub mod view;
pub mod worker;

use std::io::{self, Write};
use std::process::ExitCode;

use load::PlantedFault;

/// Exit status when a stale read was seen.
pub const EXIT_STALE: u8 = 1;
/// Exit status when the demo could not run.
pub const EXIT_FAILED: u8 = 2;

/// Flags of `iotlbd demo`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How long to run, 1 to 86,400
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Worker processes, 2 to 32
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(2..=32))]
    pub workers: u16,
    /// Print one JSON object on standard output at the end, and nothing else there
    #[arg(long)]
    pub json: bool,
    /// Start of the random numbers; another one each time when left out
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Make a mistake on purpose, to see the oracle notice
    #[arg(long, value_enum, hide = true)]
    pub plant_fault: Option<PlantedFault>,
}

/// Runs the demo: exit status 0, or [`EXIT_STALE`], or [`EXIT_FAILED`].
#[must_use]
pub fn run(options: Options) -> ExitCode {
    let summary = match session::run(&options) {
        Ok(summary) => summary,
        Err(error) => {
            let _ = writeln!(io::stderr(), "iotlbd demo: {error}");
            return ExitCode::from(EXIT_FAILED);
        }
    };
    let text = if options.json {
        serde_json::to_string(&summary).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"))
    } else {
        summary.to_string()
    };
    if let Err(error) = writeln!(io::stdout(), "{text}") {
        let _ = writeln!(io::stderr(), "iotlbd demo: cannot print the summary: {error}");
        return ExitCode::from(EXIT_FAILED);
    }
    if summary.stale_reads == 0 { ExitCode::SUCCESS } else { ExitCode::from(EXIT_STALE) }
}
