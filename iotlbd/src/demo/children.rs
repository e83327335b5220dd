//! The demo's child processes: the daemon and the workers. None outlives the demo, however it ends.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::SigSet;
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

/// Lines of a child's standard error that are kept, to be shown when it fails.
const TAIL_LINES: usize = 20;
/// Time between two looks whether a child has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A child process, killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    tail: Arc<Mutex<VecDeque<String>>>,
    tail_thread: Option<JoinHandle<()>>,
}

/// How a child ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status.
    pub status: ExitStatus,
    /// The last lines of its standard error.
    pub tail: String,
}

impl Process {
    /// Starts `program` with piped standard streams and no signal blocked. Call it on the main thread: the child dies
    /// with the *thread* that started it.
    pub fn start(name: &str, program: &Path, arguments: &[OsString]) -> io::Result<Process> {
        let parent = rustix::process::getpid();
        let mut command = Command::new(program);
        command.args(arguments.iter().map(OsString::as_os_str).collect::<Vec<&OsStr>>());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C is for the demo, which then ends its children in the right order.
        command.process_group(0);
        // SAFETY: the closure runs between fork and exec and makes only three system calls; it allocates nothing and
        // takes no lock.
        unsafe {
            command.pre_exec(move || {
                // What is blocked here, for a descriptor to report it, would stay so in a child that has none.
                SigSet::empty().thread_set_mask()?;
                die_with(parent)
            });
        }
        let mut child = command.spawn()?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let tail_thread = child.stderr.take().map(|stderr| {
            let tail = Arc::clone(&tail);
            thread::spawn(move || keep_tail(BufReader::new(stderr), &tail))
        });
        Ok(Process { name: name.to_owned(), child, tail, tail_thread })
    }

    /// What the child is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The writing end of the child's standard input; the first caller gets it.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The reading end of the child's standard output; the first caller gets it.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// How the child ended, if it has.
    pub fn ended(&mut self) -> io::Result<Option<Ended>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        // Its standard error is at the end, unless a grandchild holds it; there are none.
        if let Some(thread) = self.tail_thread.take() {
            let _ = thread.join();
        }
        Ok(Some(Ended { status, tail: self.tail() }))
    }

    /// Waits at most `timeout` for the child to end by itself.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Option<Ended>> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(ended) = self.ended()? {
                return Ok(Some(ended));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(LOOK_EVERY);
        }
    }

    /// Asks the child to end.
    pub fn terminate(&mut self) {
        // `Child` has not been waited for, so the number still names this child and no other.
        if let Ok(None) = self.child.try_wait()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    fn tail(&self) -> String {
        let lines = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().fold(String::new(), |text, line| text + "\n    " + line)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only when the child has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In the child: die when the parent does, also when it died before we could say so.
fn die_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

fn keep_tail(stderr: impl BufRead, tail: &Mutex<VecDeque<String>>) {
    for line in stderr.lines().map_while(Result::ok) {
        let mut lines = tail.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let arguments = ["-c".into(), script.into()];
        Process::start("shell", Path::new("/bin/sh"), &arguments).expect("every system has a shell")
    }

    #[test]
    fn the_last_words_of_a_child_are_kept() {
        let mut process = shell("for n in 1 2 3; do echo line $n >&2; done; exit 3");
        let ended = process.wait(Duration::from_secs(20)).expect("a child of ours").expect("it ends by itself");
        assert_eq!(ended.status.code(), Some(3));
        assert_eq!(ended.tail, "\n    line 1\n    line 2\n    line 3");
    }

    #[test]
    fn a_child_can_be_asked_to_end() {
        let mut process = shell("read line");
        let stdin = process.stdin();
        assert!(process.ended().expect("a child of ours").is_none());
        process.terminate();
        let ended = process.wait(Duration::from_secs(20)).expect("a child of ours").expect("SIGTERM ends a shell");
        assert!(!ended.status.success());
        drop(stdin);
    }
}
