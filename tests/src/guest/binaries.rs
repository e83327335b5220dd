//! The programs under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::GuestError;

/// Cargo's target directory, found from the running test's own path (`TARGET/PROFILE/deps/NAME-HASH`).
pub(crate) fn target_directory() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    own.ancestors().nth(3).map(Path::to_path_buf).unwrap_or_default()
}

/// The path of a program of this workspace in its release build, whatever the test was built as: guests are to meet
/// what is shipped, and the figures are to mean something.
///
/// # Errors
/// [`GuestError::Check`] when the build fails.
pub(crate) fn program(name: &str) -> Result<PathBuf, GuestError> {
    static BUILT: OnceLock<Result<(), String>> = OnceLock::new();
    BUILT.get_or_init(build).clone().map_err(GuestError::Check)?;
    let path = target_directory().join("release").join(name);
    if path.exists() { Ok(path) } else { Err(GuestError::Check(format!("cargo built no program {}", path.display()))) }
}

/// Cargo builds the programs of other packages than the tested one only when asked. Quick when they are fresh.
fn build() -> Result<(), String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "--release", "--workspace", "--bins", "--target-dir"])
        .arg(target_directory())
        .output()
        .map_err(|error| format!("cannot start cargo: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("cargo build failed, {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
}
