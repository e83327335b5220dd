//! What can be seen of a container from outside: podman's facts, its namespaces, its rights.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::engine::{Engine, EngineError};

/// A container by name.
#[derive(Clone, Debug)]
pub struct View<'e> {
    engine: &'e Engine,
    name: String,
}

impl<'e> View<'e> {
    /// Looks at the container of that name.
    #[must_use]
    pub fn new(engine: &'e Engine, name: &str) -> View<'e> {
        View { engine, name: name.to_owned() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A fact from `podman inspect`, as a Go template.
    ///
    /// # Errors
    /// podman failed, as when there is no such container yet.
    pub fn inspect(&self, template: &str) -> Result<String, EngineError> {
        Ok(self.engine.run(&["inspect", "--format", template, &self.name])?.trim().to_owned())
    }

    /// Whether its first process runs.
    ///
    /// # Errors
    /// podman failed.
    pub fn running(&self) -> Result<bool, EngineError> {
        Ok(self.inspect("{{.State.Running}}")? == "true")
    }

    /// A file below `/proc/PID` of its first process, seen from this machine.
    ///
    /// # Errors
    /// The container is gone.
    pub fn proc(&self, file: &str) -> Result<PathBuf, EngineError> {
        Ok(PathBuf::from(format!("/proc/{}/{file}", self.inspect("{{.State.Pid}}")?)))
    }

    /// Identity of one of its namespaces, like `net:[4026531840]`.
    ///
    /// # Errors
    /// The container is gone.
    pub fn namespace(&self, kind: &str) -> Result<PathBuf, Box<dyn std::error::Error>> {
        Ok(fs::read_link(self.proc("ns")?.join(kind))?)
    }

    /// One field of its first process's `status` file.
    ///
    /// # Errors
    /// The container is gone or the kernel has no such field.
    pub fn status_field(&self, field: &str) -> Result<String, Box<dyn std::error::Error>> {
        let text = fs::read_to_string(self.proc("status")?)?;
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no field {field}"));
        Ok(value.ok_or_else(missing)?.trim().to_owned())
    }
}
