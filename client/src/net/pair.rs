//! The queues of one pair and the port they share.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use iotlb_proto::layout::worker::Counters;

use super::backlog::{Backlog, PACKET_MAX};
use super::echo::Echo;
use super::header::{GSO_NONE, HEADER_LEN, Header, finish_checksum};
use super::lane::{Done, Lane, Lost, Step};
use super::rx::{self, PACKETS_PER_PIN};
use super::tap::{Tap, TapError, Written};
use super::tx;
use crate::Reader;

/// How long a packet waits for the guest to post more buffers. Some drivers post again only after they received
/// something, so a large packet in front of a small ring must not wait for ever.
const RX_WAIT_MAX: Duration = Duration::from_millis(200);

/// Time between two attachments of the TAP's queue. Each takes a lock that all network devices of the host share, and
/// a guest may have its ring come and go, and change its features, as often as it likes.
const ATTACH_PAUSE: Duration = Duration::from_millis(50);

/// Where packets come from and go to.
#[derive(Debug)]
pub enum Port {
    /// A queue of a TAP device.
    Tap(Tap),
    /// A neighbour in this process.
    Echo(Echo),
}

/// What a pair did with packets. All only grow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Packets that the guest received.
    pub received: u64,
    /// Packets that the guest sent, and that the port took.
    pub sent: u64,
    /// Packets dropped: too large for the guest's buffers, waited too long, no room, lost or refused by the port.
    pub dropped: u64,
    /// Chains of the guest that held no packet.
    pub malformed: u64,
}

/// Why a pair cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The attachment is of no more use.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The TAP device is gone or fails.
    #[error("the TAP device failed: {0}")]
    TapIo(#[source] io::Error),
    /// The TAP device refuses a setting.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// Whom packets are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Session {
    generation: u64,
    /// What the driver takes. Another driver of the same guest may take less.
    features: u64,
}

/// One pair: guest RX, guest TX, or both, over one port.
#[derive(Debug)]
pub struct Pair {
    port: Port,
    rx: Option<Lane>,
    tx: Option<Lane>,
    to_guest: Backlog,
    from_guest: Backlog,
    /// The TAP had something to read, or room, when last asked. Edges from epoll set them.
    readable: bool,
    writable: bool,
    /// When the TAP's queue was last attached.
    attached_at: Option<Instant>,
    session: Option<Session>,
    scratch: Vec<u8>,
    figures: Figures,
}

/// When a pair wants to be served again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// At once.
    Now,
    /// At an event, or at this time.
    At(Instant),
    /// At an event.
    Event,
}

impl Next {
    /// The earlier of two.
    #[must_use]
    pub fn earlier(self, other: Next) -> Next {
        match (self, other) {
            (Next::Now, _) | (_, Next::Now) => Next::Now,
            (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
            (Next::At(time), Next::Event) | (Next::Event, Next::At(time)) => Next::At(time),
            (Next::Event, Next::Event) => Next::Event,
        }
    }

    fn of(step: Step) -> Next {
        match step {
            Step::Again => Next::Now,
            Step::Later(time) => Next::At(time),
            // Missing: the answers are waited for by `Pair::wait`.
            Step::Idle | Step::Resting | Step::Missing => Next::Event,
        }
    }
}

impl Pair {
    /// A pair without queues.
    #[must_use]
    pub fn new(port: Port) -> Pair {
        Pair {
            port,
            rx: None,
            tx: None,
            to_guest: Backlog::default(),
            from_guest: Backlog::default(),
            readable: true,
            writable: true,
            attached_at: None,
            session: None,
            scratch: vec![0; PACKET_MAX],
            figures: Figures::default(),
        }
    }

    /// Takes a leased queue: even indexes are guest RX, odd ones guest TX.
    pub fn add(&mut self, lane: Lane) {
        let place = if lane.index().is_multiple_of(2) { &mut self.rx } else { &mut self.tx };
        *place = Some(lane);
    }

    /// Gives up the queues, for a new attachment. The port stays, and takes no packets until then.
    pub fn detach(&mut self) {
        self.rx = None;
        self.tx = None;
        self.session = None;
        self.clear();
    }

    /// The queues.
    pub fn lanes(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.rx.iter_mut().chain(&mut self.tx)
    }

    /// Whether all rings take packets.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.rx.iter().chain(&self.tx).all(Lane::ready)
    }

    /// What was done so far.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.figures
    }

    /// The descriptor to wait on, edge-triggered, if the port has one.
    #[must_use]
    pub fn port_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.port {
            Port::Tap(tap) => Some(tap.as_fd()),
            Port::Echo(_) => None,
        }
    }

    /// The port had an event.
    pub fn port_event(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Moves what can be moved, in both directions, in bursts. What is missing is asked for, and not waited for.
    ///
    /// # Errors
    ///
    /// See [`PairError`].
    pub fn serve(&mut self, reader: &mut Reader, counters: &Counters) -> Result<Next, PairError> {
        self.follow_session(reader)?;
        let mut next = self.read_port()?;
        next = next.earlier(self.serve_rx(reader, counters)?);
        next = next.earlier(self.follow_ring()?);
        self.write_port()?;
        next = next.earlier(self.serve_tx(reader, counters)?);
        self.write_port()?;
        if matches!(self.port, Port::Echo(_)) && !self.to_guest.is_empty() {
            next = next.earlier(self.serve_rx(reader, counters)?);
        }
        Ok(next)
    }

    /// Waits for what queues missed, until one of them can go on or it is somebody else's turn. To be called when there
    /// is nothing else to do: packets that are complete have left, and all that is missing was asked for; answers ring
    /// no bell that [`Next::Event`] could mean, so for one that takes long [`Next::At`] says when to look.
    ///
    /// # Errors
    ///
    /// See [`PairError`].
    pub fn wait(&mut self, reader: &mut Reader) -> Result<Next, PairError> {
        let mut next = Next::Event;
        for lane in self.rx.iter_mut().chain(&mut self.tx) {
            if let Some(step) = lane.wait(reader)? {
                next = next.earlier(Next::of(step));
            }
            // What came may let the others go on as well.
            if next == Next::Now {
                break;
            }
        }
        Ok(next)
    }

    /// Looks for a new session before packets are read for the old one.
    fn follow_session(&mut self, reader: &Reader) -> Result<(), PairError> {
        let session = {
            let guard = reader.pin().map_err(Lost::from)?;
            Session { generation: guard.session_generation(), features: guard.acked_features() }
        };
        self.enter(session);
        Ok(())
    }

    /// A new session is another guest, or the same one booted again; with other features it is another driver. Packets
    /// of the old one are not for it.
    fn enter(&mut self, session: Session) {
        if self.session != Some(session) {
            self.session = Some(session);
            self.clear();
            if let Port::Tap(tap) = &mut self.port {
                tap.forget_offloads();
            }
        }
    }

    /// Attaches the TAP's queue while the guest takes packets from it, and only then: the kernel sends a share of the
    /// flows to each attached queue, also when another one is the only one that is served. What the guest takes is
    /// said before that, and no sooner: it waits for the same lock.
    fn follow_ring(&mut self) -> Result<Next, PairError> {
        let Port::Tap(tap) = &mut self.port else { return Ok(Next::Event) };
        if !self.rx.as_ref().is_some_and(Lane::ready) {
            if tap.detach() {
                // As the kernel does with what it holds. It would be old when the ring is ready again.
                self.figures.dropped += self.to_guest.clear() as u64;
            }
            return Ok(Next::Event);
        }
        let Some(Session { features, .. }) = self.session else { return Ok(Next::Event) };
        // A queue that could not be detached still has to follow.
        if tap.attached() && tap.has_offloads(features) {
            return Ok(Next::Event);
        }
        let now = Instant::now();
        if let Some(soonest) = self.attached_at.map(|last| last + ATTACH_PAUSE)
            && now < soonest
        {
            return Ok(Next::At(soonest));
        }
        tap.set_offloads(features)?;
        tap.attach()?;
        self.attached_at = Some(now);
        // The next round looks, whatever edges there were.
        self.readable = true;
        Ok(Next::Now)
    }

    /// Drops the packets of a guest that is gone, also those that wait in the kernel.
    fn clear(&mut self) {
        self.figures.dropped += (self.to_guest.clear() + self.from_guest.clear()) as u64;
        if let Port::Tap(tap) = &mut self.port {
            tap.detach();
        }
    }

    /// TAP to backlog, while the guest takes packets. What finds no room waits in the kernel, which bounds it.
    fn read_port(&mut self) -> Result<Next, PairError> {
        let Port::Tap(tap) = &mut self.port else { return Ok(Next::Event) };
        if !self.rx.as_ref().is_some_and(Lane::ready) {
            return Ok(Next::Event);
        }
        for _ in 0..PACKETS_PER_PIN {
            if !self.readable || self.to_guest.room() == 0 {
                return Ok(Next::Event);
            }
            match tap.read(&mut self.scratch).map_err(PairError::TapIo)? {
                Some(len) => self.figures.dropped += u64::from(!self.to_guest.push_read(&mut self.scratch, len)),
                None => self.readable = false,
            }
        }
        Ok(Next::Now)
    }

    /// Backlog to guest.
    fn serve_rx(&mut self, reader: &mut Reader, counters: &Counters) -> Result<Next, PairError> {
        let Some(lane) = &mut self.rx else { return Ok(Next::Event) };
        let (backlog, figures) = (&mut self.to_guest, &mut self.figures);
        let was_ready = lane.ready();
        let (mut starved, mut more) = (false, false);
        let (read_for, mut session) = (self.session, self.session);
        let step = lane.run(reader, counters, |ring, guard, record, features| {
            // Again, under the pin that delivers: the guest may be another one since the last pin.
            session = Some(Session { generation: guard.session_generation(), features });
            if session != read_for {
                return Done::default();
            }
            let delivered = rx::deliver(ring, guard, record, features, backlog);
            figures.received += delivered.packets;
            figures.dropped += delivered.too_large;
            // What was dropped made room as well.
            (starved, more) = (delivered.starved, delivered.more || delivered.too_large > 0);
            Done { call: delivered.call, chains: delivered.chains, bytes: delivered.bytes, fault: delivered.fault }
        })?;
        if let Some(session) = session.filter(|session| Some(*session) != read_for) {
            self.enter(session);
            return Ok(Next::Now);
        }
        if more || (!was_ready && lane.ready()) {
            // What waits in the TAP may be read now, and no edge announces it again.
            return Ok(Next::Now);
        }
        if !starved {
            return Ok(Next::of(step));
        }
        let now = Instant::now();
        let deadline = self.to_guest.wait(now) + RX_WAIT_MAX;
        if now < deadline {
            // A ring that is polled says when: the buffer that comes rings no bell.
            return Ok(Next::At(deadline).earlier(Next::of(step)));
        }
        self.to_guest.pop();
        self.figures.dropped += 1;
        Ok(Next::Now)
    }

    /// Guest to backlog, as long as the port takes what is there.
    fn serve_tx(&mut self, reader: &mut Reader, counters: &Counters) -> Result<Next, PairError> {
        let Some(lane) = &mut self.tx else { return Ok(Next::Event) };
        let room = match &self.port {
            Port::Tap(_) if self.from_guest.is_empty() => self.from_guest.room(),
            Port::Tap(_) => 0,
            // Each packet may be answered by one. A guest that takes none gets none, and may still send.
            Port::Echo(_) if self.rx.as_ref().is_some_and(Lane::ready) => self.to_guest.room(),
            Port::Echo(_) => self.from_guest.room(),
        };
        if room == 0 {
            // The TAP's next edge, or the other ring's kick or deadline, brings us back.
            return Ok(Next::Event);
        }
        let (backlog, figures) = (&mut self.from_guest, &mut self.figures);
        let mut more = false;
        let step = lane.run(reader, counters, |ring, guard, record, features| {
            let collected = tx::collect(ring, guard, record, features, backlog, room);
            figures.malformed += collected.malformed;
            more = collected.more;
            Done { call: collected.call, chains: collected.chains, bytes: collected.bytes, fault: collected.fault }
        })?;
        Ok(if more { Next::Now } else { Next::of(step) })
    }

    /// Backlog to port. Nothing is pinned here.
    fn write_port(&mut self) -> Result<(), PairError> {
        while let Some(packet) = self.from_guest.front_mut() {
            match &mut self.port {
                Port::Tap(tap) => {
                    if !self.writable {
                        return Ok(());
                    }
                    match tap.write(packet).map_err(PairError::TapIo)? {
                        Written::Sent => self.figures.sent += 1,
                        Written::Refused => self.figures.dropped += 1,
                        Written::Full => {
                            self.writable = false;
                            return Ok(());
                        }
                    }
                }
                Port::Echo(echo) => {
                    let wanted = self.rx.as_ref().is_some_and(Lane::ready);
                    let mut reply = self.to_guest.buffer();
                    if wanted && answer(echo, packet, &mut reply) {
                        self.figures.dropped += u64::from(!self.to_guest.push(reply));
                    } else {
                        self.to_guest.recycle(reply);
                    }
                    self.figures.sent += 1;
                }
            }
            self.from_guest.pop();
        }
        Ok(())
    }
}

/// The neighbour's answer to a packet, both with a header in front. Segmented packets are no pings.
fn answer(echo: &mut Echo, packet: &mut [u8], reply: &mut Vec<u8>) -> bool {
    let Some((header, frame)) = packet.split_first_chunk_mut::<HEADER_LEN>() else { return false };
    let header = Header::from_bytes(*header);
    reply.extend_from_slice(&Header::default().to_bytes());
    header.gso_type == GSO_NONE && finish_checksum(&header, frame) && echo.answer(frame, reply)
}

#[cfg(test)]
mod tests;
