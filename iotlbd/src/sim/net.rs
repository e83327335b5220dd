//! A virtio-net driver on the simulated guest: every packet through an IOVA of its own, unmapped the moment the device
//! returns it, strictly or lazily, and the page checked for writes that come after the acknowledgement.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::features::virtio;
use nix::errno::Errno;

use super::guest::PAGE_WORDS;
use super::iotlb::{latency_histogram, nanoseconds_since};
use super::packet::{self, EchoAnswer, Ipv4, Mac, Peers};
use super::ring::{Buffer, DriverRing};
use super::{FrontEnd, Guest, IovaSpace, SimError, Wake};

/// Bytes of a virtio-net header with VERSION_1.
pub const NET_HEADER_LEN: usize = 12;
/// The same as a descriptor's length.
const NET_HEADER_BYTES: u32 = 12;
/// Longest frame: a page less the header.
const FRAME_MAX: usize = 4096 - NET_HEADER_LEN;
/// The guest's Ethernet address.
pub const GUEST_MAC: Mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
/// The guest's address, of a range kept for documentation.
pub const GUEST_IP: Ipv4 = [192, 0, 2, 1];
/// The address that is pinged.
pub const PEER_IP: Ipv4 = [192, 0, 2, 2];

/// Bytes of a receive buffer.
const RX_LEN: u32 = 2048;
/// Receive buffers a ring.
const RX_BUFFERS: u16 = 64;
/// IOVAs the driver hands out, well above what its rings can hold.
const IOVAS_PER_PAIR: u64 = 1024;
/// Lazily unmapped packets that are flushed together.
const LAZY_BATCH: usize = 32;
/// What free pages hold, so that a late write shows.
const FREE_PATTERN: u64 = 0x0ff0_c0de_0ff0_c0de;

/// A page the device holds.
#[derive(Clone, Copy, Debug)]
struct Lent {
    iova: u64,
    page: u64,
}

/// How the driver unmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmapping {
    /// Each page is invalidated before its data is looked at.
    Strict,
    /// Pages are collected; after a few dozen everything is flushed.
    Lazy,
}

/// What pinging showed.
#[derive(Debug)]
pub struct PingSummary {
    /// Requests sent.
    pub sent: u64,
    /// Right answers.
    pub received: u64,
    /// Damaged answers.
    pub wrong: u64,
    /// Requests without an answer in time.
    pub missing: u64,
    /// From request to answer, in ns.
    pub round_trip_ns: Histogram<u64>,
}

/// The driver.
#[derive(Debug)]
pub struct VirtioNet {
    rings: Vec<DriverRing>,
    iovas: IovaSpace,
    lent: HashMap<(u16, u16), Lent>,
    pages: Vec<u64>,
    arrived: VecDeque<(u16, Vec<u8>)>,
    mergeable: bool,
    unmapping: Unmapping,
    lazy: Vec<Lent>,
}

impl VirtioNet {
    /// Sets up the rings in guest memory, starts the device and posts receive buffers.
    pub fn start(front_end: &mut FrontEnd, unmapping: Unmapping) -> Result<VirtioNet, SimError> {
        let features = front_end.features();
        if features & virtio::ACCESS_PLATFORM == 0 {
            return Err(SimError::Missing { what: "ACCESS_PLATFORM (bit 33)" });
        }
        let (pairs, size) = (front_end.options().queue_pairs, front_end.options().queue_size);
        let mut net = VirtioNet {
            rings: Vec::new(),
            iovas: IovaSpace::new(IOVAS_PER_PAIR * u64::from(pairs)),
            lent: HashMap::new(),
            pages: Vec::new(),
            arrived: VecDeque::new(),
            mergeable: features & virtio::NET_MRG_RXBUF != 0,
            unmapping,
            lazy: Vec::new(),
        };
        for index in 0..pairs * 2 {
            let mut map_page = || {
                let (page, iova) = (front_end.guest.allocate()?, net.iovas.allocate()?);
                front_end.viommu.map(iova, page, Access::READ_WRITE)?;
                Ok::<_, SimError>((page, iova))
            };
            let (desc, ring) = (map_page()?, map_page()?);
            let event_idx = features & virtio::EVENT_IDX != 0;
            let iovas = [desc.1, ring.1];
            let pages = [desc.0, ring.0];
            net.rings.push(DriverRing::new(&front_end.guest, index, size, pages, iovas, event_idx)?);
        }
        let addresses: Vec<_> = net.rings.iter().map(DriverRing::addresses).collect();
        front_end.start(&addresses)?;
        for pair in 0..pairs {
            for _ in 0..RX_BUFFERS.min(size) {
                net.post_receive_buffer(front_end, pair * 2)?;
            }
            net.publish(front_end, pair * 2)?;
        }
        Ok(net)
    }

    /// Sends `frame` on the transmit ring of `pair`.
    pub fn send(&mut self, front_end: &mut FrontEnd, pair: u16, frame: &[u8]) -> Result<(), SimError> {
        if frame.len() > FRAME_MAX {
            return Err(SimError::Usage { what: format!("a frame of {} bytes does not fit a page", frame.len()) });
        }
        let queue = pair * 2 + 1;
        let page = self.take_page(&mut front_end.guest)?;
        front_end.guest.write(page, &[0; NET_HEADER_LEN])?;
        front_end.guest.write(page + NET_HEADER_LEN as u64, frame)?;
        let iova = self.iovas.allocate()?;
        front_end.viommu.map(iova, page, Access::READ)?;
        let header = Buffer { iova, len: NET_HEADER_BYTES, device_writes: false };
        let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let body = Buffer { iova: iova + NET_HEADER_LEN as u64, len, device_writes: false };
        let head = self.rings[usize::from(queue)].add(&front_end.guest, &[header, body])?;
        self.lent.insert((queue, head), Lent { iova, page });
        self.publish(front_end, queue)
    }

    /// The next frame that arrives within `timeout`, and the pair it arrived on.
    pub fn receive(&mut self, front_end: &mut FrontEnd, timeout: Duration) -> Result<Option<(u16, Vec<u8>)>, SimError> {
        let deadline = Instant::now() + timeout;
        loop {
            self.take_returned(front_end)?;
            if let Some(frame) = self.arrived.pop_front() {
                return Ok(Some(frame));
            }
            // Held, not duplicated: with all the queue pairs that a device can have, three descriptors a ring leave no
            // room for a fourth.
            let calls: Vec<_> = (0..self.ring_count()).map(|queue| Arc::clone(&front_end.ring(queue).call)).collect();
            let calls: Vec<_> = calls.iter().map(AsFd::as_fd).collect();
            let left = deadline.saturating_duration_since(Instant::now());
            match front_end.serve_until(&calls, left)? {
                Wake::Ready(index) => match front_end.ring(u16::try_from(index).unwrap_or(0)).call.read() {
                    Ok(_) | Err(Errno::EAGAIN) => {}
                    Err(errno) => return Err(SimError::System { what: "read a call", source: errno.into() }),
                },
                Wake::TimedOut => return Ok(None),
            }
        }
    }

    /// Asks for the peer's Ethernet address on `pair`.
    pub fn resolve_peer(&mut self, front_end: &mut FrontEnd, pair: u16, timeout: Duration) -> Result<Mac, SimError> {
        self.send(front_end, pair, &packet::arp_request(GUEST_MAC, GUEST_IP, PEER_IP))?;
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive(front_end, left)? {
                Some((from, frame)) if from == pair => {
                    if let Some(mac) = packet::arp_reply(&frame, GUEST_MAC, PEER_IP) {
                        return Ok(mac);
                    }
                }
                Some(_) => {}
                None => {
                    let what = format!("no ARP reply within {} ms; does a worker serve it?", timeout.as_millis());
                    return Err(SimError::Ring { queue: pair * 2, what });
                }
            }
        }
    }

    /// Sends `count` echo requests, one after the other and in turn on every queue pair, and checks each answer.
    pub fn ping(&mut self, front_end: &mut FrontEnd, count: u64, timeout: Duration) -> Result<PingSummary, SimError> {
        const IDENTIFIER: u16 = 0x10b1;
        let pairs = front_end.options().queue_pairs;
        let mut macs = Vec::new();
        for pair in 0..pairs {
            macs.push(self.resolve_peer(front_end, pair, timeout)?);
        }
        let mut summary =
            PingSummary { sent: 0, received: 0, wrong: 0, missing: 0, round_trip_ns: latency_histogram() };
        for number in 0..count {
            let pair = u16::try_from(number % u64::from(pairs)).unwrap_or(0);
            let peer_mac = macs[usize::from(pair)];
            let peers = Peers { mac: GUEST_MAC, ip: GUEST_IP, peer_mac, peer_ip: PEER_IP };
            // The sequence wraps after 65,536; by then the old answer is long here or counted as missing.
            let sequence = u16::try_from(number & 0xffff).unwrap_or(0);
            let payload = echo_payload(number);
            let sent = Instant::now();
            self.send(front_end, pair, &packet::echo_request(&peers, IDENTIFIER, sequence, &payload))?;
            summary.sent += 1;
            loop {
                let left = timeout.saturating_sub(sent.elapsed());
                let Some((from, frame)) = self.receive(front_end, left)? else {
                    summary.missing += 1;
                    break;
                };
                match packet::check_echo(&frame, &peers, IDENTIFIER, sequence, &payload) {
                    EchoAnswer::Right if from == pair => {
                        summary.round_trip_ns.saturating_record(nanoseconds_since(sent));
                        summary.received += 1;
                        break;
                    }
                    EchoAnswer::Right | EchoAnswer::Wrong(_) => {
                        summary.wrong += 1;
                        break;
                    }
                    EchoAnswer::Other => {}
                }
            }
        }
        Ok(summary)
    }

    /// Checks that no free page was written after it was taken from the device.
    pub fn check_free_pages(&self, guest: &Guest) -> Result<(), SimError> {
        self.pages.iter().try_for_each(|page| check_untouched(guest, *page))
    }

    fn ring_count(&self) -> u16 {
        u16::try_from(self.rings.len()).unwrap_or(u16::MAX)
    }

    fn take_returned(&mut self, front_end: &mut FrontEnd) -> Result<(), SimError> {
        for queue in 0..self.ring_count() {
            let index = usize::from(queue);
            let mut refill = false;
            while let Some((head, len)) = self.rings[index].take_used(&front_end.guest)? {
                if queue.is_multiple_of(2) {
                    let frame = self.take_frame(front_end, queue, head, len)?;
                    self.arrived.push_back((queue / 2, frame));
                    refill = true;
                } else {
                    let lent = self.unmap(front_end, queue, head)?;
                    self.take_back(front_end, lent)?;
                }
            }
            if refill {
                while self.rings[index].in_flight() < usize::from(RX_BUFFERS.min(front_end.options().queue_size)) {
                    self.post_receive_buffer(front_end, queue)?;
                }
                self.publish(front_end, queue)?;
            }
        }
        Ok(())
    }

    /// A received frame; with mergeable buffers it may span several chains, which the device returns together.
    fn take_frame(&mut self, front_end: &mut FrontEnd, queue: u16, head: u16, len: u32) -> Result<Vec<u8>, SimError> {
        let mut bytes = self.take_buffer(front_end, queue, head, len)?;
        if bytes.len() < NET_HEADER_LEN {
            return Err(SimError::Ring { queue, what: format!("a frame of {} bytes", bytes.len()) });
        }
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        if buffers != 1 && !self.mergeable {
            return Err(SimError::Ring { queue, what: format!("{buffers} buffers without mergeable buffers") });
        }
        for _ in 1..buffers {
            let next = self.rings[usize::from(queue)].take_used(&front_end.guest)?;
            let Some((head, len)) = next else {
                return Err(SimError::Ring { queue, what: "a merged frame was returned in parts".to_owned() });
            };
            bytes.extend(self.take_buffer(front_end, queue, head, len)?);
        }
        Ok(bytes.split_off(NET_HEADER_LEN))
    }

    fn take_buffer(&mut self, front_end: &mut FrontEnd, queue: u16, head: u16, len: u32) -> Result<Vec<u8>, SimError> {
        if len > RX_LEN {
            return Err(SimError::Ring { queue, what: format!("{len} bytes in a buffer of {RX_LEN}") });
        }
        // As a guest's driver: first the mapping goes, then the data is looked at.
        let lent = self.unmap(front_end, queue, head)?;
        let mut bytes = vec![0; len as usize];
        front_end.guest.read(lent.page, &mut bytes)?;
        self.take_back(front_end, lent)?;
        Ok(bytes)
    }

    fn unmap(&mut self, front_end: &mut FrontEnd, queue: u16, head: u16) -> Result<Lent, SimError> {
        let lent = self
            .lent
            .remove(&(queue, head))
            .ok_or_else(|| SimError::Ring { queue, what: format!("chain {head} was not lent") })?;
        match self.unmapping {
            Unmapping::Strict => front_end.unmap(lent.iova)?,
            Unmapping::Lazy => front_end.unmap_lazily(lent.iova)?,
        };
        Ok(lent)
    }

    /// Page and IOVA go back into circulation once the device can use neither.
    fn take_back(&mut self, front_end: &mut FrontEnd, lent: Lent) -> Result<(), SimError> {
        self.lazy.push(lent);
        if self.unmapping == Unmapping::Lazy {
            if self.lazy.len() < LAZY_BATCH {
                return Ok(());
            }
            front_end.flush()?;
        }
        for lent in std::mem::take(&mut self.lazy) {
            self.iovas.release(lent.iova);
            front_end.guest.fill_page(lent.page, FREE_PATTERN)?;
            self.pages.push(lent.page);
        }
        Ok(())
    }

    fn post_receive_buffer(&mut self, front_end: &mut FrontEnd, queue: u16) -> Result<(), SimError> {
        let page = self.take_page(&mut front_end.guest)?;
        let iova = self.iovas.allocate()?;
        front_end.viommu.map(iova, page, Access::WRITE)?;
        let buffer = Buffer { iova, len: RX_LEN, device_writes: true };
        let head = self.rings[usize::from(queue)].add(&front_end.guest, &[buffer])?;
        self.lent.insert((queue, head), Lent { iova, page });
        Ok(())
    }

    fn publish(&mut self, front_end: &FrontEnd, queue: u16) -> Result<(), SimError> {
        if self.rings[usize::from(queue)].publish(&front_end.guest)? {
            front_end.kick(queue)?;
        }
        Ok(())
    }

    fn take_page(&mut self, guest: &mut Guest) -> Result<u64, SimError> {
        let Some(page) = self.pages.pop() else { return guest.allocate() };
        check_untouched(guest, page)?;
        Ok(page)
    }
}

fn check_untouched(guest: &Guest, page: u64) -> Result<(), SimError> {
    for index in 0..PAGE_WORDS {
        let word = guest.load_word(page + index * 8)?;
        if word != FREE_PATTERN {
            let what = format!("{word:#x} was written to page {page:#x} after its invalidation was acknowledged");
            return Err(SimError::Protocol { what });
        }
    }
    Ok(())
}

/// Bytes that differ from ping to ping, in length too.
fn echo_payload(number: u64) -> Vec<u8> {
    let len = 16 + number.wrapping_mul(331) % 1400;
    (0..len).map(|at| number.wrapping_mul(31).wrapping_add(at * 7).to_le_bytes()[0]).collect()
}
