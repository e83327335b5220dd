//! A demo run from start to summary.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use iotlb_proto::sync::{AtomicU32, Ordering};

use super::Options;
use super::children::{Ended, Process};
use super::load::{Load, PlantedFault};
use super::oracle::Random;
use super::report::{Summary, WorkerReport};
use super::screen::{Screen, StopSignals};
use super::tally::{LoadFigures, Tally, WorkerFigures};
use super::view;
use crate::sim::SimError;
use crate::sim::iotlb::latency_histogram;

/// Longest any part of the demo may take to start or to end.
const WATCHDOG: Duration = Duration::from_secs(15);
/// When the daemon takes guest memory from a worker that does not unpin: not before the watchdog has ended the demo.
const STALL_REVOKE_MS: u32 = 20_000;
/// When it kills that worker.
const STALL_KILL_MS: u32 = 30_000;
/// How long to look for the daemon's death when something else is a sign of it.
const DAEMON_MAY_BE_DYING: Duration = Duration::from_millis(500);
/// Time between two looks at everything.
const TICK: Duration = Duration::from_millis(100);
/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Steps of the load between two updates of the shared figures.
const STEPS_PER_UPDATE: usize = 64;

/// Why the demo could not run.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Something local.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Operating system's words.
        source: io::Error,
    },
    /// A child could not be started.
    #[error("cannot start {name}: {source}")]
    Start {
        /// Which.
        name: String,
        /// Operating system's words.
        source: io::Error,
    },
    /// A child ended that should not have.
    #[error("{name} ended unexpectedly ({status}); its last words:{tail}")]
    Died {
        /// Which.
        name: String,
        /// How.
        status: std::process::ExitStatus,
        /// Last lines of its standard error.
        tail: String,
    },
    /// A child did not do its part in time.
    #[error("{name} did not {what} within {seconds} s", seconds = WATCHDOG.as_secs())]
    Late {
        /// Which.
        name: String,
        /// Start or end.
        what: &'static str,
    },
    /// The front-end failed.
    #[error("front-end: {0}")]
    FrontEnd(#[from] SimError),
    /// The thread of the front-end is gone.
    #[error("the front-end's thread ended by itself")]
    FrontEndGone,
    /// A worker wrote something that is no report.
    #[error("{name} wrote something that is no report: {line:?}")]
    Report {
        /// Which.
        name: String,
        /// What it wrote.
        line: String,
    },
}

impl DemoError {
    fn system(what: &'static str) -> impl FnOnce(io::Error) -> DemoError {
        move |source| DemoError::System { what, source }
    }

    fn died(process: &Process, ended: Ended) -> DemoError {
        DemoError::Died { name: process.name().to_owned(), status: ended.status, tail: ended.tail }
    }
}

/// Runs the demo.
pub fn run(options: &Options) -> Result<Summary, DemoError> {
    let signals = StopSignals::block().map_err(DemoError::system("watch for signals"))?;
    let directory = tempfile::Builder::new()
        .prefix("iotlbd-demo-")
        .tempdir()
        .map_err(DemoError::system("create a private directory for the sockets"))?;
    let seed = options.seed.unwrap_or_else(seed_from_clock);
    // The children come before the thread of the front-end in this list, so they outlive it when things go wrong.
    let program = std::env::current_exe().map_err(DemoError::system("find this program's own file"))?;
    let mut demo = Demo::start(program, directory.path(), options, seed)?;
    let outcome = demo.show(&signals, options);
    let seconds = demo.started.elapsed().as_secs_f64();
    outcome?;
    demo.finish()?;
    Ok(demo.summary(seconds, seed))
}

struct Demo {
    front_end: FrontEndThread,
    workers: Vec<Worker>,
    daemon: Process,
    started: Instant,
}

struct Worker {
    process: Process,
    figures: Arc<Mutex<WorkerFigures>>,
    reader: Option<JoinHandle<Result<(), DemoError>>>,
    stdin: Option<std::process::ChildStdin>,
}

impl Demo {
    fn start(program: PathBuf, directory: &Path, options: &Options, seed: u64) -> Result<Demo, DemoError> {
        let (socket, control) = (directory.join("vhost.sock"), directory.join("control.sock"));
        let flag = |name: &str, path: &Path| {
            let mut argument = OsString::from(name);
            argument.push(path);
            argument
        };
        let arguments = [
            flag("--socket-path=", &socket),
            flag("--control-socket=", &control),
            // On a busy machine a pinned worker may lose the processor for long; that is no stall worth a revocation.
            format!("--stall-revoke-ms={STALL_REVOKE_MS}").into(),
            format!("--stall-kill-ms={STALL_KILL_MS}").into(),
        ];
        let mut daemon = start_process("the daemon", &program, &arguments)?;
        let front_end = FrontEndThread::start(socket, seed, options.plant_fault)?;
        let front_end = front_end.wait_started(&mut daemon)?;
        let mut random = Random::new(!seed);
        let mut workers = Vec::new();
        for number in 0..options.workers {
            let name = format!("worker-{number}");
            let arguments = [
                "demo-worker".into(),
                flag("--control-socket=", &control),
                format!("--label={name}").into(),
                format!("--key={seed}").into(),
                format!("--seed={}", random.word()).into(),
            ];
            workers.push(Worker::start(&name, &program, &arguments)?);
        }
        let mut demo = Demo { front_end, workers, daemon, started: Instant::now() };
        demo.wait_for_workers()?;
        demo.started = Instant::now();
        Ok(demo)
    }

    /// Waits until every worker is attached and has reported once.
    fn wait_for_workers(&mut self) -> Result<(), DemoError> {
        let deadline = Instant::now() + WATCHDOG;
        loop {
            self.check()?;
            let missing = self.workers.iter().find(|worker| lock(&worker.figures).report.is_none());
            let Some(worker) = missing else { return Ok(()) };
            if Instant::now() >= deadline {
                return Err(DemoError::Late { name: worker.process.name().to_owned(), what: "attach" });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The time in which the workers run.
    fn show(&mut self, signals: &StopSignals, options: &Options) -> Result<(), DemoError> {
        let total = Duration::from_secs(options.seconds);
        let mut tally = Tally::new(self.started, total);
        let mut screen = match io::stdout().is_terminal() && io::stdin().is_terminal() && !options.json {
            true => Some(Screen::open().map_err(DemoError::system("take the terminal over"))?),
            false => None,
        };
        let mut next_line = LINE_EVERY;
        loop {
            self.check()?;
            let snapshot = {
                let workers: Vec<WorkerFigures> =
                    self.workers.iter().map(|worker| lock(&worker.figures).clone()).collect();
                tally.sample(Instant::now(), &workers, &lock(&self.front_end.figures))
            };
            let left = total.saturating_sub(snapshot.elapsed);
            if left.is_zero() {
                return Ok(());
            }
            let pause = TICK.min(left);
            let quit = if let Some(screen) = &mut screen {
                screen.show(&snapshot).map_err(DemoError::system("draw"))?;
                screen.wants_to_quit(pause).map_err(DemoError::system("read the keyboard"))?
                    || signals.came(Duration::ZERO).map_err(DemoError::system("watch for signals"))?
            } else {
                if snapshot.elapsed >= next_line {
                    next_line += LINE_EVERY;
                    // Nobody may be reading; the demo goes on.
                    let _ = writeln!(io::stderr(), "{}", view::plain(&snapshot));
                }
                signals.came(pause).map_err(DemoError::system("watch for signals"))?
            };
            if quit {
                return Ok(());
            }
        }
    }

    /// Whether everybody still does his part.
    fn check(&mut self) -> Result<(), DemoError> {
        if let Some(ended) = self.daemon.ended().map_err(DemoError::system("look after the daemon"))? {
            return Err(DemoError::died(&self.daemon, ended));
        }
        for worker in &mut self.workers {
            if let Some(ended) = worker.process.ended().map_err(DemoError::system("look after a worker"))? {
                // Workers stop when the daemon dies, and may be gone before it is: then its death is the news.
                return Err(match self.daemon.wait(DAEMON_MAY_BE_DYING) {
                    Ok(Some(daemon_ended)) => DemoError::died(&self.daemon, daemon_ended),
                    _ => DemoError::died(&worker.process, ended),
                });
            }
            if worker.reader.as_ref().is_some_and(JoinHandle::is_finished) {
                worker.join_reader()?;
            }
        }
        match self.front_end.check() {
            // The daemon closes the connection when it dies: its last words are the better message.
            Err(error @ DemoError::FrontEnd(SimError::Closed { .. })) => match self.daemon.wait(DAEMON_MAY_BE_DYING) {
                Ok(Some(ended)) => Err(DemoError::died(&self.daemon, ended)),
                _ => Err(error),
            },
            other => other,
        }
    }

    /// Ends everything in order: workers, front-end, daemon. Each must end well.
    fn finish(&mut self) -> Result<(), DemoError> {
        for worker in &mut self.workers {
            worker.stdin = None;
        }
        for worker in &mut self.workers {
            worker.finish()?;
        }
        self.front_end.finish()?;
        self.daemon.terminate();
        let ended = self.daemon.wait(WATCHDOG).map_err(DemoError::system("wait for the daemon"))?;
        match ended {
            Some(ended) if ended.status.success() => Ok(()),
            Some(ended) => Err(DemoError::died(&self.daemon, ended)),
            None => Err(DemoError::Late { name: "the daemon".to_owned(), what: "end" }),
        }
    }

    fn summary(&self, seconds: f64, seed: u64) -> Summary {
        let workers: Vec<WorkerFigures> = self.workers.iter().map(|worker| lock(&worker.figures).clone()).collect();
        let mut miss_ns = latency_histogram();
        for worker in &workers {
            // Adding fails only for values that do not fit; these histograms grow.
            let _ = miss_ns.add(&worker.miss_ns);
        }
        let reports: Vec<WorkerReport> = workers.iter().map(WorkerFigures::newest).collect();
        let load = lock(&self.front_end.figures).clone();
        Summary::new(seconds, seed, &reports, &miss_ns, &load)
    }
}

impl Worker {
    fn start(name: &str, program: &Path, arguments: &[OsString]) -> Result<Worker, DemoError> {
        let mut process = start_process(name, program, arguments)?;
        let figures = Arc::new(Mutex::new(WorkerFigures::new(name.to_owned(), process.id())));
        let stdin = process.stdin();
        let reader = process.stdout().map(|stdout| {
            let (name, figures) = (name.to_owned(), Arc::clone(&figures));
            thread::spawn(move || take_reports(&name, BufReader::new(stdout), &figures))
        });
        Ok(Worker { process, figures, reader, stdin })
    }

    /// Its input is at the end: it reports a last time and ends.
    fn finish(&mut self) -> Result<(), DemoError> {
        let ended = self.process.wait(WATCHDOG).map_err(DemoError::system("wait for a worker"))?;
        match ended {
            Some(ended) if ended.status.success() => {}
            Some(ended) => return Err(DemoError::died(&self.process, ended)),
            None => return Err(DemoError::Late { name: self.process.name().to_owned(), what: "end" }),
        }
        self.join_reader()?;
        if lock(&self.figures).newest().last {
            return Ok(());
        }
        Err(DemoError::Late { name: self.process.name().to_owned(), what: "send its last report" })
    }

    fn join_reader(&mut self) -> Result<(), DemoError> {
        match self.reader.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

/// The thread that is guest and front-end.
struct FrontEndThread {
    stop: Arc<AtomicU32>,
    figures: Arc<Mutex<LoadFigures>>,
    started: Receiver<()>,
    thread: Option<JoinHandle<Result<(), SimError>>>,
}

impl FrontEndThread {
    fn start(socket: PathBuf, seed: u64, fault: Option<PlantedFault>) -> Result<FrontEndThread, DemoError> {
        let stop = Arc::new(AtomicU32::new(0));
        let figures = Arc::new(Mutex::new(LoadFigures::default()));
        let (tell, started) = mpsc::channel();
        let (their_stop, their_figures) = (Arc::clone(&stop), Arc::clone(&figures));
        let body = move || {
            let mut load = Load::start(&socket, seed, fault)?;
            // The other side may have given up; then `stop` is set.
            let _ = tell.send(());
            // Partner: the store in `finish` and `drop`. Nothing else is passed by this flag.
            while their_stop.load(Ordering::Relaxed) == 0 {
                for _ in 0..STEPS_PER_UPDATE {
                    load.step()?;
                }
                publish(&load, &their_figures);
            }
            publish(&load, &their_figures);
            load.finish()
        };
        let thread = thread::Builder::new()
            .name("front-end".to_owned())
            .spawn(body)
            .map_err(DemoError::system("start a thread"))?;
        Ok(FrontEndThread { stop, figures, started, thread: Some(thread) })
    }

    fn wait_started(mut self, daemon: &mut Process) -> Result<FrontEndThread, DemoError> {
        let deadline = Instant::now() + WATCHDOG;
        loop {
            if let Some(ended) = daemon.ended().map_err(DemoError::system("look after the daemon"))? {
                return Err(DemoError::died(daemon, ended));
            }
            match self.started.try_recv() {
                Ok(()) => return Ok(self),
                Err(TryRecvError::Disconnected) => {
                    self.join()?;
                    return Err(DemoError::FrontEndGone);
                }
                Err(TryRecvError::Empty) if Instant::now() >= deadline => {
                    return Err(DemoError::Late { name: "the front-end".to_owned(), what: "start" });
                }
                Err(TryRecvError::Empty) => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn check(&mut self) -> Result<(), DemoError> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
            self.join()?;
            return Err(DemoError::FrontEndGone);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DemoError> {
        self.stop.store(1, Ordering::Relaxed);
        self.join()
    }

    fn join(&mut self) -> Result<(), DemoError> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result.map_err(DemoError::FrontEnd),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for FrontEndThread {
    fn drop(&mut self) {
        // The thread sees it at its next step, or fails when the daemon is killed. Each wait of it has a watchdog.
        self.stop.store(1, Ordering::Relaxed);
    }
}

fn publish(load: &Load, figures: &Mutex<LoadFigures>) {
    let newest = LoadFigures {
        stats: load.front_end().stats.clone(),
        flushes: load.flushes(),
        reboots: load.reboots(),
        phase: load.phase(),
    };
    *lock(figures) = newest;
}

fn take_reports(name: &str, stdout: impl BufRead, figures: &Mutex<WorkerFigures>) -> Result<(), DemoError> {
    for line in stdout.lines() {
        let line = line.map_err(DemoError::system("read a worker's report"))?;
        let Ok(report) = serde_json::from_str::<WorkerReport>(&line) else {
            return Err(DemoError::Report { name: name.to_owned(), line });
        };
        lock(figures).take(report);
    }
    Ok(())
}

fn start_process(name: &str, program: &Path, arguments: &[OsString]) -> Result<Process, DemoError> {
    Process::start(name, program, arguments).map_err(|source| DemoError::Start { name: name.to_owned(), source })
}

/// Figures stay whole when a thread panics over them: they are replaced, never changed in place.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seed_from_clock() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Random::new(u64::from(now.subsec_nanos()) ^ now.as_secs()).word() & 0xffff_ffff
}
