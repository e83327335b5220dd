//! Programs that end with the test that started them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

use super::{GuestError, Logs};
use crate::program::end_with_test;

/// How long a program may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A running program. It is killed when the value goes, and by the kernel when the thread that started it ends.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts a program; what it writes goes to the log of its name.
    ///
    /// # Errors
    /// [`GuestError::Start`] when it cannot be started, [`GuestError::Make`] when its log cannot be made.
    pub fn start(name: &str, mut command: Command, logs: &Logs) -> Result<Process, GuestError> {
        let log = logs.create(name)?;
        let start_error = |source| GuestError::Start { program: name.to_string(), source };
        let errors = log.try_clone().map_err(start_error)?;
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        end_with_test(&mut command);
        let mut child = command.spawn().map_err(start_error)?;
        // The child was not waited for, so its number is still its own.
        let pidfd = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .ok_or(io::Error::from(io::ErrorKind::InvalidData))
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
        match pidfd {
            Ok(pidfd) => Ok(Process { name: name.to_string(), child, pidfd, status: None }),
            Err(source) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(start_error(source))
            }
        }
    }

    /// The process number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Becomes readable when the program has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// [`GuestError::Ended`] if the program has ended.
    ///
    /// # Errors
    /// See above.
    pub fn check_running(&mut self) -> Result<(), GuestError> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(GuestError::Ended { program: self.name.clone(), status }),
        }
    }

    /// Waits for the program to end by itself.
    ///
    /// # Errors
    /// [`GuestError::TimedOut`] when it runs on.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, GuestError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Ok(status);
            }
            if !readable(&[self.pidfd.as_fd()], deadline)? {
                return Err(GuestError::TimedOut { what: format!("{} to end", self.name), limit });
            }
        }
    }

    /// Sends SIGTERM and waits for the end.
    ///
    /// # Errors
    /// [`GuestError::TimedOut`] when it runs on.
    pub fn terminate(&mut self) -> Result<ExitStatus, GuestError> {
        self.signal(Signal::SIGTERM);
        self.wait(END_LIMIT)
    }

    /// Sends SIGKILL and waits for the end.
    ///
    /// # Errors
    /// [`GuestError::TimedOut`] when it does not end, which only a hanging kernel could bring about.
    pub fn kill(&mut self) -> Result<ExitStatus, GuestError> {
        self.signal(Signal::SIGKILL);
        self.wait(END_LIMIT)
    }

    /// Sends a signal, unless the program has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            // Not yet waited for, so the number is still this child's. It may have ended: no harm.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Runs a program to its end and returns what it wrote.
///
/// # Errors
/// [`GuestError::Start`], or [`GuestError::Failed`] when it does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<String, GuestError> {
    let program = format!("{command:?}");
    end_with_test(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| GuestError::Start { program: program.clone(), source })?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(GuestError::Failed { program, status: output.status, output: text })
}

/// Waits until one of the descriptors is readable or hung up. False when the deadline comes first.
pub(crate) fn readable(descriptors: &[BorrowedFd<'_>], deadline: Instant) -> Result<bool, GuestError> {
    let mut set: Vec<PollFd<'_>> =
        descriptors.iter().map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN)).collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(|_| GuestError::Check("time-out too long".into()))?;
        match poll(&mut set, Some(&limit)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(GuestError::io("poll")(error.into())),
        }
    }
}

/// How often [`eventually`] looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Looks until `condition` holds, for things that give no sign when they happen.
pub(crate) fn eventually(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool, GuestError>,
) -> Result<(), GuestError> {
    let deadline = Instant::now() + limit;
    while !condition()? {
        if Instant::now() >= deadline {
            return Err(GuestError::TimedOut { what: what.to_string(), limit });
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    Ok(())
}
