//! Encoding: replies, messages for the back-end channel, and requests for a front-end.

use std::os::fd::{AsFd, BorrowedFd};

use super::codec::{CONFIG_MAX, CONFIG_PREFIX_LEN, REGION_LEN, REGION_PREFIX_LEN, REGIONS_MAX, VRING_NO_FD};
use super::header::{BACKEND_IOTLB_MSG, HEADER_LEN, Header, PAYLOAD_MAX};
use super::iotlb::{IOTLB_LEN, IOTLB_SIZE, IotlbMessage};
use super::message::{MemoryRegion, Request, VringFd, VringState};

/// Why a message cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The payload would be longer than any receiver of this protocol takes.
    #[error("request {request}: {size} bytes of payload, at most {PAYLOAD_MAX} can be sent")]
    TooLong {
        /// Request number.
        request: u32,
        /// Bytes.
        size: usize,
    },
    /// A memory table of no regions, or of more than descriptors can come with.
    #[error("SET_MEM_TABLE: {count} regions, expected 1 to {REGIONS_MAX}")]
    RegionCount {
        /// Regions.
        count: usize,
    },
    /// Configuration contents that no configuration space holds.
    #[error("request {request}: {size} bytes of configuration, expected 1 to {CONFIG_MAX}")]
    ConfigSize {
        /// Request number.
        request: u32,
        /// Bytes.
        size: usize,
    },
}

/// Bytes of a reply that is a number.
pub const REPLY_LEN: usize = HEADER_LEN + 8;

/// A request ready to be sent: the bytes of the message, and the descriptors that go with it.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// Header and payload.
    pub bytes: Vec<u8>,
    /// Descriptors, in order.
    pub fds: Vec<BorrowedFd<'a>>,
}

/// A whole message of that payload.
///
/// # Errors
///
/// The payload is longer than [`PAYLOAD_MAX`].
fn message(request: u32, header: impl FnOnce(u32) -> Header, payload: &[u8]) -> Result<Vec<u8>, EncodeError> {
    let size = payload.len();
    let too_long = EncodeError::TooLong { request, size };
    if size > PAYLOAD_MAX {
        return Err(too_long);
    }
    let header = header(u32::try_from(size).map_err(|_| too_long)?);
    let mut bytes = Vec::with_capacity(HEADER_LEN + size);
    bytes.extend_from_slice(&header.to_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// A reply that is a number; also every acknowledgement, where 0 means success.
#[must_use]
pub fn reply_u64(request: u32, value: u64) -> [u8; REPLY_LEN] {
    joined(Header::reply(request, 8), value.to_ne_bytes())
}

/// A reply that names a ring and a number (GET_VRING_BASE).
#[must_use]
pub fn reply_vring_state(request: u32, state: VringState) -> [u8; REPLY_LEN] {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&state.index.to_ne_bytes());
    payload[4..].copy_from_slice(&state.num.to_ne_bytes());
    joined(Header::reply(request, 8), payload)
}

/// A reply of any bytes (GET_CONFIG, GET_INFLIGHT_FD), complete with their inner header.
///
/// # Errors
///
/// More than [`PAYLOAD_MAX`] bytes.
pub fn reply_bytes(request: u32, payload: &[u8]) -> Result<Vec<u8>, EncodeError> {
    message(request, |size| Header::reply(request, size), payload)
}

/// An IOTLB message for the back-end channel.
#[must_use]
pub fn backend_iotlb(iotlb: &IotlbMessage, need_reply: bool) -> [u8; HEADER_LEN + IOTLB_LEN] {
    joined(Header::request(BACKEND_IOTLB_MSG, IOTLB_SIZE, need_reply), iotlb.to_bytes())
}

/// A whole message: most of them have a length that is known.
fn joined<const PAYLOAD: usize, const WHOLE: usize>(header: Header, payload: [u8; PAYLOAD]) -> [u8; WHOLE] {
    const { assert!(WHOLE == HEADER_LEN + PAYLOAD) };
    let mut bytes = [0; WHOLE];
    bytes[..HEADER_LEN].copy_from_slice(&header.to_bytes());
    bytes[HEADER_LEN..].copy_from_slice(&payload);
    bytes
}

/// Writes a request as a front-end sends it. What [`decode`](super::codec::decode) makes of it is `request` again, if
/// `request` keeps to the rules; nonsense in regions and indexes is written as it is, so that tests can send it.
///
/// # Errors
///
/// Counts and lengths that no message can carry.
pub fn encode(request: &Request, need_reply: bool) -> Result<Outgoing<'_>, EncodeError> {
    let number = request.number();
    let mut payload = Vec::new();
    let mut fds = Vec::new();
    match request {
        Request::GetFeatures
        | Request::SetOwner
        | Request::ResetOwner
        | Request::GetProtocolFeatures
        | Request::GetQueueNum
        | Request::ResetDevice
        | Request::GetMaxMemSlots
        | Request::GetStatus
        | Request::Unknown(_) => {}
        Request::SetFeatures(value)
        | Request::SetProtocolFeatures(value)
        | Request::NetSetMtu(value)
        | Request::SetStatus(value) => payload.extend_from_slice(&value.to_ne_bytes()),
        Request::SendRarp => payload.extend_from_slice(&[0; 8]),
        Request::SetMemTable(regions) => {
            let count = regions.len();
            let announced = match u32::try_from(count) {
                Ok(announced) if (1..=REGIONS_MAX).contains(&count) => announced,
                _ => return Err(EncodeError::RegionCount { count }),
            };
            payload.reserve(REGION_PREFIX_LEN + count * REGION_LEN);
            payload.extend_from_slice(&announced.to_ne_bytes());
            payload.extend_from_slice(&[0; 4]);
            for (region, fd) in regions {
                push_region(&mut payload, region);
                fds.push(fd.as_fd());
            }
        }
        Request::SetLogBase { size, offset, fd } => {
            payload.extend_from_slice(&size.to_ne_bytes());
            payload.extend_from_slice(&offset.to_ne_bytes());
            fds.extend(fd.as_ref().map(AsFd::as_fd));
        }
        Request::SetLogFd(fd) => fds.extend(fd.as_ref().map(AsFd::as_fd)),
        Request::SetVringNum(state) | Request::SetVringBase(state) | Request::SetVringEnable(state) => {
            push_state(&mut payload, *state);
        }
        Request::GetVringBase { index } => push_state(&mut payload, VringState { index: *index, num: 0 }),
        Request::SetVringAddr(address) => {
            payload.extend_from_slice(&address.index.to_ne_bytes());
            payload.extend_from_slice(&address.flags.to_ne_bytes());
            for field in [address.desc, address.used, address.avail, address.log] {
                payload.extend_from_slice(&field.to_ne_bytes());
            }
        }
        Request::SetVringKick(VringFd { index, fd })
        | Request::SetVringCall(VringFd { index, fd })
        | Request::SetVringErr(VringFd { index, fd }) => {
            let no_fd = if fd.is_some() { 0 } else { VRING_NO_FD };
            payload.extend_from_slice(&(u64::from(*index) | no_fd).to_ne_bytes());
            fds.extend(fd.as_ref().map(AsFd::as_fd));
        }
        Request::SetBackendReqFd(fd) => fds.push(fd.as_fd()),
        Request::Iotlb(iotlb) => payload.extend_from_slice(&iotlb.to_bytes()),
        Request::GetConfig { offset, size, flags } => {
            let len = config_size(number, *size as usize)?;
            push_config(&mut payload, *offset, *size, *flags);
            payload.resize(CONFIG_PREFIX_LEN + len, 0);
        }
        Request::SetConfig { offset, flags, bytes } => {
            let len = config_size(number, bytes.len())?;
            let size = u32::try_from(len).map_err(|_| EncodeError::ConfigSize { request: number, size: len })?;
            push_config(&mut payload, *offset, size, *flags);
            payload.extend_from_slice(bytes);
        }
        Request::GetInflightFd { queues, queue_size } => push_inflight(&mut payload, 0, 0, *queues, *queue_size),
        Request::SetInflightFd { size, offset, queues, queue_size, fd } => {
            push_inflight(&mut payload, *size, *offset, *queues, *queue_size);
            fds.push(fd.as_fd());
        }
        Request::AddMemReg(region, fd) => {
            payload.extend_from_slice(&[0; REGION_PREFIX_LEN]);
            push_region(&mut payload, region);
            fds.push(fd.as_fd());
        }
        Request::RemMemReg(region) => {
            payload.extend_from_slice(&[0; REGION_PREFIX_LEN]);
            push_region(&mut payload, region);
        }
    }
    let bytes = message(number, |size| Header::request(number, size, need_reply), &payload)?;
    Ok(Outgoing { bytes, fds })
}

fn push_region(payload: &mut Vec<u8>, region: &MemoryRegion) {
    for field in [region.guest_address, region.size, region.user_address, region.mmap_offset] {
        payload.extend_from_slice(&field.to_ne_bytes());
    }
}

fn push_state(payload: &mut Vec<u8>, state: VringState) {
    payload.extend_from_slice(&state.index.to_ne_bytes());
    payload.extend_from_slice(&state.num.to_ne_bytes());
}

fn config_size(request: u32, size: usize) -> Result<usize, EncodeError> {
    if (1..=CONFIG_MAX).contains(&size) { Ok(size) } else { Err(EncodeError::ConfigSize { request, size }) }
}

fn push_config(payload: &mut Vec<u8>, offset: u32, size: u32, flags: u32) {
    for field in [offset, size, flags] {
        payload.extend_from_slice(&field.to_ne_bytes());
    }
}

/// With the padding to 24 bytes that real front-ends send.
fn push_inflight(payload: &mut Vec<u8>, size: u64, offset: u64, queues: u16, queue_size: u16) {
    payload.extend_from_slice(&size.to_ne_bytes());
    payload.extend_from_slice(&offset.to_ne_bytes());
    payload.extend_from_slice(&queues.to_ne_bytes());
    payload.extend_from_slice(&queue_size.to_ne_bytes());
    payload.extend_from_slice(&[0; 4]);
}
