//! The device and guest memory: the memory table, its regions, and what is published of them without IOMMU.

mod harness;

use std::os::fd::{AsRawFd, OwnedFd};

use harness::{AVAIL, Bench, DESC, MIB, ROOMY, RW, USER, bench, eventfd, memfd, region, started, table_of, target};
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::vhost_user::{MemoryRegion, Request};
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
        assert_eq!(bench.value(table_of(&table)), 1, "{why}");
        assert_eq!(changes(&mut bench), ["remove 2", "generation 2"], "{why}");
        assert_eq!(target(&bench, 0x3000), None, "{why}: it leads into memory that the front-end gave up");
        assert_eq!(bench.update(0x3000, 4096, USER, RW), 1, "{why}");
        assert_eq!(bench.update(0x3000, 4096, USER + 64 * MIB, RW), 0, "{why}");
        // Of one region alone nothing follows for others.
        bench.actions.clear();
        let (description, fd) = bad[bad.len() - 1];
        let add = Request::AddMemReg(description, fd.try_clone().expect("duplicated"));
        if bad.len() == 1 {
            assert_eq!(bench.value(add), 1, "{why}");
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
