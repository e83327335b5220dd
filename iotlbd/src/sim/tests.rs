//! The simulated front-end against a back-end that does as a script says. The back-end here uses the daemon's codec,
//! so both codecs are checked against each other.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use iotlb_proto::access::Access;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::socket::stream::{MessageStream, StreamError};
use iotlb_proto::vhost_user::encode::{backend_iotlb, reply_u64, reply_vring_state};
use iotlb_proto::vhost_user::features::{protocol, virtio};
use iotlb_proto::vhost_user::header::Incoming;
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage, Request, VringState, codec};

use super::{FrontEnd, FrontEndOptions, Guest, RingAddresses, SimError, Wake};

/// Longest wait in tests that do not expect one to end.
const WATCHDOG_MS: u32 = 60_000;
const MAPPED: u64 = 0x7000;
const UNMAPPED: u64 = 0x9000;

/// What the back-end does at the first INVALIDATE.
#[derive(Clone, Copy, PartialEq)]
enum AtInvalidate {
    Acknowledge,
    Refuse,
    SayNothing,
    Close,
    AskFirst,
    AcknowledgeAndAsk,
}

struct BackEnd {
    main: MessageStream,
    channel: Option<MessageStream>,
    seen: Vec<String>,
    at_invalidate: AtInvalidate,
    region_base: u64,
}

impl BackEnd {
    fn start(at_invalidate: AtInvalidate) -> (UnixStream, JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let main = MessageStream::from_fd(OwnedFd::from(theirs), Incoming::Requests).expect("a stream socket");
        let back_end = BackEnd { main, channel: None, seen: Vec::new(), at_invalidate, region_base: 0 };
        (ours, std::thread::spawn(move || back_end.serve()))
    }

    fn serve(mut self) -> Vec<String> {
        loop {
            let (header, payload, fds) = match self.main.receive_blocking(WATCHDOG_MS) {
                Ok(message) => message,
                Err(StreamError::Closed) => return self.finish(),
                Err(error) => panic!("{error}"),
            };
            let request = codec::decode(header, &payload, fds).expect("the simulator sends valid messages");
            let mut words = format!("{request:?}");
            words.truncate(words.find(['(', ' ', '{']).unwrap_or(words.len()));
            self.seen.push(words);
            let answer = match request {
                Request::GetFeatures => Some(virtio::PROTOCOL_FEATURES | virtio::VERSION_1 | virtio::ACCESS_PLATFORM),
                Request::GetProtocolFeatures => {
                    Some(protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ | protocol::STATUS)
                }
                Request::GetQueueNum => Some(4),
                Request::GetStatus => Some(0),
                Request::GetVringBase { index } => {
                    let bytes = reply_vring_state(header.request, VringState { index, num: 17 + index });
                    self.main.send_blocking(&bytes, &[], WATCHDOG_MS).expect("the front-end reads");
                    None
                }
                Request::SetBackendReqFd(fd) => {
                    self.channel = Some(MessageStream::from_fd(fd, Incoming::Replies).expect("a stream socket"));
                    Some(0)
                }
                Request::SetMemTable(regions) => {
                    self.region_base = regions[0].0.user_address;
                    Some(0)
                }
                Request::Iotlb(message) => match self.iotlb(message) {
                    Some(answer) => answer,
                    None => return self.finish(),
                },
                _ => header.needs_reply().then_some(0),
            };
            if let Some(answer) = answer {
                let bytes = reply_u64(header.request, answer);
                self.main.send_blocking(&bytes, &[], WATCHDOG_MS).expect("the front-end reads");
            }
        }
    }

    /// Adds the answers that lie on the back-end channel.
    fn finish(mut self) -> Vec<String> {
        if self.at_invalidate == AtInvalidate::AcknowledgeAndAsk
            && let Some(channel) = &mut self.channel
        {
            while let Ok((header, payload, _)) = channel.receive_blocking(WATCHDOG_MS) {
                let answer = codec::decode_reply_u64(1, header, &payload).expect("a valid answer");
                self.seen.push(format!("answer {answer}"));
            }
        }
        self.seen
    }

    /// What to answer; `None` = close.
    fn iotlb(&mut self, message: IotlbMessage) -> Option<Option<u64>> {
        if message.kind == IotlbKind::Update {
            let offset = message.user_address.wrapping_sub(self.region_base);
            self.seen.push(format!("{:#x}+{:#x}={offset:#x} {}", message.iova, message.size, message.access));
            return Some(Some(0));
        }
        self.seen.push(format!("{:#x}+{:#x}", message.iova, message.size));
        match self.at_invalidate {
            AtInvalidate::Acknowledge => Some(Some(0)),
            AtInvalidate::Refuse => Some(Some(1)),
            AtInvalidate::SayNothing => Some(None),
            AtInvalidate::Close => None,
            AtInvalidate::AskFirst => {
                // What no back-end may do: the answer waits for a miss.
                self.miss(MAPPED);
                Some(None)
            }
            AtInvalidate::AcknowledgeAndAsk => {
                self.miss(MAPPED + 0x123);
                self.miss(UNMAPPED);
                Some(Some(0))
            }
        }
    }

    fn miss(&mut self, iova: u64) {
        let bytes = backend_iotlb(&IotlbMessage::miss(iova, Access::READ), true);
        let channel = self.channel.as_mut().expect("set in the handshake");
        channel.send_blocking(&bytes, &[], WATCHDOG_MS).expect("the front-end lives");
    }
}

fn started(stream: UnixStream, timeout: Duration) -> FrontEnd {
    let guest = Guest::new(0x10_0000, 16 * PAGE_SIZE).expect("memfd");
    let mut front_end = FrontEnd::over(stream, guest, FrontEndOptions { timeout, ..FrontEndOptions::default() })
        .expect("the handshake is answered");
    for (iova, page) in [(0x1000, 0x10_0000), (0x2000, 0x10_1000), (MAPPED, 0x10_5000)] {
        front_end.viommu.map(iova, page, Access::READ_WRITE).expect("free");
    }
    let ring = |desc, used| RingAddresses { desc, avail: desc + 0x800, used, base: 0 };
    front_end.start(&[ring(0x1000, 0x1c00), ring(0x2000, 0x2c00)]).expect("the start is answered");
    front_end
}

fn watchdog() -> Duration {
    Duration::from_millis(u64::from(WATCHDOG_MS))
}

#[test]
fn messages_come_in_the_order_in_which_qemu_sends_them() {
    let (stream, back_end) = BackEnd::start(AtInvalidate::Acknowledge);
    let mut front_end = started(stream, watchdog());
    assert_eq!(front_end.stop().expect("answered"), [17, 18]);
    drop(front_end);
    let mut seen = back_end.join().expect("no panic");
    seen.dedup();
    let ring = ["SetVringNum", "SetVringBase", "SetVringAddr", "SetVringKick", "SetVringCall"];
    let mut expected = vec!["GetFeatures", "GetProtocolFeatures", "SetProtocolFeatures", "GetQueueNum"];
    expected.extend(["SetBackendReqFd", "SetOwner", "GetFeatures"]);
    expected.extend(["SetVringCall", "SetVringErr", "SetVringCall", "SetVringErr", "SetVringEnable"]);
    expected.extend(["SetFeatures", "GetStatus", "SetStatus", "SetMemTable"]);
    expected.extend(ring.iter().chain(&ring));
    expected.extend(["GetStatus", "SetStatus"]);
    expected.extend(["Iotlb", "0x1000+0x1000=0x0 read-write", "Iotlb", "0x2000+0x1000=0x1000 read-write"]);
    expected.extend(["GetVringBase", "SetStatus", "GetStatus"]);
    assert_eq!(seen, expected);
}

#[test]
fn a_flush_is_two_ranges_and_the_first_ends_the_address_space() {
    let (stream, back_end) = BackEnd::start(AtInvalidate::Acknowledge);
    let mut front_end = started(stream, watchdog());
    front_end.unmap_lazily(MAPPED).expect("mapped");
    front_end.flush().expect("acknowledged");
    assert_eq!(front_end.stats.invalidations, 2);
    assert_eq!(front_end.stats.drain_ns.len(), 2);
    drop(front_end);
    let seen = back_end.join().expect("no panic");
    let tail = ["Iotlb", "0xfef00000+0xffffffff01100000", "Iotlb", "0x0+0xfee00000"];
    assert!(seen.ends_with(&tail.map(str::to_owned)), "{seen:?}");
}

#[test]
fn every_queue_pair_repeats_the_invalidation() {
    let (stream, back_end) = BackEnd::start(AtInvalidate::Acknowledge);
    let guest = Guest::new(0, 4 * PAGE_SIZE).expect("memfd");
    let options = FrontEndOptions { queue_pairs: 3, timeout: watchdog(), ..FrontEndOptions::default() };
    let mut front_end = FrontEnd::over(stream, guest, options).expect("the handshake is answered");
    front_end.invalidate(0x5000, PAGE_SIZE).expect("acknowledged");
    drop(front_end);
    let seen = back_end.join().expect("no panic");
    assert_eq!(seen.iter().filter(|message| *message == "0x5000+0x1000").count(), 3);
    assert_eq!(seen.iter().filter(|message| *message == "SetOwner").count(), 1);
    assert_eq!(seen.iter().filter(|message| *message == "SetProtocolFeatures").count(), 3);
}

#[test]
fn no_wait_is_endless() {
    let cases = [AtInvalidate::SayNothing, AtInvalidate::AskFirst, AtInvalidate::Close, AtInvalidate::Refuse];
    for case in cases {
        let (stream, back_end) = BackEnd::start(case);
        let mut front_end = started(stream, Duration::from_millis(300));
        let error = front_end.unmap(MAPPED).expect_err("the back-end misbehaves");
        let fits = match case {
            // A miss is no answer, and nobody looks at it before the answer has come.
            AtInvalidate::SayNothing | AtInvalidate::AskFirst => matches!(error, SimError::TimedOut { .. }),
            AtInvalidate::Close => matches!(error, SimError::Closed { .. }),
            _ => matches!(error, SimError::Refused { value: 1, .. }),
        };
        assert!(fits && error.to_string().contains("invalidate"), "{error}");
        assert_eq!(front_end.stats.misses, 0);
        drop(front_end);
        back_end.join().expect("no panic");
    }
}

#[test]
fn misses_are_answered_on_both_channels() {
    let (stream, back_end) = BackEnd::start(AtInvalidate::AcknowledgeAndAsk);
    let mut front_end = started(stream, watchdog());
    front_end.invalidate(0xf000, PAGE_SIZE).expect("acknowledged");
    while front_end.stats.misses < 2 {
        assert_eq!(front_end.serve_until(&[], Duration::from_millis(20)).expect("answered"), Wake::TimedOut);
    }
    let stats = front_end.stats.clone();
    drop(front_end);
    let seen = back_end.join().expect("no panic");
    assert_eq!((stats.misses, stats.denied, stats.updates), (2, 1, 3));
    let tail = ["Iotlb", "0x7000+0x1000=0x5000 read-write", "answer 0", "answer 1"];
    assert!(seen.ends_with(&tail.map(str::to_owned)), "{seen:?}");
}
