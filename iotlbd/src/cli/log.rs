//! What the daemon logs, and where to: a queue that a thread writes to standard error.

use std::io::{self, IsTerminal};

use iotlb_client::net::log::Log;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::log_limit::LogLimit;
use crate::server::now_ns;

/// Sets the log up. `filter` is one the parser took.
pub(super) fn start(filter: &str) -> Log {
    let log = Log::start("iotlbd-log");
    // The filter was checked by the parser; should it not parse here, `info` is the better log than none.
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(log.clone()).with_ansi(io::stderr().is_terminal());
    let lines = lines.with_filter(LogLimit::new(log.clone(), now_ns));
    // An Err means that a log is set up already, which serves as well.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    log
}
