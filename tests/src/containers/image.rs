//! The image of `deploy/Containerfile`, built without a registry.
//!
//! The shipped file starts from a public image with a Rust toolchain. Here an image of that name is made of next to
//! nothing: this machine's `/usr` and toolchain are mounted into it, read-only, while the shipped file's own lines run
//! in it. So every line is tried, nothing is downloaded, and cargo's output is kept between runs.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::command::{self, CommandError};
use super::engine::{Engine, EngineError};

/// The name the image gets.
pub const IMAGE: &str = "localhost/iotlbd:latest";

/// A cold build of all crates on two busy cores takes some three minutes.
const BUILD_LIMIT: Duration = Duration::from_secs(900);

/// Directories that are links into `/usr` on merged systems.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

/// Why the image was not built.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file or directory of the stand-in for the toolchain image.
    #[error("cannot prepare {path}")]
    Prepare {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The shipped file has no `FROM`, so there is nothing to stand in for.
    #[error("deploy/Containerfile: no line begins with FROM")]
    NoBase,
    /// rustc or cargo failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// podman failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Builds the image from the sources in `repository`. `cache` keeps cargo's output.
///
/// # Errors
/// A tool is missing or the build fails; the message has the build's output.
pub fn build(engine: &Engine, repository: &Path, cache: &Path) -> Result<(), ImageError> {
    let containerfile = repository.join("deploy/Containerfile");
    let text = fs::read_to_string(&containerfile).map_err(prepare(&containerfile))?;
    let base = base_name(&text).ok_or(ImageError::NoBase)?;
    build_base(engine, base)?;
    // The build inside has no network, so the crates have to be here.
    command::run(Command::new("cargo").args(["fetch", "--locked"]).current_dir(repository), BUILD_LIMIT)?;
    let sysroot =
        command::run(Command::new("rustc").args(["--print", "sysroot"]).current_dir(repository), BUILD_LIMIT)?;
    fs::create_dir_all(cache).map_err(prepare(cache))?;

    let mut podman = engine.command();
    podman.args(["build", "--pull=never", "--network=none", "--tag", IMAGE]);
    for directory in machine_directories() {
        mount(&mut podman, &directory, &directory, "ro");
    }
    mount(&mut podman, Path::new(sysroot.trim()), Path::new("/rust"), "ro");
    let cargo_home = cargo_home();
    // Unpacking a crate writes; two cargos take turns by cargo's own lock.
    mount(&mut podman, &cargo_home.join("registry"), Path::new("/cargo/registry"), "rw");
    let config = cargo_home.join("config.toml");
    if config.is_file() {
        mount(&mut podman, &config, Path::new("/cargo/config.toml"), "ro");
    }
    mount(&mut podman, cache, Path::new("/src/target"), "rw");
    podman.arg("--file").arg(&containerfile).arg(repository);
    command::run(&mut podman, BUILD_LIMIT)?;
    Ok(())
}

fn prepare(path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    |source| ImageError::Prepare { path, source }
}

/// The image named by the first `FROM`.
fn base_name(containerfile: &str) -> Option<&str> {
    containerfile.lines().find_map(|line| line.strip_prefix("FROM ")?.split_whitespace().next())
}

/// Makes the stand-in: mount points, this machine's links into `/usr`, and where to find cargo.
fn build_base(engine: &Engine, name: &str) -> Result<(), ImageError> {
    let root = engine.state().join("base");
    for directory in ["usr", "etc/alternatives", "tmp", "cargo", "rust", "root"] {
        let path = root.join(directory);
        fs::create_dir_all(&path).map_err(prepare(&path))?;
    }
    for directory in MERGED {
        let path = root.join(directory);
        match fs::read_link(Path::new("/").join(directory)) {
            Ok(target) => symlink(target, &path).map_err(prepare(&path))?,
            Err(_) => fs::create_dir_all(&path).map_err(prepare(&path))?,
        }
    }
    let file = engine.state().join("Containerfile.base");
    let text = "FROM scratch\n\
                COPY . /\n\
                ENV PATH=/rust/bin:/usr/bin:/bin CARGO_HOME=/cargo CARGO_NET_OFFLINE=true HOME=/root\n";
    fs::write(&file, text).map_err(prepare(&file))?;
    let mut podman = engine.command();
    podman.args(["build", "--quiet", "--tag", name, "--file"]).arg(&file).arg(&root);
    command::run(&mut podman, BUILD_LIMIT)?;
    Ok(())
}

/// What the linker and the shell need of this machine.
fn machine_directories() -> Vec<PathBuf> {
    let mut directories = vec![PathBuf::from("/usr")];
    // Debian's `cc` is a link through here.
    directories.extend(Some(PathBuf::from("/etc/alternatives")).filter(|path| path.is_dir()));
    directories.extend(MERGED.map(|name| Path::new("/").join(name)).into_iter().filter(|path| {
        // A real directory is one of an unmerged system; a link was copied into the image.
        path.symlink_metadata().is_ok_and(|data| data.is_dir())
    }));
    directories
}

fn cargo_home() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cargo");
    std::env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from)
}

fn mount(podman: &mut Command, from: &Path, to: &Path, mode: &str) {
    podman.arg("--volume").arg(format!("{}:{}:{mode}", from.display(), to.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_the_first_from() {
        assert_eq!(base_name("# FROM x\nFROM a/b:1 AS build\nFROM scratch\n"), Some("a/b:1"));
        assert_eq!(base_name("RUN true\n"), None);
    }
}
