//! Requests that take more than one slice of work: what is served between two slices, and when the reply goes out.

mod harness;

use std::os::fd::OwnedFd;

use harness::{Bench, ROOMY, SMALLEST, memfd, region, table_of};
use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::vhost_user::{IotlbMessage, MemoryRegion, Request};
use iotlb_proto::worker::Answer;
use iotlbd::device::{Action, DeviceConfig, Event, MemoryChange, ReplyPayload, WorkerId};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const RW: Access = Access::READ_WRITE;
/// Where the two regions are, in the guest and in the front-end.
const LOW: u64 = 0;
const LOW_USER: u64 = 0x7000_0000_0000;
const HIGH: u64 = 1 << 32;
const HIGH_USER: u64 = 0x7100_0000_0000;
const REGION: u64 = 4 * MIB;
/// Ring 0 lies in the high region.
const DESC: u64 = 0xffff_e000;
const AVAIL: u64 = 0xffff_f000;
const USED: u64 = 0xffff_f240;
/// Where the guest maps pages of the low region, each in a node of its own: a slice of one step takes one.
const FIRST: u64 = 0x20_0000;
const STEP: u64 = 0x20_0000;
const MAPPED: u64 = 40;

fn low() -> MemoryRegion {
    region(LOW, REGION, LOW_USER)
}

fn high() -> MemoryRegion {
    region(HIGH, REGION, HIGH_USER)
}

/// A device with two regions that does one step a slice. Without `iommu`, guest memory is published as it is.
fn bench(iommu: bool) -> (Bench, [OwnedFd; 2]) {
    let fds = [memfd(REGION), memfd(REGION)];
    let bench = Bench::in_slices(DeviceConfig::net(1, 100, 1 << 40), ROOMY, 1);
    let features = bench.device.config().features;
    let features = if iommu { features } else { features & !virtio::ACCESS_PLATFORM };
    (bench.connect(features, &[(low(), &fds[0]), (high(), &fds[1])]), fds)
}

/// Ring 0 runs, and many pages lead to the low region, one to the high one. From now on nothing happens by itself.
fn mapped() -> (Bench, [OwnedFd; 2]) {
    let (mut bench, fds) = bench(true);
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(bench.update(DESC, 2 * PAGE, HIGH_USER, RW), 0);
    for page in 0..MAPPED {
        assert_eq!(bench.update(FIRST + page * STEP, PAGE, LOW_USER + page * PAGE, RW), 0);
    }
    for _ in 0..bench.messages().len() {
        bench.event(Event::MissReply { value: 0 });
    }
    bench.messages();
    bench.actions.clear();
    (bench.instant_grace, bench.instant_work) = (false, false);
    (bench, fds)
}

/// Pages that lead to the low region.
fn left(bench: &Bench) -> u64 {
    let mut count = 0;
    bench.device.table().for_each(|leaf| count += u64::from(leaf.target < REGION));
    count
}

fn remove_low() -> (Request, u32) {
    let request = Request::RemMemReg(low());
    let code = harness::header(&request, true).request;
    (request, code)
}

#[test]
fn others_are_served_between_slices_and_the_reply_comes_after_the_last() {
    let (mut bench, _fds) = mapped();
    let (request, code) = remove_low();
    assert_eq!(bench.request(request, true), []);
    let (mut slices, mut before) = (0, left(&bench));
    assert!(before >= MAPPED - 1, "{before} left after the first slice");
    while bench.device.has_work() {
        assert!(!bench.device.accepts_requests(), "slice {slices}");
        assert_eq!(bench.device.grace_target(), None, "a grace period that begins now covers no later slice");
        assert_eq!(bench.replies(code), [], "slice {slices}");
        assert!(!bench.actions.iter().any(|action| matches!(action, Action::Memory(_))), "slice {slices}");
        // What others want, they get: a miss is asked for, another answered by what is there, a third runs out of time.
        let ticket = slices + 1;
        bench.miss(0, 0, ticket, 0x1000, 16, RW);
        assert_eq!(bench.messages().iter().filter(|(message, _)| message.iova == 0x1000).count(), 1);
        bench.miss(1, 0, ticket, DESC, 16, RW);
        assert_eq!(bench.answers(), [(1, 0, ticket, Answer::Resolved)]);
        bench.now_ns = bench.device.next_deadline_ns().expect("a miss waits");
        bench.event(Event::Tick);
        assert_eq!(bench.answers(), [(0, 0, ticket, Answer::TimedOut)]);
        bench.event(Event::MissReply { value: 1 });
        bench.event(Event::WorkerGone { worker: WorkerId(2) });
        let now = left(&bench);
        assert!(now + 1 >= before, "{before} were left, and now {now}");
        before = now;
        bench.event(Event::Continue);
        slices += 1;
    }
    assert!(u64::from(slices) >= MAPPED, "{slices} slices");
    assert_eq!(left(&bench), 0);
    assert!(!bench.device.accepts_requests());
    assert_eq!(bench.replies(code), [], "answered before the grace period");
    bench.grace();
    let order: Vec<_> = bench
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Memory(MemoryChange::Remove { .. }) => Some("unmap"),
            Action::Reply { .. } => Some("reply"),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["unmap", "reply"]);
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    assert!(bench.device.accepts_requests());
    assert!(bench.device.table().lookup(DESC).is_some(), "the other region stays");
}

#[test]
fn work_between_slices_of_a_wait_is_nobodys() {
    let (mut bench, _fds) = mapped();
    let request = Request::Iotlb(IotlbMessage::invalidate(FIRST, PAGE));
    let code = harness::header(&request, true).request;
    assert_eq!(bench.request(request, true), []);
    let waited = bench.device.counters().graces_waited;
    for _ in 0..3 {
        bench.event(Event::Continue);
    }
    assert_eq!(bench.device.counters().graces_waited, waited, "the wait began anew");
    assert_eq!(bench.replies(code), []);
    bench.grace();
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
}

#[test]
fn a_flush_is_acknowledged_before_all_is_put_away() {
    let (mut bench, _fds) = mapped();
    let flush = Request::Iotlb(IotlbMessage::invalidate(0, 0));
    let code = harness::header(&flush, true).request;
    assert_eq!(bench.request(flush, true), []);
    assert_eq!(left(&bench), 0, "gone at once");
    bench.grace();
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    assert!(bench.device.has_work());
    // And what comes next does not wait either.
    assert_eq!(bench.update(FIRST, PAGE, LOW_USER, RW), 0);
    let mut slices = 0;
    while bench.device.has_work() {
        bench.event(Event::Continue);
        slices += 1;
    }
    assert!(slices > 1);
    assert_eq!(left(&bench), 1, "what was put in meanwhile stays");
    assert_eq!(bench.device.table().stats().entries, 1);
}

#[test]
fn a_session_that_ends_between_slices_is_drained_and_leaves_nothing_to_the_next() {
    let (mut bench, _fds) = mapped();
    let (request, code) = remove_low();
    assert_eq!(bench.request(request, true), []);
    bench.event(Event::Continue);
    assert!(bench.device.has_work() && left(&bench) > 0, "the removal is over already");
    bench.event(Event::FrontEndLost { reason: "test".to_owned() });
    bench.device.table().for_each(|leaf| panic!("{leaf:?} is left"));
    let closed = |bench: &Bench| bench.actions.iter().any(|action| matches!(action, Action::CloseFrontEnd { .. }));
    for _ in 0..200 {
        bench.event(Event::Continue);
        assert!(!closed(&bench), "closed before the grace period");
    }
    assert!(bench.device.grace_target().is_some());
    bench.grace();
    assert!(closed(&bench));
    assert_eq!(bench.replies(code), []);
    // The next session maps the same addresses.
    (bench.instant_grace, bench.instant_work) = (true, true);
    let features = bench.device.config().features;
    let fd = memfd(REGION);
    let mut bench = bench.connect(features, &[(low(), &fd)]);
    for page in 0..MAPPED {
        assert_eq!(bench.update(FIRST + page * STEP, PAGE, LOW_USER + page * PAGE, RW), 0);
    }
    assert!(!bench.device.has_work());
    assert_eq!(left(&bench), MAPPED, "the former session's removal goes on");
}

/// Without an IOMMU a miss says that there is no such guest address; while the map changes nobody can say so.
#[test]
fn misses_of_an_identity_map_are_judged_when_the_removal_is_done() {
    let (mut bench, _fds) = bench(false);
    bench.start_ring(0, HIGH_USER, HIGH_USER + 0x1000, HIGH_USER + 0x2000);
    assert!(bench.device.table().lookup(LOW).is_some() && bench.device.table().lookup(HIGH).is_some());
    (bench.instant_grace, bench.instant_work) = (false, false);
    let (request, code) = remove_low();
    assert_eq!(bench.request(request, true), []);
    assert!(bench.device.has_work() && left(&bench) > 0);
    bench.miss(0, 0, 1, HIGH, 16, RW);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Resolved)]);
    bench.miss(0, 1, 2, LOW, 16, RW);
    bench.miss(0, 2, 3, REGION - PAGE, 16, RW);
    // The first leaf is gone, the second one is still there, and a reader would find it.
    assert_eq!(bench.answers(), [(0, 2, 3, Answer::Resolved)]);
    while bench.device.has_work() {
        bench.event(Event::Continue);
        assert_eq!(bench.answers(), []);
    }
    bench.grace();
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    assert_eq!(bench.answers(), [(0, 1, 2, Answer::Denied)]);
    assert_eq!(left(&bench), 0);
}

#[test]
fn many_regions_are_published_in_slices_before_the_reply() {
    let (mut bench, fds) = bench(false);
    bench.start_ring(0, HIGH_USER, HIGH_USER + 0x1000, HIGH_USER + 0x2000);
    let many: Vec<_> = (0..20).map(|n| (region(HIGH + n * REGION, REGION, HIGH_USER + n * REGION), &fds[1])).collect();
    (bench.instant_grace, bench.instant_work) = (false, false);
    let request = table_of(&many);
    let code = harness::header(&request, true).request;
    assert_eq!(bench.request(request, true), []);
    bench.grace();
    let mut slices = 0;
    while bench.device.has_work() && !bench.device.accepts_requests() {
        assert_eq!(bench.replies(code), []);
        bench.event(Event::Continue);
        slices += 1;
    }
    assert!(slices > 1, "all at once");
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    for (region, _) in &many {
        assert!(bench.device.table().lookup(region.guest_address).is_some());
    }
}

#[test]
fn an_update_finds_room_in_what_a_flush_left() {
    let fd = memfd(REGION);
    let bench = Bench::in_slices(DeviceConfig::net(1, 100, 1 << 40), SMALLEST, 1);
    let features = bench.device.config().features;
    let mut bench = bench.connect(features, &[(low(), &fd)]);
    bench.instant_work = false;
    for round in 0..20 {
        for page in 0..30 {
            let iova = page << 22;
            assert_eq!(bench.update(iova, PAGE, LOW_USER, RW), 0);
            assert!(bench.device.table().lookup(iova).is_some(), "round {round}: page {page} was left out");
        }
        assert_eq!(bench.invalidate(0, 0), 0);
    }
    assert_eq!(bench.device.table().stats().evictions, 0);
}
