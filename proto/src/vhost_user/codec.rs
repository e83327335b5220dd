//! Decoding: from a message's header, payload and descriptors to a [`Request`].
//!
//! The bytes are a front-end's and therefore hostile. A message is taken only if its length, its counts and its
//! descriptors agree exactly; whatever is refused here left the stream in step, so it can be answered non-zero and the
//! connection lives on. Descriptors that are not handed out are closed. Those with an IOTLB message do not count: where
//! it comes in one piece nobody looks for any (`glance`).

use std::os::fd::OwnedFd;

use super::fields::Fields;
use super::header::{BACKEND_IOTLB_MSG, FDS_MAX, Header, RequestCode};
use super::iotlb::{IOTLB_LEN, IotlbError, IotlbMessage};
use super::message::{MemoryRegion, RegionError, Request, VringAddress, VringFd, VringState};

/// Bytes of one memory region: four 64-bit fields.
pub(super) const REGION_LEN: usize = 32;
/// Bytes before the regions of SET_MEM_TABLE (count and padding) and before the one of ADD_MEM_REG (padding).
pub(super) const REGION_PREFIX_LEN: usize = 8;
/// Bytes before the contents in GET_CONFIG and SET_CONFIG: offset, size, flags.
pub(super) const CONFIG_PREFIX_LEN: usize = 12;
/// Bytes of an inflight description without and with the padding some front-ends add.
pub(super) const INFLIGHT_LEN: (usize, usize) = (20, 24);
/// Bit of SET_VRING_KICK, _CALL and _ERR: no descriptor comes along.
pub(super) const VRING_NO_FD: u64 = 1 << 8;

/// Most regions in one SET_MEM_TABLE: each needs a descriptor. Front-ends stop at eight.
pub const REGIONS_MAX: usize = FDS_MAX;
/// Size of the configuration space that can be read and written, in bytes: what front-ends and other back-ends use as
/// well. No virtio device has more.
pub const CONFIG_MAX: usize = 256;

/// Why a message could not be decoded. The stream is still in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload handed over is not what the header announces.
    #[error("request {request}: {got} bytes of payload, the header announces {announced}")]
    Announced {
        /// Request number.
        request: u32,
        /// The header's size.
        announced: u32,
        /// Bytes there are.
        got: usize,
    },
    /// The payload is too short or too long for the request.
    #[error("{request}: {size} bytes of payload, expected {min} to {max}")]
    PayloadSize {
        /// The request.
        request: RequestCode,
        /// Bytes there are.
        size: usize,
        /// Fewest bytes.
        min: usize,
        /// Most bytes.
        max: usize,
    },
    /// Too few or too many descriptors for the request.
    #[error("{request}: {fds} descriptors came along, expected {min} to {max}")]
    Descriptors {
        /// The request.
        request: RequestCode,
        /// Descriptors there are.
        fds: usize,
        /// Fewest descriptors.
        min: usize,
        /// Most descriptors.
        max: usize,
    },
    /// A memory table of no regions, or of more than can come.
    #[error("SET_MEM_TABLE: {count} regions, expected 1 to {REGIONS_MAX}")]
    RegionCount {
        /// What the message says.
        count: u32,
    },
    /// A memory region by itself that cannot be.
    #[error("{request}: the region is not usable: {source}")]
    Region {
        /// The request.
        request: RequestCode,
        /// What is wrong with it.
        source: RegionError,
    },
    /// Bits above the ring index and the no-descriptor bit.
    #[error("{request}: {value:#x} is no ring index; only bits 0-7 (index) and 8 (no descriptor) have a meaning")]
    RingIndex {
        /// The request.
        request: RequestCode,
        /// The payload.
        value: u64,
    },
    /// The no-descriptor bit and the descriptors disagree.
    #[error("{request}: ring {index}: no-descriptor bit {}, {fds} descriptors", if *.no_fd { "set" } else { "clear" })]
    RingDescriptor {
        /// The request.
        request: RequestCode,
        /// Ring index.
        index: u8,
        /// Bit 8 of the payload.
        no_fd: bool,
        /// Descriptors there are.
        fds: usize,
    },
    /// Offset and size leave the configuration space, or disagree with the payload.
    #[error("{request}: offset {offset}, size {size}, {contents} bytes of contents; the space has {CONFIG_MAX} bytes")]
    ConfigRange {
        /// The request.
        request: RequestCode,
        /// First byte.
        offset: u32,
        /// Bytes wanted.
        size: u32,
        /// Bytes that came.
        contents: usize,
    },
    /// An area of a descriptor that is empty or wraps.
    #[error("{request}: {size:#x} bytes at offset {offset:#x} are no area of a descriptor")]
    Area {
        /// The request.
        request: RequestCode,
        /// Bytes.
        size: u64,
        /// Offset in the descriptor.
        offset: u64,
    },
    /// An IOTLB message without a meaning.
    #[error("IOTLB_MSG: {0}")]
    Iotlb(#[from] IotlbError),
    /// A request on the back-end channel other than the IOTLB message, or one with the wrong length.
    #[error("back-end channel: request {request} of {size} bytes, expected {BACKEND_IOTLB_MSG} of {IOTLB_LEN}")]
    BackEndRequest {
        /// Request number.
        request: u32,
        /// Bytes there are.
        size: usize,
    },
    /// The reply does not belong to the request, or has the wrong length.
    #[error(
        "reply to request {request} of {size} bytes, expected one to request {expected_request} of {expected_size}"
    )]
    Reply {
        /// Request number in the reply.
        request: u32,
        /// Bytes there are.
        size: usize,
        /// Request number that was asked.
        expected_request: u32,
        /// Bytes the reply must have.
        expected_size: usize,
    },
}

/// Decodes one front-end message. Request numbers that are not known here give [`Request::Unknown`], whatever their
/// payload and descriptors; both are dropped.
///
/// Ring indexes above 255 cannot come with descriptors and are refused there; elsewhere they are the device's to check,
/// as are overlapping regions and the range of an IOTLB message. So are the regions of a SET_MEM_TABLE: one that cannot
/// be spoils the table, but what the table leaves out is gone all the same.
///
/// # Errors
///
/// See [`DecodeError`]. All descriptors are closed then.
pub fn decode(header: Header, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Request, DecodeError> {
    if payload.len() != header.size as usize {
        return Err(DecodeError::Announced { request: header.request, announced: header.size, got: payload.len() });
    }
    let Some(request) = RequestCode::from_number(header.request) else {
        return Ok(Request::Unknown(header.request));
    };
    Message { request, payload, fds }.decode()
}

/// Decodes what a front-end receives on the back-end channel.
///
/// # Errors
///
/// Anything but an IOTLB message.
pub fn decode_backend(header: Header, payload: &[u8]) -> Result<IotlbMessage, DecodeError> {
    let wrong = DecodeError::BackEndRequest { request: header.request, size: payload.len() };
    if header.request != BACKEND_IOTLB_MSG {
        return Err(wrong);
    }
    let bytes = <&[u8; IOTLB_LEN]>::try_from(payload).map_err(|_| wrong)?;
    Ok(IotlbMessage::from_bytes(bytes)?)
}

/// The number in a reply to `request`.
///
/// # Errors
///
/// The reply is one to another request, or is not 8 bytes long.
pub fn decode_reply_u64(request: u32, header: Header, payload: &[u8]) -> Result<u64, DecodeError> {
    Ok(reply_fields::<8>(request, header, payload)?.u64())
}

/// Ring and number in a reply to `request` (GET_VRING_BASE).
///
/// # Errors
///
/// The reply is one to another request, or is not 8 bytes long.
pub fn decode_reply_vring_state(request: u32, header: Header, payload: &[u8]) -> Result<VringState, DecodeError> {
    let mut fields = reply_fields::<8>(request, header, payload)?;
    Ok(VringState { index: fields.u32(), num: fields.u32() })
}

fn reply_fields<const N: usize>(request: u32, header: Header, payload: &[u8]) -> Result<Fields<'_>, DecodeError> {
    if header.request != request || !header.is_reply() || payload.len() != N {
        return Err(DecodeError::Reply {
            request: header.request,
            size: payload.len(),
            expected_request: request,
            expected_size: N,
        });
    }
    Ok(Fields::new(payload))
}

/// A description of a region as it stands there.
fn region(fields: &mut Fields<'_>) -> MemoryRegion {
    MemoryRegion {
        guest_address: fields.u64(),
        size: fields.u64(),
        user_address: fields.u64(),
        mmap_offset: fields.u64(),
    }
}

/// A message whose request number is known.
struct Message<'a> {
    request: RequestCode,
    payload: &'a [u8],
    fds: Vec<OwnedFd>,
}

impl<'a> Message<'a> {
    fn decode(self) -> Result<Request, DecodeError> {
        use RequestCode as Code;
        match self.request {
            Code::GetFeatures => self.empty(Request::GetFeatures),
            Code::SetFeatures => Ok(Request::SetFeatures(self.number()?)),
            Code::SetOwner => self.empty(Request::SetOwner),
            Code::ResetOwner => self.empty(Request::ResetOwner),
            Code::SetMemTable => self.memory_table(),
            Code::SetLogBase => self.log_base(),
            Code::SetLogFd => {
                self.payload_size(0, 0)?;
                Ok(Request::SetLogFd(self.optional_fd()?))
            }
            Code::SetVringNum => Ok(Request::SetVringNum(self.vring_state()?)),
            Code::SetVringAddr => self.vring_address(),
            Code::SetVringBase => Ok(Request::SetVringBase(self.vring_state()?)),
            Code::GetVringBase => Ok(Request::GetVringBase { index: self.vring_state()?.index }),
            Code::SetVringKick => Ok(Request::SetVringKick(self.vring_fd()?)),
            Code::SetVringCall => Ok(Request::SetVringCall(self.vring_fd()?)),
            Code::SetVringErr => Ok(Request::SetVringErr(self.vring_fd()?)),
            Code::GetProtocolFeatures => self.empty(Request::GetProtocolFeatures),
            Code::SetProtocolFeatures => Ok(Request::SetProtocolFeatures(self.number()?)),
            Code::GetQueueNum => self.empty(Request::GetQueueNum),
            Code::SetVringEnable => Ok(Request::SetVringEnable(self.vring_state()?)),
            // The hardware address in it is of no use: the device never speaks for the guest.
            Code::SendRarp => self.number().map(|_| Request::SendRarp),
            Code::NetSetMtu => Ok(Request::NetSetMtu(self.number()?)),
            Code::SetBackendReqFd => {
                self.payload_size(0, 0)?;
                Ok(Request::SetBackendReqFd(self.one_fd()?))
            }
            Code::IotlbMsg => self.iotlb(),
            Code::GetConfig => {
                let (offset, size, flags, _) = self.config()?;
                Ok(Request::GetConfig { offset, size, flags })
            }
            Code::SetConfig => {
                let (offset, _, flags, bytes) = self.config()?;
                Ok(Request::SetConfig { offset, flags, bytes: bytes.to_vec() })
            }
            Code::GetInflightFd => self.get_inflight(),
            Code::SetInflightFd => self.set_inflight(),
            Code::ResetDevice => self.empty(Request::ResetDevice),
            Code::GetMaxMemSlots => self.empty(Request::GetMaxMemSlots),
            Code::AddMemReg => {
                let region = self.single_region()?;
                Ok(Request::AddMemReg(region, self.one_fd()?))
            }
            Code::RemMemReg => {
                // The specification lets a front-end send the region's descriptor along, and discourages it.
                let region = self.region_that_goes()?;
                self.optional_fd()?;
                Ok(Request::RemMemReg(region))
            }
            Code::SetStatus => Ok(Request::SetStatus(self.number()?)),
            Code::GetStatus => self.empty(Request::GetStatus),
        }
    }

    fn payload_size(&self, min: usize, max: usize) -> Result<Fields<'a>, DecodeError> {
        let size = self.payload.len();
        if size < min || size > max {
            return Err(DecodeError::PayloadSize { request: self.request, size, min, max });
        }
        Ok(Fields::new(self.payload))
    }

    fn fd_count(&self, min: usize, max: usize) -> Result<(), DecodeError> {
        let fds = self.fds.len();
        if fds < min || fds > max {
            return Err(DecodeError::Descriptors { request: self.request, fds, min, max });
        }
        Ok(())
    }

    /// Exactly `size` bytes and no descriptor.
    fn plain(&self, size: usize) -> Result<Fields<'a>, DecodeError> {
        let fields = self.payload_size(size, size)?;
        self.fd_count(0, 0)?;
        Ok(fields)
    }

    fn empty(self, request: Request) -> Result<Request, DecodeError> {
        self.plain(0)?;
        Ok(request)
    }

    fn number(&self) -> Result<u64, DecodeError> {
        Ok(self.plain(8)?.u64())
    }

    fn optional_fd(mut self) -> Result<Option<OwnedFd>, DecodeError> {
        self.fd_count(0, 1)?;
        Ok(self.fds.pop())
    }

    fn one_fd(mut self) -> Result<OwnedFd, DecodeError> {
        self.fd_count(1, 1)?;
        self.fds.pop().ok_or(DecodeError::Descriptors { request: self.request, fds: 0, min: 1, max: 1 })
    }

    fn checked(&self, region: MemoryRegion) -> Result<MemoryRegion, DecodeError> {
        region.check().map_err(|source| DecodeError::Region { request: self.request, source })?;
        Ok(region)
    }

    fn single_region(&self) -> Result<MemoryRegion, DecodeError> {
        self.checked(self.unchecked_region()?)
    }

    /// A region by its name, which is where it lies and how large it is: the specification has the mmap offset ignored.
    fn region_that_goes(&self) -> Result<MemoryRegion, DecodeError> {
        let region = self.unchecked_region()?;
        self.checked(MemoryRegion { mmap_offset: 0, ..region })?;
        Ok(region)
    }

    /// QEMU 5.1 leaves out the upper half of the mmap offset, the last field. As zero it is wrong for offsets of 4 GiB
    /// and more only, which no region of its own has.
    fn unchecked_region(&self) -> Result<MemoryRegion, DecodeError> {
        const SIZE: usize = REGION_PREFIX_LEN + REGION_LEN;
        const HALF: usize = SIZE - 4;
        let size = if self.payload.len() == HALF { HALF } else { SIZE };
        self.payload_size(size, size)?;
        let mut whole = [0; SIZE];
        whole[..size].copy_from_slice(self.payload);
        let mut fields = Fields::new(&whole);
        fields.u64();
        Ok(region(&mut fields))
    }

    /// The regions as they stand there: see [`decode`].
    fn memory_table(mut self) -> Result<Request, DecodeError> {
        let mut fields =
            self.payload_size(REGION_PREFIX_LEN + REGION_LEN, REGION_PREFIX_LEN + REGIONS_MAX * REGION_LEN)?;
        let announced = fields.u32();
        fields.u32();
        let count = match usize::try_from(announced) {
            Ok(count) if (1..=REGIONS_MAX).contains(&count) => count,
            _ => return Err(DecodeError::RegionCount { count: announced }),
        };
        // Linux's virtio_uml has room for two, whatever it announces.
        let size_min = REGION_PREFIX_LEN + count * REGION_LEN;
        self.payload_size(size_min, REGION_PREFIX_LEN + REGIONS_MAX * REGION_LEN)?;
        self.fd_count(count, count)?;
        let fds = std::mem::take(&mut self.fds);
        let mut regions = Vec::with_capacity(count);
        for fd in fds {
            regions.push((region(&mut fields), fd));
        }
        Ok(Request::SetMemTable(regions))
    }

    fn area(&self, size: u64, offset: u64) -> Result<(), DecodeError> {
        if size == 0 || offset.checked_add(size).is_none() {
            return Err(DecodeError::Area { request: self.request, size, offset });
        }
        Ok(())
    }

    fn log_base(self) -> Result<Request, DecodeError> {
        let mut fields = self.payload_size(16, 16)?;
        let (size, offset) = (fields.u64(), fields.u64());
        self.area(size, offset)?;
        Ok(Request::SetLogBase { size, offset, fd: self.optional_fd()? })
    }

    fn vring_state(&self) -> Result<VringState, DecodeError> {
        let mut fields = self.plain(8)?;
        Ok(VringState { index: fields.u32(), num: fields.u32() })
    }

    fn vring_address(self) -> Result<Request, DecodeError> {
        let mut fields = self.plain(40)?;
        Ok(Request::SetVringAddr(VringAddress {
            index: fields.u32(),
            flags: fields.u32(),
            desc: fields.u64(),
            used: fields.u64(),
            avail: fields.u64(),
            log: fields.u64(),
        }))
    }

    fn vring_fd(mut self) -> Result<VringFd, DecodeError> {
        let value = self.payload_size(8, 8)?.u64();
        let no_fd = value & VRING_NO_FD != 0;
        // A ring number cut to eight bits would name another ring.
        let index =
            u8::try_from(value & !VRING_NO_FD).map_err(|_| DecodeError::RingIndex { request: self.request, value })?;
        let fds = self.fds.len();
        if fds != usize::from(!no_fd) {
            return Err(DecodeError::RingDescriptor { request: self.request, index, no_fd, fds });
        }
        Ok(VringFd { index, fd: self.fds.pop() })
    }

    /// With a descriptor or without one: see above.
    fn iotlb(self) -> Result<Request, DecodeError> {
        let size = self.payload.len();
        let bytes = <&[u8; IOTLB_LEN]>::try_from(self.payload).map_err(|_| DecodeError::PayloadSize {
            request: self.request,
            size,
            min: IOTLB_LEN,
            max: IOTLB_LEN,
        })?;
        Ok(Request::Iotlb(IotlbMessage::from_bytes(bytes)?))
    }

    /// Offset, size, flags and contents; the contents are `size` bytes long.
    fn config(&self) -> Result<(u32, u32, u32, &'a [u8]), DecodeError> {
        let mut fields = self.payload_size(CONFIG_PREFIX_LEN, CONFIG_PREFIX_LEN + CONFIG_MAX)?;
        self.fd_count(0, 0)?;
        let (offset, size, flags) = (fields.u32(), fields.u32(), fields.u32());
        let contents = fields.rest();
        let end = u64::from(offset) + u64::from(size);
        if size == 0 || end > CONFIG_MAX as u64 || contents.len() != size as usize {
            return Err(DecodeError::ConfigRange { request: self.request, offset, size, contents: contents.len() });
        }
        Ok((offset, size, flags, contents))
    }

    fn inflight(&self) -> Result<(u64, u64, u16, u16), DecodeError> {
        let mut fields = self.payload_size(INFLIGHT_LEN.0, INFLIGHT_LEN.1)?;
        Ok((fields.u64(), fields.u64(), fields.u16(), fields.u16()))
    }

    fn get_inflight(self) -> Result<Request, DecodeError> {
        let (_, _, queues, queue_size) = self.inflight()?;
        self.fd_count(0, 0)?;
        Ok(Request::GetInflightFd { queues, queue_size })
    }

    fn set_inflight(self) -> Result<Request, DecodeError> {
        let (size, offset, queues, queue_size) = self.inflight()?;
        self.area(size, offset)?;
        Ok(Request::SetInflightFd { size, offset, queues, queue_size, fd: self.one_fd()? })
    }
}
