//! A podman with a store, run directory and settings of its own.
//!
//! Nothing of the machine's own containers is seen or changed. Four settings make it work on machines without systemd,
//! without `CAP_SYS_RESOURCE` and with hybrid control groups; they stand in a file of their own (`CONTAINERS_CONF`).
//! Everything is removed on drop. What a killed test run left behind is removed by the next one: a lock that the kernel
//! drops with its holder tells the living from the dead.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::command::{self, CommandError};

/// Longest an ordinary podman command may take. They take less than a second on an idle machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// How the state directories are called.
const PREFIX: &str = "pods-";

/// Programs the tests need, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 2] = [("podman", "podman"), ("runc", "runc")];

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A program is missing.
    #[error(
        "{program} is not installed: apt-get install {package} (./tests/run does that), or leave the container tests \
         out with IOTLBD_SKIP_CONTAINERS=1"
    )]
    Missing {
        /// The program.
        program: &'static str,
        /// The Debian package it comes with.
        package: &'static str,
    },
    /// The private directory cannot be made.
    #[error("cannot prepare {path}")]
    Directory {
        /// The directory or file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// podman failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A podman of our own.
#[derive(Debug)]
pub struct Engine {
    state: PathBuf,
    // Held for as long as the engine lives: says that the directory is in use.
    _lock: File,
}

impl Engine {
    /// Makes an engine with its state in a new directory below `parent`.
    ///
    /// # Errors
    /// podman or runc is missing, or the directory cannot be written.
    pub fn open(parent: &Path) -> Result<Engine, EngineError> {
        for (program, package) in PROGRAMS {
            if !on_path(program) {
                return Err(EngineError::Missing { program, package });
            }
        }
        let fail = |path: &Path| {
            let path = path.to_owned();
            |source| EngineError::Directory { path, source }
        };
        fs::create_dir_all(parent).map_err(fail(parent))?;
        remove_left_over(parent);
        let state = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent).map_err(fail(parent))?.keep();
        fs::create_dir(state.join("networks")).map_err(fail(&state))?;
        let lock_path = lock_path(&state);
        let lock = File::create(&lock_path).map_err(fail(&lock_path))?;
        lock.lock().map_err(fail(&lock_path))?;
        let settings = settings_path(&state);
        fs::write(&settings, settings_text(&state)).map_err(fail(&settings))?;
        Ok(Engine { state, _lock: lock })
    }

    /// Where this engine keeps everything; gone when it is dropped.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A podman command on this engine's store, to which arguments are added.
    #[must_use]
    pub fn command(&self) -> Command {
        podman(&self.state)
    }

    /// Runs `podman ARGUMENTS` and returns its output.
    ///
    /// # Errors
    /// It fails or hangs.
    pub fn run(&self, arguments: &[&str]) -> Result<String, EngineError> {
        Ok(command::run(self.command().args(arguments), COMMAND_LIMIT)?)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        clean(&self.state);
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian has them in these two, which are not on everybody's PATH.
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).any(|directory| directory.join(program).is_file())
}

fn podman(state: &Path) -> Command {
    let mut command = Command::new("podman");
    command
        .env("CONTAINERS_CONF", settings_path(state))
        // Builds put their working copies here.
        .env("TMPDIR", state)
        .arg("--root")
        .arg(state.join("store"))
        .arg("--runroot")
        .arg(state.join("run"))
        .arg("--tmpdir")
        .arg(state.join("tmp"))
        // The plainest driver: works on every file system. The images are a few megabytes.
        .args(["--storage-driver", "vfs"]);
    command
}

fn settings_path(state: &Path) -> PathBuf {
    state.join("containers.conf")
}

fn lock_path(state: &Path) -> PathBuf {
    state.join("lock")
}

/// Why each line: the default limits need `CAP_SYS_RESOURCE`; crun refuses hybrid control groups; the other two need
/// a running systemd. Locks in files, not in the machine's one shared segment. No networks, so no warnings about them.
fn settings_text(state: &Path) -> String {
    format!(
        r#"[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
[network]
network_config_dir = "{}"
"#,
        state.join("networks").display()
    )
}

/// Removes the state of engines whose process is gone.
fn remove_left_over(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let state = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let in_use = match File::open(lock_path(&state)) {
            Ok(lock) => matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
            // No lock: just being made by somebody else.
            Err(_) => true,
        };
        if !in_use {
            clean(&state);
        }
    }
}

/// Ends all containers of a store and removes it. Errors are shown, not returned: this runs on drop.
fn clean(state: &Path) {
    for arguments in [["rm", "--all", "--force", "--time=0"].as_slice(), &["volume", "rm", "--all", "--force"]] {
        if let Err(error) = command::run(podman(state).args(arguments), COMMAND_LIMIT) {
            eprintln!("containers: cleaning up: {error}");
        }
    }
    if let Err(error) = fs::remove_dir_all(state) {
        eprintln!("containers: cannot remove {}: {error}", state.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_on_the_path() {
        assert!(on_path("sh"));
        assert!(!on_path("no-such-program-here"));
    }

    #[test]
    fn a_missing_program_comes_with_the_package_to_install() {
        let text = EngineError::Missing { program: "podman", package: "podman" }.to_string();
        assert!(text.contains("apt-get install podman") && text.contains("IOTLBD_SKIP_CONTAINERS"), "{text}");
    }
}
