//! A device behind a stream, without the loop around it: what a message costs that is neither the system's nor the
//! table's work. It runs where a whole daemon does not, under callgrind.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use iotlb_client::Access;
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::CELL_PAGES_MAX;
use iotlb_proto::socket::{MessageStream, Received};
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::vhost_user::{
    self, Header, Incoming, MemoryRegion, Request, VringAddress, VringFd, VringState, backend_iotlb, reply_u64,
};
use iotlb_proto::worker::{Answer, MissRequest};
use iotlbd::device::{Action, Device, DeviceConfig, Event, ReplyPayload, WorkerId};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::daemon::service::{ACK_LEN, IOTLB_LEN, invalidate, update};
use super::peers::PAGE;

/// Messages that come together, and pages of a miss.
pub const BATCH: usize = 16;
const _: () = assert!(BATCH as u64 <= CELL_PAGES_MAX);
/// First address of a batch. Its pages share a node.
const IOVA: u64 = 0x4000_0000;
/// Where the front-end has guest memory.
const USER_ADDRESS: u64 = 0x7000_0000_0000;
/// Guest memory, bytes.
const MEMORY: u64 = 4 << 20;
/// The time, for all of it: nothing here waits.
const NOW_NS: u64 = 1;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A device with a started ring, and both ends of its main channel.
#[derive(Debug)]
pub struct Session {
    device: Device,
    stream: MessageStream,
    front_end: UnixStream,
    /// Misses of the worker that were resolved.
    resolved: usize,
}

impl Session {
    /// Negotiates, gives memory and a ring.
    ///
    /// # Errors
    /// A table, a socket or memory cannot be made.
    pub fn start() -> Result<Session, Box<dyn std::error::Error>> {
        let (table, _fd) = TableWriter::create(&TableConfig { size: 8 << 20, generation: 1 })?;
        let config = DeviceConfig::net(1, 100, 1 << 40);
        let (features, protocol) = (config.features, config.protocol_features);
        let (front_end, far) = UnixStream::pair()?;
        let stream = MessageStream::from_fd(OwnedFd::from(far), Incoming::Requests)?;
        let mut session = Session { device: Device::new(config, table), stream, front_end, resolved: 0 };
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC)?;
        ftruncate(&memory, MEMORY)?;
        let region = MemoryRegion { guest_address: 0, size: MEMORY, user_address: USER_ADDRESS, mmap_offset: 0 };
        session.device.handle(Event::FrontEndConnected, NOW_NS);
        let address =
            VringAddress { index: 0, flags: 0, desc: 0xffff_e000, used: 0xffff_f240, avail: 0xffff_f000, log: 0 };
        for request in [
            Request::SetProtocolFeatures(protocol),
            Request::SetBackendReqFd(OwnedFd::from(UnixStream::pair()?.0)),
            Request::SetFeatures(features),
            Request::SetMemTable(vec![(region, memory)]),
            Request::SetVringNum(VringState { index: 0, num: 256 }),
            Request::SetVringBase(VringState { index: 0, num: 0 }),
            Request::SetVringAddr(address),
            Request::SetVringKick(VringFd { index: 0, fd: Some(eventfd(0, EventfdFlags::CLOEXEC)?) }),
        ] {
            let header = Header::request(request.number(), 0, false);
            session.device.handle(Event::Request { header, request }, NOW_NS);
            session.carry_out()?;
        }
        // The ring's own pages, which were asked for.
        session
            .front_end
            .write_all([update(address.desc, USER_ADDRESS), update(address.avail, USER_ADDRESS)].as_flattened())?;
        session.answer(2)?;
        session.device.handle(Event::MissReply { value: 0 }, NOW_NS);
        session.acknowledged(2)?;
        Ok(session)
    }

    /// The front-end sends UPDATEs of [`BATCH`] pages.
    ///
    /// # Errors
    /// The socket takes no more.
    pub fn send_updates(&mut self) -> Outcome {
        let updates: Vec<[u8; IOTLB_LEN]> = pages().map(|page| update(page, USER_ADDRESS)).collect();
        Ok(self.front_end.write_all(updates.as_flattened())?)
    }

    /// It sends INVALIDATEs of the same.
    ///
    /// # Errors
    /// As [`Session::send_updates`].
    pub fn send_invalidations(&mut self) -> Outcome {
        let all: Vec<[u8; IOTLB_LEN]> = pages().map(invalidate).collect();
        Ok(self.front_end.write_all(all.as_flattened())?)
    }

    /// Answers the next `count` messages, in one go.
    ///
    /// # Errors
    /// One of them is not there or makes no sense.
    pub fn answer(&mut self, count: usize) -> Outcome {
        for _ in 0..count {
            let Received::Message { header, payload, fds } = self.stream.receive()? else {
                return Err("a message is missing".into());
            };
            let request = vhost_user::decode(header, &payload, fds)?;
            self.device.handle(Event::Request { header, request }, NOW_NS);
            self.carry_out()?;
        }
        self.stream.flush()?;
        Ok(())
    }

    /// The front-end takes that many acknowledgements, which must be good ones.
    ///
    /// # Errors
    /// One of them is not.
    pub fn acknowledged(&mut self, count: usize) -> Outcome {
        self.stream.put_away()?;
        let mut acks = vec![0; count * ACK_LEN];
        self.front_end.read_exact(&mut acks)?;
        let good = acks.chunks_exact(ACK_LEN).all(|ack| ack[ACK_LEN - 8..] == [0; 8]);
        if good { Ok(()) } else { Err("a message was refused".into()) }
    }

    /// A worker asks for the same pages.
    pub fn miss(&mut self, ticket: u32) {
        if let Some(range) = IovaRange::from_len(IOVA, BATCH as u64 * PAGE) {
            let request = MissRequest { ticket, range, access: Access::READ };
            self.device.handle(Event::Miss { worker: WorkerId(1), cell: 0, request }, NOW_NS);
        }
    }

    /// The front-end says that it has done what it was asked for with the last batch of misses.
    pub fn reply(&mut self) {
        self.device.handle(Event::MissReply { value: 0 }, NOW_NS);
    }

    /// How many misses were resolved so far.
    #[must_use]
    pub fn resolved(&self) -> usize {
        self.resolved
    }

    /// Carries out what the device wants. Returns how many MISS messages that were.
    ///
    /// # Errors
    /// A miss was not resolved, or a reply cannot be queued.
    pub fn carry_out(&mut self) -> Result<usize, Box<dyn std::error::Error>> {
        let mut misses = 0;
        loop {
            while let Some(action) = self.device.next_action() {
                match action {
                    Action::Reply { request, payload: ReplyPayload::U64(value) } => {
                        self.stream.put(&reply_u64(request, value))?;
                    }
                    Action::SendBackEnd { message, need_reply } => {
                        std::hint::black_box(backend_iotlb(&message, need_reply));
                        misses += 1;
                    }
                    Action::AnswerMiss { answer: Answer::Resolved, .. } => self.resolved += 1,
                    Action::AnswerMiss { answer, .. } => return Err(format!("a miss was answered {answer:?}").into()),
                    _ => {}
                }
            }
            let Some(epoch) = self.device.grace_target() else { return Ok(misses) };
            // Nobody reads.
            self.device.handle(Event::GraceCompleted { epoch }, NOW_NS);
        }
    }
}

/// The pages of a batch.
fn pages() -> impl Iterator<Item = u64> {
    (0..BATCH as u64).map(|n| IOVA + n * PAGE)
}
