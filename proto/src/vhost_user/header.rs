//! The 12-byte header of every message, and the request numbers.

use std::fmt;

use super::fields::Fields;

/// Length of a header on the wire, in bytes.
pub const HEADER_LEN: usize = 12;
/// Longest payload that is accepted, in bytes. The longest real ones are GET_CONFIG's 12 + 256 bytes and a memory table
/// of eight regions, 264 bytes; the rest is head room for newer front-ends.
pub const PAYLOAD_MAX: usize = 4096;
/// Most descriptors with one message: a memory table carries one a region, eight at most by the specification.
pub const FDS_MAX: usize = 32;

/// `flags` of a header: bits 0-1, protocol version.
pub const FLAG_VERSION_MASK: u32 = 0x3;
/// The only version there is.
pub const FLAG_VERSION: u32 = 0x1;
/// `flags` of a header: the message is a reply.
pub const FLAG_REPLY: u32 = 0x4;
/// `flags` of a header: the sender wants an acknowledgement (REPLY_ACK).
pub const FLAG_NEED_REPLY: u32 = 0x8;

/// A message header, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number; may be unknown.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Payload bytes that follow.
    pub size: u32,
}

/// Which kind of message may arrive on a channel. Each direction of each channel carries one kind only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// The main channel at the back-end, the back-end channel at the front-end.
    Requests,
    /// The main channel at the front-end, the back-end channel at the back-end.
    Replies,
}

/// Why a header cannot be trusted. Where the next message starts is then unknown: the connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not protocol version 1.
    #[error("request {request}: protocol version {version}, only version 1 is spoken here (flags {flags:#x})")]
    Version {
        /// Request number.
        request: u32,
        /// Bits 0-1 of the flags.
        version: u32,
        /// All flags.
        flags: u32,
    },
    /// More payload than any message of this protocol has.
    #[error("request {request}: {size} bytes of payload announced, at most {PAYLOAD_MAX} are accepted")]
    TooLong {
        /// Request number.
        request: u32,
        /// Announced payload length.
        size: u32,
    },
    /// A reply where requests are expected.
    #[error("request {request}: the reply flag is set on what must be a request (flags {flags:#x})")]
    UnexpectedReply {
        /// Request number.
        request: u32,
        /// All flags.
        flags: u32,
    },
    /// A request where replies are expected.
    #[error("request {request}: the reply flag is missing on what must be a reply (flags {flags:#x})")]
    UnexpectedRequest {
        /// Request number.
        request: u32,
        /// All flags.
        flags: u32,
    },
}

impl Header {
    /// The header of a request of `size` payload bytes.
    #[must_use]
    pub const fn request(request: u32, size: u32, need_reply: bool) -> Header {
        let flags = if need_reply { FLAG_VERSION | FLAG_NEED_REPLY } else { FLAG_VERSION };
        Header { request, flags, size }
    }

    /// The header of a reply of `size` payload bytes.
    #[must_use]
    pub const fn reply(request: u32, size: u32) -> Header {
        Header { request, flags: FLAG_VERSION | FLAG_REPLY, size }
    }

    /// Whether an acknowledgement is asked for.
    #[must_use]
    pub const fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }

    /// Whether this is a reply.
    #[must_use]
    pub const fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    /// Reads a header and checks all of it that framing depends on. Flag bits without a meaning are ignored.
    ///
    /// # Errors
    ///
    /// See [`HeaderError`]; no later byte of the stream can be interpreted after any of them.
    pub fn parse(bytes: &[u8; HEADER_LEN], incoming: Incoming) -> Result<Header, HeaderError> {
        let mut fields = Fields::new(bytes);
        let header = Header { request: fields.u32(), flags: fields.u32(), size: fields.u32() };
        let Header { request, flags, size } = header;
        let version = flags & FLAG_VERSION_MASK;
        if version != FLAG_VERSION {
            return Err(HeaderError::Version { request, version, flags });
        }
        match incoming {
            Incoming::Requests if header.is_reply() => return Err(HeaderError::UnexpectedReply { request, flags }),
            Incoming::Replies if !header.is_reply() => return Err(HeaderError::UnexpectedRequest { request, flags }),
            _ => {}
        }
        if size as usize > PAYLOAD_MAX {
            return Err(HeaderError::TooLong { request, size });
        }
        Ok(header)
    }

    /// The header as it goes on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.size.to_ne_bytes());
        bytes
    }
}

macro_rules! request_codes {
    ($($variant:ident = $number:literal $name:literal,)*) => {
        /// Front-end requests (`VHOST_USER_*`) this project decodes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        #[allow(missing_docs)] // the names are the specification's
        pub enum RequestCode {
            $($variant = $number,)*
        }

        impl RequestCode {
            /// Every request that is decoded.
            pub const ALL: &[RequestCode] = &[$(RequestCode::$variant,)*];

            /// The request of that number, if it is decoded here.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<RequestCode> {
                match number {
                    $($number => Some(RequestCode::$variant),)*
                    _ => None,
                }
            }

            /// The specification's name, without `VHOST_USER_`.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(RequestCode::$variant => $name,)*
                }
            }
        }
    };
}

request_codes! {
    GetFeatures = 1 "GET_FEATURES",
    SetFeatures = 2 "SET_FEATURES",
    SetOwner = 3 "SET_OWNER",
    ResetOwner = 4 "RESET_OWNER",
    SetMemTable = 5 "SET_MEM_TABLE",
    SetLogBase = 6 "SET_LOG_BASE",
    SetLogFd = 7 "SET_LOG_FD",
    SetVringNum = 8 "SET_VRING_NUM",
    SetVringAddr = 9 "SET_VRING_ADDR",
    SetVringBase = 10 "SET_VRING_BASE",
    GetVringBase = 11 "GET_VRING_BASE",
    SetVringKick = 12 "SET_VRING_KICK",
    SetVringCall = 13 "SET_VRING_CALL",
    SetVringErr = 14 "SET_VRING_ERR",
    GetProtocolFeatures = 15 "GET_PROTOCOL_FEATURES",
    SetProtocolFeatures = 16 "SET_PROTOCOL_FEATURES",
    GetQueueNum = 17 "GET_QUEUE_NUM",
    SetVringEnable = 18 "SET_VRING_ENABLE",
    SendRarp = 19 "SEND_RARP",
    NetSetMtu = 20 "NET_SET_MTU",
    SetBackendReqFd = 21 "SET_BACKEND_REQ_FD",
    IotlbMsg = 22 "IOTLB_MSG",
    GetConfig = 24 "GET_CONFIG",
    SetConfig = 25 "SET_CONFIG",
    GetInflightFd = 31 "GET_INFLIGHT_FD",
    SetInflightFd = 32 "SET_INFLIGHT_FD",
    ResetDevice = 34 "RESET_DEVICE",
    GetMaxMemSlots = 36 "GET_MAX_MEM_SLOTS",
    AddMemReg = 37 "ADD_MEM_REG",
    RemMemReg = 38 "REM_MEM_REG",
    SetStatus = 39 "SET_STATUS",
    GetStatus = 40 "GET_STATUS",
}

impl RequestCode {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for RequestCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The one request a back-end sends here: an IOTLB message on the back-end channel (`VHOST_USER_BACKEND_IOTLB_MSG`).
pub const BACKEND_IOTLB_MSG: u32 = 1;
