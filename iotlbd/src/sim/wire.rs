//! Message bodies as bytes, in the order of the vhost-user specification. All fields are in host byte order.

use iotlb_proto::access::Access;

use super::SimError;
use super::guest::Region;

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// Request numbers of the main channel, with the name used in messages about them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u32, pub &'static str);

#[allow(missing_docs)] // the names are the specification's
pub mod code {
    use super::Code;
    pub const GET_FEATURES: Code = Code(1, "GET_FEATURES");
    pub const SET_FEATURES: Code = Code(2, "SET_FEATURES");
    pub const SET_OWNER: Code = Code(3, "SET_OWNER");
    pub const SET_MEM_TABLE: Code = Code(5, "SET_MEM_TABLE");
    pub const SET_VRING_NUM: Code = Code(8, "SET_VRING_NUM");
    pub const SET_VRING_ADDR: Code = Code(9, "SET_VRING_ADDR");
    pub const SET_VRING_BASE: Code = Code(10, "SET_VRING_BASE");
    pub const GET_VRING_BASE: Code = Code(11, "GET_VRING_BASE");
    pub const SET_VRING_KICK: Code = Code(12, "SET_VRING_KICK");
    pub const SET_VRING_CALL: Code = Code(13, "SET_VRING_CALL");
    pub const SET_VRING_ERR: Code = Code(14, "SET_VRING_ERR");
    pub const GET_PROTOCOL_FEATURES: Code = Code(15, "GET_PROTOCOL_FEATURES");
    pub const SET_PROTOCOL_FEATURES: Code = Code(16, "SET_PROTOCOL_FEATURES");
    pub const GET_QUEUE_NUM: Code = Code(17, "GET_QUEUE_NUM");
    pub const SET_VRING_ENABLE: Code = Code(18, "SET_VRING_ENABLE");
    pub const SET_BACKEND_REQ_FD: Code = Code(21, "SET_BACKEND_REQ_FD");
    pub const IOTLB_UPDATE: Code = Code(22, "IOTLB_MSG (update)");
    pub const IOTLB_INVALIDATE: Code = Code(22, "IOTLB_MSG (invalidate)");
    pub const GET_MAX_MEM_SLOTS: Code = Code(36, "GET_MAX_MEM_SLOTS");
    pub const ADD_MEM_REG: Code = Code(37, "ADD_MEM_REG");
    pub const REM_MEM_REG: Code = Code(38, "REM_MEM_REG");
    pub const SET_STATUS: Code = Code(39, "SET_STATUS");
    pub const GET_STATUS: Code = Code(40, "GET_STATUS");
}

/// The IOTLB message on the back-end channel.
pub const BACKEND_IOTLB: u32 = 1;

/// A message header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageHeader {
    /// Request number.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes of body.
    pub size: u32,
}

impl MessageHeader {
    /// A request's header. `size`: bytes of body; a body is never near 4 GiB here.
    #[must_use]
    pub fn request(code: Code, size: usize, need_reply: bool) -> MessageHeader {
        let flags = VERSION | if need_reply { NEED_REPLY } else { 0 };
        MessageHeader { request: code.0, flags, size: u32::try_from(size).unwrap_or(u32::MAX) }
    }

    /// The header of a `u64` reply to `request`.
    #[must_use]
    pub fn reply(request: u32) -> MessageHeader {
        MessageHeader { request, flags: VERSION | REPLY, size: 8 }
    }

    /// Whether the sender waits for an answer.
    #[must_use]
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> MessageHeader {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        MessageHeader { request: word(0), flags: word(4), size: word(8) }
    }

    /// Checks that this answers `code` with `size` bytes.
    pub fn expect_reply(&self, code: Code, size: usize) -> Result<(), SimError> {
        if self.request == code.0 && self.flags & (REPLY | 3) == (REPLY | VERSION) && self.size as usize == size {
            return Ok(());
        }
        Err(SimError::Protocol { what: format!("{self:?} came instead of the answer to {}", code.1) })
    }
}

/// Builds a body field by field.
#[derive(Debug, Default)]
pub struct Body(Vec<u8>);

impl Body {
    /// Appends 32 bits.
    #[must_use]
    pub fn u32(mut self, value: u32) -> Body {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends 64 bits.
    #[must_use]
    pub fn u64(mut self, value: u64) -> Body {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// Appends a memory region.
    #[must_use]
    pub fn region(self, region: &Region) -> Body {
        self.u64(region.guest_address()).u64(region.size()).u64(region.user_address()).u64(0)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// The IOTLB message, on both channels: 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iotlb {
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end.
    pub user_address: u64,
    /// Permission bits.
    pub permission: u8,
    /// 1 miss, 2 update, 3 invalidate, 4 access fail.
    pub kind: u8,
}

impl Iotlb {
    /// Bytes on the wire.
    pub const LEN: usize = 32;

    /// A translation.
    #[must_use]
    pub fn update(iova: u64, size: u64, user_address: u64, access: Access) -> Iotlb {
        Iotlb { iova, size, user_address, permission: access.bits(), kind: 2 }
    }

    /// Forget a range. The two fields that mean nothing then are as QEMU leaves them: what its stack held.
    #[must_use]
    pub fn invalidate(iova: u64, size: u64) -> Iotlb {
        Iotlb { iova, size, user_address: 0x562c_4887_1230, permission: 0xa5, kind: 3 }
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Iotlb::LEN] {
        let mut bytes = [0; Iotlb::LEN];
        bytes[..8].copy_from_slice(&self.iova.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.user_address.to_ne_bytes());
        bytes[24] = self.permission;
        bytes[25] = self.kind;
        bytes
    }

    /// From a body; `None` when its length is wrong.
    #[must_use]
    pub fn decode(body: &[u8]) -> Option<Iotlb> {
        let bytes: &[u8; Iotlb::LEN] = body.try_into().ok()?;
        let word = |at: usize| read_u64(&bytes[at..]);
        Some(Iotlb { iova: word(0)?, size: word(8)?, user_address: word(16)?, permission: bytes[24], kind: bytes[25] })
    }
}

/// The first eight bytes as a number; `None` when there are fewer.
#[must_use]
pub fn read_u64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// The first four bytes as a number; `None` when there are fewer.
#[must_use]
pub fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iotlb_messages_survive_the_wire() {
        let message = Iotlb::update(0x1_2345_6000, 0x1000, 0x7f00_dead_b000, Access::READ_WRITE);
        let bytes = message.encode();
        assert_eq!(bytes[24..26], [3, 2]);
        assert_eq!(bytes[26..], [0; 6]);
        assert_eq!(Iotlb::decode(&bytes), Some(message));
        assert_eq!(Iotlb::decode(&bytes[1..]), None);
    }

    #[test]
    fn a_reply_must_answer_the_request() {
        let reply = MessageHeader::reply(code::GET_FEATURES.0);
        assert!(reply.expect_reply(code::GET_FEATURES, 8).is_ok());
        assert!(reply.expect_reply(code::GET_STATUS, 8).is_err());
        assert!(reply.expect_reply(code::GET_FEATURES, 16).is_err());
        let request = MessageHeader::request(code::GET_FEATURES, 8, true);
        assert!(request.needs_reply() && request.expect_reply(code::GET_FEATURES, 8).is_err());
        assert_eq!(MessageHeader::decode(&request.encode()), request);
    }
}
