//! The programs under test: `iotlbd` and its workers.

use std::path::{Path, PathBuf};
use std::process::Command;

use iotlb_proto::socket::PacketSocket;
use tempfile::TempDir;

use super::binaries::program;
use super::network::TAP;
use super::places::{self, Places};
use super::process::{Process, eventually};
use super::{GuestError, Logs, VhostUser, WATCHDOG};

/// How long one attempt to connect may take.
const CONNECT_TIMEOUT_MS: u32 = 1000;

/// The queue whose buffers the guest receives into.
pub const RECEIVE_QUEUE: u16 = 0;
/// The queue the guest sends through.
pub const TRANSMIT_QUEUE: u16 = 1;

/// A daemon and its workers, each a process of its own.
#[derive(Debug)]
pub struct Backend {
    // The order of the fields is the order of their end: workers first, then the daemon, then its sockets' folder.
    workers: Vec<(String, Process)>,
    daemon: Process,
    queue_pairs: u16,
    directory: TempDir,
}

impl Backend {
    /// A daemon, and two workers on one multi-queue TAP: one serves the guest's receive queue, one its transmit queue.
    ///
    /// # Errors
    /// A program cannot be built or started, or ends.
    pub fn tap(logs: &Logs) -> Result<Backend, GuestError> {
        Backend::tap_pairs(logs, 1)
    }

    /// As [`Backend::tap`], where the device has `queue_pairs` pairs of queues; the workers serve the first.
    ///
    /// # Errors
    /// As [`Backend::tap`].
    pub fn tap_pairs(logs: &Logs, queue_pairs: u16) -> Result<Backend, GuestError> {
        let mut backend = Backend::daemon_with(logs, queue_pairs, None)?;
        backend.add_tap_worker("receive", RECEIVE_QUEUE, logs)?;
        backend.add_tap_worker("transmit", TRANSMIT_QUEUE, logs)?;
        Ok(backend)
    }

    /// As [`Backend::tap`], with more arguments for the workers, perhaps another build of their program, and perhaps
    /// with everybody in a place of their own.
    ///
    /// # Errors
    /// As [`Backend::tap`].
    pub fn tap_with(
        logs: &Logs,
        arguments: &[&str],
        worker: Option<&Path>,
        places: Option<Places>,
    ) -> Result<Backend, GuestError> {
        let mut backend = Backend::daemon_with(logs, 1, places)?;
        let worker = worker.map_or_else(|| program("iotlb-net"), |path| Ok(path.to_path_buf()))?;
        for (name, queue) in [("receive", RECEIVE_QUEUE), ("transmit", TRANSMIT_QUEUE)] {
            let queue = queue.to_string();
            let arguments = [&["--queues", &queue, "--tap", TAP], arguments].concat();
            backend.start_worker(&worker, name, &arguments, logs)?;
        }
        if let Some(places) = places {
            backend.workers.iter().try_for_each(|(_, worker)| places::put(worker.id(), |_| places.guest))?;
        }
        Ok(backend)
    }

    /// A daemon, and one worker that answers ARP and ICMP echo by itself.
    ///
    /// # Errors
    /// As [`Backend::tap`].
    pub fn echo(logs: &Logs) -> Result<Backend, GuestError> {
        let mut backend = Backend::daemon_with(logs, 1, None)?;
        backend.add_worker("echo", &["--queues", "0,1", "--echo"], logs)?;
        Ok(backend)
    }

    fn daemon_with(logs: &Logs, queue_pairs: u16, places: Option<Places>) -> Result<Backend, GuestError> {
        let directory = TempDir::new().map_err(GuestError::io("making a folder for the sockets"))?;
        let daemon = start_daemon("iotlbd", directory.path(), queue_pairs, places, logs)?;
        Ok(Backend { workers: Vec::new(), daemon, queue_pairs, directory })
    }

    /// Kills the daemon at whatever it is doing and starts another one; its log has the name.
    ///
    /// # Errors
    /// It had ended before, or cannot be started.
    pub fn replace_daemon(&mut self, name: &str, logs: &Logs) -> Result<(), GuestError> {
        self.daemon.check_running()?;
        self.daemon.kill()?;
        self.daemon = start_daemon(name, self.directory.path(), self.queue_pairs, None, logs)?;
        Ok(())
    }

    /// Starts a worker that serves one queue from the TAP; its log has its name.
    ///
    /// # Errors
    /// It cannot be built or started.
    pub fn add_tap_worker(&mut self, name: &str, queue: u16, logs: &Logs) -> Result<(), GuestError> {
        self.add_worker(name, &["--queues", &queue.to_string(), "--tap", TAP], logs)
    }

    fn add_worker(&mut self, name: &str, arguments: &[&str], logs: &Logs) -> Result<(), GuestError> {
        self.start_worker(&program("iotlb-net")?, name, arguments, logs)
    }

    fn start_worker(&mut self, program: &Path, name: &str, arguments: &[&str], logs: &Logs) -> Result<(), GuestError> {
        let mut command = Command::new(program);
        command.arg("--control-socket").arg(control_path(self.directory.path())).args(arguments);
        self.workers.push((name.to_string(), Process::start(name, command, logs)?));
        Ok(())
    }

    /// What QEMU has to know of it.
    pub fn vhost_user(&self) -> VhostUser {
        VhostUser { socket: front_path(self.directory.path()), queue_pairs: self.queue_pairs, reconnect: false }
    }

    /// The daemon.
    pub fn daemon_process(&mut self) -> &mut Process {
        &mut self.daemon
    }

    /// Kills a worker, by name, at whatever it is doing.
    ///
    /// # Errors
    /// There is none of that name, or it had ended before.
    pub fn kill_worker(&mut self, name: &str) -> Result<(), GuestError> {
        let at = self.workers.iter().position(|(own, _)| own == name);
        let at = at.ok_or_else(|| GuestError::Check(format!("no worker {name}")))?;
        let (_, mut worker) = self.workers.swap_remove(at);
        worker.check_running()?;
        worker.kill().map(drop)
    }

    /// [`GuestError::Ended`] if one of the programs has ended by itself.
    ///
    /// # Errors
    /// See above.
    pub fn check_running(&mut self) -> Result<(), GuestError> {
        self.daemon.check_running()?;
        self.workers.iter_mut().try_for_each(|(_, worker)| worker.check_running())
    }

    /// As [`Backend::end`]; then what the daemon measured of itself.
    ///
    /// # Errors
    /// As [`Backend::end`], or there are no figures.
    pub fn end_with_figures(self, logs: &Logs) -> Result<serde_json::Value, GuestError> {
        self.end()?;
        serde_json::from_str(&logs.read("stats"))
            .map_err(|error| GuestError::Check(format!("the daemon's figures are no JSON: {error}")))
    }

    /// Ends the workers, then the daemon, by SIGTERM. Both must take it as the wish for a clean end.
    ///
    /// # Errors
    /// [`GuestError::TimedOut`] if one does not end, [`GuestError::Ended`] if it ends with another status than 0.
    pub fn end(mut self) -> Result<(), GuestError> {
        self.check_running()?;
        let daemon = ("iotlbd".to_string(), self.daemon);
        for (name, mut process) in self.workers.into_iter().chain([daemon]) {
            let status = process.terminate()?;
            if !status.success() {
                return Err(GuestError::Ended { program: name, status });
            }
        }
        Ok(())
    }
}

/// Starts a daemon and waits until it may be connected to.
fn start_daemon(
    name: &str,
    directory: &Path,
    queue_pairs: u16,
    places: Option<Places>,
    logs: &Logs,
) -> Result<Process, GuestError> {
    let (front, control) = (front_path(directory), control_path(directory));
    let mut command = Command::new(program("iotlbd")?);
    command.arg(argument("--socket-path=", &front)).arg(argument("--control-socket=", &control));
    command.arg(argument("--stats=", &logs.path("stats"))).arg(format!("--queue-pairs={queue_pairs}"));
    command.args(places.map(|places| format!("--cpu={}", places.front_end)));
    let mut daemon = Process::start(name, command, logs)?;
    // A killed one leaves its sockets behind: what counts is that somebody listens.
    eventually("iotlbd to open its sockets", WATCHDOG, || {
        daemon.check_running()?;
        Ok(front.exists() && PacketSocket::connect(&control, CONNECT_TIMEOUT_MS).is_ok())
    })?;
    Ok(daemon)
}

fn front_path(directory: &Path) -> PathBuf {
    directory.join("front")
}

fn control_path(directory: &Path) -> PathBuf {
    directory.join("control")
}

fn argument(flag: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(flag);
    argument.push(path);
    argument
}
