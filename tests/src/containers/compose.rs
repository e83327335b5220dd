//! The shipped compose file, brought up as a user would.
//!
//! podman-compose comes from Python's package index, in a version that understands the whole file; Debian 12 has one
//! that drops half of the settings. It is installed into cargo's target directory, not into the system.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::command::{self, CommandError};
use super::engine::Engine;

/// The program, and a checker that knows every field of the format.
const PACKAGES: [&str; 2] = ["podman-compose==1.6.0", "compose-spec==0.2.1"];

/// Installing and starting both take seconds.
const LIMIT: Duration = Duration::from_secs(180);

/// Fails on fields that the format does not have: podman-compose ignores them.
const CHECK: &str = "import sys; from compose_spec import PyOptions; \
                     PyOptions(apply_merge=True).from_yaml(open(sys.argv[1]).read())";

/// Why the file was not brought up.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// A file of ours could not be written.
    #[error("cannot prepare {path}")]
    Prepare {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tools cannot be installed.
    #[error("podman-compose cannot be installed; python3 and pip are needed: apt-get install python3-pip")]
    Install(#[source] CommandError),
    /// The file has a field that the format does not know, or podman-compose failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// The services of a compose file. Taken down on drop.
#[derive(Debug)]
pub struct Compose {
    tools: PathBuf,
    podman: PathBuf,
    file: PathBuf,
}

impl Compose {
    /// Checks `file` and starts its services with the images that are there. `cache` keeps the tools between runs.
    ///
    /// # Errors
    /// The tools are missing, the file is wrong, or a service does not start.
    pub fn up(engine: &Engine, file: &Path, cache: &Path) -> Result<Compose, ComposeError> {
        let tools = install(cache)?;
        command::run(python(&tools).args(["-c", CHECK]).arg(file), LIMIT)?;
        let compose = Compose { tools, podman: wrapper(engine)?, file: file.to_owned() };
        command::run(compose.command().args(["up", "--detach", "--no-build"]), LIMIT)?;
        Ok(compose)
    }

    fn command(&self) -> Command {
        let mut command = python(&self.tools);
        command.args(["-m", "podman_compose", "--podman-path"]).arg(&self.podman).arg("--file").arg(&self.file);
        command
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        if let Err(error) = command::run(self.command().args(["down", "--volumes", "--timeout=0"]), LIMIT) {
            eprintln!("containers: taking compose down: {error}");
        }
    }
}

fn python(tools: &Path) -> Command {
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", tools);
    command
}

/// Installs the tools where they are missing. A file written last says that all of them are there.
fn install(cache: &Path) -> Result<PathBuf, ComposeError> {
    let tools = cache.join("compose-tools");
    let complete = tools.join(".complete");
    let wanted = PACKAGES.join(" ");
    if fs::read_to_string(&complete).is_ok_and(|there| there == wanted) {
        return Ok(tools);
    }
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "install", "--quiet", "--upgrade", "--target"]).arg(&tools).args(PACKAGES);
    command::run(&mut pip, LIMIT).map_err(ComposeError::Install)?;
    fs::write(&complete, wanted).map_err(|source| ComposeError::Prepare { path: complete, source })?;
    Ok(tools)
}

/// podman-compose wants one program without arguments: a script that is our podman.
fn wrapper(engine: &Engine) -> Result<PathBuf, ComposeError> {
    let path = engine.state().join("podman");
    let podman = engine.command();
    let mut text = String::from("#!/bin/sh\n");
    for (name, value) in podman.get_envs() {
        if let Some(value) = value {
            text += &format!("export {}={}\n", name.display(), quoted(&value.to_string_lossy()));
        }
    }
    let words = std::iter::once(podman.get_program()).chain(podman.get_args());
    let words: Vec<String> = words.map(|word| quoted(&word.to_string_lossy())).collect();
    text += &format!("exec {} \"$@\"\n", words.join(" "));
    let prepare = |source| ComposeError::Prepare { path: path.clone(), source };
    fs::write(&path, text).map_err(prepare)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(prepare)?;
    Ok(path)
}

/// A word for the shell, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        for word in ["plain", "with space", "it's", "$HOME", ""] {
            let echoed = command::run(Command::new("sh").arg("-c").arg(format!("printf %s {}", quoted(word))), LIMIT);
            assert_eq!(echoed.expect("sh runs"), word);
        }
    }
}
