//! Running a program with a deadline.

use std::io;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Why a program gave no result.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("{program}: cannot start it")]
    Start {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Its output could not be read.
    #[error("{program}: cannot read its output")]
    Output {
        /// Its name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It did not end in time and was killed.
    #[error("{line}: not done after {limit:?}, killed")]
    Deadline {
        /// The whole command line.
        line: String,
        /// What it was given.
        limit: Duration,
    },
    /// It ended with a failure.
    #[error("{line}: {status}\n{output}")]
    Failed {
        /// The whole command line.
        line: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote, standard error last.
        output: String,
    },
}

/// Runs `command` to its end and returns what it wrote to standard output.
///
/// # Errors
/// It cannot be started, does not end within `limit`, or ends with a failure.
pub fn run(command: &mut Command, limit: Duration) -> Result<String, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let line = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().map_err(|source| CommandError::Start { program: program.clone(), source })?;
    let pid = pid_of(&child);
    let (done, result) = mpsc::channel();
    let reader = thread::spawn(move || done.send(child.wait_with_output()));
    let output = match result.recv_timeout(limit) {
        Ok(output) => output.map_err(|source| CommandError::Output { program, source })?,
        Err(_) => {
            // The reader has not reaped the child, so the number is still its own. An error means it has just ended.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = reader.join();
            return Err(CommandError::Deadline { line, limit });
        }
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let output_text = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    Err(CommandError::Failed { line, status: output.status, output: output_text })
}

/// The child's process number in the form the signal calls take.
///
/// # Panics
/// Never: process numbers of Linux fit 22 bits.
#[must_use]
pub fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("a Linux process number fits 22 bits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_returned() {
        assert_eq!(run(Command::new("echo").arg("word"), Duration::from_secs(60)).expect("echo runs"), "word\n");
    }

    #[test]
    fn a_failure_says_what_was_run_and_what_it_wrote() {
        let error = run(Command::new("sh").args(["-c", "echo reason >&2; exit 3"]), Duration::from_secs(60));
        let text = error.expect_err("status 3").to_string();
        assert!(text.contains("exit 3") && text.contains("reason"), "{text}");
    }

    #[test]
    fn a_program_that_hangs_is_killed() {
        let error = run(Command::new("sleep").arg("1000"), Duration::from_millis(10)).expect_err("sleeps");
        assert!(matches!(error, CommandError::Deadline { .. }), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("no-such-program-here"), Duration::from_secs(60)).expect_err("missing");
        assert!(error.to_string().contains("no-such-program-here"), "{error}");
    }
}
