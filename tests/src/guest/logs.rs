//! Where a run's programs write.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::GuestError;
use super::binaries::target_directory;

/// How much of each log is shown when a test fails, bytes.
const SHOWN_BYTES: usize = 6000;

/// The folder of one run's logs, `guest-logs/NAME` in the target directory. Shown when the test fails.
#[derive(Debug)]
pub struct Logs {
    directory: PathBuf,
}

impl Logs {
    /// Makes the folder, empty.
    ///
    /// # Errors
    /// [`GuestError::Make`] when it cannot be made.
    pub fn new(name: &str) -> Result<Logs, GuestError> {
        let directory = target_directory().join("guest-logs").join(name);
        let remove = match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        match remove.and_then(|()| fs::create_dir_all(&directory)) {
            Ok(()) => Ok(Logs { directory }),
            Err(source) => Err(GuestError::Make { path: directory, source }),
        }
    }

    /// The path of one log.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// Opens one log, empty.
    pub(crate) fn create(&self, name: &str) -> Result<File, GuestError> {
        let path = self.path(name);
        File::create(&path).map_err(|source| GuestError::Make { path, source })
    }

    /// The paths of all logs, sorted.
    pub(crate) fn paths(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths
    }

    /// What a log says so far. Empty when there is none.
    pub fn read(&self, name: &str) -> String {
        read_lossy(&self.path(name))
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for path in self.paths() {
            let text = read_lossy(&path);
            let from = text.len().saturating_sub(SHOWN_BYTES);
            let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
            eprintln!("---- {} ----\n{}", path.display(), &text[from..]);
        }
    }
}

pub(crate) fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// Says something in every run, also of a test that passes.
///
/// The test harness shows what the print macros write only when a test fails.
pub(crate) fn say(text: &str) {
    // The harness names a test's thread after the test.
    let thread = std::thread::current();
    let _ = writeln!(io::stderr(), "{}: {text}", thread.name().unwrap_or("guest"));
}
