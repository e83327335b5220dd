//! A network of the test's own.

use std::net::Ipv4Addr;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use super::GuestError;
use super::process::run;

/// The host's end of the TAP.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 1);
/// The guest's address.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The TAP's name.
pub(crate) const TAP: &str = "tap0";

/// A network namespace that holds nothing but a loopback and a TAP. Nothing can leave it.
///
/// The calling thread is in it from then on, and so are the programs and threads it starts. The namespace goes with the
/// last of them.
#[derive(Debug)]
pub struct Network(());

impl Network {
    /// Moves the calling thread into a new namespace and sets it up. `multi_queue`: the TAP takes several queues.
    ///
    /// # Errors
    /// [`GuestError::Namespace`] without the privilege, [`GuestError::Failed`] when `ip` fails.
    pub fn new(multi_queue: bool) -> Result<Network, GuestError> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(GuestError::Namespace)?;
        let address = format!("{HOST_ADDRESS}/24");
        ip(&["link", "set", "lo", "up"])?;
        let mut create = vec!["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"];
        create.extend(multi_queue.then_some("multi_queue"));
        ip(&create)?;
        ip(&["address", "add", &address, "dev", TAP])?;
        ip(&["link", "set", TAP, "up"])?;
        Ok(Network(()))
    }
}

fn ip(arguments: &[&str]) -> Result<(), GuestError> {
    run(Command::new("ip").args(arguments)).map(drop)
}
