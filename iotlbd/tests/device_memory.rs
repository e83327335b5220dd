//! The device and guest memory: the memory table, its regions, and what is published of them without IOMMU.

mod harness;

use std::os::fd::{AsRawFd, OwnedFd};

use harness::{
    AVAIL, Bench, DESC, MIB, ROOMY, RW, SMALLEST, USER, bench, eventfd, memfd, region, started, table_of, target,
};
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::vhost_user::header::HEADER_LEN;
use iotlb_proto::vhost_user::{Header, MemoryRegion, Request, decode, encode};
use iotlb_proto::worker::Answer;
use iotlbd::device::{Action, DeviceConfig, Event, MemoryChange, ReplyPayload};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, memfd_create};

fn changes(bench: &mut Bench) -> Vec<String> {
    std::mem::take(&mut bench.actions)
        .into_iter()
        .filter_map(|action| match action {
            Action::Memory(MemoryChange::Add(info, _)) => Some(format!("add {} at {:#x}", info.id, info.arena_offset)),
            Action::Memory(MemoryChange::Remove { id }) => Some(format!("remove {id}")),
            Action::Memory(MemoryChange::Generation(g)) => Some(format!("generation {g}")),
            _ => None,
        })
        .collect()
}

/// The value that answers a request which comes as bytes, as from a front-end: what its fields hold is seen by the
/// decoder first.
fn sent(bench: &mut Bench, request: &Request) -> u64 {
    let message = encode(request, true).expect("encodes");
    let payload = &message.bytes[HEADER_LEN..];
    let fds = message.fds.iter().map(|fd| fd.try_clone_to_owned().expect("duplicated")).collect();
    let header = Header::request(request.number(), payload.len().try_into().expect("short"), true);
    bench.event(match decode(header, payload, fds) {
        Ok(request) => Event::Request { header, request },
        Err(error) => Event::BadRequest { header, error },
    });
    match bench.replies(header.request).as_slice() {
        [ReplyPayload::U64(value)] => *value,
        other => panic!("expected one number, got {other:?}"),
    }
}

#[test]
fn regions_that_stay_are_kept_mapped() {
    let (mut bench, fd) = bench();
    assert_eq!(changes(&mut bench), ["add 1 at 0x0", "generation 1"]);
    let more = memfd(MIB);
    bench.ack(table_of(&[(region(0, 4 * MIB, USER), &fd), (region(0x1_0000_0000, MIB, 0x5000_0000), &more)]));
    assert_eq!(changes(&mut bench), ["add 2 at 0x100000000", "generation 2"]);
    // Other memory at the same addresses is another region.
    let other = memfd(4 * MIB);
    bench.ack(table_of(&[(region(0, 4 * MIB, USER), &other)]));
    assert_eq!(changes(&mut bench), ["remove 2", "remove 1", "add 3 at 0x0", "generation 3"]);
    bench.ack(table_of(&[(region(0, 4 * MIB, USER), &other)]));
    assert!(changes(&mut bench).is_empty());
}

#[test]
fn a_memory_table_drops_all_entries_and_asks_for_the_rings_again() {
    let (mut bench, fd) = started();
    bench.ack(table_of(&[(region(0, 4 * MIB, USER), &fd)]));
    assert_eq!(bench.device.table().stats().entries, 0);
    let pages: Vec<u64> = bench.messages().iter().map(|(message, _)| message.iova).collect();
    assert_eq!(pages, [DESC, AVAIL]);
}

#[test]
fn a_removed_region_takes_its_entries_along_whatever_their_iova() {
    let (a, b) = (memfd(MIB), memfd(MIB));
    let second = region(0x1_0000_0000, MIB, 0x5000_0000);
    let mut bench = Bench::net(&[(region(0, MIB, USER), &a), (second, &b)]);
    assert_eq!(bench.update(0x1_0000_0000, 4096, USER, RW), 0);
    assert_eq!(bench.update(0x3000, 4096, 0x5000_0000, RW), 0);
    bench.actions.clear();
    bench.ack(Request::RemMemReg(MemoryRegion { mmap_offset: 0x123, ..second }));
    assert_eq!(target(&bench, 0x3000), None);
    assert_eq!(target(&bench, 0x1_0000_0000), Some(0), "found by its guest address");
    assert_eq!(changes(&mut bench), ["remove 2", "generation 2"]);
    assert_eq!(bench.value(Request::RemMemReg(second)), 0, "gone is gone");
    assert!(changes(&mut bench).is_empty());
}

#[test]
fn bad_memory_is_refused_and_what_else_the_table_leaves_out_goes() {
    let fd = memfd(4 * MIB);
    let bad: Vec<(MemoryRegion, &OwnedFd)> = vec![
        (region(0, 8 * MIB, USER), &fd),
        (region(0, MIB, u64::MAX - 100), &fd),
        (region(u64::MAX - 100, MIB, USER), &fd),
        (MemoryRegion { mmap_offset: 5, ..region(0, MIB, USER) }, &fd),
        (region(0, 0, USER), &fd),
        (region(0, MIB + 1, USER), &fd),
        (region(5, MIB, USER), &fd),
        (region(0, MIB, USER + 5), &fd),
    ];
    let refused = |bad: &[(MemoryRegion, &OwnedFd)], why: &str| {
        // One region stays as it is; what the other one's user addresses mean by this table cannot be had.
        let (stays, goes) = (memfd(MIB), memfd(MIB));
        let (kept, other) = (region(0x2_0000_0000, MIB, USER + 64 * MIB), region(0x3_0000_0000, MIB, USER));
        let mut bench = Bench::net(&[(kept, &stays), (other, &goes)]);
        assert_eq!(bench.update(0x3000, 4096, USER, RW), 0);
        bench.actions.clear();
        let mut table = vec![(kept, &stays)];
        table.extend(bad);
        assert_eq!(sent(&mut bench, &table_of(&table)), 1, "{why}");
        assert_eq!(changes(&mut bench), ["remove 2", "generation 2"], "{why}");
        assert_eq!(target(&bench, 0x3000), None, "{why}: it leads into memory that the front-end gave up");
        assert_eq!(bench.update(0x3000, 4096, USER, RW), 1, "{why}");
        assert_eq!(bench.update(0x3000, 4096, USER + 64 * MIB, RW), 0, "{why}");
        // Of one region alone nothing follows for others.
        bench.actions.clear();
        let (description, fd) = bad[bad.len() - 1];
        let add = Request::AddMemReg(description, fd.try_clone().expect("duplicated"));
        if bad.len() == 1 {
            assert_eq!(sent(&mut bench, &add), 1, "{why}");
            assert!(changes(&mut bench).is_empty(), "{why}");
            assert_eq!(target(&bench, 0x3000), Some(0x2_0000_0000));
        }
    };
    for (description, fd) in bad {
        refused(&[(description, fd)], &format!("{description:x?}"));
    }
    refused(&[(region(0, 4096, USER), &eventfd())], "not memory");
    for (mode, flags) in [("read-only", OFlags::RDONLY), ("write-only", OFlags::WRONLY), ("path-only", OFlags::PATH)] {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let half = rustix::fs::open(path, flags, Mode::empty()).expect("opened again");
        refused(&[(region(0, 4096, USER), &half)], &format!("{mode}: no worker can map it"));
    }
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let sealed = memfd_create("sealed", MemfdFlags::ALLOW_SEALING).expect("a memfd");
        rustix::fs::ftruncate(&sealed, MIB).expect("room");
        rustix::fs::fcntl_add_seals(&sealed, seal).expect("sealed");
        refused(&[(region(0, 4096, USER), &sealed)], &format!("{seal:?}: no worker can map it"));
    }
    let twice = [(region(0, 2 * MIB, USER), &fd), (region(0x1_0000_0000, MIB, USER + MIB), &fd)];
    refused(&twice, "user addresses overlap");
}

#[test]
fn regions_that_overlap_in_the_guest_or_lie_too_high_get_another_place() {
    let (a, b, c) = (memfd(4 * MIB), memfd(4 * MIB), memfd(MIB));
    let bench = Bench::net(&[
        (region(0, 4 * MIB, USER), &a),
        (region(MIB, 4 * MIB, USER + 8 * MIB), &b),
        (region(1 << 50, MIB, USER + 16 * MIB), &c),
    ]);
    let (regions, _) = bench.device.regions();
    let mut places: Vec<_> = regions.iter().map(|(r, _)| (r.arena_offset, r.arena_offset + r.size)).collect();
    places.sort_unstable();
    assert_eq!(places, [(0, 4 * MIB), (4 * MIB, 8 * MIB), (8 * MIB, 9 * MIB)]);
}

#[test]
fn slots_are_bounded() {
    let (mut bench, fd) = bench();
    let number = |payload: &[ReplyPayload]| match payload {
        [ReplyPayload::U64(value)] => *value,
        other => panic!("{other:?}"),
    };
    let slots = number(&bench.request(Request::GetMaxMemSlots, false));
    for slot in 1..slots {
        let add = Request::AddMemReg(region(slot << 32, 4096, 0x1000 * slot), fd.try_clone().expect("a descriptor"));
        bench.ack(add);
    }
    let one_more = Request::AddMemReg(region(slots << 32, 4096, 0x1000 * slots), fd.try_clone().expect("a descriptor"));
    assert_eq!(bench.value(one_more), 1);
}

#[test]
fn without_access_platform_guest_memory_is_published_as_it_is() {
    let fd = memfd(4 * MIB);
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let (features, protocol) = (config.features & !virtio::ACCESS_PLATFORM, config.protocol_features);
    let mut bench = Bench::new(config, ROOMY);
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.ack(table_of(&[(region(0x10_0000, 4 * MIB, USER), &fd)]));
    assert_eq!(bench.device.table().stats().entries, 0);
    bench.silent(Request::SetFeatures(features));
    assert_eq!(target(&bench, 0x10_0000), Some(0x10_0000));
    // Ring addresses are the front-end's own; workers get guest addresses.
    bench.start_ring(0, USER + 0x1000, USER + 0x2000, USER + 0x2240);
    let words = &bench.device.table().memory().queues()[0];
    assert_eq!(words.used.load(iotlb_proto::sync::Ordering::Relaxed), 0x10_2240);
    assert_eq!(bench.messages(), []);
    assert_eq!(rustix::io::pwrite(&fd, &31u16.to_le_bytes(), 0x2242), Ok(2));
    // A miss can only be wrong, because everything is there.
    bench.miss(0, 0, 1, 0x5000_0000, 64, RW);
    bench.miss(0, 1, 2, 0x11_0000, 64, RW);
    assert_eq!(bench.answers(), [(0, 0, 1, Answer::Denied), (0, 1, 2, Answer::Resolved)]);
    assert_eq!(bench.update(0x10_0000, 4096, USER, RW), 1);
    assert_eq!(bench.invalidate(0, 0), 0);
    assert_eq!(target(&bench, 0x10_0000), Some(0x10_0000));
    // While memory changes nobody is denied.
    bench.instant_grace = false;
    let more = memfd(MIB);
    let table = table_of(&[(region(0x10_0000, 4 * MIB, USER), &fd), (region(0x5000_0000, MIB, 0x4000_0000), &more)]);
    assert_eq!(bench.request(table, true), []);
    bench.miss(0, 0, 3, 0x5000_0000, 64, RW);
    assert_eq!(bench.answers(), []);
    bench.grace();
    assert_eq!(bench.answers(), [(0, 0, 3, Answer::Resolved)]);
    bench.actions.clear();
    bench.instant_grace = true;
    let reply = bench.request(Request::GetVringBase { index: 0 }, false);
    assert_eq!(reply, [ReplyPayload::VringState { index: 0, num: 31 }]);
}

#[test]
fn a_ring_outside_guest_memory_does_not_start() {
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let (features, protocol) = (config.features & !virtio::ACCESS_PLATFORM, config.protocol_features);
    let mut bench = Bench::new(config, ROOMY);
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.silent(Request::SetFeatures(features));
    bench.ack(table_of(&[(region(0, MIB, USER), &memfd(MIB))]));
    bench.start_ring(0, USER + MIB - 16, USER, USER);
    assert!(!bench.device.is_running());
}

/// A front-end without IOMMU with so many regions, far apart, that the smallest table has no room for all of them.
fn more_regions_than_fit() -> (Bench, Vec<u64>) {
    let fd = memfd(0x4000);
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let features = config.features & !virtio::ACCESS_PLATFORM;
    let guests: Vec<u64> = (0..64).map(|n| n << 39).collect();
    let regions: Vec<_> = guests.iter().map(|guest| (region(*guest, 0x4000, USER + (guest >> 25)), &fd)).collect();
    let mut bench = Bench::new(config, SMALLEST).connect(features, &regions);
    bench.start_ring(0, USER, USER + 0x1000, USER + 0x2000);
    bench.actions.clear();
    (bench, guests)
}

#[test]
fn a_region_that_was_evicted_is_published_again_for_who_misses_it() {
    let (mut bench, guests) = more_regions_than_fit();
    let places: Vec<_> = bench.device.regions().0.into_iter().map(|(r, _)| (r.guest_address, r.arena_offset)).collect();
    let (there, gone): (Vec<u64>, Vec<u64>) = guests.iter().partition(|guest| target(&bench, **guest).is_some());
    assert!(!there.is_empty() && !gone.is_empty(), "all have room, or none has");
    // Each may evict another, and that one comes again as well.
    for (guest, ticket) in guests.iter().chain(&guests).zip(1..) {
        bench.miss(0, 0, ticket, *guest, 64, RW);
        assert_eq!(bench.answers(), [(0, 0, ticket, Answer::Resolved)], "{guest:#x}");
        let place = places.iter().find(|(of, _)| of == guest).map(|(_, place)| *place);
        assert_eq!(target(&bench, *guest), place, "{guest:#x}");
    }
    // What no region holds is denied all the same, and so is what only begins in one.
    bench.miss(0, 0, 1000, 1 << 38, 64, RW);
    bench.miss(0, 1, 1001, 0x3fff, 2, RW);
    assert_eq!(bench.answers(), [(0, 0, 1000, Answer::Denied), (0, 1, 1001, Answer::Denied)]);
}

#[test]
fn what_an_evicted_region_waits_for_is_a_grace_period() {
    let (mut bench, guests) = more_regions_than_fit();
    (bench.instant_grace, bench.instant_work) = (false, false);
    let gone: Vec<u64> = guests.iter().copied().filter(|guest| target(&bench, *guest).is_none()).collect();
    // The first ones find room, or make some; a node that was in use comes back after a grace period only.
    let mut waited = false;
    for (guest, ticket) in gone.iter().zip(1..) {
        bench.miss(0, 0, ticket, *guest, 64, RW);
        while bench.device.has_work() {
            bench.event(Event::Continue);
        }
        if bench.device.grace_target().is_some() {
            waited = true;
            assert_eq!((bench.answers(), target(&bench, *guest)), (vec![], None), "a node was used again too early");
            bench.grace();
        }
        assert_eq!(bench.answers(), [(0, 0, ticket, Answer::Resolved)]);
    }
    assert!(waited, "no entry was evicted");
}

#[test]
fn who_misses_evicted_regions_on_and_on_holds_up_neither_others_nor_the_front_end() {
    let (mut bench, guests) = more_regions_than_fit();
    (bench.instant_grace, bench.instant_work) = (false, false);
    let gone: Vec<u64> = guests.iter().copied().filter(|guest| target(&bench, *guest).is_none()).collect();
    let (wanted, others) = gone.split_first().expect("not all fit");
    let mut ticket = 1;
    for (cell, guest) in (0..).zip(others) {
        bench.miss(0, cell, ticket, *guest, 64, RW);
    }
    bench.miss(1, 0, 1, *wanted, 64, RW);
    for round in 0.. {
        assert!(round < 2 * guests.len(), "worker 1 waits for ever");
        assert!(bench.device.has_work());
        bench.event(Event::Continue);
        while bench.device.grace_target().is_some() {
            bench.grace();
        }
        // Between two of them the front-end has its turn.
        assert!(bench.device.accepts_requests());
        bench.ack(Request::SetOwner);
        let answers = bench.answers();
        assert!(answers.iter().all(|(_, _, _, answer)| *answer == Answer::Resolved), "{answers:?}");
        if answers.iter().any(|(worker, ..)| *worker == 1) {
            break;
        }
        for (worker, cell, ..) in answers {
            ticket += 1;
            let evicted = others.iter().find(|guest| target(&bench, **guest).is_none()).expect("there is no room");
            bench.miss(worker, cell, ticket, *evicted, 64, RW);
        }
    }
    // Nobody is left behind when the last ring stops.
    assert_eq!(bench.request(Request::GetVringBase { index: 0 }, false), []);
    bench.grace();
    let answers = bench.answers();
    assert!(!answers.is_empty() && answers.iter().all(|(_, _, _, answer)| *answer == Answer::Stopped), "{answers:?}");
}

/// A front-end without IOMMU and with two regions; the ring lies in the second one, and is 31 entries far.
fn ring_in_the_second_region() -> (Bench, [(MemoryRegion, OwnedFd); 2]) {
    let fds = [memfd(MIB), memfd(MIB)];
    let regions = [region(0, MIB, USER), region(0x1_0000_0000, MIB, 0x5000_0000)];
    let config = DeviceConfig::net(1, 100, 1 << 40);
    let features = config.features & !virtio::ACCESS_PLATFORM;
    let mut bench = Bench::new(config, ROOMY).connect(features, &[(regions[0], &fds[0]), (regions[1], &fds[1])]);
    bench.start_ring(0, 0x5000_0000, 0x5000_1000, 0x5000_2000);
    assert_eq!(rustix::io::pwrite(&fds[1], &31u16.to_le_bytes(), 0x2002), Ok(2));
    let [first, second] = fds;
    (bench, [(regions[0], first), (regions[1], second)])
}

#[test]
fn a_ring_whose_memory_went_goes_on_where_it_was_when_it_is_back() {
    for by_table in [false, true] {
        let (mut bench, [(first, fd), (second, ring_fd)]) = ring_in_the_second_region();
        bench.ack(if by_table { table_of(&[(first, &fd)]) } else { Request::RemMemReg(second) });
        assert!(!bench.device.is_running());
        bench.ack(Request::AddMemReg(second, ring_fd));
        assert!(bench.device.is_running());
        let base = bench.device.table().memory().queues()[0].base.load(iotlb_proto::sync::Ordering::Relaxed);
        assert_eq!(base, 31, "by table: {by_table}");
    }
}

#[test]
fn a_ring_whose_memory_goes_is_covered_by_the_same_grace_period() {
    let (mut bench, [_, (second, _)]) = ring_in_the_second_region();
    bench.instant_grace = false;
    assert_eq!(bench.request(Request::RemMemReg(second), true), []);
    assert!(!bench.device.is_running());
    bench.grace();
    assert_eq!(bench.device.grace_target(), None, "there is nothing else to wait for");
}

#[test]
fn a_ring_that_memory_alone_was_missing_for_finds_all_of_it_published() {
    let mut bench = Bench::new(DeviceConfig::net(1, 100, 1 << 40), ROOMY);
    let protocol = bench.device.config().protocol_features;
    bench.event(Event::FrontEndConnected);
    bench.silent(Request::SetProtocolFeatures(protocol));
    bench.start_ring(0, USER, USER + 0x1000, USER + 0x2000);
    bench.ack(table_of(&[(region(0x10_0000, MIB, USER), &memfd(MIB))]));
    assert!(bench.device.is_running());
    assert_eq!(target(&bench, 0x10_0000), Some(0x10_0000));
}
