//! The control codec: round trips, and what is refused.

use iotlb_proto::control::message::{HELLO_MAGIC, NAME_MAX, QUEUES_MAX, REASON_MAX};
use iotlb_proto::control::{
    ControlError, ControlMessage, DaemonMessage, Hello, MESSAGE_MAX, QueueLease, Refusal, RegionInfo, Welcome,
    WorkerMessage, clip_reason, decode, encode,
};
use proptest::prelude::*;

fn hello(device: &str, label: &str) -> WorkerMessage {
    WorkerMessage::Hello(Hello {
        magic: HELLO_MAGIC,
        control_version: 9,
        layout_version: 1,
        layout_hash: u64::MAX,
        device: device.into(),
        label: label.into(),
    })
}

fn worker_messages() -> Vec<WorkerMessage> {
    let all = (0..).take(QUEUES_MAX).collect();
    vec![
        hello("", ""),
        hello(&"d".repeat(NAME_MAX), &"é".repeat(NAME_MAX / 2)),
        WorkerMessage::ClaimQueues { claim: 0, queues: vec![] },
        WorkerMessage::ClaimQueues { claim: u64::MAX, queues: all },
        WorkerMessage::ReleaseQueue { queue: u16::MAX, claim: u64::MAX },
        WorkerMessage::Mapped { generation: u64::MAX },
        WorkerMessage::Revoked,
        WorkerMessage::QueueError { queue: 1, reason: "r".repeat(REASON_MAX) },
    ]
}

const REGION: RegionInfo =
    RegionInfo { id: 7, arena_offset: 0x1000, guest_address: 1 << 32, size: 0x2000, file_offset: 0x3000 };

fn daemon_messages() -> Vec<DaemonMessage> {
    vec![
        DaemonMessage::Welcome(Welcome {
            worker: 1,
            incarnation: 0x1234_5678_9abc_def0,
            device: "net0".into(),
            table_size: 1 << 24,
            segment_size: 1 << 16,
            liveness_offset: 32,
            arena_size: 1 << 40,
            miss_timeout_ms: 40,
            queues: 2,
        }),
        DaemonMessage::Refused(Refusal::Layout { version: 2, hash: 3 }),
        DaemonMessage::Refused(Refusal::NoSuchDevice),
        DaemonMessage::Refused(Refusal::Full),
        DaemonMessage::Refused(Refusal::Pidfd),
        DaemonMessage::Refused(Refusal::NotAWorker),
        DaemonMessage::Refused(Refusal::Banned),
        DaemonMessage::Refused(Refusal::Exhausted { reason: "Too many open files".into() }),
        DaemonMessage::Refused(Refusal::Control { version: 4 }),
        DaemonMessage::AddRegion(REGION),
        DaemonMessage::RemoveRegion { id: 7 },
        DaemonMessage::MemoryMap { generation: 8 },
        DaemonMessage::Lease(QueueLease { queue: 0, claim: 5, kick: true, call: false, err: true }),
        DaemonMessage::LeaseRefused { queue: 1, claim: 6, reason: "belongs to worker 2".into() },
        DaemonMessage::Revoke,
    ]
}

fn round_trip<T: ControlMessage + PartialEq + std::fmt::Debug>(messages: Vec<T>) {
    for message in messages {
        let bytes = encode(&message).expect("encodes");
        assert!(bytes.len() <= MESSAGE_MAX);
        assert_eq!(decode::<T>(&bytes).expect("decodes"), message);
        for len in 0..bytes.len() {
            assert!(
                matches!(decode::<T>(&bytes[..len]), Err(ControlError::Decode(_))),
                "{len} bytes of {message:?} were taken"
            );
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(matches!(decode::<T>(&longer), Err(ControlError::Trailing { trailing: 1 })));
    }
}

#[test]
fn every_message_survives_the_wire_whole_and_alone() {
    round_trip(worker_messages());
    round_trip(daemon_messages());
}

/// Builds that do not fit each other must still be able to say so: these bytes never change.
#[test]
fn the_encoding_of_hello_and_refusal_is_fixed() {
    let WorkerMessage::Hello(mut fields) = hello("n", "w") else { panic!("not a HELLO") };
    fields.layout_hash = 0x0102_0304_0506_0708;
    let bytes = encode(&WorkerMessage::Hello(fields)).expect("encodes");
    let mut expected = vec![0, 253];
    expected.extend(*b"iotlbHEL");
    expected.extend([9, 1, 253, 8, 7, 6, 5, 4, 3, 2, 1, 1, b'n', 1, b'w']);
    assert_eq!(bytes, expected);
    let refusal = DaemonMessage::Refused(Refusal::Layout { version: 2, hash: 3 });
    assert_eq!(encode(&refusal).expect("encodes"), [1, 0, 2, 3]);
    let refusal = DaemonMessage::Refused(Refusal::Control { version: 4 });
    assert_eq!(encode(&refusal).expect("encodes"), [1, 7, 4]);
}

/// The error of decoding what `encode` would not write: bincode's bytes without this crate's checks.
fn refused<T: ControlMessage + std::fmt::Debug>(message: &T) -> ControlError {
    let config = bincode::config::standard();
    let bytes = bincode::serde::encode_to_vec(message, config).expect("encodes unchecked");
    let decoded = decode::<T>(&bytes).expect_err("must not be taken");
    let encoded = encode(message).expect_err("must not be written");
    assert_eq!(format!("{decoded}"), format!("{encoded}"));
    decoded
}

#[test]
fn what_the_types_allow_but_the_protocol_does_not_is_refused_both_ways() {
    let long = "n".repeat(NAME_MAX + 1);
    assert!(matches!(
        refused(&hello(&long, "")),
        ControlError::TextTooLong { field: "device name", len: 65, max: NAME_MAX }
    ));
    assert!(matches!(refused(&hello("", &long)), ControlError::TextTooLong { field: "worker label", .. }));
    assert!(matches!(refused(&hello("", "a\nb")), ControlError::TextControl { field: "worker label" }));
    let WorkerMessage::Hello(mut fields) = hello("", "") else { panic!("not a HELLO") };
    fields.magic = 5;
    assert!(matches!(refused(&WorkerMessage::Hello(fields)), ControlError::Magic(5)));
    let queues = vec![0; QUEUES_MAX + 1];
    assert!(matches!(
        refused(&WorkerMessage::ClaimQueues { claim: 0, queues }),
        ControlError::QueueCount { count } if count == QUEUES_MAX + 1
    ));
    let reason = "r".repeat(REASON_MAX + 1);
    assert!(matches!(
        refused(&WorkerMessage::QueueError { queue: 0, reason: reason.clone() }),
        ControlError::TextTooLong { field: "reason", .. }
    ));
    assert!(matches!(
        refused(&DaemonMessage::Refused(Refusal::Exhausted { reason })),
        ControlError::TextTooLong { field: "reason", .. }
    ));
    for region in [
        RegionInfo { size: 0, ..REGION },
        RegionInfo { size: 0x800, ..REGION },
        RegionInfo { arena_offset: 1, ..REGION },
        RegionInfo { guest_address: !0xfff, ..REGION },
        RegionInfo { file_offset: !0xfff, ..REGION },
    ] {
        assert!(matches!(refused(&DaemonMessage::AddRegion(region)), ControlError::Region { id: 7, .. }));
    }
}

#[test]
fn a_length_that_lies_is_refused_before_anything_is_allocated_for_it() {
    // QueueError, queue 0, then a text that claims 2^62 bytes.
    let mut bytes = vec![5, 0, 253];
    bytes.extend((1u64 << 62).to_le_bytes());
    assert!(matches!(decode::<WorkerMessage>(&bytes), Err(ControlError::Decode(_))));
    // ClaimQueues, claim 0, with as many.
    let mut bytes = vec![1, 0, 253];
    bytes.extend((1u64 << 62).to_le_bytes());
    assert!(matches!(decode::<WorkerMessage>(&bytes), Err(ControlError::Decode(_))));
    let size = MESSAGE_MAX + 1;
    assert!(matches!(decode::<WorkerMessage>(&vec![0; size]), Err(ControlError::TooLong { size: s }) if s == size));
}

#[test]
fn any_text_can_be_made_a_reason() {
    assert_eq!(clip_reason("a\nb\u{7f}c"), "a b c");
    let clipped = clip_reason(&"é".repeat(REASON_MAX));
    assert_eq!(clipped.len(), REASON_MAX);
    // One byte shifts every following character, so that the limit falls inside one.
    assert_eq!(clip_reason(&format!("a{}", "é".repeat(REASON_MAX))).len(), REASON_MAX - 1);
    assert!(encode(&WorkerMessage::QueueError { queue: 0, reason: clipped }).is_ok());
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_panic(variant in 0u8..10, tail in prop::collection::vec(any::<u8>(), 0..64)) {
        let bytes = [&[variant][..], &tail].concat();
        if let Ok(message) = decode::<WorkerMessage>(&bytes) {
            prop_assert!(message.validate().is_ok());
        }
        if let Ok(message) = decode::<DaemonMessage>(&bytes) {
            prop_assert!(message.validate().is_ok());
        }
    }
}
