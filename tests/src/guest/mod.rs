//! Real guests: QEMU boots a Debian kernel whose virtio network device is served by `iotlbd` and its workers.
//!
//! A test takes [`exclusive`], enters a network namespace of its own with [`Network::new`], starts a [`Backend`],
//! boots a [`Machine`] and asks it to do things ([`checks`]). Every program it started ends with it, whatever happens,
//! and what it wrote stays in the run's [`Logs`].
//!
//! The guest takes shell commands over its second serial port (see `tests/guest/init`), so what happens in it is
//! written where it is checked: in the test.

mod assets;
mod backend;
mod binaries;
pub mod checks;
mod error;
mod logs;
mod machine;
mod network;
mod places;
mod process;
mod serial;

pub use assets::{Kernel, Qemu};
pub use backend::{Backend, RECEIVE_QUEUE, TRANSMIT_QUEUE};
pub use error::GuestError;
pub use logs::Logs;
pub use machine::{Iommu, Machine, MachineOptions, VhostUser};
pub use network::{GUEST_ADDRESS, HOST_ADDRESS, Network};
pub use places::Places;
pub use process::Process;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::not_tested::not_tested;

/// How long anything in a guest may take before the test gives up. A whole run takes 10 to 20 seconds on two idle
/// processors; the rest is for busy ones.
pub const WATCHDOG: Duration = Duration::from_secs(120);

static ONE_GUEST: Mutex<()> = Mutex::new(());

/// Waits until no other guest of this process runs. An emulated guest takes a processor for itself; two at a time would
/// only slow each other down.
pub fn exclusive() -> MutexGuard<'static, ()> {
    // A test that failed leaves no state that could harm the next one.
    ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True, and said, when the environment asks to leave the guests out (`IOTLBD_SKIP_GUEST=1`).
pub fn skipped() -> bool {
    let skip = std::env::var_os("IOTLBD_SKIP_GUEST").is_some_and(|value| value == "1");
    if skip {
        not_tested("IOTLBD_SKIP_GUEST=1");
    }
    skip
}
