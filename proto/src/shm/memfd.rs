//! Creating, sealing and checking memfds.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

/// A step with a memfd that failed.
#[derive(Debug, thiserror::Error)]
pub enum MemfdError {
    /// `memfd_create`.
    #[error("cannot create a memfd for {name}: {source}")]
    Create {
        /// What it was for.
        name: String,
        /// The system's answer.
        source: Errno,
    },
    /// `ftruncate`.
    #[error("cannot size the memfd for {name} to {size} bytes: {source}")]
    Size {
        /// What it was for.
        name: String,
        /// Bytes.
        size: u64,
        /// The system's answer.
        source: Errno,
    },
    /// `F_ADD_SEALS`.
    #[error("cannot seal a memfd: {0}")]
    Seal(Errno),
    /// A descriptor that should be a sealed memfd answers no seals.
    #[error("the descriptor is no memfd: {0}")]
    NotMemfd(Errno),
    /// The size of a received memfd could still change under its mapping.
    #[error("the memfd's size is not sealed (seals {0:#x}); its owner could shrink it under the mapping")]
    NotSealed(u32),
    /// `fstat`.
    #[error("cannot stat a memfd: {0}")]
    Stat(Errno),
    /// The size is another than the one that was announced.
    #[error("the memfd has {found} bytes where {expected} were announced")]
    WrongSize {
        /// Announced.
        expected: u64,
        /// Found.
        found: u64,
    },
}

/// Creates a memfd of `size` zero bytes that may be sealed; close-on-exec, and not executable where the kernel can say
/// so (6.3 and later).
///
/// # Errors
/// Creating or sizing failed.
pub fn create(name: &str, size: u64) -> Result<OwnedFd, MemfdError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }
    .map_err(|source| MemfdError::Create { name: name.to_owned(), source })?;
    rustix::fs::ftruncate(&fd, size).map_err(|source| MemfdError::Size { name: name.to_owned(), size, source })?;
    Ok(fd)
}

/// Fixes the size for ever and forbids every *new* way to write: mappings made before go on being writable. After it no
/// holder of the descriptor can write, whatever it reopens.
///
/// # Errors
/// The seals were refused.
pub fn seal_read_only(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL)
        .map_err(MemfdError::Seal)
}

/// Fixes the size for ever.
///
/// # Errors
/// The seals were refused.
pub fn seal_size(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    rustix::fs::fcntl_add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(MemfdError::Seal)
}

/// Checks that a received descriptor is a memfd of exactly `size` bytes whose size cannot change any more.
///
/// # Errors
/// It is not.
pub fn check_sealed(fd: BorrowedFd<'_>, size: u64) -> Result<(), MemfdError> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(MemfdError::NotMemfd)?;
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(MemfdError::NotSealed(seals.bits()));
    }
    let stat = rustix::fs::fstat(fd.as_fd()).map_err(MemfdError::Stat)?;
    let found = u64::try_from(stat.st_size).unwrap_or(0);
    if found != size {
        return Err(MemfdError::WrongSize { expected: size, found });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_memfd_passes_the_check_and_others_do_not() {
        let fd = create("test", 8192).expect("memfd");
        assert!(matches!(check_sealed(fd.as_fd(), 8192), Err(MemfdError::NotSealed(_))));
        seal_size(fd.as_fd()).expect("seal");
        check_sealed(fd.as_fd(), 8192).expect("sealed");
        assert!(matches!(check_sealed(fd.as_fd(), 4096), Err(MemfdError::WrongSize { found: 8192, .. })));
        let (reader, _writer) = std::io::pipe().expect("pipe");
        assert!(matches!(check_sealed(reader.as_fd(), 0), Err(MemfdError::NotMemfd(_))));
    }
}
