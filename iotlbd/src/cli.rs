//! Command line.
//!
//! `iotlbd --socket-path=PATH --control-socket=PATH` serves one device; `iotlbd demo` shows it at work.
//! Flag names are those QEMU's conventions for vhost-user back-end programs ask for where there are such.

mod log;
mod log_limit;
pub mod parse;

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{error, warn};

use crate::demo;
use crate::server::config::{MAX_WORKERS_LIMIT, QUEUE_PAIRS_MAX};
use crate::server::{DeviceKind, FrontEndSocket, FrontEndSource, ServerConfig, StallPolicy, signals};

/// The device IOTLB of a vhost-user device as a service: translations in shared memory for any number of workers.
#[derive(Debug, Parser)]
#[command(name = "iotlbd", version, about, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// Something else than serving.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to serve.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do instead of serving.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the daemon at work, with a simulated guest and real worker processes. Needs no root and no QEMU.
    Demo(demo::Options),
    /// A worker process of the demo.
    #[command(hide = true)]
    DemoWorker(demo::worker::WorkerOptions),
    /// A front-end that pings echo workers through a running daemon.
    #[command(hide = true)]
    DemoFrontEnd(demo::pinger::PingerOptions),
}

/// How to serve a device.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Where the front-end (QEMU) connects; created here
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// An inherited unix stream socket to use in place of --socket-path: listening, or connected already
    #[arg(long, value_name = "N", value_parser = parse::descriptor)]
    pub fd: Option<RawFd>,

    /// Where workers attach; created here
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// Kind of device
    #[arg(long, value_enum, default_value_t = DeviceArg::Net)]
    pub device: DeviceArg,

    /// Queue pairs the device has, 1 to 128
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUE_PAIRS_MAX)))]
    pub queue_pairs: u16,

    /// Most bytes of the shared translation table; K, M and G are understood. Memory is used as entries come: 2.1 MiB
    /// for each GiB that the guest maps in 4 KiB pages
    #[arg(long, value_name = "BYTES", default_value = "16M", value_parser = parse::size)]
    pub table_size: u64,

    /// Longest a miss stays unanswered. Must be less than half of --stall-revoke-ms
    #[arg(long, value_name = "MS", default_value_t = 400, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub miss_timeout_ms: u32,

    /// A worker that holds a reply back this long is reported
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = stall_ms())]
    pub stall_report_ms: u32,

    /// A worker that holds a reply back this long loses guest memory
    #[arg(long, value_name = "MS", default_value_t = 1000, value_parser = stall_ms())]
    pub stall_revoke_ms: u32,

    /// A worker that holds a reply back this long is killed, where the daemon may
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = stall_ms())]
    pub stall_kill_ms: u32,

    /// Workers that can be attached at a time
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_WORKERS_LIMIT)))]
    pub max_workers: u16,

    /// Never sleep: the loop takes one processor for itself, and workers never make a system call for a miss
    #[arg(long)]
    pub busy_poll: bool,

    /// Write figures here as JSON, after each front-end session and at the end: counters, and how long the front-end
    /// took for a page and the daemon for an acknowledgement. The loop itself writes: keep it on a local file system
    #[arg(long, value_name = "PATH")]
    pub stats: Option<PathBuf>,

    /// Keep the loop on this processor
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,

    /// Permissions of the front-end socket
    #[arg(long, value_name = "OCTAL", default_value = "0600", value_parser = parse::mode)]
    pub socket_mode: u32,

    /// Permissions of the control socket. Who may connect can map all guest memory
    #[arg(long, value_name = "OCTAL", default_value = "0660", value_parser = parse::mode)]
    pub control_mode: u32,

    /// What is logged to standard error: error, warn, info, debug, trace, or a filter like `iotlbd::server=debug`
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = parse::log_filter)]
    pub log_level: String,

    /// Print what this back-end can do as JSON and exit; the other flags are ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Up to an hour: longer is no policy but a frozen guest.
fn stall_ms() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=3_600_000)
}

/// Kinds of devices the command line knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// virtio-net
    Net,
}

/// Why the flags cannot be served. The message names the flag and the fix.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// Neither --socket-path nor --fd.
    #[error("--socket-path=PATH (or --fd=N) is missing: where does the front-end connect?")]
    NoFrontEnd,
    /// No --control-socket.
    #[error("--control-socket=PATH is missing: where do workers attach?")]
    NoControl,
    /// Both sockets have the same path.
    #[error("--socket-path and --control-socket are both {0}: give them different paths")]
    SamePath(PathBuf),
    /// Stall times out of order.
    #[error(
        "--stall-report-ms={report}, --stall-revoke-ms={revoke}, --stall-kill-ms={kill}: must not descend in this order"
    )]
    StallOrder {
        /// Given.
        report: u32,
        /// Given.
        revoke: u32,
        /// Given.
        kill: u32,
    },
    /// The miss time-out is too long.
    #[error(
        "--miss-timeout-ms={miss} must be less than half of --stall-revoke-ms={revoke}: a worker that waits for a miss \
         must not look stalled"
    )]
    MissTimeout {
        /// Given.
        miss: u32,
        /// Given.
        revoke: u32,
    },
    /// The inherited descriptor is of no use.
    #[error("--fd={fd}: {reason}")]
    Fd {
        /// Given.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
}

impl ServeArgs {
    /// Checks the flags against each other and makes the server's configuration of them.
    ///
    /// # Errors
    /// A flag is missing or two do not fit. Takes over the descriptor of `--fd`, so call it once, and first: see
    /// [`FrontEndSocket::from_raw`].
    pub fn config(&self) -> Result<ServerConfig, CliError> {
        let (report, revoke, kill) = (self.stall_report_ms, self.stall_revoke_ms, self.stall_kill_ms);
        if report > revoke || revoke > kill {
            return Err(CliError::StallOrder { report, revoke, kill });
        }
        if self.miss_timeout_ms >= revoke.div_ceil(2) {
            return Err(CliError::MissTimeout { miss: self.miss_timeout_ms, revoke });
        }
        let control = self.control_socket.clone().ok_or(CliError::NoControl)?;
        let front_end = match (&self.socket_path, self.fd) {
            (Some(path), _) if *path == control => return Err(CliError::SamePath(control)),
            (Some(path), _) => FrontEndSource::Path { path: path.clone(), mode: self.socket_mode },
            (None, Some(fd)) => {
                let socket =
                    FrontEndSocket::from_raw(fd).map_err(|error| CliError::Fd { fd, reason: error.to_string() })?;
                FrontEndSource::Inherited(socket)
            }
            (None, None) => return Err(CliError::NoFrontEnd),
        };
        let device = match self.device {
            DeviceArg::Net => DeviceKind::Net { queue_pairs: self.queue_pairs },
        };
        let mut config = ServerConfig::new(device, front_end, control);
        config.control_mode = self.control_mode;
        config.table_size = self.table_size;
        config.miss_timeout_ms = self.miss_timeout_ms;
        config.stall = StallPolicy { report_ms: report, revoke_ms: revoke, kill_ms: kill };
        config.max_workers = usize::from(self.max_workers);
        config.busy_poll = self.busy_poll;
        config.stats.clone_from(&self.stats);
        config.cpu = self.cpu;
        Ok(config)
    }
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    // QEMU's conventions: this flag wins over everything, whatever else stands on the line.
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.iter().skip(1).take_while(|a| *a != "--").any(|a| a == "--print-capabilities") {
        return print_capabilities();
    }
    let cli = Cli::parse_from(arguments);
    match cli.command {
        Some(Command::Demo(options)) => demo::run(options),
        Some(Command::DemoWorker(options)) => demo::worker::run(&options),
        Some(Command::DemoFrontEnd(options)) => demo::pinger::run(&options),
        None => serve(&cli.serve),
    }
}

/// The JSON of `--print-capabilities`.
#[must_use]
pub fn capabilities() -> serde_json::Value {
    serde_json::json!({ "type": "net", "features": [] })
}

fn print_capabilities() -> ExitCode {
    let mut out = std::io::stdout();
    match writeln!(out, "{}", capabilities()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(arguments: &ServeArgs) -> ExitCode {
    // Before anything else is opened: after that, a wrong number in --fd could name a descriptor of our own.
    let config = match arguments.config() {
        Ok(config) => config,
        Err(error) => return usage(&error),
    };
    // Before any thread exists: threads inherit the mask, and a blocked signal reaches the descriptor only.
    let stop = signals::stop_signals();
    let log = log::start(&arguments.log_level);
    let stop = match stop {
        Ok(stop) => stop,
        Err(error) => {
            error!("cannot watch for the signals that end it: {error}");
            log.flush();
            return ExitCode::FAILURE;
        }
    };
    raise_descriptor_limit();
    let status = match crate::server::run(config, stop) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    };
    log.flush();
    status
}

/// Raises the soft limit of open descriptors to the hard one. 256 rings with three descriptors each, 64 regions and 64
/// workers need more than the 1024 that processes start with (a limit for `select`, which is not used here),
/// and a front-end whose descriptors find no room has to be cut off.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!("the limit of open descriptors stays as it is: {error}");
    }
}

/// Says what is wrong with the command line, the way the parser does.
fn usage(error: &CliError) -> ExitCode {
    // An Err leaves the exit status to speak.
    let _ = writeln!(std::io::stderr(), "error: {error}\n\nFor more information, try '--help'.");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"iotlbd").chain(arguments))
    }

    fn config(arguments: &[&str]) -> Result<ServerConfig, CliError> {
        parse(arguments).expect("flags parse").serve.config()
    }

    #[test]
    fn the_two_paths_are_enough() {
        let config = config(&["--socket-path=/tmp/a", "--control-socket=/tmp/b"]).expect("valid");
        assert_eq!(config.control_path, PathBuf::from("/tmp/b"));
        assert_eq!(config.control_mode, 0o660);
        assert_eq!(config.table_size, 16 << 20);
        assert_eq!(config.device, DeviceKind::Net { queue_pairs: 1 });
    }

    #[test]
    fn the_loop_sleeps_and_runs_anywhere_unless_told_otherwise() {
        let paths = ["--socket-path=/tmp/a", "--control-socket=/tmp/b"];
        let usual = config(&paths).expect("valid");
        assert_eq!((usual.busy_poll, usual.cpu), (false, None));
        let told = config(&[&paths[..], &["--busy-poll", "--cpu=1"]].concat()).expect("valid");
        assert_eq!((told.busy_poll, told.cpu), (true, Some(1)));
    }

    #[test]
    fn missing_flags_are_named() {
        let text = config(&["--control-socket=/tmp/b"]).expect_err("no front-end").to_string();
        assert!(text.contains("--socket-path") && text.contains("--fd"), "{text}");
        let text = config(&["--socket-path=/tmp/b"]).expect_err("no control socket").to_string();
        assert!(text.contains("--control-socket"), "{text}");
    }

    #[test]
    fn flags_that_exclude_each_other() {
        let text = parse(&["--socket-path=/a", "--fd=3", "--control-socket=/b"]).expect_err("both").to_string();
        assert!(text.contains("--socket-path") && text.contains("--fd"), "{text}");
        let error = config(&["--socket-path=/x", "--control-socket=/x"]).expect_err("one path for two sockets");
        assert!(matches!(error, CliError::SamePath(_)));
    }

    #[test]
    fn times_must_be_in_order() {
        let paths = ["--socket-path=/a", "--control-socket=/b"];
        let with = |more: &[&str]| config(&[&paths[..], more].concat());
        assert!(matches!(with(&["--stall-report-ms=2000"]), Err(CliError::StallOrder { .. })));
        assert!(matches!(with(&["--stall-kill-ms=999"]), Err(CliError::StallOrder { .. })));
        assert!(matches!(with(&["--miss-timeout-ms=500"]), Err(CliError::MissTimeout { .. })));
        assert!(with(&["--miss-timeout-ms=499"]).is_ok());
    }

    #[test]
    fn ranges_are_checked() {
        for bad in [
            "--queue-pairs=0",
            "--queue-pairs=129",
            "--table-size=10",
            "--table-size=327K",
            "--table-size=lots",
            "--socket-mode=9",
            "--fd=-1",
            "--max-workers=0",
            "--log-level=a=b=c",
            "--log-level=wran",
            "--log-level=",
            "--log-level=info,noisy",
            "--cpu=-1",
            "--cpu=first",
            "--busy-poll=yes",
        ] {
            assert!(parse(&["--control-socket=/b", bad]).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn capabilities_name_the_device_type() {
        assert_eq!(capabilities()["type"], "net");
    }
}
