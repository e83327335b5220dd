//! A device with everything around it played by the test: front-end, grace periods, clock.

#![allow(dead_code, unreachable_pub, missing_docs, missing_debug_implementations)] // each test binary uses a part of it

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use iotlb_proto::access::Access;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlb_proto::tree::SLICE_WORDS;
use iotlb_proto::vhost_user::header::{FLAG_NEED_REPLY, FLAG_VERSION};
use iotlb_proto::vhost_user::{Header, IotlbMessage, MemoryRegion, Request, VringAddress, VringFd, VringState};
use iotlb_proto::worker::{Answer, MissRequest};
use iotlbd::device::{Action, Device, DeviceConfig, Event, ReplyPayload, WorkerId};

/// A table large enough that nothing is evicted.
pub const ROOMY: u64 = 8 << 20;
/// The smallest there is: 64 nodes.
pub const SMALLEST: u64 = 336_000;
pub const MIB: u64 = 1 << 20;
pub const USER: u64 = 0x7000_0000_0000;
pub const RW: Access = Access::READ_WRITE;
/// Where the ring of `started` lies.
pub const DESC: u64 = 0xffff_e000;
pub const AVAIL: u64 = 0xffff_f000;
pub const USED: u64 = 0xffff_f240;

pub struct Bench {
    pub device: Device,
    pub now_ns: u64,
    /// What the device wanted and no helper took yet.
    pub actions: VecDeque<Action>,
    /// Complete grace periods as soon as they are asked for.
    pub instant_grace: bool,
    /// Let the device go on with what it has to do until it is done.
    pub instant_work: bool,
}

impl Bench {
    pub fn new(config: DeviceConfig, table_size: u64) -> Bench {
        Bench::in_slices(config, table_size, SLICE_WORDS)
    }

    /// A device whose slices are of `words`: with few, each is one step.
    pub fn in_slices(config: DeviceConfig, table_size: u64, words: usize) -> Bench {
        let mut table = TableWriter::create(&TableConfig { size: table_size, generation: 1 }).expect("a table").0;
        table.set_slice_words(words);
        let device = Device::new(config, table);
        Bench { device, now_ns: 1, actions: VecDeque::new(), instant_grace: true, instant_work: true }
    }

    /// A net device with two rings, connected and negotiated, with a back-end channel and `regions` as memory.
    pub fn net(regions: &[(MemoryRegion, &OwnedFd)]) -> Bench {
        let bench = Bench::new(DeviceConfig::net(1, 100, 1 << 40), ROOMY);
        let features = bench.device.config().features;
        bench.connect(features, regions)
    }

    /// A front-end connects, negotiates `features`, gives a back-end channel and memory.
    pub fn connect(mut self, features: u64, regions: &[(MemoryRegion, &OwnedFd)]) -> Bench {
        let bench = &mut self;
        let protocol = bench.device.config().protocol_features;
        bench.event(Event::FrontEndConnected);
        bench.silent(Request::SetProtocolFeatures(protocol));
        bench.ack(Request::SetBackendReqFd(channel()));
        bench.silent(Request::SetFeatures(features));
        bench.ack(table_of(regions));
        self
    }

    pub fn event(&mut self, event: Event) {
        let mut next = Some(event);
        while let Some(event) = next {
            self.device.handle(event, self.now_ns);
            self.collect();
            next = match self.device.grace_target().filter(|_| self.instant_grace) {
                Some(epoch) => Some(Event::GraceCompleted { epoch }),
                None => (self.instant_work && self.device.has_work()).then_some(Event::Continue),
            };
        }
    }

    fn collect(&mut self) {
        while let Some(action) = self.device.next_action() {
            self.actions.push_back(action);
        }
    }

    /// Completes the grace period the device waits for.
    pub fn grace(&mut self) {
        let epoch = self.device.grace_target().expect("the device waits for a grace period");
        self.event(Event::GraceCompleted { epoch });
    }

    /// Sends a request and returns the replies that came.
    pub fn request(&mut self, request: Request, need_reply: bool) -> Vec<ReplyPayload> {
        let header = header(&request, need_reply);
        assert!(self.device.accepts_requests(), "{:?} is not accepted now", header.request);
        self.event(Event::Request { header, request });
        self.replies(header.request)
    }

    /// Takes the replies there are out of the actions.
    pub fn replies(&mut self, expected: u32) -> Vec<ReplyPayload> {
        let mut replies = Vec::new();
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::Reply { request, payload } => {
                    assert_eq!(request, expected, "a reply to another request");
                    replies.push(payload);
                }
                other => self.actions.push_back(other),
            }
        }
        replies
    }

    /// A request with NEED_REPLY; returns the value.
    pub fn value(&mut self, request: Request) -> u64 {
        match self.request(request, true).as_slice() {
            [ReplyPayload::U64(value)] => *value,
            other => panic!("expected one number, got {other:?}"),
        }
    }

    /// A request with NEED_REPLY that must be acknowledged with 0.
    pub fn ack(&mut self, request: Request) {
        let name = format!("{request:?}");
        assert_eq!(self.value(request), 0, "{name}");
    }

    /// A request without NEED_REPLY that must not be answered.
    pub fn silent(&mut self, request: Request) {
        assert_eq!(self.request(request, false), []);
    }

    pub fn update(&mut self, iova: u64, size: u64, user: u64, access: Access) -> u64 {
        self.value(Request::Iotlb(IotlbMessage::update(iova, size, user, access)))
    }

    pub fn invalidate(&mut self, iova: u64, size: u64) -> u64 {
        self.value(Request::Iotlb(IotlbMessage::invalidate(iova, size)))
    }

    /// Starts a ring of 256 descriptors.
    pub fn start_ring(&mut self, index: u8, desc: u64, avail: u64, used: u64) {
        let ring = u32::from(index);
        self.silent(Request::SetVringNum(VringState { index: ring, num: 256 }));
        self.silent(Request::SetVringBase(VringState { index: ring, num: 0 }));
        self.silent(Request::SetVringAddr(VringAddress { index: ring, flags: 0, desc, used, avail, log: 0 }));
        self.silent(Request::SetVringKick(VringFd { index, fd: Some(eventfd()) }));
    }

    pub fn miss(&mut self, worker: u32, cell: u16, ticket: u32, iova: u64, len: u64, access: Access) {
        let range = iotlb_proto::iova::IovaRange::from_len(iova, len).expect("a range");
        let request = MissRequest { ticket, range, access };
        self.event(Event::Miss { worker: WorkerId(worker), cell, request });
    }

    /// Takes the MISS and ACCESS_FAIL messages out of the actions.
    pub fn messages(&mut self) -> Vec<(IotlbMessage, bool)> {
        let mut found = Vec::new();
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::SendBackEnd { message, need_reply } => found.push((message, need_reply)),
                other => self.actions.push_back(other),
            }
        }
        found
    }

    /// Takes the answers to misses out of the actions: worker, cell, ticket, answer.
    pub fn answers(&mut self) -> Vec<(u32, u16, u32, Answer)> {
        let mut found = Vec::new();
        for action in std::mem::take(&mut self.actions) {
            match action {
                Action::AnswerMiss { worker, cell, ticket, answer } => found.push((worker.0, cell, ticket, answer)),
                other => self.actions.push_back(other),
            }
        }
        found
    }
}

pub fn table_of(regions: &[(MemoryRegion, &OwnedFd)]) -> Request {
    Request::SetMemTable(regions.iter().map(|(region, fd)| (*region, fd.try_clone().expect("a descriptor"))).collect())
}

pub fn region(guest: u64, size: u64, user: u64) -> MemoryRegion {
    MemoryRegion { guest_address: guest, size, user_address: user, mmap_offset: 0 }
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, size).expect("room");
    fd
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd")
}

/// What a front-end sends as back-end channel; its other end is closed.
pub fn channel() -> OwnedFd {
    OwnedFd::from(std::os::unix::net::UnixStream::pair().expect("a socket pair").0)
}

pub fn header(request: &Request, need_reply: bool) -> Header {
    let flags = FLAG_VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 };
    Header { request: request.number(), flags, size: 0 }
}

/// A net device with 4 MiB at guest address 0.
pub fn bench() -> (Bench, OwnedFd) {
    let fd = memfd(4 * MIB);
    (Bench::net(&[(region(0, 4 * MIB, USER), &fd)]), fd)
}

/// The same with ring 0 started and its pages translated.
pub fn started() -> (Bench, OwnedFd) {
    let (mut bench, fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(bench.update(DESC, 4096, USER + 0x1000, RW), 0);
    assert_eq!(bench.update(AVAIL, 4096, USER + 0x2000, RW), 0);
    for _ in 0..bench.messages().len() {
        bench.event(Event::MissReply { value: 0 });
    }
    assert_eq!(bench.messages(), []);
    bench.actions.clear();
    (bench, fd)
}

pub fn target(bench: &Bench, iova: u64) -> Option<u64> {
    bench.device.table().lookup(iova).map(|leaf| leaf.target + (iova - leaf.first))
}
