//! The handlers of front-end requests.

use std::os::fd::OwnedFd;

use iotlb_proto::table::TargetRemoval;
use iotlb_proto::vhost_user::features::{protocol, virtio};
use iotlb_proto::vhost_user::{
    DecodeError, Header, IotlbKind, Request, RequestCode, VringAddress, VringFd, VringState,
};

use rustix::fs::{FileType, fstat};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType, getpeername};

use super::machine::Device;
use super::memory::{MemoryError, REGIONS_MAX};
use super::ring::{ADDRESS_LOG, Kick, RingError, areas, check_size, told};
use super::session::STATUS_FEATURES_OK;
use super::take::{Due, Job, REFUSED};
use super::{Action, ReplyPayload};

/// Longest configuration space the specification allows, in bytes.
const CONFIG_MAX: usize = 256;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("{0} was not negotiated")]
    NotNegotiated(&'static str),
    #[error("feature bits {0:#x} were not offered")]
    NotOffered(u64),
    #[error("UPDATE at {iova:#x} is empty")]
    EmptyUpdate { iova: u64 },
    #[error("UPDATE without ACCESS_PLATFORM")]
    NoIommu,
    #[error("{0:?} is not for the front-end to send on the main channel")]
    WrongDirection(IotlbKind),
    #[error("device status {0:#x} does not fit 8 bits")]
    Status(u64),
    #[error("the descriptor of the back-end channel is not one end of a pair of unix stream sockets")]
    Channel,
    #[error("the descriptor for ring {0} is a file, a socket or a pipe, not an event descriptor")]
    NoEvent(u8),
    #[error("{0} is not served")]
    NotServed(&'static str),
    #[error("request {0} is unknown")]
    Unknown(u32),
}

/// Whether `fd` can be a back-end channel. Looked at here, so that the front-end hears of it in the reply.
fn is_channel(fd: &OwnedFd) -> bool {
    socket_domain(fd) == Ok(AddressFamily::UNIX)
        && socket_type(fd) == Ok(SocketType::STREAM)
        && socket_acceptconn(fd) == Ok(false)
        && !has_named_peer(fd)
}

/// Whether the other end has a name, as one that somebody's listener accepted has. A front-end makes a pair for the
/// channel, and a pair has no names; its own end of the main connection has this daemon's at the other end, and kept
/// open here the connection would never end.
fn has_named_peer(fd: &OwnedFd) -> bool {
    match getpeername(fd) {
        // The length is all that is needed; nothing but the family: no name.
        Ok(Some(name)) => usize::try_from(name.addr_len()).is_ok_and(|len| len > size_of::<libc::sa_family_t>()),
        Ok(None) => false,
        // Not connected: of no use either.
        Err(_) => true,
    }
}

/// Whether `fd` can be a kick, a call or an error descriptor: no file, socket or pipe. Those are kept, and handed on to
/// workers: they would be written to, and a copy of the front-end's own end would keep its connection open when it is
/// gone. Other things without an inode of their own do no harm; whoever writes looks closer.
fn can_be_signalled(fd: &OwnedFd) -> bool {
    // Event descriptors share an inode without a file type.
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Unknown)
}

/// What comes of a request.
enum Outcome {
    /// Done; acknowledge where that was asked for.
    Ack,
    /// Done; answer.
    Reply(ReplyPayload),
    /// Goes on as a job, which answers.
    Job(Job),
}

impl Device {
    /// The acknowledgement `header` asks for.
    fn due(&self, header: Header) -> Due {
        if header.needs_reply() && self.session.reply_ack() {
            Due::Number { request: header.request, value: 0 }
        } else {
            Due::Nothing
        }
    }

    /// The same for a request that is understood. The one that negotiates acknowledgements may ask for one already
    /// (Linux's `virtio_uml` does, and waits).
    fn due_for(&self, header: Header, request: &Request) -> Due {
        match request {
            Request::SetProtocolFeatures(features)
                if header.needs_reply() && features & self.config.protocol_features & protocol::REPLY_ACK != 0 =>
            {
                Due::Number { request: header.request, value: 0 }
            }
            _ => self.due(header),
        }
    }

    /// Handles a request.
    pub(super) fn request(&mut self, header: Header, request: Request) {
        self.counters.requests += 1;
        // Before the request is handled: it may be the one that negotiates acknowledgements.
        let due = self.due_for(header, &request);
        match self.dispatch(header, request, due) {
            Ok(Outcome::Ack) => self.acknowledge(due),
            Ok(Outcome::Reply(payload)) => self.reply(header.request, payload),
            Ok(Outcome::Job(job)) => self.start(job),
            Err(error) => self.refuse(header, due, &error),
        }
    }

    /// Handles a message whose content cannot be understood.
    pub(super) fn bad_request(&mut self, header: Header, error: &DecodeError) {
        let due = self.due(header);
        self.refuse(header, due, error);
    }

    fn acknowledge(&mut self, due: Due) {
        if let Due::Number { request, value } = due {
            self.reply(request, ReplyPayload::U64(value));
        }
    }

    fn reply(&mut self, request: u32, payload: ReplyPayload) {
        self.actions.push_back(Action::Reply { request, payload });
    }

    fn complain(&mut self, header: Header, error: &dyn std::error::Error) {
        self.counters.refused += 1;
        if self.may_complain() {
            tracing::warn!(request = header.request, %error, "request refused");
        }
    }

    /// Says no. Requests that are always answered are answered with what says least.
    fn refuse(&mut self, header: Header, due: Due, error: &dyn std::error::Error) {
        self.complain(header, error);
        const FEATURES: u32 = RequestCode::GetFeatures as u32;
        const PROTOCOL_FEATURES: u32 = RequestCode::GetProtocolFeatures as u32;
        const QUEUE_NUM: u32 = RequestCode::GetQueueNum as u32;
        const MEM_SLOTS: u32 = RequestCode::GetMaxMemSlots as u32;
        const STATUS: u32 = RequestCode::GetStatus as u32;
        const VRING_BASE: u32 = RequestCode::GetVringBase as u32;
        const CONFIG: u32 = RequestCode::GetConfig as u32;
        const INFLIGHT: u32 = RequestCode::GetInflightFd as u32;
        let payload = match header.request {
            FEATURES | PROTOCOL_FEATURES | QUEUE_NUM | MEM_SLOTS | STATUS => ReplyPayload::U64(0),
            VRING_BASE => ReplyPayload::VringState { index: 0, num: 0 },
            CONFIG | INFLIGHT => ReplyPayload::Bytes(Vec::new()),
            _ => match due {
                Due::Nothing => return,
                _ => ReplyPayload::U64(REFUSED),
            },
        };
        self.reply(header.request, payload);
    }

    fn dispatch(&mut self, header: Header, request: Request, due: Due) -> Result<Outcome, RequestError> {
        let number = |value| Ok(Outcome::Reply(ReplyPayload::U64(value)));
        match request {
            Request::GetFeatures => number(self.config.features),
            Request::SetFeatures(features) => Ok(self.set_features(features, due)),
            Request::GetProtocolFeatures => number(self.config.protocol_features),
            Request::SetProtocolFeatures(features) => {
                self.session.protocol = features & self.config.protocol_features;
                match features & !self.config.protocol_features {
                    0 => Ok(Outcome::Ack),
                    extra => Err(RequestError::NotOffered(extra)),
                }
            }
            Request::GetQueueNum => number(u64::from(self.config.queue_num)),
            // Front-ends say it once a connection, and there is nobody else a device could belong to.
            Request::SetOwner => Ok(Outcome::Ack),
            Request::SetBackendReqFd(fd) => {
                self.needs(protocol::BACKEND_REQ, "BACKEND_REQ")?;
                if !is_channel(&fd) {
                    return Err(RequestError::Channel);
                }
                (self.session.channel, self.session.had_channel) = (true, true);
                self.misses.channel_replaced();
                self.actions.push_back(Action::UseBackEndChannel(Some(fd)));
                Ok(Outcome::Job(Job { ask_rings: true, ..Job::give(due) }))
            }

            Request::SetMemTable(table) => {
                let (plan, result) = self.memory.plan_table(table);
                let due = match result {
                    Ok(()) => due,
                    Err(error) => {
                        self.complain(header, &error);
                        due.refused()
                    }
                };
                self.stop_rings_without(&plan);
                self.clear_table();
                if !plan.is_empty() {
                    self.table.note_taken();
                }
                let identity = self.wants_identity();
                Ok(Outcome::Job(Job { memory: Some(Box::new(plan)), identity, ask_rings: true, ..Job::take(due) }))
            }
            Request::GetMaxMemSlots => number(u64::try_from(REGIONS_MAX).unwrap_or(u64::MAX)),
            Request::AddMemReg(description, fd) => {
                self.needs(protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
                let Some(plan) = self.memory.plan_add(&description, fd)? else { return Ok(Outcome::Ack) };
                let identity = self.wants_identity();
                Ok(Outcome::Job(Job { memory: Some(Box::new(plan)), identity, ask_rings: true, ..Job::give(due) }))
            }
            Request::RemMemReg(description) => {
                self.needs(protocol::CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS")?;
                let (plan, region) = match self.memory.plan_remove(&description) {
                    Ok(found) => found,
                    // A take is never answered with an error, and what was to go is not there. QEMU up to 7.2 removes
                    // every region once for each pair of queues.
                    Err(error) => {
                        self.complain(header, &error);
                        return Ok(Outcome::Job(Job::take(due)));
                    }
                };
                self.stop_rings_without(&plan);
                // Entries are found by where they point, which is the region, whatever their IOVA is.
                let (first, last) = region.arena();
                let removal = TargetRemoval::new(first, last);
                Ok(Outcome::Job(Job { memory: Some(Box::new(plan)), ask_rings: true, ..Job::unlink(due, removal) }))
            }

            Request::SetVringNum(state) => self.set_vring_num(state, due),
            Request::SetVringAddr(address) => self.set_vring_addr(address, due),
            Request::SetVringBase(state) => self.set_vring_base(state),
            Request::GetVringBase { index } => self.get_vring_base(header, index),
            Request::SetVringKick(kick) => {
                let index = self.ring_of(&kick)?;
                if let Some(ring) = self.rings.get_mut(index) {
                    let old = ring.replace_kick(kick.fd.map_or(Kick::Polled, Kick::Fd));
                    self.actions.extend(old.map(Action::CloseDescriptor));
                }
                let queue = u16::from(kick.index);
                self.actions.push_back(Action::QueueDescriptors { queue, call_changed: false });
                self.start_ring(index, due)
            }
            Request::SetVringCall(call) => {
                let at = self.ring_of(&call)?;
                if let Some(ring) = self.rings.get_mut(at) {
                    let old = std::mem::replace(&mut ring.call, call.fd);
                    self.actions.extend(old.map(Action::CloseDescriptor));
                }
                // No reply is due, so the old descriptor may have been signalled after the front-end looked at it last:
                // the worker signals the new one once.
                self.actions.push_back(Action::QueueDescriptors { queue: u16::from(call.index), call_changed: true });
                Ok(Outcome::Ack)
            }
            Request::SetVringErr(err) => {
                let at = self.ring_of(&err)?;
                if let Some(ring) = self.rings.get_mut(at) {
                    let old = std::mem::replace(&mut ring.err, err.fd);
                    self.actions.extend(old.map(Action::CloseDescriptor));
                }
                self.actions.push_back(Action::QueueDescriptors { queue: u16::from(err.index), call_changed: false });
                Ok(Outcome::Ack)
            }
            Request::SetVringEnable(state) => {
                let index = self.ring(state.index)?;
                let enable = match state.num {
                    0 => false,
                    1 => true,
                    other => return Err(RingError::Enable(other).into()),
                };
                // Front-ends say it before they negotiate features and before the ring exists.
                let Some(ring) = self.rings.get_mut(index) else { return Ok(Outcome::Ack) };
                ring.enable = Some(enable);
                let started = ring.started.is_some();
                if self.publish_ring(index) && started {
                    // Whoever pinned before goes by the old word: it still delivers packets, or throws them away.
                    self.table.note_taken();
                    return Ok(Outcome::Job(Job::take(due)));
                }
                Ok(Outcome::Ack)
            }

            Request::Iotlb(message) => self.iotlb(&message, due).map(Outcome::Job),

            Request::ResetOwner => Ok(self.reset_device(due)),
            Request::ResetDevice => {
                self.needs(protocol::RESET_DEVICE, "RESET_DEVICE")?;
                Ok(self.reset_device(due))
            }
            Request::SetStatus(status) => {
                self.needs(protocol::STATUS, "STATUS")?;
                let mut status = u8::try_from(status).map_err(|_| RequestError::Status(status))?;
                if status == 0 {
                    // Rings keep what SET_VRING_ENABLE said: that is the front-end's word, not the driver's.
                    self.stop_everything();
                    return Ok(Outcome::Job(Job::take(due)));
                }
                if self.session.acked_too_much {
                    status &= !STATUS_FEATURES_OK;
                }
                let could_ask = self.session.may_ask();
                self.session.status = status;
                if could_ask || !self.session.may_ask() {
                    return Ok(Outcome::Ack);
                }
                // The rings started before.
                Ok(Outcome::Job(Job { ask_rings: true, ..Job::give(due) }))
            }
            Request::GetStatus => number(u64::from(self.session.status)),

            Request::SetLogBase { .. } => {
                self.needs(protocol::LOG_SHMFD, "LOG_SHMFD")?;
                self.table.note_taken();
                // Answered in any case, with a header alone unless an acknowledgement was asked for.
                let due = match due {
                    Due::Nothing => Due::Empty { request: header.request },
                    due => due,
                };
                Ok(Outcome::Job(Job::take(due)))
            }
            Request::SetLogFd(_) => Ok(Outcome::Ack),

            Request::GetConfig { offset, size, flags } => Ok(Outcome::Reply(self.config_bytes(offset, size, flags))),
            Request::SetConfig { .. } => Err(RequestError::NotServed("SET_CONFIG")),
            Request::GetInflightFd { queues, queue_size } => {
                // A region of size 0: there is none.
                let mut bytes = vec![0; 24];
                for (at, byte) in (16..).zip(queues.to_ne_bytes().into_iter().chain(queue_size.to_ne_bytes())) {
                    if let Some(slot) = bytes.get_mut(at) {
                        *slot = byte;
                    }
                }
                Ok(Outcome::Reply(ReplyPayload::Bytes(bytes)))
            }
            Request::SetInflightFd { .. } => {
                self.needs(protocol::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
                Ok(Outcome::Ack)
            }
            Request::SendRarp => Err(RequestError::NotServed("SEND_RARP")),
            Request::NetSetMtu(_) => Err(RequestError::NotServed("NET_SET_MTU")),
            Request::Unknown(number) => Err(RequestError::Unknown(number)),
        }
    }

    fn needs(&self, feature: u64, name: &'static str) -> Result<(), RequestError> {
        if self.session.has(feature) { Ok(()) } else { Err(RequestError::NotNegotiated(name)) }
    }

    fn ring(&self, index: u32) -> Result<usize, RequestError> {
        match usize::try_from(index) {
            Ok(at) if at < self.rings.len() => Ok(at),
            _ => Err(RingError::NoSuchRing(index).into()),
        }
    }

    /// The ring that a descriptor is for, if it is fit for one.
    fn ring_of(&self, descriptor: &VringFd) -> Result<usize, RequestError> {
        let at = self.ring(u32::from(descriptor.index))?;
        match &descriptor.fd {
            Some(fd) if !can_be_signalled(fd) => Err(RequestError::NoEvent(descriptor.index)),
            _ => Ok(at),
        }
    }

    /// Whether guest memory is to be published as it is: there is no IOMMU, and the driver (or a ring) is there.
    pub(super) fn wants_identity(&self) -> bool {
        !self.session.iommu() && (self.session.acked.is_some() || self.is_running())
    }

    fn set_features(&mut self, features: u64, due: Due) -> Outcome {
        let offered = self.config.features;
        let acked = features & offered;
        let before = self.session.features();
        let had_iommu = self.session.iommu();
        self.session.acked = Some(acked);
        self.session.acked_too_much = features != acked;
        self.table.set_acked_features(acked);
        let mut due = due;
        if features != acked {
            self.counters.refused += 1;
            if self.may_complain() {
                let bits = features & !offered;
                tracing::warn!(bits = format_args!("{bits:#x}"), "SET_FEATURES names bits that were not offered");
            }
            due = due.refused();
        }
        if (before ^ acked) & virtio::LOG_ALL != 0 {
            self.table.note_taken();
        }
        let mode_changed = had_iommu != self.session.iommu();
        if mode_changed {
            self.clear_table();
            self.refresh_rings();
        }
        for index in 0..self.rings.len() {
            let started = self.rings.get(index).is_some_and(|ring| ring.started.is_some());
            if self.publish_ring(index) && started {
                // As with SET_VRING_ENABLE, which may not have been said.
                self.table.note_taken();
            }
        }
        // Several queue pairs repeat the same features: then nothing was unlinked and nothing is to be published.
        let identity = self.wants_identity() && !self.identity;
        Outcome::Job(Job { identity, ask_rings: mode_changed, ..Job::take(due) })
    }

    fn set_vring_num(&mut self, state: VringState, due: Due) -> Result<Outcome, RequestError> {
        let index = self.ring(state.index)?;
        let size = check_size(state.num);
        if let Some(ring) = self.rings.get_mut(index) {
            if ring.started.is_none() {
                // Whether it is refused or not: the former one is not what the front-end will go by.
                ring.size = size.unwrap_or(0);
            } else if ring.size != size? {
                return Err(RingError::Running(state.index).into());
            }
        }
        size?;
        self.start_ring(index, due)
    }

    fn set_vring_base(&mut self, state: VringState) -> Result<Outcome, RequestError> {
        let index = self.ring(state.index)?;
        let base = u16::try_from(state.num).map_err(|_| RingError::Base { index: state.index, base: state.num })?;
        if let Some(ring) = self.rings.get_mut(index) {
            if ring.started.is_some() && ring.base != base {
                return Err(RingError::Running(state.index).into());
            }
            ring.base = base;
        }
        Ok(Outcome::Ack)
    }

    fn set_vring_addr(&mut self, address: VringAddress, due: Due) -> Result<Outcome, RequestError> {
        let index = self.ring(address.index)?;
        let Some(ring) = self.rings.get_mut(index) else { return Ok(Outcome::Ack) };
        if let Err(error) = areas(told(&address), ring.size.max(1)) {
            if ring.started.is_none() {
                // As with a size: a ring without an address does not start.
                ring.address = None;
            }
            return Err(error.into());
        }
        let logs = |flags: u32| flags & ADDRESS_LOG != 0;
        let log_changed = logs(ring.address.map_or(0, |old| old.flags)) != logs(address.flags);
        match ring.started {
            None => {
                ring.address = Some(address);
                ring.used_index = None;
                if log_changed {
                    self.table.note_taken();
                }
                self.start_ring(index, due)
            }
            // Switching the log names the same addresses again.
            Some(_) if ring.address.map(|old| told(&old)) == Some(told(&address)) => {
                ring.address = Some(address);
                if log_changed {
                    self.table.note_taken();
                }
                Ok(Outcome::Job(Job::take(due)))
            }
            Some(_) => Err(RingError::Running(address.index).into()),
        }
    }

    /// Starts a ring if it is complete, and asks for its pages.
    fn start_ring(&mut self, index: usize, due: Due) -> Result<Outcome, RequestError> {
        if !self.try_start(index)? {
            return Ok(Outcome::Job(Job::take(due)));
        }
        let identity = self.wants_identity() && !self.identity;
        Ok(Outcome::Job(Job { identity, ask_rings: true, ..Job::take(due) }))
    }

    fn get_vring_base(&mut self, header: Header, index: u32) -> Result<Outcome, RequestError> {
        let (at, ring) = match (self.ring(index), u16::try_from(index)) {
            (Ok(at), Ok(ring)) => (at, ring),
            // DPDK's virtio-user looks whether the answer is for the ring it asked for.
            _ => {
                self.complain(header, &RingError::NoSuchRing(index));
                return Ok(Outcome::Reply(ReplyPayload::VringState { index, num: 0 }));
            }
        };
        if self.stop_ring(at) && !self.is_running() {
            // Front-ends send no invalidations for a stopped device, so nothing it translated may outlive the last
            // ring. What comes after this goes when a ring starts.
            if self.session.iommu() {
                self.clear_table();
            }
            self.misses.stop(&mut self.actions);
        }
        Ok(Outcome::Job(Job::take(Due::VringBase { request: header.request, ring })))
    }

    fn reset_device(&mut self, due: Due) -> Outcome {
        self.stop_everything();
        for ring in &mut self.rings {
            ring.enable = None;
        }
        Outcome::Job(Job::take(due))
    }

    fn config_bytes(&self, offset: u32, size: u32, flags: u32) -> ReplyPayload {
        let range = usize::try_from(offset).ok().zip(usize::try_from(size).ok());
        let data = range
            .filter(|&(_, len)| len <= CONFIG_MAX)
            .and_then(|(from, len)| self.config.config_space.get(from..from.checked_add(len)?))
            .filter(|data| !data.is_empty());
        match data {
            Some(data) => {
                let mut bytes = Vec::with_capacity(12 + data.len());
                for word in [offset, size, flags] {
                    bytes.extend_from_slice(&word.to_ne_bytes());
                }
                bytes.extend_from_slice(data);
                ReplyPayload::Bytes(bytes)
            }
            // A header alone says that it failed.
            None => ReplyPayload::Bytes(Vec::new()),
        }
    }
}
