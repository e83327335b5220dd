//! What `tests/packages.sh` unpacked: the QEMUs and the kernels.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use super::GuestError;
use super::process::run;

/// A QEMU version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// 7.2, of Debian 12.
    V7,
    /// 10, of its backports.
    V10,
}

/// A guest kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// 6.1, of Debian 12.
    V6_1,
    /// 6.12, of its backports. Knows virtio-iommu too.
    V6_12,
}

fn cache() -> PathBuf {
    match std::env::var_os("IOTLBD_TEST_CACHE") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache"),
    }
}

fn existing(path: PathBuf) -> Result<PathBuf, GuestError> {
    if path.exists() { Ok(path) } else { Err(GuestError::Asset(path)) }
}

impl Qemu {
    fn root(self) -> PathBuf {
        cache().join(match self {
            Qemu::V7 => "qemu-7",
            Qemu::V10 => "qemu-10",
        })
    }

    /// A command that starts this QEMU from where it was unpacked, with its own libraries, modules and firmware.
    ///
    /// # Errors
    /// [`GuestError::Asset`] when it was not unpacked.
    pub fn command(self) -> Result<Command, GuestError> {
        let root = self.root();
        let mut command = Command::new(existing(root.join("usr/bin/qemu-system-x86_64"))?);
        let libraries = [root.join("usr/lib/x86_64-linux-gnu"), root.join("lib/x86_64-linux-gnu")];
        let joined = libraries.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>().join(":");
        command.env("LD_LIBRARY_PATH", joined).env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
        for share in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(root.join(share));
        }
        // Far quicker than the full firmware: nothing but a kernel is to be started.
        command.arg("-bios").arg(existing(root.join("usr/share/qemu/qboot.rom"))?);
        Ok(command)
    }
}

impl Kernel {
    fn root(self) -> PathBuf {
        cache().join(match self {
            Kernel::V6_1 => "linux-6.1",
            Kernel::V6_12 => "linux-6.12",
        })
    }

    /// The kernel image.
    ///
    /// # Errors
    /// [`GuestError::Asset`] when it was not unpacked.
    pub fn image(self) -> Result<PathBuf, GuestError> {
        existing(self.root().join("vmlinuz"))
    }

    /// The initramfs for this kernel, built when there is none or its parts are newer.
    ///
    /// # Errors
    /// [`GuestError::Asset`] without the kernel's modules, [`GuestError::Failed`] when a program for it is missing.
    pub fn initramfs(self) -> Result<PathBuf, GuestError> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
        let modules = existing(self.root().join("modules"))?;
        let image = self.root().join("initramfs.img");
        let parts = [scripts.join("init"), scripts.join("initramfs.sh"), modules];
        let newest = parts.iter().map(|path| modified(path)).max().unwrap_or(SystemTime::UNIX_EPOCH);
        if !image.exists() || modified(&image) <= newest {
            run(Command::new("sh").arg(scripts.join("initramfs.sh")).arg(self.root()).arg(&image))?;
        }
        Ok(image)
    }
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}
