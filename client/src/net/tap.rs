//! A queue of a TAP device.
//!
//! Workers of one guest share a multi-queue TAP: each opens a queue of its own for each pair. The kernel spreads flows
//! over all queues that are *attached*. A queue that nobody reads must not be one of them: its share of the flows would
//! be lost. So a queue is **detached** (`TUNSETQUEUE`) but for the time in which a guest's receive ring takes packets:
//! the kernel steers nothing to it, while writes go on as before. Detaching drops what waits in the queue. Both need no
//! right but the open descriptor; a security module may have a say in attaching.
//!
//! Header size and byte order belong to the device and are the same for all; offloads too, but they depend on what the
//! guest acknowledged and concern only packets *for* the guest, so only workers that serve guest RX set them.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use iotlb_proto::vhost_user::features::virtio;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::header::HEADER_LEN;

const DEVICE: &str = "/dev/net/tun";

/// Bytes of a device name, with the terminating zero.
const NAME_SIZE: usize = libc::IFNAMSIZ;

/// Offloads that kernels before 6.2 refuse.
const OFFLOAD_USO: u32 = 0x20 | 0x40;
const OFFLOAD_CSUM: u32 = 0x01;
const OFFLOAD_TSO4: u32 = 0x02;
const OFFLOAD_TSO6: u32 = 0x04;
const OFFLOAD_TSO_ECN: u32 = 0x08;

mod ioctl {
    //! `linux/if_tun.h`. The numbers say `int` where the argument is a structure, so they are spelled out.
    use std::ffi::c_int;

    use nix::request_code_write as code;

    nix::ioctl_write_ptr_bad!(set_iff, code!(b'T', 202, size_of::<c_int>()), libc::ifreq);
    nix::ioctl_write_int_bad!(set_offload, code!(b'T', 208, size_of::<c_int>()));
    nix::ioctl_write_ptr_bad!(set_header_size, code!(b'T', 216, size_of::<c_int>()), c_int);
    nix::ioctl_write_ptr_bad!(set_queue, code!(b'T', 217, size_of::<c_int>()), libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_little_endian, code!(b'T', 220, size_of::<c_int>()), c_int);
}

/// Which way packets go through a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the guest, and from it.
    Both,
    /// From the guest only.
    FromGuest,
}

/// Why a TAP queue could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Empty, too long, or with characters no device has.
    #[error("--tap {name:?} is no device name: 1 to 15 characters, without '/' and spaces")]
    Name {
        /// As given.
        name: String,
    },
    /// The control device.
    #[error("cannot open {DEVICE} ({source}): is the tun module loaded, and the device passed to the container?")]
    Open {
        /// What the kernel said.
        source: io::Error,
    },
    /// No right to this TAP.
    #[error(
        "may not use TAP {name}: create it beforehand for this user with `ip tuntap add dev {name} mode tap \
         multi_queue vnet_hdr user USER`, or run with CAP_NET_ADMIN"
    )]
    Permission {
        /// The device.
        name: String,
    },
    /// It exists in another form.
    #[error(
        "TAP {name} exists, but not as a multi-queue TAP with virtio headers: remove it, then create it with \
         `ip tuntap add dev {name} mode tap multi_queue vnet_hdr`"
    )]
    Kind {
        /// The device.
        name: String,
    },
    /// A queue cannot be attached, for which the kernel asks no right but a security module's.
    #[error(
        "TAP {name}: a queue cannot be attached ({source}): if a security module forbids it, allow it there (SELinux \
         calls it `attach_queue` of `tun_socket`)"
    )]
    Attach {
        /// The device.
        name: String,
        /// What the kernel said.
        source: Errno,
    },
    /// Any other step.
    #[error("TAP {name}: {step} failed: {source}")]
    Step {
        /// The device.
        name: String,
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

/// How a packet fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The kernel took it.
    Sent,
    /// There is no room now; try again when the queue becomes writable, which is announced.
    Full,
    /// The kernel refused this packet (a hostile header, the device is down): it is lost.
    Refused,
}

/// Whether the kernel steers packets to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steering {
    Detached,
    Attached,
    /// Attached for good: the kernel did not detach the queue when it was asked to.
    Fixed,
}

/// One queue; non-blocking.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offloads: Option<u32>,
    steering: Steering,
    /// The log says that the device is down, and nothing was sent since.
    told_down: bool,
}

impl Tap {
    /// Opens one more queue of device `name`, which is created when there is none and this process may. The queue is
    /// detached.
    ///
    /// # Errors
    ///
    /// See [`TapError`].
    pub fn open(name: &str, direction: Direction) -> Result<Tap, TapError> {
        let mut request = request_for(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|source| TapError::Open { source })?;
        let fail = |step| {
            let name = name.to_owned();
            move |source| match source {
                Errno::EPERM | Errno::EACCES => TapError::Permission { name },
                Errno::EINVAL | Errno::EBUSY if step == "TUNSETIFF" => TapError::Kind { name },
                _ => TapError::Step { name, step, source },
            }
        };
        set_flags(&mut request, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE);
        let fd = file.as_raw_fd();
        // SAFETY: the request lives across the call, which reads it and writes the name back into it; the descriptor is
        // open.
        unsafe { ioctl::set_iff(fd, &raw const request) }.map_err(fail("TUNSETIFF"))?;
        // 12 fits.
        let size = i32::try_from(HEADER_LEN).unwrap_or(i32::MAX);
        // SAFETY: the call reads one int that lives across it; the descriptor is open.
        unsafe { ioctl::set_header_size(fd, &raw const size) }.map_err(fail("TUNSETVNETHDRSZ"))?;
        let yes = 1;
        // SAFETY: as above.
        match unsafe { ioctl::set_little_endian(fd, &raw const yes) } {
            // Kernels without cross-endian support know the machine's byte order only, which is this one.
            Err(Errno::EINVAL) if cfg!(target_endian = "little") => {}
            other => drop(other.map_err(fail("TUNSETVNETLE"))?),
        }
        let mut tap =
            Tap { file, name: name.to_owned(), offloads: None, steering: Steering::Attached, told_down: false };
        match direction {
            Direction::Both => {
                tap.detach();
            }
            // Never to be attached, so without this it is of no use.
            Direction::FromGuest => {
                tap.set_queue(libc::IFF_DETACH_QUEUE).map_err(fail("TUNSETQUEUE"))?;
                tap.steering = Steering::Detached;
            }
        }
        Ok(tap)
    }

    /// Whether the kernel steers packets to this queue.
    #[must_use]
    pub fn attached(&self) -> bool {
        self.steering != Steering::Detached
    }

    /// Has the kernel steer packets to this queue. The queue is empty then, unless it was attached before.
    ///
    /// # Errors
    ///
    /// [`TapError::Attach`].
    pub fn attach(&mut self) -> Result<(), TapError> {
        if !self.attached() {
            let attached = self.set_queue(libc::IFF_ATTACH_QUEUE);
            attached.map_err(|source| TapError::Attach { name: self.name.clone(), source })?;
            self.steering = Steering::Attached;
        }
        Ok(())
    }

    /// Has the kernel steer nothing to this queue, and drop what waits in it. Where it refuses, the queue stays
    /// attached from then on, and the log says so. Returns whether the queue was detached by this.
    pub fn detach(&mut self) -> bool {
        if self.steering == Steering::Attached {
            self.steering = match self.set_queue(libc::IFF_DETACH_QUEUE) {
                Ok(()) => Steering::Detached,
                Err(source) => {
                    tracing::warn!(
                        tap = self.name,
                        %source,
                        "cannot detach a queue of the TAP: while no guest takes packets from it, flows that the kernel \
                         steers to it are lost, also if another queue is served"
                    );
                    Steering::Fixed
                }
            };
            return !self.attached();
        }
        false
    }

    fn set_queue(&self, flag: libc::c_int) -> Result<(), Errno> {
        // The queue is that of the descriptor; the name is not looked at.
        let mut request = empty_request();
        set_flags(&mut request, flag);
        // SAFETY: the request lives across the call, which only reads it; `self.file` keeps the descriptor open.
        unsafe { ioctl::set_queue(self.file.as_raw_fd(), &raw const request) }.map(drop)
    }

    /// Whether [`Tap::set_offloads`] has nothing to do.
    #[must_use]
    pub fn has_offloads(&self, features: u64) -> bool {
        self.offloads == Some(offloads(features))
    }

    /// Has the next [`Tap::set_offloads`] set them again: through another queue others may be set meanwhile.
    pub fn forget_offloads(&mut self) {
        self.offloads = None;
    }

    /// Lets the kernel hand out packets as large, and checksums as unfinished, as the guest can take.
    ///
    /// # Errors
    ///
    /// [`TapError::Step`].
    pub fn set_offloads(&mut self, features: u64) -> Result<(), TapError> {
        if self.has_offloads(features) {
            return Ok(());
        }
        let wanted = offloads(features);
        let set = |bits: u32| {
            // SAFETY: the argument is a number; the descriptor is open.
            unsafe { ioctl::set_offload(self.file.as_raw_fd(), bits.cast_signed()) }
        };
        match set(wanted) {
            Err(Errno::EINVAL) if wanted & OFFLOAD_USO != 0 => set(wanted & !OFFLOAD_USO),
            other => other,
        }
        .map_err(|source| TapError::Step { name: self.name.clone(), step: "TUNSETOFFLOAD", source })?;
        self.offloads = Some(wanted);
        Ok(())
    }

    /// Reads one packet, header first; `None` when there is none, 0 bytes when the kernel dropped it: a header cannot
    /// say everything that the kernel's own packets can be.
    ///
    /// # Errors
    ///
    /// That the device is gone, or that a security module forbids it.
    pub fn read(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.file.read(packet) {
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Not up (yet): nothing to read either.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(None),
                // These come before a packet is taken out of the queue.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EPERM | libc::EACCES)) => {
                    return Err(error);
                }
                // All others are of one packet, which is gone.
                Err(_) => return Ok(Some(0)),
            }
        }
    }

    /// Writes one packet, header first.
    ///
    /// # Errors
    ///
    /// That the device is gone.
    pub fn write(&mut self, packet: &[u8]) -> io::Result<Written> {
        loop {
            match self.file.write(packet) {
                Ok(_) => {
                    self.told_down = false;
                    return Ok(Written::Sent);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    // The kernel announces room only to who asked for it since there was none; a write does not count.
                    let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
                    if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..)) {
                        return Ok(Written::Full);
                    }
                    // There is some by now, and nobody will say so.
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(error),
                Err(error) => {
                    // Said of a device that is down and of nothing else, so it is not the guest that fills the log.
                    if error.raw_os_error() == Some(libc::EIO) && !self.told_down {
                        self.told_down = true;
                        tracing::warn!("TAP {0} is down, packets are lost: run `ip link set {0} up`", self.name);
                    }
                    return Ok(Written::Refused);
                }
            }
        }
    }

    /// To wait on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `TUN_F_*` for what the guest acknowledged. Segmentation needs checksum offload.
fn offloads(features: u64) -> u32 {
    let bit = |feature, flag| if features & feature != 0 { flag } else { 0 };
    if features & virtio::NET_GUEST_CSUM == 0 {
        return 0;
    }
    let segmentation = bit(virtio::NET_GUEST_TSO4, OFFLOAD_TSO4) | bit(virtio::NET_GUEST_TSO6, OFFLOAD_TSO6);
    let ecn = if segmentation != 0 { bit(virtio::NET_GUEST_ECN, OFFLOAD_TSO_ECN) } else { 0 };
    // The kernel knows both kinds together or not at all.
    let uso = virtio::NET_GUEST_USO4 | virtio::NET_GUEST_USO6;
    let uso = if features & uso == uso { OFFLOAD_USO } else { 0 };
    OFFLOAD_CSUM | segmentation | ecn | uso
}

fn request_for(name: &str) -> Result<libc::ifreq, TapError> {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b'%' && byte != b':';
    if name.is_empty() || name.len() >= NAME_SIZE || !name.bytes().all(plain) || name == "." || name == ".." {
        return Err(TapError::Name { name: name.to_owned() });
    }
    let mut request = empty_request();
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = std::ffi::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

fn empty_request() -> libc::ifreq {
    // SAFETY: a C structure of numbers and addresses, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

fn set_flags(request: &mut libc::ifreq, flags: libc::c_int) {
    // The flags of TAP are 16 bits, the upper one the sign bit of the field.
    #[expect(clippy::cast_possible_truncation, reason = "16 flag bits in a signed field")]
    let flags = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
}

#[cfg(test)]
mod tests;
