//! Reference worker: serves virtio-net queues of a guest through iotlbd. See [`iotlb_client::net`].

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use iotlb_client::net::log::Log;
use iotlb_client::net::options::Options;
use iotlb_client::net::worker::{Signals, run};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let options = Options::parse();
    // Before any thread exists: the log's would get the signals otherwise.
    let signals = Signals::block();
    let log = Log::start("iotlb-net-log");
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(log.clone()).init();
    let status = match signals.and_then(|signals| run(&options, &signals)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    };
    log.flush();
    status
}
