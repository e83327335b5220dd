//! What front-ends other than today's QEMU say, and must be answered.

mod harness;

use harness::{AVAIL, Bench, DESC, MIB, ROOMY, RW, USED, USER, bench, memfd, region, target};
use iotlb_proto::vhost_user::features::protocol;
use iotlb_proto::vhost_user::header::{FLAG_NEED_REPLY, FLAG_VERSION};
use iotlb_proto::vhost_user::{Header, IotlbMessage, Request, decode};
use iotlb_proto::worker::Answer;
use iotlbd::device::{Action, DeviceConfig, Event, MemoryChange, ReplyPayload};

/// The payload of a message about regions: how many, then each as four numbers.
fn regions_payload(count: u64, regions: &[[u64; 4]]) -> Vec<u8> {
    let mut payload = count.to_ne_bytes().to_vec();
    payload.extend(regions.as_flattened().iter().flat_map(|word| word.to_ne_bytes()));
    payload
}

/// A device to which a front-end has connected.
fn connected(pairs: u16) -> Bench {
    let mut bench = Bench::new(DeviceConfig::net(pairs, 100, 1 << 40), ROOMY);
    bench.event(Event::FrontEndConnected);
    bench
}

/// QEMU 5.1 to 7.2: each pair of queues has its own list of what it has said.
#[test]
fn every_pair_of_queues_may_add_and_remove_a_region() {
    let fd = memfd(4 * MIB);
    let mut bench = connected(2);
    bench.silent(Request::SetProtocolFeatures(bench.device.config().protocol_features));
    let added = region(0, 4 * MIB, USER);
    let add = || Request::AddMemReg(added, fd.try_clone().expect("duplicated"));
    bench.ack(add());
    bench.actions.clear();
    bench.ack(add());
    assert!(!bench.actions.iter().any(|action| matches!(action, Action::Memory(_))), "workers are told twice");
    // The same addresses with another memory behind them are another region.
    assert_eq!(bench.value(Request::AddMemReg(added, memfd(4 * MIB))), 1);
    bench.ack(Request::RemMemReg(added));
    bench.actions.clear();
    bench.ack(Request::RemMemReg(added));
    assert!(!bench.actions.iter().any(|action| matches!(action, Action::Memory(MemoryChange::Remove { .. }))));
    bench.ack(add());
}

/// Linux's `virtio_uml`; the `vhost` crate's front-end, when it is told to ask early. Both wait.
#[test]
fn what_negotiates_acknowledgements_is_acknowledged() {
    let features = protocol::REPLY_ACK | protocol::MQ;
    let mut bench = connected(1);
    bench.ack(Request::SetProtocolFeatures(features));
    let mut bench = connected(1);
    bench.silent(Request::SetProtocolFeatures(features));
    let mut bench = connected(1);
    assert_eq!(bench.request(Request::SetProtocolFeatures(protocol::MQ), true), [], "nothing is negotiated");
}

/// QEMU 5.1 cuts the mmap offset to its lower half.
#[test]
fn a_region_without_the_upper_half_of_its_offset_is_understood() {
    let mut payload = regions_payload(0, &[[0, 4 * MIB, USER, 0x1000]]);
    for len in [40, 36] {
        payload.truncate(len);
        let header =
            Header { request: 37, flags: FLAG_VERSION | FLAG_NEED_REPLY, size: u32::try_from(len).expect("small") };
        let got = decode(header, &payload, vec![memfd(8 * MIB)]);
        assert!(matches!(&got, Ok(Request::AddMemReg(region, _)) if region.mmap_offset == 0x1000), "{got:?}");
    }
    for len in [32, 37, 39] {
        payload.resize(len, 0);
        let header =
            Header { request: 37, flags: FLAG_VERSION | FLAG_NEED_REPLY, size: u32::try_from(len).expect("small") };
        assert!(decode(header, &payload, vec![memfd(8 * MIB)]).is_err(), "{len}");
    }
}

/// Linux's `virtio_uml`: room for two regions, one announced, one descriptor.
#[test]
fn a_memory_table_may_have_room_for_more() {
    let mut payload = regions_payload(1, &[[0, 4 * MIB, USER, 0]]);
    payload.resize(72, 0);
    let header = Header { request: 5, flags: FLAG_VERSION, size: 72 };
    let got = decode(header, &payload, vec![memfd(4 * MIB)]);
    assert!(matches!(&got, Ok(Request::SetMemTable(table)) if table.len() == 1), "{got:?}");
    payload[0] = 2;
    assert!(decode(header, &payload, vec![memfd(4 * MIB)]).is_err(), "two regions, one descriptor");
}

/// DPDK's virtio-user compares the index in the answer.
#[test]
fn the_base_of_no_ring_is_answered_with_its_index() {
    let (mut bench, _memory) = bench();
    for index in [2, 1 << 16, u32::MAX] {
        let got = bench.request(Request::GetVringBase { index }, false);
        assert_eq!(got, [ReplyPayload::VringState { index, num: 0 }]);
    }
}

/// QEMU 5.1 to 7.1 resets no status, tells no memory again, and answers a MISS that it reads after it stopped the
/// device. No invalidation follows until the device starts again.
#[test]
fn what_comes_while_no_ring_runs_is_gone_when_one_does() {
    const X: u64 = 0x10_0000;
    let (mut bench, _memory) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.miss(1, 0, 1, X, 4096, RW);
    assert!(bench.messages().iter().any(|(message, _)| message.iova == X), "asked for");
    bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(bench.update(X, 4096, USER + 0x1000, RW), 0);
    let features = bench.device.config().features;
    bench.silent(Request::SetFeatures(features));
    bench.instant_grace = false;
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(target(&bench, X), None, "the guest may have given the page away meanwhile");
    bench.grace();
    // What comes from now on is followed by invalidations.
    assert_eq!(bench.update(X, 4096, USER + 0x2000, RW), 0);
    bench.start_ring(1, DESC + 0x1_0000, AVAIL + 0x1_0000, USED + 0x1_0000);
    assert_eq!(target(&bench, X), Some(0x2000), "only the first ring begins with nothing");
}

/// One that has no back-end channel is never asked, so nothing that it says is late.
#[test]
fn who_cannot_be_asked_may_say_all_before_a_ring_starts() {
    let memory = memfd(4 * MIB);
    let mut bench = connected(1);
    let (features, protocol) = (bench.device.config().features, bench.device.config().protocol_features);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.silent(Request::SetFeatures(features));
    bench.ack(harness::table_of(&[(region(0, 4 * MIB, USER), &memory)]));
    bench.ack(Request::Iotlb(IotlbMessage::update(0x10_0000, 4096, USER + 0x1000, RW)));
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(target(&bench, 0x10_0000), Some(0x1000));
}

/// QEMU 7.2.0 to 7.2.2 reads the back-end channel while it waits for a reply, and takes that reply for the
/// acknowledgement of its UPDATE. After the last kick it waits for GET_STATUS; with DRIVER_OK the start is over.
#[test]
fn nothing_is_asked_for_before_the_driver_is_there() {
    const X: u64 = 0x10_0000;
    let (mut bench, _memory) = bench();
    bench.silent(Request::SetStatus(8));
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.miss(1, 0, 1, X, 4096, RW);
    assert_eq!(bench.value(Request::GetStatus), 8);
    assert_eq!(bench.messages(), []);
    bench.silent(Request::SetStatus(15));
    let mut asked: Vec<u64> = bench.messages().iter().map(|(message, _)| message.iova).collect();
    asked.sort_unstable();
    assert_eq!(asked, [X, DESC, AVAIL]);
}

/// A guest may take longer to start than a miss may take. Nobody was asked for the rings' pages yet, so their time has
/// not begun; a worker's has, since it does not know what it waits for.
#[test]
fn a_driver_that_comes_late_finds_the_rings_asked_for() {
    let (mut bench, _memory) = bench();
    bench.silent(Request::SetStatus(8));
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.miss(1, 0, 1, 0x10_0000, 4096, RW);
    assert_eq!(bench.device.misses_waiting(), 1, "the worker's");
    bench.now_ns += 150_000_000;
    bench.event(Event::Tick);
    assert_eq!(bench.answers(), [(1, 0, 1, Answer::TimedOut)]);
    assert_eq!(bench.messages(), []);
    bench.ack(Request::SetStatus(15));
    let asked: Vec<u64> = bench.messages().iter().map(|(message, _)| message.iova).collect();
    assert_eq!(asked, [DESC, AVAIL]);
    // The same status again is no news.
    bench.now_ns += 150_000_000;
    bench.event(Event::Tick);
    bench.ack(Request::SetStatus(15));
    assert_eq!(bench.messages(), []);
}
