//! The benchmark program started once more.
//!
//! A neighbour must be a process of its own, and a daemon's memory is its own only when nothing else is in the process.
//! The parent gives orders by single bytes on the child's standard input; each is answered by a byte when it holds. The
//! child ends when its input does.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use iotlb_client::{AttachOptions, Attachment};
use iotlb_proto::sync::{AtomicU32, AtomicU64, Ordering};
use iotlbd::server::{DeviceKind, FrontEndSource, Server, ServerConfig};

use super::groups::{hit, visits};
use super::rig;
use crate::processors::bind;

/// First argument of a neighbour; the control socket, the number of entries and its processor follow.
const NEIGHBOUR: &str = "--as-neighbour";
/// First argument of a daemon; its folder follows.
const DAEMON: &str = "--as-daemon";
/// First argument of a worker that only attaches; the control socket follows.
const WORKER: &str = "--as-worker";

/// Orders to a neighbour.
pub mod order {
    /// Do nothing.
    pub const REST: u8 = b'r';
    /// Look up in pinned bursts.
    pub const LOOKUPS: u8 = b'l';
    /// Load one line, again and again.
    pub const LOADS: u8 = b'1';
    /// Look up in pinned bursts, in a table whose pages come and go.
    pub const CHANGING: u8 = b'c';
    /// Go on, and say how many operations there were so far.
    pub const COUNT: u8 = b'n';
}

/// Longest a worker may take to map guest memory, in milliseconds.
const MAPS_MS: u32 = 10_000;
/// Longest that a neighbour may wait for its processor.
pub const TURN: Duration = Duration::from_secs(10);
/// Operations between two looks at the orders.
const STRETCH: u64 = 4_096;

/// A process that was started from this program. Ends when dropped.
#[derive(Debug)]
pub struct Helper {
    process: Child,
    orders: Option<ChildStdin>,
    answers: ChildStdout,
}

impl Helper {
    /// A worker on `cpu` that attaches to `control`, and can do the lookups of this benchmark on `entries` entries.
    ///
    /// # Errors
    /// It does not start.
    pub fn neighbour(control: &Path, entries: u64, cpu: Option<usize>) -> std::io::Result<Helper> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(NEIGHBOUR).arg(control).arg(entries.to_string());
        command.args(cpu.map(|cpu| cpu.to_string()));
        Helper::start(command)
    }

    /// A daemon with its sockets in `folder`: [`front_end_socket`] and [`control_socket`].
    ///
    /// # Errors
    /// It does not start.
    pub fn daemon(folder: &Path) -> std::io::Result<Helper> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(DAEMON).arg(folder);
        Helper::start(command)
    }

    /// A worker that attaches to `control`, and has a reader, at the first order; whatever that is.
    ///
    /// # Errors
    /// It does not start.
    pub fn worker(control: &Path) -> std::io::Result<Helper> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(WORKER).arg(control);
        Helper::start(command)
    }

    fn start(mut command: Command) -> std::io::Result<Helper> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = process.stdin.take();
        let answers = process.stdout.take().ok_or(std::io::ErrorKind::BrokenPipe)?;
        let mut helper = Helper { process, orders, answers };
        helper.answer()?;
        Ok(helper)
    }

    /// Gives an order of [`order`] and waits until it holds.
    ///
    /// # Errors
    /// The process has ended.
    pub fn order(&mut self, order: u8) -> std::io::Result<()> {
        self.orders.as_mut().ok_or(std::io::ErrorKind::BrokenPipe)?.write_all(&[order])?;
        self.answer()
    }

    /// Gives a neighbour an order to work, and waits until it does: on a busy machine its processor may be another's.
    ///
    /// # Errors
    /// The process has ended, or got no turn for [`TURN`].
    pub fn set_to_work(&mut self, order: u8) -> std::io::Result<()> {
        let before = self.count()?;
        self.order(order)?;
        let until = Instant::now() + TURN;
        while self.count()? == before {
            if Instant::now() >= until {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// How many operations a neighbour has done so far.
    ///
    /// # Errors
    /// The process has ended.
    pub fn count(&mut self) -> std::io::Result<u64> {
        self.order(order::COUNT)?;
        let mut count = [0; 8];
        self.answers.read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }

    /// Its process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    fn answer(&mut self) -> std::io::Result<()> {
        self.answers.read_exact(&mut [0])
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.orders.take());
        // It ends by itself: its input has.
        let _ = self.process.wait();
    }
}

/// Where a daemon in `folder` waits for its front-end.
#[must_use]
pub fn front_end_socket(folder: &Path) -> PathBuf {
    folder.join("vhost.sock")
}

/// Where a daemon in `folder` waits for workers.
#[must_use]
pub fn control_socket(folder: &Path) -> PathBuf {
    folder.join("control.sock")
}

/// Does what a child was started for; `None` when this process is none.
#[must_use]
pub fn run_if_child() -> Option<Result<(), Box<dyn std::error::Error>>> {
    let mut arguments = std::env::args().skip(1);
    let (kind, place) = (arguments.next()?, arguments.next());
    match (kind.as_str(), place) {
        (NEIGHBOUR, Some(control)) => {
            let entries = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1);
            let cpu = arguments.next().and_then(|text| text.parse().ok());
            Some(neighbour(Path::new(&control), entries, cpu))
        }
        (DAEMON, Some(folder)) => Some(daemon(Path::new(&folder))),
        (WORKER, Some(control)) => Some(worker(Path::new(&control))),
        _ => None,
    }
}

fn say_ready() -> std::io::Result<()> {
    say(b".")
}

fn say(bytes: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout();
    out.write_all(bytes)?;
    out.flush()
}

fn neighbour(control: &Path, entries: u64, cpu: Option<usize>) -> Result<(), Box<dyn std::error::Error>> {
    static WANTED: AtomicU32 = AtomicU32::new(order::REST as u32);
    static DONE: AtomicU64 = AtomicU64::new(0);
    let worker =
        Attachment::connect(control, &AttachOptions { label: "neighbour".into(), ..AttachOptions::default() })?;
    let visits = visits(&rig::pages(entries));
    let load = std::thread::current();
    let orders = std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut order = [0];
        say_ready()?;
        while stdin.read_exact(&mut order).is_ok() {
            // Relaxed: nothing comes with it; here and below.
            if order[0] == order::COUNT {
                say_ready()?;
                say(&DONE.load(Ordering::Relaxed).to_ne_bytes())?;
                continue;
            }
            WANTED.store(u32::from(order[0]), Ordering::Relaxed);
            load.unpark();
            say_ready()?;
        }
        WANTED.store(0, Ordering::Relaxed);
        load.unpark();
        std::io::Result::Ok(())
    });
    // Only now: the threads that are there already may be wherever there is room.
    bind(cpu);
    let reader = worker.reader()?;
    let mut at = 0;
    loop {
        // Relaxed, as in the other thread. What is no order ends the process.
        match u8::try_from(WANTED.load(Ordering::Relaxed)).unwrap_or(0) {
            order::LOOKUPS => at = hit::bursts(&reader, &visits, at, STRETCH),
            order::CHANGING => at = hit::changing_bursts(&reader, &visits, at, STRETCH),
            order::LOADS => hit::l1_chain(STRETCH),
            order::REST => {
                std::thread::park();
                continue;
            }
            _ => break,
        }
        DONE.fetch_add(STRETCH, Ordering::Relaxed);
    }
    orders.join().map_err(|_| "the thread that takes orders")??;
    Ok(())
}

fn worker(control: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut stdin = std::io::stdin().lock();
    // What the process takes before it is a worker can be looked at now.
    say_ready()?;
    stdin.read_exact(&mut [0])?;
    let worker = Attachment::connect(control, &AttachOptions::default())?;
    let mut reader = worker.reader()?;
    if !reader.wait_mapped(MAPS_MS) {
        return Err("guest memory was not mapped in time".into());
    }
    say_ready()?;
    // Until the parent has looked.
    let _ = stdin.read(&mut [0])?;
    Ok(())
}

fn daemon(folder: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let (stop_reader, stop) = std::io::pipe()?;
    // What the process takes before it serves anything can be looked at now.
    say_ready()?;
    std::io::stdin().lock().read_exact(&mut [0])?;
    let source = FrontEndSource::Path { path: front_end_socket(folder), mode: 0o600 };
    let config = ServerConfig::new(DeviceKind::Net { queue_pairs: 1 }, source, control_socket(folder));
    let server = Server::start(config)?;
    say_ready()?;
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut order = [0];
        while stdin.read_exact(&mut order).is_ok() {
            // A parent that asks now and then only wants to know that the process lives.
            if say_ready().is_err() {
                break;
            }
        }
        drop(stop);
    });
    server.run(OwnedFd::from(stop_reader))?;
    Ok(())
}
