//! Real guests behind a vIOMMU, served by `iotlbd` and separate worker processes.
//!
//! Needs root (a network namespace, a TAP) and what `tests/packages.sh` brings. Missing parts are a failure, not a
//! skip; `IOTLBD_SKIP_GUEST=1` leaves the guests out and says so.

use iotlb_tests::guest::{
    Backend, GuestError, Iommu, Kernel, Logs, Machine, MachineOptions, Network, Qemu, RECEIVE_QUEUE, TRANSMIT_QUEUE,
    VhostUser, checks, exclusive, skipped,
};

fn run(name: &str, test: impl FnOnce(&Logs) -> Result<(), GuestError>) {
    if skipped() {
        return;
    }
    let _only = exclusive();
    let logs = Logs::new(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    if let Err(error) = test(&logs) {
        panic!("{name}: {error}");
    }
}

/// Boots a guest against `backend`, runs `test` in it, and ends both in good order.
fn served(
    logs: &Logs,
    mut backend: Backend,
    (qemu, kernel, iommu): (Qemu, Kernel, Iommu),
    test: impl FnOnce(&mut Machine, &mut Backend) -> Result<(), GuestError>,
) -> Result<(), GuestError> {
    let options = MachineOptions { qemu, kernel, iommu, vhost_user: Some(backend.vhost_user()) };
    let mut machine = Machine::boot(&options, logs)?;
    test(&mut machine, &mut backend)?;
    backend.check_running()?;
    machine.power_off()?;
    backend.end()?;
    checks::no_trouble(logs)
}

/// All checks against the daemon and two workers on one TAP, one a queue.
fn two_workers(name: &str, qemu: Qemu, kernel: Kernel, iommu: Iommu) {
    run(name, |logs| {
        let _network = Network::new(true)?;
        served(logs, Backend::tap(logs)?, (qemu, kernel, iommu), |machine, _| checks::all(machine, logs))
    });
}

/// QEMU's own device on the same TAP: shows that the guest, the network and the checks are sound without any of ours.
#[test]
fn reference_without_iotlbd() {
    run("reference", |logs| {
        let _network = Network::new(false)?;
        let options = MachineOptions { qemu: Qemu::V10, kernel: Kernel::V6_12, iommu: Iommu::Strict, vhost_user: None };
        let mut machine = Machine::boot(&options, logs)?;
        checks::all(&mut machine, logs)?;
        machine.power_off()?;
        checks::no_trouble(logs)
    });
}

#[test]
fn qemu_10_strict() {
    two_workers("qemu-10-strict", Qemu::V10, Kernel::V6_12, Iommu::Strict);
}

#[test]
fn qemu_10_lazy() {
    two_workers("qemu-10-lazy", Qemu::V10, Kernel::V6_12, Iommu::Lazy);
}

#[test]
fn qemu_10_passthrough() {
    two_workers("qemu-10-passthrough", Qemu::V10, Kernel::V6_12, Iommu::Passthrough);
}

#[test]
fn qemu_10_virtio_iommu() {
    two_workers("qemu-10-virtio-iommu", Qemu::V10, Kernel::V6_12, Iommu::VirtioStrict);
}

#[test]
fn qemu_10_without_iommu() {
    two_workers("qemu-10-without-iommu", Qemu::V10, Kernel::V6_1, Iommu::Off);
}

/// QEMU 7.2 in lazy mode loses invalidations by itself, so it is tested in strict mode only.
#[test]
fn qemu_7_strict() {
    two_workers("qemu-7-strict", Qemu::V7, Kernel::V6_1, Iommu::Strict);
}

/// The device is reset and set up anew, by the driver and then by a reboot of the guest, with the same daemon and the
/// same workers throughout. The guest sends no invalidation then, and reuses its addresses for other pages.
#[test]
fn reset_and_reboot() {
    run("reset-and-reboot", |logs| {
        let _network = Network::new(true)?;
        served(logs, Backend::tap(logs)?, (Qemu::V10, Kernel::V6_12, Iommu::Strict), |machine, _| {
            checks::echoes(machine)?;
            for _ in 0..3 {
                machine.rebind()?;
                checks::ping(machine, 300, "-f")?;
            }
            machine.reboot()?;
            checks::echoes(machine)?;
            checks::transfers(machine)
        })
    });
}

/// Two pairs of queues are two devices to QEMU, each of which tells the daemon of memory, and of invalidations, by
/// itself. QEMU 7.2 does it with every region.
#[test]
fn two_pairs_of_queues() {
    for (qemu, kernel) in [(Qemu::V7, Kernel::V6_1), (Qemu::V10, Kernel::V6_12)] {
        run(&format!("two-pairs-{qemu:?}"), |logs| {
            let _network = Network::new(true)?;
            let parts = (qemu, kernel, Iommu::Strict);
            served(logs, Backend::tap_pairs(logs, 2)?, parts, |machine, _| {
                checks::echoes(machine)?;
                checks::transfers(machine)
            })
        });
    }
}

/// The daemon is killed, and another one is in its place. QEMU and the workers connect again by themselves.
#[test]
fn killed_daemon_is_followed() {
    run("killed-daemon", |logs| {
        let _network = Network::new(true)?;
        let mut backend = Backend::tap_with(logs, &["--reconnect"], None, None)?;
        let vhost_user = Some(VhostUser { reconnect: true, ..backend.vhost_user() });
        let options = MachineOptions { qemu: Qemu::V10, kernel: Kernel::V6_12, iommu: Iommu::Strict, vhost_user };
        let mut machine = Machine::boot(&options, logs)?;
        checks::ping(&mut machine, 300, "-f")?;
        machine.start("/programs/ping -f -s 9000 10.0.2.1")?;
        backend.replace_daemon("iotlbd-again", logs)?;
        checks::answered(&mut machine)?;
        machine.run("killall ping")?;
        checks::ping(&mut machine, 300, "-f")?;
        checks::transfers(&mut machine)?;
        backend.check_running()?;
        machine.power_off()?;
        backend.end()
    });
}

/// A worker that answers by itself, so that no TAP is needed.
#[test]
fn echo_worker() {
    run("echo-worker", |logs| {
        let _network = Network::new(false)?;
        let parts = (Qemu::V10, Kernel::V6_12, Iommu::Lazy);
        served(logs, Backend::echo(logs)?, parts, |machine, _| checks::echoes(machine))
    });
}

/// Each worker is killed under traffic and followed by another. Packets may be lost meanwhile; the guest, the daemon
/// and the other worker must not notice, and afterwards nothing may be lost.
#[test]
fn killed_workers_are_followed() {
    run("killed-workers", |logs| {
        let _network = Network::new(true)?;
        let parts = (Qemu::V10, Kernel::V6_12, Iommu::Strict);
        served(logs, Backend::tap(logs)?, parts, |machine, backend| {
            checks::ping(machine, 5, "-i 0.1")?;
            for (name, queue) in [("receive", RECEIVE_QUEUE), ("transmit", TRANSMIT_QUEUE)] {
                machine.start("/programs/ping -f -s 9000 10.0.2.1")?;
                backend.kill_worker(name)?;
                backend.add_tap_worker(&format!("{name}-again"), queue, logs)?;
                checks::answered(machine)?;
                machine.run("killall ping")?;
                checks::ping(machine, 300, "-f")?;
            }
            checks::transfers(machine)
        })
    });
}
