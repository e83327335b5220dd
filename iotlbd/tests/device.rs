//! The device, one rule at a time.

mod harness;

use std::os::fd::OwnedFd;

use harness::{
    AVAIL, Bench, DESC, MIB, ROOMY, RW, SMALLEST, USED, USER, bench, eventfd, memfd, region, started, table_of, target,
};
use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::features::{protocol, virtio};
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage, Request, VringAddress, VringFd, VringState};
use iotlbd::device::{Action, DeviceConfig, Event, MemoryChange, ReplyPayload};

// ---- publish, wait, acknowledge ----

#[test]
fn an_update_of_something_new_is_acknowledged_at_once() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    assert_eq!(bench.update(0x10_0000, 4096, USER, RW), 0);
    assert_eq!(bench.device.grace_target(), None);
    assert_eq!(target(&bench, 0x10_0123), Some(0x123));
}

#[test]
fn takes_hold_their_reply_until_the_grace_period_is_over() {
    let takes: Vec<(&str, Request)> = vec![
        ("invalidate", Request::Iotlb(IotlbMessage::invalidate(DESC, 4096))),
        ("replace", Request::Iotlb(IotlbMessage::update(DESC, 4096, USER + 0x9000, RW))),
        ("narrow", Request::Iotlb(IotlbMessage::update(DESC, 4096, USER + 0x1000, Access::READ))),
        ("base", Request::GetVringBase { index: 0 }),
        ("status", Request::SetStatus(0)),
        ("reset device", Request::ResetDevice),
        ("reset owner", Request::ResetOwner),
        ("memory", table_of(&[(region(0, 4 * MIB, USER), &memfd(4 * MIB))])),
        ("remove", Request::RemMemReg(region(0, 4 * MIB, USER))),
    ];
    for (name, request) in takes {
        let (mut bench, _fd) = started();
        bench.instant_grace = false;
        let code = harness::header(&request, true).request;
        assert_eq!(bench.request(request, true), [], "{name}: answered before the grace period");
        assert!(!bench.device.accepts_requests(), "{name}");
        bench.grace();
        assert_eq!(bench.replies(code).len(), 1, "{name}: not answered after it");
        assert!(bench.device.accepts_requests(), "{name}");
    }
}

#[test]
fn a_started_ring_is_enabled_and_disabled_when_workers_have_seen_it() {
    let enable = |index, num| Request::SetVringEnable(VringState { index, num });
    let code = harness::header(&enable(0, 0), true).request;
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    // A worker that pinned before may be about to write a packet, or to throw one away.
    for num in [1, 0] {
        for need_reply in [true, false] {
            assert_eq!(bench.request(enable(0, num), need_reply), [], "{num}");
            if need_reply {
                assert!(!bench.device.accepts_requests(), "{num}");
                bench.grace();
                assert_eq!(bench.replies(code), [ReplyPayload::U64(0)], "{num}");
            }
            // The same again changes nothing, nor does it for a ring that nobody may touch.
            assert!(bench.device.accepts_requests(), "{num}");
            bench.ack(enable(1, num));
        }
    }
    // Without a reply the next request waits all the same: a front-end may well ask for nothing else.
    bench.silent(enable(0, 1));
    assert!(!bench.device.accepts_requests());
    bench.grace();
    assert!(bench.device.accepts_requests());
}

#[test]
fn a_ring_does_not_start_as_it_was_when_what_it_should_be_was_refused() {
    let address = |desc| VringAddress { index: 0, flags: 0, desc, used: USED, avail: AVAIL, log: 0 };
    let size = |num| VringState { index: 0, num };
    let told = |name, desc, num| match name {
        "address" => Request::SetVringAddr(address(desc)),
        _ => Request::SetVringNum(size(num)),
    };
    for name in ["address", "size"] {
        let wrong = || told(name, DESC + 8, 100);
        let (mut bench, _fd) = started();
        assert_eq!(bench.value(wrong()), 1, "{name}");
        assert!(bench.device.is_running(), "{name}: of a ring that runs nothing changes");
        assert_eq!(bench.request(Request::GetVringBase { index: 0 }, false).len(), 1);
        assert_eq!(bench.value(wrong()), 1, "{name}");
        bench.ack(Request::SetVringKick(VringFd { index: 0, fd: Some(eventfd()) }));
        assert!(!bench.device.is_running(), "{name}");
        bench.ack(told(name, DESC, 256));
        assert!(bench.device.is_running(), "{name}");
    }
}

#[test]
fn features_that_enable_a_started_ring_are_such_a_take() {
    const PROTOCOL_FEATURES: u64 = 1 << 30;
    let (mut bench, _fd) = started();
    let features = bench.device.config().features;
    assert_ne!(features & PROTOCOL_FEATURES, 0, "so the ring is disabled");
    bench.instant_grace = false;
    let request = Request::SetFeatures(features & !PROTOCOL_FEATURES);
    let code = harness::header(&request, true).request;
    assert_eq!(bench.request(request, true), []);
    bench.grace();
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    bench.ack(Request::SetFeatures(features & !PROTOCOL_FEATURES));
}

/// Where user addresses are guest addresses the ring stays where it is when the IOMMU goes along.
#[test]
fn features_that_enable_a_ring_without_moving_it_are_such_a_take() {
    const GUEST: u64 = 0x1_0000_0000;
    let fd = memfd(4 * MIB);
    let mut bench = Bench::net(&[(region(GUEST, 4 * MIB, GUEST), &fd)]);
    bench.start_ring(0, GUEST, GUEST + 0x1000, GUEST + 0x1240);
    assert_eq!(bench.device.table().stats().entries, 0, "nothing else is taken");
    bench.instant_grace = false;
    let features = bench.device.config().features & !virtio::ACCESS_PLATFORM;
    let request = Request::SetFeatures(features & !virtio::PROTOCOL_FEATURES);
    let code = harness::header(&request, true).request;
    assert_eq!(bench.request(request, true), [], "a worker may be about to throw a packet away");
    bench.grace();
    assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    assert!(target(&bench, GUEST + 0x1000).is_some(), "and without an IOMMU all of it is there");
}

#[test]
fn stopping_a_ring_is_a_take_even_when_nothing_is_translated() {
    let (mut bench, _fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(bench.device.table().stats().entries, 0);
    bench.instant_grace = false;
    let request = Request::GetVringBase { index: 0 };
    let code = harness::header(&request, false).request;
    assert_eq!(bench.request(request, false), [], "a worker may be in the ring");
    bench.grace();
    assert_eq!(bench.replies(code).len(), 1);
}

#[test]
fn a_full_table_still_takes_what_is_new() {
    let fd = memfd(MIB);
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let (features, protocol) = (config.features, config.protocol_features);
    let mut bench = Bench::new(config, SMALLEST);
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.silent(Request::SetFeatures(features));
    bench.ack(table_of(&[(region(0, MIB, USER), &fd)]));
    for page in 0..300u64 {
        let iova = page << 39;
        assert_eq!(bench.update(iova, 4096, USER + 0x3000, RW), 0);
        assert_eq!(target(&bench, iova), Some(0x3000), "page {page} was left out");
    }
    assert!(bench.device.table().stats().evictions > 0, "the table was never full");
}

#[test]
fn log_changes_are_takes() {
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let features = config.features | virtio::LOG_ALL;
    let protocol = config.protocol_features | protocol::LOG_SHMFD;
    let mut bench = Bench::new(DeviceConfig { features, protocol_features: protocol, ..config }, ROOMY);
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.silent(Request::SetFeatures(features & !virtio::LOG_ALL));
    bench.ack(table_of(&[(region(0, MIB, USER), &memfd(MIB))]));
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.instant_grace = false;
    let log = VringAddress { index: 0, flags: 1, desc: DESC, used: USED, avail: AVAIL, log: USED };
    for request in [
        Request::SetFeatures(features),
        Request::SetVringAddr(log),
        Request::SetLogBase { size: 4096, offset: 0, fd: Some(memfd(4096)) },
    ] {
        let code = harness::header(&request, true).request;
        assert_eq!(bench.request(request, true), []);
        bench.grace();
        assert_eq!(bench.replies(code), [ReplyPayload::U64(0)]);
    }
    // The same again changes nothing and waits for nothing.
    bench.ack(Request::SetFeatures(features));
    bench.ack(Request::SetVringAddr(log));
}

#[test]
fn a_take_without_a_reply_holds_the_next_request_all_the_same() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    bench.silent(Request::Iotlb(IotlbMessage::invalidate(0, 0)));
    assert!(!bench.device.accepts_requests());
    bench.grace();
    assert!(bench.device.accepts_requests());
    assert_eq!(bench.replies(0), []);
}

#[test]
fn an_invalidation_of_nothing_is_acknowledged_at_once() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    assert_eq!(bench.invalidate(0x5000_0000, 4096), 0);
}

#[test]
fn a_lost_front_end_is_drained_before_its_socket_is_closed() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    let generation =
        bench.device.table().memory().header().state.session_generation.load(iotlb_proto::sync::Ordering::Relaxed);
    bench.event(Event::FrontEndLost { reason: "test".to_owned() });
    assert!(!bench.device.is_running() && bench.device.table().stats().entries == 0);
    assert!(!bench.actions.iter().any(|a| matches!(a, Action::CloseFrontEnd { .. } | Action::Memory(_))));
    bench.grace();
    let order: Vec<_> = bench
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Memory(MemoryChange::Remove { .. }) => Some("remove"),
            Action::Memory(MemoryChange::Generation(_)) => Some("generation"),
            Action::CloseFrontEnd { .. } => Some("close"),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["remove", "generation", "close"]);
    let after =
        bench.device.table().memory().header().state.session_generation.load(iotlb_proto::sync::Ordering::Relaxed);
    assert!(after > generation);
    bench.event(Event::FrontEndConnected);
    assert!(bench.device.accepts_requests());
}

#[test]
fn a_front_end_lost_while_its_request_waits_gets_no_reply_but_a_drain() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    let request = Request::Iotlb(IotlbMessage::invalidate(DESC, 4096));
    assert_eq!(bench.request(request, true), []);
    bench.event(Event::FrontEndLost { reason: "test".to_owned() });
    assert!(!bench.actions.iter().any(|a| matches!(a, Action::CloseFrontEnd { .. })));
    // Rings and regions were taken after the first grace period began: that one is not enough.
    while bench.device.grace_target().is_some() {
        bench.grace();
    }
    assert!(bench.actions.iter().any(|a| matches!(a, Action::CloseFrontEnd { .. })));
    assert!(!bench.actions.iter().any(|a| matches!(a, Action::Reply { .. })));
}

#[test]
fn old_news_of_grace_periods_does_not_end_a_wait() {
    let (mut bench, _fd) = started();
    bench.instant_grace = false;
    assert_eq!(bench.request(Request::Iotlb(IotlbMessage::invalidate(DESC, 4096)), true), []);
    let target = bench.device.grace_target().expect("waits");
    bench.event(Event::GraceCompleted { epoch: target - 1 });
    assert!(!bench.device.accepts_requests());
    bench.grace();
    assert!(bench.device.accepts_requests());
}

// ---- IOTLB messages ----

#[test]
fn an_invalidation_of_a_part_takes_all_of_the_translation() {
    const AT: u64 = 0x4000_0000;
    // Each with a last address that it translates.
    let cases = [
        ("one entry of an upper level", vec![(AT, 2 * MIB, 0)], AT + 2 * MIB - 1),
        ("pages", vec![(AT, 0x4000, 0x1000)], AT + 0x3fff),
        ("over two regions", vec![(AT, 2 * MIB, 3 * MIB)], AT + 2 * MIB - 1),
        ("no whole pages", vec![(AT + 0x800, 0x2000, 0x800)], AT + 0x27ff),
        ("cut by another", vec![(AT, 2 * MIB, 0), (AT + 0x2000, 4096, 0x9000)], AT + 2 * MIB - 1),
    ];
    for (name, updates, last) in cases {
        let (low, high) = (memfd(4 * MIB), memfd(4 * MIB));
        let regions = [(region(0, 4 * MIB, USER), &low), (region(1 << 32, 4 * MIB, USER + 4 * MIB), &high)];
        let mut bench = Bench::net(&regions);
        bench.start_ring(0, DESC, AVAIL, USED);
        // What lies beside it stays.
        assert_eq!(bench.update(AT - 0x1000, 4096, USER, RW), 0);
        assert_eq!(bench.update(AT + 4 * MIB, 2 * MIB, USER, RW), 0);
        for (iova, size, user) in updates {
            assert_eq!(bench.update(iova, size, USER + user, RW), 0, "{name}");
        }
        assert!(target(&bench, last).is_some(), "{name}");
        assert_eq!(bench.invalidate(AT, 4096), 0, "{name}");
        let left: Vec<u64> = (AT..AT + 4 * MIB).step_by(0x400).filter(|iova| target(&bench, *iova).is_some()).collect();
        assert!(left.is_empty(), "{name}: {left:#x?}");
        assert!(target(&bench, AT - 1).is_some() && target(&bench, AT + 4 * MIB).is_some(), "{name}");
    }
}

#[test]
fn an_update_is_split_at_region_borders() {
    let (low, high) = (memfd(MIB), memfd(MIB));
    // Neighbours in the front-end, far apart in the guest.
    let mut bench = Bench::net(&[(region(0, MIB, USER), &low), (region(0x1_0000_0000, MIB, USER + MIB), &high)]);
    assert_eq!(bench.update(0x8000_0000, 2 * MIB, USER, RW), 0);
    assert_eq!(target(&bench, 0x8000_0000), Some(0));
    assert_eq!(target(&bench, 0x8000_0000 + MIB - 1), Some(MIB - 1));
    assert_eq!(target(&bench, 0x8000_0000 + MIB), Some(0x1_0000_0000));
}

#[test]
fn what_cannot_be_reached_is_refused_and_supersedes_what_was_there() {
    let (mut bench, _fd) = bench();
    assert_eq!(bench.update(0x8000_0000, 8192, USER, RW), 0);
    assert_eq!(bench.update(0x8000_0000, 8192, USER + 4 * MIB - 4096, RW), 1, "half of it lies outside");
    assert_eq!(target(&bench, 0x8000_0000), Some(4 * MIB - 4096));
    assert_eq!(target(&bench, 0x8000_1000), None, "an old meaning survived");
    assert_eq!(bench.update(0x8000_0000, 4096, USER, Access::NONE), 1);
    assert_eq!(target(&bench, 0x8000_0000), None);
    assert_eq!(bench.update(0x8000_0000, 8192, u64::MAX - 10, RW), 1);
    let last_page = u64::MAX - 4095;
    assert_eq!(bench.update(last_page, 4096, USER, RW), 0);
    assert_eq!(bench.update(last_page, 8192, USER, RW), 1, "it wraps");
    assert_eq!(target(&bench, last_page), None);
}

#[test]
fn ring_pages_that_cannot_be_reached_are_not_asked_for_on_and_on() {
    let (mut bench, _fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    let answer_all = |bench: &mut Bench, update: fn(u64) -> (u64, u64, u64)| {
        let mut asked = 0;
        loop {
            let messages = bench.messages();
            if messages.is_empty() {
                break;
            }
            for (miss, need_reply) in messages {
                asked += 1;
                assert!(asked < 100, "it never ends");
                let (iova, size, user) = update(miss.iova & !4095);
                assert_eq!(bench.update(iova, size, user, RW), 1);
                if need_reply {
                    bench.event(Event::MissReply { value: 0 });
                }
            }
        }
    };
    // Each page is answered, and always with memory outside every region.
    answer_all(&mut bench, |page| (page, 4096, USER + (1 << 40)));
    // The same with one UPDATE for all three pages, of which the first is memory.
    bench.start_ring(1, DESC - 4096, DESC, AVAIL);
    answer_all(&mut bench, |_| (DESC - 4096, 3 * 4096, USER + 4 * MIB - 4096));
    // What was there and is replaced by such a page is asked for anew.
    assert_eq!(bench.update(DESC, 4096, USER, RW), 0);
    assert_eq!(bench.update(DESC, 4096, USER + (1 << 40), RW), 1);
    assert!(bench.messages().iter().any(|(miss, _)| miss.iova == DESC));
}

#[test]
fn a_flush_that_takes_nothing_asks_for_nothing() {
    let (mut bench, _fd) = started();
    // All ring pages go with the first of two flushes that say the same, as each pair of queues has its own.
    assert_eq!(bench.invalidate(0, 0), 0);
    let mut refused = 0;
    loop {
        let messages = bench.messages();
        if messages.is_empty() {
            break;
        }
        refused += messages.len();
        assert!(refused < 100, "it never ends");
        let replies = messages.iter().filter(|(_, need_reply)| *need_reply).count();
        (0..replies).for_each(|_| bench.event(Event::MissReply { value: 1 }));
    }
    assert!(refused > 0);
    assert_eq!(bench.invalidate(0, 0), 0);
    assert_eq!(bench.messages(), []);
}

#[test]
fn nonsense_is_refused() {
    let (mut bench, _fd) = started();
    let before = bench.device.table().stats().entries;
    assert_eq!(bench.update(0x8000_0000, 0, USER, RW), 1);
    assert_eq!(bench.update(u64::MAX - 10, 4096, USER, RW), 1);
    for kind in [IotlbKind::Miss, IotlbKind::AccessFail] {
        let message = IotlbMessage { kind, ..IotlbMessage::miss(0, RW) };
        assert_eq!(bench.value(Request::Iotlb(message)), 1);
    }
    assert_eq!(bench.value(Request::Unknown(77)), 1);
    bench.silent(Request::Unknown(77));
    assert_eq!(bench.value(Request::NetSetMtu(1500)), 1);
    assert_eq!(bench.value(Request::SetInflightFd { size: 0, offset: 0, queues: 1, queue_size: 1, fd: eventfd() }), 1);
    assert_eq!(bench.value(Request::SetLogBase { size: 0, offset: 0, fd: None }), 1);
    assert_eq!(bench.value(Request::SetProtocolFeatures(u64::MAX)), 1);
    assert_eq!(bench.value(Request::SetFeatures(u64::MAX)), 1);
    assert_eq!(bench.value(Request::SetStatus(0x100)), 1);
    assert_eq!(bench.device.table().stats().entries, before);
    assert!(bench.device.is_running());
}

#[test]
fn need_reply_means_nothing_before_it_was_negotiated() {
    let mut bench = Bench::new(DeviceConfig::net(1, 100, 1 << 40), ROOMY);
    bench.event(Event::FrontEndConnected);
    assert_eq!(bench.request(Request::SetOwner, true), []);
    assert_eq!(bench.request(Request::GetFeatures, false).len(), 1);
    bench.silent(Request::SetProtocolFeatures(protocol::REPLY_ACK));
    bench.ack(Request::SetOwner);
}

// ---- rings ----

fn record(bench: &Bench, queue: usize) -> (bool, bool) {
    use iotlb_proto::layout::table::{QUEUE_ENABLED, QUEUE_STARTED};
    let flags = bench.device.table().memory().queues()[queue].flags.load(iotlb_proto::sync::Ordering::Relaxed);
    (flags & QUEUE_STARTED != 0, flags & QUEUE_ENABLED != 0)
}

#[test]
fn a_ring_starts_with_its_kick_and_is_enabled_by_what_was_said_before() {
    let (mut bench, _fd) = bench();
    bench.ack(Request::SetVringEnable(VringState { index: 0, num: 1 }));
    assert_eq!(record(&bench, 0), (false, false));
    bench.start_ring(0, DESC, AVAIL, USED);
    assert_eq!(record(&bench, 0), (true, true));
    bench.ack(Request::SetVringEnable(VringState { index: 0, num: 0 }));
    assert_eq!(record(&bench, 0), (true, false));
    bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(record(&bench, 0), (false, false));
}

#[test]
fn the_order_of_what_makes_a_ring_does_not_matter() {
    let (mut bench, _fd) = bench();
    bench.silent(Request::SetVringKick(VringFd { index: 1, fd: None }));
    bench.silent(Request::SetVringAddr(VringAddress {
        index: 1,
        flags: 0,
        desc: DESC,
        used: USED,
        avail: AVAIL,
        log: 0,
    }));
    assert!(!bench.device.is_running());
    bench.silent(Request::SetVringNum(VringState { index: 1, num: 8 }));
    assert_eq!(record(&bench, 1), (true, false));
}

#[test]
fn bad_rings_are_refused_and_stay_stopped() {
    let (mut bench, _fd) = bench();
    for num in [0, 3, 65_536] {
        assert_eq!(bench.value(Request::SetVringNum(VringState { index: 0, num })), 1);
    }
    assert_eq!(bench.value(Request::SetVringNum(VringState { index: 2, num: 256 })), 1, "no such ring");
    assert_eq!(bench.value(Request::SetVringBase(VringState { index: 0, num: 65_536 })), 1);
    assert_eq!(bench.value(Request::SetVringEnable(VringState { index: 0, num: 2 })), 1);
    let good = VringAddress { index: 0, flags: 0, desc: DESC, used: USED, avail: AVAIL, log: 0 };
    for bad in [
        VringAddress { desc: DESC + 8, ..good },
        VringAddress { avail: AVAIL + 1, ..good },
        VringAddress { used: USED + 2, ..good },
        VringAddress { desc: !15, ..good },
    ] {
        bench.ack(Request::SetVringNum(VringState { index: 0, num: 256 }));
        assert_eq!(bench.value(Request::SetVringAddr(bad)), 1, "{bad:x?}");
    }
    bench.ack(Request::SetVringKick(VringFd { index: 0, fd: Some(eventfd()) }));
    assert!(!bench.device.is_running());
    // A GET is answered whatever it asks for.
    assert_eq!(bench.request(Request::GetVringBase { index: 9 }, false).len(), 1);
}

#[test]
fn a_running_ring_is_not_changed_under_its_worker() {
    let (mut bench, _fd) = started();
    assert_eq!(bench.value(Request::SetVringNum(VringState { index: 0, num: 8 })), 1);
    assert_eq!(bench.value(Request::SetVringBase(VringState { index: 0, num: 8 })), 1);
    let other = VringAddress { index: 0, flags: 0, desc: 0, used: USED, avail: AVAIL, log: 0 };
    assert_eq!(bench.value(Request::SetVringAddr(other)), 1);
}

#[test]
fn the_base_is_the_used_index_even_when_its_translation_is_gone() {
    let (mut bench, fd) = started();
    assert_eq!(rustix::io::pwrite(&fd, &777u16.to_le_bytes(), 0x2242), Ok(2));
    assert_eq!(bench.invalidate(0, 0), 0);
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 777 }]);
}

#[test]
fn the_base_is_what_the_worker_said_when_the_used_index_cannot_be_read() {
    let (mut bench, fd) = started();
    rustix::fs::ftruncate(&fd, 0x1000).expect("shorter");
    bench.device.note_progress(0, 55);
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 55 }]);
}

#[test]
fn what_a_worker_said_in_a_former_run_is_not_how_far_this_one_got() {
    let (mut bench, fd) = started();
    assert_eq!(rustix::io::pwrite(&fd, &500u16.to_le_bytes(), 0x2242), Ok(2));
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 500 }]);
    // Its used ring never comes, so nobody does anything; the worker's word stays as it was.
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.device.note_progress(0, 500);
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 0 }]);
}

#[test]
fn who_leaves_a_queue_leaves_word_how_far_it_got() {
    let base =
        |bench: &Bench| bench.device.table().memory().queues()[0].base.load(iotlb_proto::sync::Ordering::Relaxed);
    let (mut bench, fd) = bench();
    bench.start_ring(0, DESC, AVAIL, USED);
    bench.device.note_progress(0, 55);
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 0, "where no used ring was found nobody has done anything: it speaks of another run");
    assert_eq!(rustix::io::pwrite(&fd, &7u16.to_le_bytes(), 0x2242), Ok(2));
    bench.device.note_progress(0, 5);
    assert_eq!(bench.update(AVAIL, 4096, USER + 0x2000, RW), 0);
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 0, "who can read the used ring has no need of it, and others are not to be disturbed");
    assert_eq!(bench.update(AVAIL, 4096, USER + 0x2000, Access::WRITE), 0);
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 7, "what the used ring says counts");
    // It cannot be read any more.
    rustix::fs::ftruncate(&fd, 0x1000).expect("shorter");
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 7, "nobody came any further");
    bench.device.note_progress(0, 9);
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 9);
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 9 }]);
    bench.device.owner_left(0);
    assert_eq!(base(&bench), 0, "it is stopped");
    bench.device.owner_left(9);
}

#[test]
fn the_base_survives_a_reset() {
    let (mut bench, fd) = started();
    assert_eq!(rustix::io::pwrite(&fd, &9u16.to_le_bytes(), 0x2242), Ok(2));
    bench.silent(Request::SetStatus(0));
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 9 }]);
}

#[test]
fn features_repeated_by_each_queue_pair_disturb_nothing() {
    let (mut bench, _fd) = started();
    let (entries, features) = (bench.device.table().stats().entries, bench.device.config().features);
    bench.instant_grace = false;
    bench.ack(Request::SetFeatures(features));
    assert!(bench.device.is_running());
    assert_eq!(bench.device.table().stats().entries, entries);
    assert!(record(&bench, 0).0);
}

// ---- descriptors ----

#[test]
fn what_is_no_back_end_channel_is_refused_and_the_old_one_stays() {
    let (mut bench, fd) = started();
    let packets = OwnedFd::from(std::os::unix::net::UnixDatagram::unbound().expect("a socket"));
    let network = OwnedFd::from(std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket"));
    for bad in [eventfd(), fd, packets, network] {
        assert_eq!(bench.value(Request::SetBackendReqFd(bad)), 1);
    }
    assert!(!bench.actions.iter().any(|action| matches!(action, Action::UseBackEndChannel(_))));
    bench.miss(0, 0, 1, 0x9000, 16, RW);
    assert_eq!(bench.messages().len(), 1);
}

#[test]
fn a_file_or_a_socket_is_refused_for_a_ring() {
    let (mut bench, fd) = started();
    // A copy of the front-end's own end would keep the connection open for ever.
    let (stream, _other) = std::os::unix::net::UnixStream::pair().expect("a pair");
    for bad in [fd, OwnedFd::from(stream)] {
        let again = || VringFd { index: 0, fd: Some(bad.try_clone().expect("duplicated")) };
        assert_eq!(bench.value(Request::SetVringKick(again())), 1);
        assert_eq!(bench.value(Request::SetVringCall(again())), 1);
        assert_eq!(bench.value(Request::SetVringErr(again())), 1);
    }
    assert!(!bench.actions.iter().any(|action| matches!(action, Action::QueueDescriptors { .. })));
    assert_eq!(record(&bench, 0), (true, false), "the ring goes on with what it had");
    let [kick, ..] = bench.device.queue_descriptors(0);
    assert!(kick.is_some());
}
