//! A front-end session: handshake, start, stop, memory regions. Messages go out in the order in which QEMU sends them.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iotlb_proto::iova::PAGE_MASK;
use iotlb_proto::vhost_user::features::{protocol, virtio};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::SimError;
use super::channel::{Channel, poll_fds};
use super::guest::{Guest, Region};
use super::iotlb::IotlbStats;
use super::viommu::Viommu;
use super::wire::{Body, Code, MessageHeader, code, read_u32, read_u64};

/// What the simulated QEMU negotiates of what is offered.
const WANTED_PROTOCOL: u64 =
    protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ | protocol::CONFIGURE_MEM_SLOTS | protocol::STATUS;

/// Status bits: the guest's driver has seen the device and agreed on features.
const STATUS_FEATURES_OK: u64 = 0x8;
/// Status bits: acknowledged, driver, features, running.
const STATUS_RUNNING: u64 = 0xf;

/// How a session is set up.
#[derive(Clone, Debug)]
pub struct FrontEndOptions {
    /// Queue pairs to drive; two rings each.
    pub queue_pairs: u16,
    /// Descriptors a ring; a power of two.
    pub queue_size: u16,
    /// Virtio features the driver would like; what is not offered is left out.
    pub features: u64,
    /// Use ADD_MEM_REG and REM_MEM_REG where offered, not SET_MEM_TABLE.
    pub memory_slots: bool,
    /// Answer misses with the permission the guest gave, not with read-write as QEMU does.
    pub exact_permissions: bool,
    /// Longest wait for anything.
    pub timeout: Duration,
}

impl Default for FrontEndOptions {
    fn default() -> FrontEndOptions {
        FrontEndOptions {
            queue_pairs: 1,
            queue_size: 256,
            features: virtio::VERSION_1 | virtio::ACCESS_PLATFORM | virtio::NET_MRG_RXBUF | virtio::EVENT_IDX,
            memory_slots: false,
            exact_permissions: false,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Where a ring's parts lie, as IOVAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
    /// Available index to start from.
    pub base: u16,
}

/// A ring's eventfds.
#[derive(Debug)]
pub struct RingEvents {
    /// Driver to device.
    pub kick: EventFd,
    /// Device to driver. A driver that waits for all of them holds them while the front-end serves misses.
    pub call: Arc<EventFd>,
    /// The device found the ring broken.
    pub err: EventFd,
}

/// A connected front-end with its guest and vIOMMU.
///
/// Like QEMU it does one thing at a time: while it waits for an answer on the main channel it does not look at the
/// back-end channel, so a daemon that makes an answer wait for a miss runs into the watchdog.
#[derive(Debug)]
pub struct FrontEnd {
    /// Guest memory.
    pub guest: Guest,
    /// The vIOMMU's page table. Change it with [`FrontEnd::unmap`] and its kin when the device should hear of it.
    pub viommu: Viommu,
    /// What happened on the IOTLB so far.
    pub stats: IotlbStats,
    pub(super) main: Channel,
    pub(super) back_end: Option<Channel>,
    pub(super) options: FrontEndOptions,
    rings: Vec<RingEvents>,
    protocol_features: u64,
    offered: u64,
    acked: u64,
}

impl FrontEnd {
    /// Connects to the daemon's socket, waiting for it to appear if need be, and shakes hands.
    pub fn connect(path: &Path, guest: Guest, options: FrontEndOptions) -> Result<FrontEnd, SimError> {
        let deadline = Instant::now() + options.timeout;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= deadline => {
                    return Err(SimError::Connect { path: path.to_owned(), source });
                }
                // The daemon may be starting. Nothing can tell us when, so look again shortly.
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        FrontEnd::over(stream, guest, options)
    }

    /// Listens on `path` and shakes hands with the first daemon that connects.
    pub fn listen(path: &Path, guest: Guest, options: FrontEndOptions) -> Result<FrontEnd, SimError> {
        let failed = |source| SimError::Listen { path: path.to_owned(), source };
        let listener = UnixListener::bind(path).map_err(failed)?;
        if !poll_fds(&[listener.as_fd()], options.timeout).map_err(failed)?[0] {
            let timeout_ms = options.timeout.as_millis();
            return Err(SimError::TimedOut { what: "the daemon to connect", timeout_ms });
        }
        let (stream, _) = listener.accept().map_err(failed)?;
        FrontEnd::over(stream, guest, options)
    }

    /// Shakes hands over a connected stream.
    pub fn over(stream: UnixStream, guest: Guest, options: FrontEndOptions) -> Result<FrontEnd, SimError> {
        let rings = (0..options.queue_pairs * 2)
            .map(|_| {
                let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
                Ok(RingEvents { kick: event()?, call: Arc::new(event()?), err: event()? })
            })
            .collect::<Result<Vec<_>, nix::Error>>()
            .map_err(|errno| SimError::System { what: "create an eventfd", source: errno.into() })?;
        let mut front_end = FrontEnd {
            guest,
            viommu: Viommu::default(),
            stats: IotlbStats::new(),
            main: Channel::new(stream, options.timeout),
            back_end: None,
            options,
            rings,
            protocol_features: 0,
            offered: 0,
            acked: 0,
        };
        front_end.shake_hands()?;
        Ok(front_end)
    }

    /// Virtio features in use.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.acked
    }

    /// How the session was set up.
    #[must_use]
    pub fn options(&self) -> &FrontEndOptions {
        &self.options
    }

    /// The eventfds of ring `index`.
    #[must_use]
    pub fn ring(&self, index: u16) -> &RingEvents {
        &self.rings[usize::from(index)]
    }

    /// The main channel and the back-end channel, for who wants to speak there without this type: benchmarks. Messages
    /// must not mix.
    #[must_use]
    pub fn channels(&self) -> (BorrowedFd<'_>, Option<BorrowedFd<'_>>) {
        (self.main.as_fd(), self.back_end.as_ref().map(AsFd::as_fd))
    }

    /// Tells the device to look at ring `index`.
    pub fn kick(&self, index: u16) -> Result<(), SimError> {
        match self.ring(index).kick.write(1) {
            Ok(_) => Ok(()),
            Err(errno) => Err(SimError::System { what: "kick a ring", source: errno.into() }),
        }
    }

    /// Starts the device: features, memory, rings, status, and the used rings' first pages unasked, as QEMU does.
    /// The rings' pages must be in the vIOMMU already.
    pub fn start(&mut self, rings: &[RingAddresses]) -> Result<(), SimError> {
        if rings.len() != self.rings.len() {
            let what = format!("{} ring addresses for {} rings", rings.len(), self.rings.len());
            return Err(SimError::Usage { what });
        }
        for pair in 0..self.options.queue_pairs {
            let features = self.acked | self.offered & virtio::PROTOCOL_FEATURES;
            self.send_u64(code::SET_FEATURES, features)?;
            if pair == 0 {
                if self.has(protocol::STATUS) {
                    self.ask_u64(code::GET_STATUS, &[])?;
                    self.send_u64(code::SET_STATUS, STATUS_FEATURES_OK)?;
                }
                self.send_memory()?;
            }
            for index in [pair * 2, pair * 2 + 1] {
                self.start_ring(index, rings[usize::from(index)])?;
            }
        }
        if self.has(protocol::STATUS) {
            self.ask_u64(code::GET_STATUS, &[])?;
            self.send_u64(code::SET_STATUS, STATUS_RUNNING)?;
        }
        if self.acked & virtio::ACCESS_PLATFORM != 0 {
            for ring in rings {
                self.push_update(ring.used & !PAGE_MASK)?;
            }
        }
        Ok(())
    }

    /// Stops the device as a guest's reset does: GET_VRING_BASE per ring, then status 0. No invalidation comes with it.
    /// Returns where each ring stood.
    pub fn stop(&mut self) -> Result<Vec<u16>, SimError> {
        let bases = (0..self.options.queue_pairs * 2).map(|index| self.vring_base(index)).collect();
        if self.has(protocol::STATUS) {
            self.send_u64(code::SET_STATUS, 0)?;
            // No answer comes to SET_STATUS. Asking shows that it was taken.
            let status = self.ask_u64(code::GET_STATUS, &[])?;
            if status != 0 {
                return Err(SimError::Protocol { what: format!("status {status:#x} after it was set to 0") });
            }
        }
        bases
    }

    /// Stops ring `index`: where it stood. After the answer nobody uses the ring.
    pub fn vring_base(&mut self, index: u16) -> Result<u16, SimError> {
        let body = Body::default().u32(u32::from(index)).u32(0).bytes();
        self.main.send(code::GET_VRING_BASE.1, MessageHeader::request(code::GET_VRING_BASE, 8, false), &body, &[])?;
        let answer = self.main.receive(code::GET_VRING_BASE.1)?;
        answer.header.expect_reply(code::GET_VRING_BASE, 8)?;
        let ring = read_u32(&answer.body).unwrap_or(u32::MAX);
        let base = read_u32(&answer.body[4..]).unwrap_or(u32::MAX);
        match u16::try_from(base) {
            Ok(base) if ring == u32::from(index) => Ok(base),
            _ => Err(SimError::Protocol { what: format!("ring {ring} at {base} in the answer about ring {index}") }),
        }
    }

    /// Enables or disables ring `index`.
    pub fn enable_ring(&mut self, index: u16, enabled: bool) -> Result<(), SimError> {
        let body = Body::default().u32(u32::from(index)).u32(u32::from(enabled)).bytes();
        self.acknowledged(code::SET_VRING_ENABLE, &body, &[])
    }

    /// Plugs memory into the running guest.
    pub fn add_region(&mut self, guest_address: u64, size: u64) -> Result<(), SimError> {
        self.guest.add_region(guest_address, size)?;
        if !self.uses_slots() {
            return self.send_memory();
        }
        let Some(region) = self.guest.regions().last() else { return Ok(()) };
        let body = Body::default().u64(0).region(region).bytes();
        self.acknowledged(code::ADD_MEM_REG, &body, &[region.fd()])
    }

    /// Unplugs memory. When this returns no back-end process uses the region. Mappings into it must be gone from the
    /// vIOMMU, or later misses name memory that is not there.
    pub fn remove_region(&mut self, guest_address: u64) -> Result<Region, SimError> {
        let region = self
            .guest
            .remove_region(guest_address)
            .ok_or_else(|| SimError::Usage { what: format!("no region at {guest_address:#x}") })?;
        if self.uses_slots() {
            let body = Body::default().u64(0).region(&region).bytes();
            self.acknowledged(code::REM_MEM_REG, &body, &[])?;
        } else {
            self.send_memory()?;
        }
        Ok(region)
    }

    /// Closes the connection, without a word as QEMU does. The guest lives on.
    #[must_use]
    pub fn disconnect(self) -> Guest {
        self.guest
    }

    fn shake_hands(&mut self) -> Result<(), SimError> {
        for pair in 0..self.options.queue_pairs {
            self.offered = self.ask_u64(code::GET_FEATURES, &[])?;
            if self.offered & virtio::PROTOCOL_FEATURES == 0 {
                return Err(SimError::Missing { what: "protocol features (bit 30)" });
            }
            self.acked = self.offered & self.options.features;
            let protocol_offer = self.ask_u64(code::GET_PROTOCOL_FEATURES, &[])?;
            self.protocol_features = protocol_offer & WANTED_PROTOCOL;
            // QEMU refuses to start an IOMMU device without these two.
            if !self.has(protocol::REPLY_ACK) || !self.has(protocol::BACKEND_REQ) {
                return Err(SimError::Missing { what: "REPLY_ACK and BACKEND_REQ" });
            }
            self.send_u64(code::SET_PROTOCOL_FEATURES, self.protocol_features)?;
            if pair == 0 {
                self.shake_hands_once()?;
            }
            self.ask_u64(code::GET_FEATURES, &[])?;
            for index in [pair * 2, pair * 2 + 1] {
                self.send_event(code::SET_VRING_CALL, index)?;
                self.send_event(code::SET_VRING_ERR, index)?;
            }
        }
        // QEMU enables every ring several times before any of them is set up.
        for _ in 0..2 {
            for index in 0..self.options.queue_pairs * 2 {
                self.enable_ring(index, true)?;
            }
        }
        Ok(())
    }

    fn shake_hands_once(&mut self) -> Result<(), SimError> {
        if self.has(protocol::MQ) {
            let pairs = self.ask_u64(code::GET_QUEUE_NUM, &[])?;
            if pairs < u64::from(self.options.queue_pairs) {
                let what = format!("{} queue pairs asked for, the daemon has {pairs}", self.options.queue_pairs);
                return Err(SimError::Usage { what });
            }
        }
        if self.uses_slots() && self.ask_u64(code::GET_MAX_MEM_SLOTS, &[])? == 0 {
            return Err(SimError::Protocol { what: "no memory slots".to_owned() });
        }
        let (ours, theirs) =
            UnixStream::pair().map_err(|source| SimError::System { what: "create the back-end channel", source })?;
        self.acknowledged(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        self.back_end = Some(Channel::new(ours, self.options.timeout));
        self.send(code::SET_OWNER, &[], &[])
    }

    fn start_ring(&mut self, index: u16, ring: RingAddresses) -> Result<(), SimError> {
        let number = u32::from(index);
        let size = Body::default().u32(number).u32(u32::from(self.options.queue_size)).bytes();
        self.send(code::SET_VRING_NUM, &size, &[])?;
        let base = Body::default().u32(number).u32(u32::from(ring.base)).bytes();
        self.send(code::SET_VRING_BASE, &base, &[])?;
        let address =
            Body::default().u32(number).u32(0).u64(ring.desc).u64(ring.used).u64(ring.avail).u64(ring.used).bytes();
        self.send(code::SET_VRING_ADDR, &address, &[])?;
        self.send_event(code::SET_VRING_KICK, index)?;
        self.send_event(code::SET_VRING_CALL, index)
    }

    fn send_memory(&self) -> Result<(), SimError> {
        if self.uses_slots() {
            for region in self.guest.regions() {
                let body = Body::default().u64(0).region(region).bytes();
                self.acknowledged(code::ADD_MEM_REG, &body, &[region.fd()])?;
            }
            return Ok(());
        }
        let regions = self.guest.regions();
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let body = regions.iter().fold(Body::default().u32(count).u32(0), Body::region).bytes();
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(Region::fd).collect();
        self.acknowledged(code::SET_MEM_TABLE, &body, &fds)
    }

    fn send_event(&self, request: Code, index: u16) -> Result<(), SimError> {
        let ring = self.ring(index);
        let event = match request {
            code::SET_VRING_KICK => &ring.kick,
            code::SET_VRING_ERR => &ring.err,
            _ => &*ring.call,
        };
        self.send(request, &Body::default().u64(u64::from(index)).bytes(), &[event.as_fd()])
    }

    fn has(&self, feature: u64) -> bool {
        self.protocol_features & feature != 0
    }

    fn uses_slots(&self) -> bool {
        self.options.memory_slots && self.has(protocol::CONFIGURE_MEM_SLOTS)
    }

    fn send(&self, request: Code, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SimError> {
        self.main.send(request.1, MessageHeader::request(request, body.len(), false), body, fds)
    }

    fn send_u64(&self, request: Code, value: u64) -> Result<(), SimError> {
        self.send(request, &value.to_ne_bytes(), &[])
    }

    fn ask_u64(&self, request: Code, body: &[u8]) -> Result<u64, SimError> {
        self.send(request, body, &[])?;
        self.answer(request)
    }

    /// Sends with NEED_REPLY and waits for a zero.
    pub(super) fn acknowledged(&self, request: Code, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SimError> {
        self.main.send(request.1, MessageHeader::request(request, body.len(), true), body, fds)?;
        self.expect_zero(request)
    }

    /// Waits for the acknowledgement of a request sent before.
    pub(super) fn expect_zero(&self, request: Code) -> Result<(), SimError> {
        match self.answer(request)? {
            0 => Ok(()),
            value => Err(SimError::Refused { what: request.1, value }),
        }
    }

    fn answer(&self, request: Code) -> Result<u64, SimError> {
        let message = self.main.receive(request.1)?;
        message.header.expect_reply(request, 8)?;
        read_u64(&message.body).ok_or_else(|| SimError::Protocol { what: "a short answer".to_owned() })
    }
}
