//! The guest itself.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Instant;

use tempfile::TempDir;

use super::logs::say;
use super::network::TAP;
use super::places::{self, Places};
use super::process::{Process, readable};
use super::serial::Serial;
use super::{GUEST_ADDRESS, GuestError, Kernel, Logs, Qemu, WATCHDOG};

/// What the name of the thread begins with that is the guest's processor.
const GUEST_THREAD: &str = "CPU 0/";

/// What stands between the guest's network device and its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// intel-iommu; the guest takes each mapping away as soon as it is done with it.
    Strict,
    /// intel-iommu; the guest lets mappings live on and takes all of them away now and then. Debian's default.
    Lazy,
    /// intel-iommu, but the guest maps its whole memory once, one to one.
    Passthrough,
    /// virtio-iommu, strict. The 6.12 kernel has the driver.
    VirtioStrict,
    /// No IOMMU, and the device does not offer `ACCESS_PLATFORM`: addresses are guest physical.
    Off,
}

/// What to boot, and against what.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// The QEMU.
    pub qemu: Qemu,
    /// The kernel.
    pub kernel: Kernel,
    /// The IOMMU.
    pub iommu: Iommu,
    /// The back-end; none for QEMU's own device on the TAP.
    pub vhost_user: Option<VhostUser>,
}

/// How QEMU speaks with a back-end.
#[derive(Clone, Debug)]
pub struct VhostUser {
    /// Its socket.
    pub socket: PathBuf,
    /// Pairs of queues to give the guest; the back-end has as many.
    pub queue_pairs: u16,
    /// Connect again when the connection ends.
    pub reconnect: bool,
}

/// A running guest.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    serial: Serial,
    /// Holds the serial socket's path.
    _directory: TempDir,
}

impl Machine {
    /// Boots a guest and waits until it takes commands.
    ///
    /// # Errors
    /// Any: something to boot is missing, QEMU ends, the guest does not come up within [`WATCHDOG`].
    pub fn boot(options: &MachineOptions, logs: &Logs) -> Result<Machine, GuestError> {
        let deadline = Instant::now() + WATCHDOG;
        let directory = TempDir::new().map_err(GuestError::io("making a folder for the serial port"))?;
        let port = directory.path().join("serial");
        let listener = UnixListener::bind(&port).map_err(GuestError::io("listening for the serial port"))?;

        let mut command = options.qemu.command()?;
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-smp", "1", "-cpu", options.processor()]);
        // Threads get names.
        command.args(["-name", "guest,debug-threads=on"]);
        command.args(["-machine", "q35,accel=tcg,kernel-irqchip=split,memory-backend=mem"]);
        command.args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"]);
        // Before the devices it serves.
        match options.iommu {
            Iommu::Strict | Iommu::Lazy | Iommu::Passthrough => {
                command.args(["-device", "intel-iommu,intremap=on,device-iotlb=on"]);
            }
            Iommu::VirtioStrict => {
                command.args(["-device", "virtio-iommu-pci"]);
            }
            Iommu::Off => {}
        }
        match &options.vhost_user {
            Some(VhostUser { socket, queue_pairs, reconnect }) => {
                let again = if *reconnect { ",reconnect-ms=100" } else { "" };
                command.arg("-chardev").arg(format!("socket,id=chr0,path={}{again}", socket.display()));
                command.arg("-netdev").arg(format!("vhost-user,id=n0,chardev=chr0,queues={queue_pairs}"));
            }
            None => {
                command.arg("-netdev").arg(format!("tap,id=n0,ifname={TAP},script=no,downscript=no,vhost=off"));
            }
        }
        command.arg("-device").arg(options.device());
        command.arg("-serial").arg(format!("file:{}", logs.path("console").display()));
        command.arg("-chardev").arg(format!("socket,id=port,path={}", port.display()));
        command.args(["-serial", "chardev:port"]);
        command.arg("-kernel").arg(options.kernel.image()?);
        command.arg("-initrd").arg(options.kernel.initramfs()?);
        command.arg("-append").arg(options.kernel_line());

        let mut process = Process::start("qemu", command, logs)?;
        if !readable(&[listener.as_fd(), process.pidfd()], deadline)? {
            return Err(GuestError::TimedOut { what: "QEMU to open the serial port".into(), limit: WATCHDOG });
        }
        process.check_running()?;
        let (stream, _) = listener.accept().map_err(GuestError::io("accepting the serial port"))?;
        let mut machine =
            Machine { process, serial: Serial::new(stream, logs.create("serial")?), _directory: directory };
        machine.wait_ready(deadline)?;
        machine.check_domain(options.iommu)?;
        Ok(machine)
    }

    fn wait_ready(&mut self, deadline: Instant) -> Result<(), GuestError> {
        let seconds = self.serial.ready(deadline)?;
        say(&format!("up after {seconds} s of its time"));
        Ok(())
    }

    /// Checks that the guest's kernel put the device into the domain that was asked for: a test of lazy mode in a
    /// guest that is strict would show nothing.
    fn check_domain(&mut self, iommu: Iommu) -> Result<(), GuestError> {
        let wanted = match iommu {
            Iommu::Strict | Iommu::VirtioStrict => "DMA",
            Iommu::Lazy => "DMA-FQ",
            Iommu::Passthrough => "identity",
            Iommu::Off => "none",
        };
        // The virtio device's parent is the PCI device, which is the IOMMU's business.
        let found = self.run(
            "cd -P /sys/class/net/eth0/device/.. && \
             if [ -e iommu_group ]; then cat iommu_group/type; else echo none; fi",
        )?;
        if found.trim() == wanted {
            return Ok(());
        }
        Err(GuestError::Check(format!("the guest's device is in domain {}, wanted {wanted}", found.trim())))
    }

    /// Runs a shell command in the guest and returns what it wrote.
    ///
    /// # Errors
    /// [`GuestError::Command`] when it ends with another status than 0, [`GuestError::TimedOut`] when it does not end
    /// within [`WATCHDOG`].
    pub fn run(&mut self, command: &str) -> Result<String, GuestError> {
        match self.serial.run(command, WATCHDOG)? {
            (0, output) => Ok(output),
            (status, output) => Err(GuestError::Command { command: command.to_string(), status, output }),
        }
    }

    /// Starts a shell command in the guest and leaves it running.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn start(&mut self, command: &str) -> Result<(), GuestError> {
        self.run(&format!("{command} >/dev/null 2>&1 &")).map(drop)
    }

    /// Starts a command in the guest; `meanwhile` runs on the host; then both are waited for.
    ///
    /// # Errors
    /// As [`Machine::run`], or what `meanwhile` returned.
    pub fn run_with<T>(
        &mut self,
        command: &str,
        meanwhile: impl FnOnce() -> Result<T, GuestError> + Send,
    ) -> Result<(String, T), GuestError>
    where
        T: Send,
    {
        std::thread::scope(|scope| {
            let other = scope.spawn(meanwhile);
            let output = self.run(command);
            let result = other.join().map_err(|_| GuestError::Check("the host's part panicked".into()))?;
            // The guest's error says more: the host's part often fails only for want of it.
            Ok((output?, result?))
        })
    }

    /// Has the guest's kernel restart the machine and waits until it takes commands again.
    ///
    /// # Errors
    /// As [`Machine::boot`].
    pub fn reboot(&mut self) -> Result<(), GuestError> {
        self.serial.send("reboot -f")?;
        self.wait_ready(Instant::now() + WATCHDOG)
    }

    /// Takes the driver from the network device and gives it back; the device is reset and set up anew.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn rebind(&mut self) -> Result<(), GuestError> {
        let device = self.run("basename $(readlink /sys/class/net/eth0/device)")?;
        let device = device.trim();
        self.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/unbind"))?;
        self.run(&format!("echo {device} >/sys/bus/virtio/drivers/virtio_net/bind && net-up"))?;
        Ok(())
    }

    /// Powers the guest off and waits for QEMU to end.
    ///
    /// # Errors
    /// [`GuestError::TimedOut`] when it does not end, [`GuestError::Ended`] when it ends badly.
    pub fn power_off(mut self) -> Result<(), GuestError> {
        self.serial.send("poweroff -f")?;
        let status = self.process.wait(WATCHDOG)?;
        if status.success() { Ok(()) } else { Err(GuestError::Ended { program: "qemu".into(), status }) }
    }

    /// Puts the guest's processor, and all the rest of QEMU, where they belong.
    ///
    /// # Errors
    /// QEMU has no such thread, or the system refuses.
    pub fn stay(&self, places: Places) -> Result<(), GuestError> {
        let mut guest_found = false;
        places::put(self.process.id(), |thread| {
            let is_guest = thread.starts_with(GUEST_THREAD);
            guest_found |= is_guest;
            if is_guest { places.guest } else { places.front_end }
        })?;
        if guest_found { Ok(()) } else { Err(GuestError::Check(format!("QEMU has no thread {GUEST_THREAD}*"))) }
    }

    /// The QEMU process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl MachineOptions {
    /// The processor model.
    fn processor(&self) -> &'static str {
        match (self.qemu, self.kernel) {
            // This pair comes up under emulation only without cmpxchg16b.
            (Qemu::V7, Kernel::V6_12) => "qemu64,-cx16",
            _ => "qemu64",
        }
    }

    fn device(&self) -> String {
        let mut device = String::from("virtio-net-pci,netdev=n0,mac=52:54:00:12:34:56,disable-legacy=on,romfile=");
        if self.iommu != Iommu::Off {
            device.push_str(",iommu_platform=on,ats=on");
        }
        // With MSI-X, 7.2 crashes under emulation as the guest starts a vhost-user device.
        if self.qemu == Qemu::V7 && self.vhost_user.is_some() {
            device.push_str(",vectors=0");
        }
        if self.vhost_user.as_ref().is_some_and(|back_end| back_end.queue_pairs > 1) {
            device.push_str(",mq=on");
        }
        device
    }

    fn kernel_line(&self) -> String {
        let iommu = match self.iommu {
            Iommu::Strict => "intel_iommu=on iommu.strict=1",
            Iommu::Lazy => "intel_iommu=on iommu.strict=0",
            Iommu::Passthrough => "intel_iommu=on iommu=pt",
            Iommu::VirtioStrict => "iommu.strict=1",
            Iommu::Off => "",
        };
        // A panic restarts the machine after a second, which the test sees as a command that never ends; the console's
        // log has the reason.
        // Under TCG on a busy machine the kernel's check that the timer ticks fails now and then, and ends the boot.
        format!("console=ttyS0 panic=1 no_timer_check guest.address={GUEST_ADDRESS}/24 {iommu}")
    }
}
