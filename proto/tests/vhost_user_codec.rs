//! The vhost-user codec: round trips of every request, and the exact error for every kind of malformed message.

use std::os::fd::{AsFd, OwnedFd};

use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::codec::REGIONS_MAX;
use iotlb_proto::vhost_user::header::{FDS_MAX, FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, HEADER_LEN, PAYLOAD_MAX};
use iotlb_proto::vhost_user::{
    BACKEND_IOTLB_MSG, DecodeError, EncodeError, Header, HeaderError, Incoming, IotlbError, IotlbKind, IotlbMessage,
    MemoryRegion, RegionError, Request, RequestCode, VringAddress, VringFd, VringState, backend_iotlb, decode,
    decode_backend, decode_reply_u64, decode_reply_vring_state, encode, reply_bytes, reply_u64, reply_vring_state,
};
use proptest::prelude::*;

fn fd() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null opens").into()
}

fn fds(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| fd()).collect()
}

const REGION: MemoryRegion =
    MemoryRegion { guest_address: 0x1000, size: 0x2000, user_address: 0x7f00_0000_0000, mmap_offset: 0x3000 };
const STATE: VringState = VringState { index: 3, num: 256 };

/// One of each request, with the payload size that front-ends send (as recorded from QEMU where it sends the request).
fn samples() -> Vec<(Request, usize, usize)> {
    let high = MemoryRegion { guest_address: 1 << 32, mmap_offset: 0, ..REGION };
    vec![
        (Request::GetFeatures, 0, 0),
        (Request::SetFeatures(0x1_7000_0000), 8, 0),
        (Request::SetOwner, 0, 0),
        (Request::ResetOwner, 0, 0),
        (Request::SetMemTable(vec![(REGION, fd())]), 40, 1),
        (Request::SetMemTable(vec![(REGION, fd()), (high, fd())]), 72, 2),
        (Request::SetLogBase { size: 16384, offset: 4096, fd: Some(fd()) }, 16, 1),
        (Request::SetLogBase { size: 16384, offset: 0, fd: None }, 16, 0),
        (Request::SetLogFd(Some(fd())), 0, 1),
        (Request::SetLogFd(None), 0, 0),
        (Request::SetVringNum(STATE), 8, 0),
        (Request::SetVringAddr(VringAddress { index: 1, flags: 1, desc: 2, used: 3, avail: 4, log: 5 }), 40, 0),
        (Request::SetVringBase(STATE), 8, 0),
        (Request::GetVringBase { index: 1 }, 8, 0),
        (Request::SetVringKick(VringFd { index: 255, fd: Some(fd()) }), 8, 1),
        (Request::SetVringKick(VringFd { index: 1, fd: None }), 8, 0),
        (Request::SetVringCall(VringFd { index: 2, fd: Some(fd()) }), 8, 1),
        (Request::SetVringErr(VringFd { index: 0, fd: None }), 8, 0),
        (Request::GetProtocolFeatures, 0, 0),
        (Request::SetProtocolFeatures(0x29), 8, 0),
        (Request::GetQueueNum, 0, 0),
        (Request::SetVringEnable(STATE), 8, 0),
        (Request::SendRarp, 8, 0),
        (Request::NetSetMtu(1500), 8, 0),
        (Request::SetBackendReqFd(fd()), 0, 1),
        (Request::Iotlb(IotlbMessage::update(0x1000, 0x1000, 0x7f00_0000_0000, Access::READ_WRITE)), 32, 0),
        (Request::GetConfig { offset: 0, size: 57, flags: 0 }, 69, 0),
        (Request::SetConfig { offset: 250, flags: 1, bytes: vec![1, 2, 3, 4, 5, 6] }, 18, 0),
        (Request::GetInflightFd { queues: 1, queue_size: 128 }, 24, 0),
        (Request::SetInflightFd { size: 4096, offset: 8192, queues: 1, queue_size: 128, fd: fd() }, 24, 1),
        (Request::ResetDevice, 0, 0),
        (Request::GetMaxMemSlots, 0, 0),
        (Request::AddMemReg(REGION, fd()), 40, 1),
        (Request::RemMemReg(REGION), 40, 0),
        (Request::SetStatus(0xf), 8, 0),
        (Request::GetStatus, 0, 0),
        (Request::Unknown(99), 0, 0),
    ]
}

/// A request in words, with descriptor numbers taken out: each side has numbers of its own.
fn shape(request: &Request) -> String {
    let mut text = String::new();
    let debug = format!("{request:?}");
    let mut rest = debug.as_str();
    while let Some(at) = rest.find("fd: ") {
        let (head, tail) = rest.split_at(at + "fd: ".len());
        text.push_str(head);
        rest = tail.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    text + rest
}

#[test]
fn every_request_survives_the_wire() {
    let mut seen = Vec::new();
    for (request, size, fd_count) in samples() {
        for need_reply in [false, true] {
            let outgoing = encode(&request, need_reply).expect("encodes");
            let (head, payload) = outgoing.bytes.split_first_chunk::<HEADER_LEN>().expect("a whole header");
            let header = Header::parse(head, Incoming::Requests).expect("a request");
            assert_eq!((header.request, header.needs_reply()), (request.number(), need_reply));
            assert_eq!((payload.len(), outgoing.fds.len()), (size, fd_count), "{request:?}");
            let copies = outgoing.fds.iter().map(|fd| fd.try_clone_to_owned().expect("dup")).collect();
            let decoded = decode(header, payload, copies).expect("decodes");
            assert_eq!(shape(&decoded), shape(&request));
        }
        seen.push(request.number());
    }
    for code in RequestCode::ALL {
        assert!(seen.contains(&code.number()), "no sample of {code}");
        assert_eq!(RequestCode::from_number(code.number()), Some(*code));
    }
}

#[test]
fn descriptors_stay_with_their_region() {
    let (one, two) = std::io::pipe().expect("pipe");
    let (one, two): (OwnedFd, OwnedFd) = (one.into(), two.into());
    let flags = |fd: std::os::fd::BorrowedFd<'_>| {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).expect("flags") // read end and write end differ here
    };
    let (read, write) = (flags(one.as_fd()), flags(two.as_fd()));
    assert_ne!(read, write);
    let second = MemoryRegion { guest_address: 0x10_0000, ..REGION };
    let request = Request::SetMemTable(vec![(REGION, one), (second, two)]);
    let outgoing = encode(&request, false).expect("encodes");
    let copies = outgoing.fds.iter().map(|fd| fd.try_clone_to_owned().expect("dup")).collect();
    let header = Header::request(RequestCode::SetMemTable.number(), 72, false);
    let Request::SetMemTable(regions) = decode(header, &outgoing.bytes[HEADER_LEN..], copies).expect("decodes") else {
        panic!("another request");
    };
    let kinds: Vec<_> = regions.iter().map(|(region, fd)| (region.guest_address, flags(fd.as_fd()))).collect();
    assert_eq!(kinds, [(0x1000, read), (0x10_0000, write)]);
}

#[test]
fn qemu_sends_a_descriptor_with_rem_mem_reg() {
    let request = Request::RemMemReg(REGION);
    let payload = encode(&request, true).expect("encodes").bytes.split_off(HEADER_LEN);
    let header = Header::request(RequestCode::RemMemReg.number(), 40, true);
    for count in 0..2 {
        assert!(matches!(decode(header, &payload, fds(count)), Ok(Request::RemMemReg(REGION))));
    }
}

#[test]
fn the_mmap_offset_of_a_region_that_goes_means_nothing() {
    for mmap_offset in [0x123, u64::MAX] {
        let payload = [vec![0; 8], region_bytes(MemoryRegion { mmap_offset, ..REGION })].concat();
        let header = Header::request(RequestCode::RemMemReg.number(), 40, true);
        let gone = match decode(header, &payload, fds(0)) {
            Ok(Request::RemMemReg(region)) => region,
            other => panic!("{mmap_offset:#x}: {other:?}"),
        };
        assert_eq!((gone.guest_address, gone.size), (REGION.guest_address, REGION.size));
        assert_eq!(gone.user_address, REGION.user_address);
    }
}

#[test]
fn unpadded_inflight_is_taken() {
    let header = Header::request(RequestCode::GetInflightFd.number(), 20, false);
    let payload = [0u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    let payload = [&payload[..], &2u16.to_ne_bytes(), &64u16.to_ne_bytes()].concat();
    assert!(matches!(decode(header, &payload, Vec::new()), Ok(Request::GetInflightFd { queues: 2, queue_size: 64 })));
}

#[test]
fn garbage_in_the_user_address_of_an_invalidation_is_taken() {
    let message =
        IotlbMessage { user_address: 0xdead_beef, ..IotlbMessage::invalidate(0xfef0_0000, 0xffff_ffff_0110_0000) };
    let mut bytes = message.to_bytes();
    bytes[26..].fill(0xaa); // padding
    let header = Header::request(RequestCode::IotlbMsg.number(), 32, true);
    assert!(matches!(decode(header, &bytes, Vec::new()), Ok(Request::Iotlb(taken)) if taken == message));
}

#[test]
fn a_descriptor_with_an_iotlb_message_does_not_count() {
    for count in [1, FDS_MAX] {
        let header = Header::request(RequestCode::IotlbMsg.number(), 32, true);
        let got = decode(header, &iotlb_bytes(3, 3), fds(count));
        assert!(matches!(&got, Ok(Request::Iotlb(message)) if message.kind == IotlbKind::Invalidate), "{got:?}");
    }
}

fn region_bytes(region: MemoryRegion) -> Vec<u8> {
    [region.guest_address, region.size, region.user_address, region.mmap_offset]
        .iter()
        .flat_map(|f| f.to_ne_bytes())
        .collect()
}

fn table_bytes(count: u32, regions: usize) -> Vec<u8> {
    let mut bytes = count.to_ne_bytes().to_vec();
    bytes.extend([0; 4]);
    for _ in 0..regions {
        bytes.extend(region_bytes(REGION));
    }
    bytes
}

fn config_bytes(offset: u32, size: u32, contents: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = [offset, size, 0].iter().flat_map(|f| f.to_ne_bytes()).collect();
    bytes.resize(12 + contents, 0);
    bytes
}

fn iotlb_bytes(access: u8, kind: u8) -> Vec<u8> {
    let mut bytes = IotlbMessage::miss(0x1000, Access::READ).to_bytes();
    (bytes[24], bytes[25]) = (access, kind);
    bytes.to_vec()
}

/// The message that `access` and `kind` make on the wire.
fn iotlb_message(access: u8, kind: u8) -> Result<IotlbMessage, IotlbError> {
    let bytes = iotlb_bytes(access, kind);
    IotlbMessage::from_bytes(bytes.as_slice().try_into().expect("32 bytes"))
}

#[test]
fn an_invalidation_is_understood_whatever_its_permission_field_holds() {
    // QEMU leaves the field as its stack was.
    for garbage in [1, 3, 4, 0x80, 0xff] {
        let message = iotlb_message(garbage, 3).expect("an invalidation");
        assert_eq!((message.kind, message.access), (IotlbKind::Invalidate, Access::NONE), "{garbage:#x}");
    }
}

#[test]
fn an_update_with_a_permission_nobody_knows_allows_nothing() {
    for unknown in [4, 5, 0x80, 0xff] {
        let message = iotlb_message(unknown, 2).expect("an update");
        assert_eq!((message.kind, message.access), (IotlbKind::Update, Access::NONE), "{unknown:#x}");
    }
}

#[test]
fn every_malformation_has_its_error() {
    use RequestCode as Code;
    let size = |request, size, min, max| DecodeError::PayloadSize { request, size, min, max };
    let descriptors = |request, fds, min, max| DecodeError::Descriptors { request, fds, min, max };
    let region = |request, source| DecodeError::Region { request, source };
    let single = |region: MemoryRegion| [vec![0; 8], region_bytes(region)].concat();
    let number = |value: u64| value.to_ne_bytes().to_vec();
    let area = |size: u64, offset: u64| [size.to_ne_bytes(), offset.to_ne_bytes()].concat();
    let big = 8 + 32 * REGIONS_MAX;
    let table: Vec<(Code, Vec<u8>, usize, DecodeError)> = vec![
        (Code::GetFeatures, vec![0; 8], 0, size(Code::GetFeatures, 8, 0, 0)),
        (Code::GetFeatures, vec![], 1, descriptors(Code::GetFeatures, 1, 0, 0)),
        (Code::SetFeatures, vec![0; 4], 0, size(Code::SetFeatures, 4, 8, 8)),
        (Code::SetFeatures, vec![0; 9], 0, size(Code::SetFeatures, 9, 8, 8)),
        (Code::SetStatus, number(1), 2, descriptors(Code::SetStatus, 2, 0, 0)),
        (Code::SetMemTable, vec![], 0, size(Code::SetMemTable, 0, 40, big)),
        (Code::SetMemTable, table_bytes(0, 0), 0, size(Code::SetMemTable, 8, 40, big)),
        (Code::SetMemTable, table_bytes(0, 1), 1, DecodeError::RegionCount { count: 0 }),
        (Code::SetMemTable, table_bytes(33, 32), 32, DecodeError::RegionCount { count: 33 }),
        (Code::SetMemTable, table_bytes(u32::MAX, 2), 2, DecodeError::RegionCount { count: u32::MAX }),
        (Code::SetMemTable, table_bytes(2, 1), 2, size(Code::SetMemTable, 40, 72, big)),
        (Code::SetMemTable, table_bytes(1, 2), 2, descriptors(Code::SetMemTable, 2, 1, 1)),
        (Code::SetMemTable, table_bytes(2, 2), 1, descriptors(Code::SetMemTable, 1, 2, 2)),
        (Code::SetMemTable, table_bytes(2, 2), 3, descriptors(Code::SetMemTable, 3, 2, 2)),
        (Code::AddMemReg, single(MemoryRegion { size: 0, ..REGION }), 1, region(Code::AddMemReg, RegionError::Empty)),
        (Code::AddMemReg, vec![0; 32], 1, size(Code::AddMemReg, 32, 40, 40)),
        (Code::AddMemReg, single(REGION), 0, descriptors(Code::AddMemReg, 0, 1, 1)),
        (Code::AddMemReg, single(REGION), 2, descriptors(Code::AddMemReg, 2, 1, 1)),
        (Code::RemMemReg, single(REGION), 2, descriptors(Code::RemMemReg, 2, 0, 1)),
        (
            Code::AddMemReg,
            single(MemoryRegion { size: 0x1800, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Misaligned { field: "size", value: 0x1800 }),
        ),
        (
            Code::AddMemReg,
            single(MemoryRegion { guest_address: 1, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Misaligned { field: "guest address", value: 1 }),
        ),
        (
            Code::AddMemReg,
            single(MemoryRegion { user_address: 0x10, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Misaligned { field: "user address", value: 0x10 }),
        ),
        (
            Code::AddMemReg,
            single(MemoryRegion { mmap_offset: 0x200, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Misaligned { field: "mmap offset", value: 0x200 }),
        ),
        (
            Code::RemMemReg,
            single(MemoryRegion { guest_address: !0xfff, ..REGION }),
            0,
            region(Code::RemMemReg, RegionError::Wraps { field: "guest address", start: !0xfff, size: 0x2000 }),
        ),
        (
            Code::AddMemReg,
            single(MemoryRegion { user_address: !0xfff, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Wraps { field: "user address", start: !0xfff, size: 0x2000 }),
        ),
        (
            Code::AddMemReg,
            single(MemoryRegion { mmap_offset: !0xfff, ..REGION }),
            1,
            region(Code::AddMemReg, RegionError::Wraps { field: "mmap offset", start: !0xfff, size: 0x2000 }),
        ),
        (Code::SetLogBase, vec![0; 8], 1, size(Code::SetLogBase, 8, 16, 16)),
        (Code::SetLogBase, area(0, 0), 1, DecodeError::Area { request: Code::SetLogBase, size: 0, offset: 0 }),
        (
            Code::SetLogBase,
            area(2, u64::MAX),
            1,
            DecodeError::Area { request: Code::SetLogBase, size: 2, offset: u64::MAX },
        ),
        (Code::SetLogBase, area(1, 0), 2, descriptors(Code::SetLogBase, 2, 0, 1)),
        (Code::SetLogFd, vec![], 2, descriptors(Code::SetLogFd, 2, 0, 1)),
        (Code::SetVringNum, vec![0; 4], 0, size(Code::SetVringNum, 4, 8, 8)),
        (Code::SetVringAddr, vec![0; 32], 0, size(Code::SetVringAddr, 32, 40, 40)),
        (Code::GetVringBase, vec![0; 8], 1, descriptors(Code::GetVringBase, 1, 0, 0)),
        (
            Code::SetVringKick,
            number(0x100),
            1,
            DecodeError::RingDescriptor { request: Code::SetVringKick, index: 0, no_fd: true, fds: 1 },
        ),
        (
            Code::SetVringCall,
            number(7),
            0,
            DecodeError::RingDescriptor { request: Code::SetVringCall, index: 7, no_fd: false, fds: 0 },
        ),
        (
            Code::SetVringErr,
            number(7),
            2,
            DecodeError::RingDescriptor { request: Code::SetVringErr, index: 7, no_fd: false, fds: 2 },
        ),
        (
            Code::SetVringKick,
            number(0x1_0000_0000),
            1,
            DecodeError::RingIndex { request: Code::SetVringKick, value: 0x1_0000_0000 },
        ),
        (Code::SetVringKick, number(0x200), 1, DecodeError::RingIndex { request: Code::SetVringKick, value: 0x200 }),
        (Code::SetBackendReqFd, vec![], 0, descriptors(Code::SetBackendReqFd, 0, 1, 1)),
        (Code::SetBackendReqFd, vec![0; 8], 1, size(Code::SetBackendReqFd, 8, 0, 0)),
        (Code::IotlbMsg, vec![0; 31], 0, size(Code::IotlbMsg, 31, 32, 32)),
        (Code::IotlbMsg, vec![0; 33], 0, size(Code::IotlbMsg, 33, 32, 32)),
        (Code::IotlbMsg, iotlb_bytes(3, 0), 0, DecodeError::Iotlb(IotlbError::UnknownKind(0))),
        (Code::IotlbMsg, iotlb_bytes(3, 5), 0, DecodeError::Iotlb(IotlbError::UnknownKind(5))),
        (Code::IotlbMsg, iotlb_bytes(4, 1), 0, DecodeError::Iotlb(IotlbError::UnknownAccess(4))),
        (Code::GetConfig, vec![0; 11], 0, size(Code::GetConfig, 11, 12, 268)),
        (Code::GetConfig, config_bytes(0, 257, 257), 0, size(Code::GetConfig, 269, 12, 268)),
        (
            Code::GetConfig,
            config_bytes(0, 0, 0),
            0,
            DecodeError::ConfigRange { request: Code::GetConfig, offset: 0, size: 0, contents: 0 },
        ),
        (
            Code::GetConfig,
            config_bytes(0, 8, 4),
            0,
            DecodeError::ConfigRange { request: Code::GetConfig, offset: 0, size: 8, contents: 4 },
        ),
        (
            Code::SetConfig,
            config_bytes(u32::MAX, 8, 8),
            0,
            DecodeError::ConfigRange { request: Code::SetConfig, offset: u32::MAX, size: 8, contents: 8 },
        ),
        (
            Code::SetConfig,
            config_bytes(0, u32::MAX, 8),
            0,
            DecodeError::ConfigRange { request: Code::SetConfig, offset: 0, size: u32::MAX, contents: 8 },
        ),
        (
            Code::SetConfig,
            config_bytes(249, 8, 8),
            0,
            DecodeError::ConfigRange { request: Code::SetConfig, offset: 249, size: 8, contents: 8 },
        ),
        (Code::GetInflightFd, vec![0; 19], 0, size(Code::GetInflightFd, 19, 20, 24)),
        (Code::GetInflightFd, vec![0; 25], 0, size(Code::GetInflightFd, 25, 20, 24)),
        (Code::GetInflightFd, vec![0; 24], 1, descriptors(Code::GetInflightFd, 1, 0, 0)),
        (Code::SetInflightFd, vec![0; 24], 1, DecodeError::Area { request: Code::SetInflightFd, size: 0, offset: 0 }),
        (Code::SetInflightFd, [area(4096, 0), vec![0; 8]].concat(), 0, descriptors(Code::SetInflightFd, 0, 1, 1)),
    ];
    for (code, payload, fd_count, expected) in table {
        let header = Header::request(code.number(), u32::try_from(payload.len()).expect("short"), false);
        match decode(header, &payload, fds(fd_count)) {
            Err(error) => {
                assert_eq!(error, expected, "{code}");
                assert!(error.to_string().contains(code.name()), "{error} does not name {code}");
            }
            Ok(request) => panic!("{code} was taken: {request:?}, expected {expected:?}"),
        }
    }
}

#[test]
fn a_payload_other_than_announced_is_refused() {
    let header = Header::request(RequestCode::SetFeatures.number(), 16, false);
    assert_eq!(
        decode(header, &[0; 8], Vec::new()).expect_err("wrong length"),
        DecodeError::Announced { request: 2, announced: 16, got: 8 }
    );
}

#[test]
fn a_region_may_end_at_the_top() {
    let top = MemoryRegion { guest_address: !0x1fff, ..REGION };
    assert_eq!(top.check(), Ok(()));
}

#[test]
fn headers() {
    let parse = |request: u32, flags: u32, size: u32, incoming| {
        Header::parse(&Header { request, flags, size }.to_bytes(), incoming)
    };
    let max = u32::try_from(PAYLOAD_MAX).expect("small");
    assert_eq!(
        parse(22, FLAG_VERSION | FLAG_NEED_REPLY, max, Incoming::Requests),
        Ok(Header { request: 22, flags: 9, size: max })
    );
    assert!(parse(22, FLAG_VERSION | FLAG_REPLY, 8, Incoming::Replies).is_ok());
    assert_eq!(
        parse(22, FLAG_VERSION, max + 1, Incoming::Requests),
        Err(HeaderError::TooLong { request: 22, size: max + 1 })
    );
    assert_eq!(parse(22, 1, u32::MAX, Incoming::Requests), Err(HeaderError::TooLong { request: 22, size: u32::MAX }));
    for version in [0, 2, 3] {
        assert_eq!(
            parse(22, version, 0, Incoming::Requests),
            Err(HeaderError::Version { request: 22, version, flags: version })
        );
    }
    assert_eq!(parse(22, 5, 8, Incoming::Requests), Err(HeaderError::UnexpectedReply { request: 22, flags: 5 }));
    assert_eq!(parse(22, 9, 8, Incoming::Replies), Err(HeaderError::UnexpectedRequest { request: 22, flags: 9 }));
}

fn split(bytes: &[u8], incoming: Incoming) -> (Header, &[u8]) {
    let (head, payload) = bytes.split_first_chunk::<HEADER_LEN>().expect("a whole header");
    let header = Header::parse(head, incoming).expect("a header");
    assert_eq!(header.size as usize, payload.len());
    (header, payload)
}

#[test]
fn replies() {
    let bytes = reply_u64(22, 7);
    let (header, payload) = split(&bytes, Incoming::Replies);
    assert_eq!(header.flags, 5);
    assert_eq!(decode_reply_u64(22, header, payload), Ok(7));
    assert_eq!(
        decode_reply_u64(21, header, payload),
        Err(DecodeError::Reply { request: 22, size: 8, expected_request: 21, expected_size: 8 })
    );
    let bytes = reply_vring_state(11, STATE);
    let (header, payload) = split(&bytes, Incoming::Replies);
    assert_eq!(decode_reply_vring_state(11, header, payload), Ok(STATE));
    let bytes = reply_bytes(24, &[1, 2, 3]).expect("short");
    let (header, payload) = split(&bytes, Incoming::Replies);
    assert_eq!(payload, [1, 2, 3]);
    assert!(decode_reply_u64(24, header, payload).is_err());
    let size = PAYLOAD_MAX + 1;
    assert_eq!(reply_bytes(24, &vec![0; size]), Err(EncodeError::TooLong { request: 24, size }));
}

#[test]
fn the_back_end_channel() {
    let miss = IotlbMessage::miss(0xffff_e000, Access::WRITE);
    let bytes = backend_iotlb(&miss, true);
    let (header, payload) = split(&bytes, Incoming::Requests);
    assert_eq!((header.request, header.flags, payload.len()), (BACKEND_IOTLB_MSG, 9, 32));
    assert_eq!(decode_backend(header, payload), Ok(miss));
    assert_eq!(
        decode_backend(header, &payload[..31]),
        Err(DecodeError::BackEndRequest { request: BACKEND_IOTLB_MSG, size: 31 })
    );
    assert_eq!(
        decode_backend(Header { request: 2, ..header }, payload),
        Err(DecodeError::BackEndRequest { request: 2, size: 32 })
    );
}

#[test]
fn what_no_message_can_carry_is_not_encoded() {
    assert_eq!(
        encode(&Request::SetMemTable(Vec::new()), false).expect_err("no regions"),
        EncodeError::RegionCount { count: 0 }
    );
    let many = (0..=REGIONS_MAX).map(|_| (REGION, fd())).collect();
    assert_eq!(
        encode(&Request::SetMemTable(many), false).expect_err("too many"),
        EncodeError::RegionCount { count: REGIONS_MAX + 1 }
    );
    assert_eq!(
        encode(&Request::GetConfig { offset: 0, size: u32::MAX, flags: 0 }, false).expect_err("too long"),
        EncodeError::ConfigSize { request: 24, size: u32::MAX as usize }
    );
}

proptest! {
    /// Lengths near the real ones, so that most cases get past the length check.
    #[test]
    fn arbitrary_payloads_do_not_panic(
        request in 0u32..45,
        flags in any::<u32>(),
        payload in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..80),
            Just(vec![]),
            prop::collection::vec(any::<u8>(), 8),
            prop::collection::vec(any::<u8>(), 16),
            prop::collection::vec(any::<u8>(), 24),
            prop::collection::vec(any::<u8>(), 32),
            prop::collection::vec(any::<u8>(), 40),
        ],
        fd_count in 0usize..4,
    ) {
        let header = Header { request, flags, size: u32::try_from(payload.len()).expect("short") };
        let decoded = decode(header, &payload, fds(fd_count));
        if RequestCode::from_number(request).is_none() {
            let unknown = matches!(decoded, Ok(Request::Unknown(number)) if number == request);
            prop_assert!(unknown);
        }
        if let Ok(request) = decoded {
            // What was taken can be said again, and means the same.
            let again = encode(&request, false).expect("encodes");
            let header = Header::request(request.number(), 0, false);
            let payload = &again.bytes[HEADER_LEN..];
            let header = Header { size: u32::try_from(payload.len()).expect("short"), ..header };
            let copies = again.fds.iter().map(|fd| fd.try_clone_to_owned().expect("dup")).collect();
            let decoded = decode(header, payload, copies).expect("decodes");
            prop_assert_eq!(shape(&decoded), shape(&request));
        }
    }

    #[test]
    fn region_tables_round_trip_whatever_the_regions_are(
        fields in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()), 1..=REGIONS_MAX),
    ) {
        let regions: Vec<_> = fields.iter().map(|&(guest_address, size, user_address, mmap_offset)| MemoryRegion {
            guest_address,
            size,
            user_address,
            mmap_offset,
        }).collect();
        let request = Request::SetMemTable(regions.iter().map(|region| (*region, fd())).collect());
        let outgoing = encode(&request, true).expect("encodes");
        let (header, payload) = split(&outgoing.bytes, Incoming::Requests);
        let decoded = decode(header, payload, fds(regions.len())).expect("decodes");
        let Request::SetMemTable(taken) = decoded else { panic!("another request") };
        prop_assert_eq!(taken.into_iter().map(|(region, _)| region).collect::<Vec<_>>(), regions);
    }

    #[test]
    fn iotlb_messages_round_trip(
        iova in any::<u64>(), size in any::<u64>(), user_address in any::<u64>(), access in 0u8..4, kind in 1u8..5,
    ) {
        let kind = IotlbKind::from_number(kind).expect("a kind");
        let access = Access::from_bits(access).filter(|_| kind != IotlbKind::Invalidate).unwrap_or(Access::NONE);
        let message = IotlbMessage { iova, size, user_address, access, kind };
        prop_assert_eq!(IotlbMessage::from_bytes(&message.to_bytes()), Ok(message));
    }
}
