//! One running container: its output and its end.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::command::CommandError;
use super::engine::{Engine, EngineError};
use super::image::IMAGE;
use super::view::View;

/// What every container of the project runs with; `deploy/compose.yaml` says the same in its own words. The runtime's
/// default seccomp profile applies since nothing here says otherwise.
const CONFINEMENT: [&str; 11] = [
    "--network=none",
    "--ipc=private",
    "--pid=private",
    "--uts=private",
    "--cgroupns=private",
    "--read-only",
    "--read-only-tmpfs=false",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--pids-limit=64",
    "--pull=never",
];

/// What differs between containers.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// Name, unique within the engine.
    pub name: &'a str,
    /// User and group inside, numeric.
    pub user: &'a str,
    /// Memory limit in podman's notation.
    pub memory: &'a str,
    /// Volumes, as `name:/path`.
    pub volumes: &'a [&'a str],
    /// More flags of `podman run`.
    pub flags: &'a [&'a str],
    /// The program and its arguments.
    pub command: &'a [&'a str],
}

/// A container in the foreground of a podman process. Killed and removed on drop.
#[derive(Debug)]
pub struct Container<'e> {
    engine: &'e Engine,
    name: String,
    child: Child,
    log: Arc<Log>,
    readers: Vec<JoinHandle<()>>,
    status: Option<i32>,
}

/// Lines as they come, from both streams.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<(Vec<String>, usize)>,
    grown: Condvar,
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, (Vec<String>, usize)> {
        // The lines are only ever pushed to, so they are whole even if a holder panicked.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let log = Arc::clone(self);
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                log.lock().0.push(line);
                log.grown.notify_all();
            }
            log.lock().1 += 1;
            log.grown.notify_all();
        })
    }
}

impl<'e> Container<'e> {
    /// Starts a container.
    ///
    /// # Errors
    /// podman cannot be started. That the container failed shows later, in its output and status.
    pub fn start(engine: &'e Engine, settings: &Settings<'_>) -> Result<Container<'e>, EngineError> {
        let mut podman = engine.command();
        podman.arg("run").args(CONFINEMENT).args(["--name", settings.name, "--user", settings.user]);
        podman.args(["--memory", settings.memory, "--memory-swap", settings.memory]);
        for volume in settings.volumes {
            podman.args(["--volume", volume]);
        }
        let (program, arguments) = settings.command.split_first().map_or(("/bin/iotlbd", &[][..]), |(p, a)| (*p, a));
        podman.args(settings.flags).args(["--entrypoint", program, IMAGE]).args(arguments);
        podman.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let start_error = |source| CommandError::Start { program: "podman run".to_owned(), source };
        let mut child = podman.spawn().map_err(start_error)?;
        let log = Arc::new(Log::default());
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let readers = [out.map(|s| log.follow(s)), err.map(|s| log.follow(s))].into_iter().flatten().collect();
        Ok(Container { engine, name: settings.name.to_owned(), child, log, readers, status: None })
    }

    /// Waits until a line of its output contains `text`.
    ///
    /// # Errors
    /// It ended first, or `limit` passed. The error is what it wrote.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        let mut lines = self.log.lock();
        loop {
            if lines.0.iter().any(|line| line.contains(text)) {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = lines.1 == self.readers.len();
            if ended || left.is_zero() {
                let why = if ended { "ended" } else { "is silent" };
                return Err(format!("{} {why} without `{text}`:\n{}", self.name, lines.0.join("\n")));
            }
            lines = self.log.grown.wait_timeout(lines, left).map_or_else(|e| e.into_inner().0, |(lines, _)| lines);
        }
    }

    /// Waits for its end and returns its exit status; signals are 128 + number.
    ///
    /// # Errors
    /// `limit` passed. The error is what it wrote.
    pub fn wait_end(&mut self, limit: Duration) -> Result<i32, String> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let deadline = Instant::now() + limit;
        let mut lines = self.log.lock();
        // Both streams end when the last process that holds them does; what follows then is podman's own end.
        while lines.1 < self.readers.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("{} still runs after {limit:?}:\n{}", self.name, lines.0.join("\n")));
            }
            lines = self.log.grown.wait_timeout(lines, left).map_or_else(|e| e.into_inner().0, |(lines, _)| lines);
        }
        drop(lines);
        let status = self.child.wait().map_err(|error| format!("{}: {error}", self.name))?;
        let code = status.code().ok_or_else(|| format!("{}: podman itself was killed: {status}", self.name))?;
        self.status = Some(code);
        Ok(code)
    }

    /// Everything it wrote so far.
    #[must_use]
    pub fn output(&self) -> String {
        self.log.lock().0.join("\n")
    }

    /// What can be seen of it from outside.
    #[must_use]
    pub fn view(&self) -> View<'e> {
        View::new(self.engine, &self.name)
    }

    /// Sends a signal to its first process.
    ///
    /// # Errors
    /// podman failed, as when the container is gone.
    pub fn signal(&self, signal: &str) -> Result<(), EngineError> {
        self.engine.run(&["kill", "--signal", signal, &self.name]).map(drop)
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Failing means it is gone already.
        let _ = self.engine.run(&["rm", "--force", "--time=0", &self.name]);
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}
