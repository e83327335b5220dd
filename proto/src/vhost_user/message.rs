//! Decoded front-end requests.

use std::os::fd::OwnedFd;

use super::header::RequestCode;
use super::iotlb::IotlbMessage;
use crate::iova::{IovaRange, PAGE_MASK};

/// One region of guest memory as the front-end describes it (SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG).
///
/// The decoder has seen to [`MemoryRegion::check`] where a message is about one region (but for the mmap offset of
/// REM_MEM_REG, which means nothing). The regions of a SET_MEM_TABLE are as hostile as they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address of the first byte.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the first byte in the front-end.
    pub user_address: u64,
    /// Offset of the first byte in the descriptor.
    pub mmap_offset: u64,
}

/// Why a memory region is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// No bytes.
    #[error("its size is 0")]
    Empty,
    /// A field is not a multiple of the page size.
    #[error("its {field} {value:#x} is not a multiple of 4096")]
    Misaligned {
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// The last address or offset does not fit 64 bits.
    #[error("its {field} {start:#x} plus its size {size:#x} passes 2^64")]
    Wraps {
        /// Which field.
        field: &'static str,
        /// Its value.
        start: u64,
        /// Size of the region.
        size: u64,
    },
}

impl MemoryRegion {
    /// Checks what holds for a region by itself.
    ///
    /// All four fields must be multiples of 4096. A worker maps the region at its guest address from its offset, and
    /// only pages can be mapped; a user address that is not on a page would put every page of the region astride two
    /// pages of the guest, which the table's entries cannot say. Front-ends get all of these from `mmap`, so a field
    /// that is off a page is a mistake worth naming.
    ///
    /// # Errors
    ///
    /// See [`RegionError`]. Overlaps between regions are not looked at.
    pub fn check(&self) -> Result<(), RegionError> {
        let size = self.size;
        if size == 0 {
            return Err(RegionError::Empty);
        }
        let starts = [
            ("guest address", self.guest_address),
            ("user address", self.user_address),
            ("mmap offset", self.mmap_offset),
        ];
        for (field, value) in [("size", size)].into_iter().chain(starts) {
            if value & PAGE_MASK != 0 {
                return Err(RegionError::Misaligned { field, value });
            }
        }
        for (field, start) in starts {
            if IovaRange::from_len(start, size).is_none() {
                return Err(RegionError::Wraps { field, start, size });
            }
        }
        Ok(())
    }
}

/// Index and number: SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE, SET_VRING_ENABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringState {
    /// Which ring.
    pub index: u32,
    /// The number; its meaning depends on the request.
    pub num: u32,
}

/// SET_VRING_ADDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringAddress {
    /// Which ring.
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table: a user address of the front-end, or an IOVA once ACCESS_PLATFORM is negotiated.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
    /// Where writes to the used ring are logged.
    pub log: u64,
}

/// SET_VRING_KICK, _CALL, _ERR.
#[derive(Debug)]
pub struct VringFd {
    /// Which ring.
    pub index: u8,
    /// The descriptor; `None` means that the other side polls.
    pub fd: Option<OwnedFd>,
}

/// What the front-end asks, with every length and count already checked against the bytes and descriptors that came.
#[derive(Debug)]
#[allow(missing_docs)] // the names are the specification's
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    /// Its regions are not checked: see [`MemoryRegion`].
    SetMemTable(Vec<(MemoryRegion, OwnedFd)>),
    SetLogBase {
        size: u64,
        offset: u64,
        fd: Option<OwnedFd>,
    },
    SetLogFd(Option<OwnedFd>),
    SetVringNum(VringState),
    SetVringAddr(VringAddress),
    SetVringBase(VringState),
    GetVringBase {
        index: u32,
    },
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringState),
    SendRarp,
    NetSetMtu(u64),
    SetBackendReqFd(OwnedFd),
    Iotlb(IotlbMessage),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    GetInflightFd {
        queues: u16,
        queue_size: u16,
    },
    SetInflightFd {
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
        fd: OwnedFd,
    },
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(MemoryRegion, OwnedFd),
    RemMemReg(MemoryRegion),
    SetStatus(u64),
    GetStatus,
    /// A request number this project does not know. Its payload and descriptors were dropped.
    Unknown(u32),
}

impl Request {
    /// The number on the wire.
    #[must_use]
    pub const fn number(&self) -> u32 {
        let code = match self {
            Request::GetFeatures => RequestCode::GetFeatures,
            Request::SetFeatures(_) => RequestCode::SetFeatures,
            Request::SetOwner => RequestCode::SetOwner,
            Request::ResetOwner => RequestCode::ResetOwner,
            Request::SetMemTable(_) => RequestCode::SetMemTable,
            Request::SetLogBase { .. } => RequestCode::SetLogBase,
            Request::SetLogFd(_) => RequestCode::SetLogFd,
            Request::SetVringNum(_) => RequestCode::SetVringNum,
            Request::SetVringAddr(_) => RequestCode::SetVringAddr,
            Request::SetVringBase(_) => RequestCode::SetVringBase,
            Request::GetVringBase { .. } => RequestCode::GetVringBase,
            Request::SetVringKick(_) => RequestCode::SetVringKick,
            Request::SetVringCall(_) => RequestCode::SetVringCall,
            Request::SetVringErr(_) => RequestCode::SetVringErr,
            Request::GetProtocolFeatures => RequestCode::GetProtocolFeatures,
            Request::SetProtocolFeatures(_) => RequestCode::SetProtocolFeatures,
            Request::GetQueueNum => RequestCode::GetQueueNum,
            Request::SetVringEnable(_) => RequestCode::SetVringEnable,
            Request::SendRarp => RequestCode::SendRarp,
            Request::NetSetMtu(_) => RequestCode::NetSetMtu,
            Request::SetBackendReqFd(_) => RequestCode::SetBackendReqFd,
            Request::Iotlb(_) => RequestCode::IotlbMsg,
            Request::GetConfig { .. } => RequestCode::GetConfig,
            Request::SetConfig { .. } => RequestCode::SetConfig,
            Request::GetInflightFd { .. } => RequestCode::GetInflightFd,
            Request::SetInflightFd { .. } => RequestCode::SetInflightFd,
            Request::ResetDevice => RequestCode::ResetDevice,
            Request::GetMaxMemSlots => RequestCode::GetMaxMemSlots,
            Request::AddMemReg(..) => RequestCode::AddMemReg,
            Request::RemMemReg(_) => RequestCode::RemMemReg,
            Request::SetStatus(_) => RequestCode::SetStatus,
            Request::GetStatus => RequestCode::GetStatus,
            Request::Unknown(number) => return *number,
        };
        code.number()
    }
}
