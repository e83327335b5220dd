//! The server: sockets, processes and clocks around a [`Device`](crate::device::Device).
//!
//! One thread owns everything and never waits for a peer: all descriptors are non-blocking, all queues bounded, all
//! waiting is done in one `epoll_wait`.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | what a server is told |
//! | [`listen`] | sockets in the file system, their locks, stale ones |
//! | [`inherit`] | sockets handed in |
//! | [`signals`] | the signals that end it, as a descriptor |
//! | `poller`, `alarm` | epoll and the timer |
//! | `pace`, `cpu` | when the loop polls and when it sleeps, and where it runs |
//! | `event_loop` | the loop: what woke it, in which order things are done |
//! | `actions` | carrying out what the device wants |
//! | `front_end`, `back_end` | the two channels of a front-end |
//! | `arrivals` | connections that have not said HELLO yet |
//! | `registry`, `worker`, `link`, `process` | workers, their segments, connections and processes |
//! | `turn` | how much of the loop's time a worker's connection may take |
//! | `closer` | threads that close what workers and strangers sent, and what workers had |
//! | `leases` | which worker owns which queue |
//! | `grace`, `stall` | waiting for readers, and what happens to those that make the guest wait |
//! | `eventfd` | other processes' eventfds |
//! | `kernel` | what the host can do |
//! | `figures` | what is measured, and where that is written |

pub mod config;
pub mod inherit;
pub mod listen;
pub mod signals;

mod actions;
mod alarm;
mod arrivals;
mod back_end;
mod closer;
mod cpu;
mod event_loop;
mod eventfd;
mod figures;
mod front_end;
mod grace;
mod kernel;
mod leases;
mod link;
mod pace;
mod poller;
mod process;
mod registry;
mod stall;
#[cfg(test)]
mod tests;
mod turn;
mod worker;
mod workers;

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::SocketType;
use tracing::info;

pub(crate) use alarm::now_ns;
pub use config::{DeviceKind, FrontEndSource, ServerConfig, StallPolicy};
pub use cpu::CpuError;
pub use inherit::FrontEndSocket;

use event_loop::EventLoop;
use front_end::FrontEndDoor;
use listen::{ListenError, NamedListener};

/// Why a server does not start, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A socket cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The table cannot be made.
    #[error("--table-size: cannot make the translation table: {0}")]
    Table(#[from] iotlb_proto::table::TableError),
    /// The liveness word cannot be made.
    #[error("cannot make the liveness word: {0}")]
    Liveness(#[from] iotlb_proto::liveness::LivenessError),
    /// The loop cannot be set up or go on.
    #[error("the event loop cannot {step}: {source}")]
    Loop {
        /// What was tried.
        step: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// The processor of `--cpu` cannot be had.
    #[error(transparent)]
    Cpu(#[from] cpu::CpuError),
    /// A second signal came while readers were still waited for.
    #[error("told twice to stop: ended although workers still held guest memory")]
    Forced,
}

/// A server whose sockets exist already: whoever connects is served once [`Server::run`] is called.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    front_end: FrontEndDoor,
    control: ControlListener,
}

/// Where workers connect.
#[derive(Debug)]
pub(crate) enum ControlListener {
    /// Made here, removed at the end.
    Named(NamedListener),
    /// Handed in.
    Given(OwnedFd),
}

impl std::os::fd::AsFd for ControlListener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            ControlListener::Named(listener) => listener.as_fd(),
            ControlListener::Given(fd) => fd.as_fd(),
        }
    }
}

impl Server {
    /// Makes the sockets. When this returns, connecting to them works.
    ///
    /// # Errors
    /// A socket cannot be had; see [`ListenError`].
    pub fn start(mut config: ServerConfig) -> Result<Server, ServerError> {
        let source = std::mem::replace(&mut config.front_end, FrontEndSource::Taken);
        let front_end = match source {
            FrontEndSource::Path { path, mode } => {
                FrontEndDoor::Named(NamedListener::create("--socket-path", &path, SocketType::STREAM, mode)?)
            }
            FrontEndSource::Inherited(FrontEndSocket::Listener(fd)) => FrontEndDoor::Given(fd),
            FrontEndSource::Inherited(FrontEndSocket::Connection(fd)) => FrontEndDoor::Once(Some(fd)),
            FrontEndSource::Taken => FrontEndDoor::Once(None),
        };
        let control = match config.control_listener.take() {
            Some(fd) => {
                inherit::prepare(&fd)
                    .map_err(|source| ServerError::Loop { step: "use the control socket handed in", source })?;
                ControlListener::Given(fd)
            }
            None => ControlListener::Named(NamedListener::create(
                "--control-socket",
                &config.control_path,
                SocketType::SEQPACKET,
                config.control_mode,
            )?),
        };
        Ok(Server { config, front_end, control })
    }

    /// Serves until `stop` is readable, or, if the front-end's connection was handed in, until that ends. The calling
    /// thread becomes the owner of the liveness word: when it ends, workers take the daemon for dead.
    ///
    /// The front-end's connection is closed only after all workers let go of guest memory. `stop` readable a second
    /// time ends that wait; where it is a descriptor of [`signals`], SIGHUP does not count for that. An end without it,
    /// or by an error, is as when the process dies: nobody can pin any more when the connection closes, but who is
    /// pinned at that moment goes on until it unpins.
    ///
    /// # Errors
    /// The server cannot be set up or go on; or the processor it is to run on cannot be had.
    pub fn run(self, stop: OwnedFd) -> Result<(), ServerError> {
        let Server { config, front_end, control } = self;
        // Counted before the thread is bound to one of them.
        let cpus = cpu::available();
        if let Some(number) = config.cpu {
            cpu::bind_thread(number)?;
            info!(cpu = number, "the loop stays on this processor");
        }
        let mut event_loop = EventLoop::new(config, front_end, control, stop, cpus)?;
        info!("serving");
        let result = event_loop.run();
        // Whatever ended it: what was counted is wanted also where workers are not waited for.
        event_loop.figures.write(&event_loop.device);
        event_loop.let_all_go();
        info!("stopped");
        result
    }
}

/// Makes a server and runs it: [`Server::start`], [`Server::run`].
///
/// # Errors
/// Those of both.
pub fn run(config: ServerConfig, stop: OwnedFd) -> Result<(), ServerError> {
    Server::start(config)?.run(stop)
}
