//! What a pin yields.

mod support;

use std::os::fd::AsFd;

use iotlb_client::{Access, Fault, PinError, thread_pins};
use iotlb_proto::control::{DaemonMessage, RegionInfo, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::Ordering;
use support::{ARENA_SIZE, Daemon, Memory, PATIENCE_MS};

const RW: Access = Access::READ_WRITE;

#[test]
fn neighbours_in_the_guests_space_are_pieces_in_memory() {
    let (daemon, memory, attachment) = Daemon::with_memory(64);
    // Seven pages of IOVA in falling order of memory, the fourth and fifth of which happen to be neighbours.
    let targets = [40_u64, 30, 20, 10, 11, 5, 50];
    for (i, page) in (0_u64..).zip(targets) {
        daemon.map(0x10_0000 + i * PAGE_SIZE, PAGE_SIZE, page * PAGE_SIZE, RW);
        memory.poke(page * PAGE_SIZE, &[u8::try_from(i).expect("small"); 4096]);
    }
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let base = guard.translate(0x10_5000, 1, RW).expect("mapped").next().expect("a piece").as_ptr().addr() - 5 * 4096;
    let pieces = |iova, len| -> Vec<(usize, usize)> {
        let segments = guard.translate(iova, len, RW).expect("mapped");
        segments.map(|segment| (segment.as_ptr().addr() - base, segment.len())).collect()
    };
    assert_eq!(pieces(0x10_0000, 4096), [(40 * 4096, 4096)]);
    assert_eq!(pieces(0x10_0fff, 2), [(40 * 4096 + 4095, 1), (30 * 4096, 1)]);
    assert_eq!(pieces(0x10_3800, 0x1000), [(10 * 4096 + 0x800, 0x1000)], "joined");
    let all = [(40, 1), (30, 1), (20, 1), (10, 2), (5, 1), (50, 1)].map(|(page, n)| (page * 4096, n * 4096));
    assert_eq!(pieces(0x10_0000, 7 * 4096), all);

    let mut bytes = vec![0xff; 7 * 4096];
    guard.read(0x10_0000, &mut bytes).expect("mapped");
    assert!(bytes.chunks(4096).zip(0_u8..).all(|(page, i)| page.iter().all(|byte| *byte == i)));
    guard.write(0x10_1ffe, &[1, 2, 3, 4]).expect("mapped");
    assert_eq!(memory.peek(30 * 4096 + 4094, 2), [1, 2]);
    assert_eq!(memory.peek(20 * 4096, 2), [3, 4]);
    guard.read(0x666_0000, &mut []).expect("nothing to read is no fault");
}

#[test]
fn all_or_nothing() {
    let (daemon, memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    daemon.map(0x2000, 0x1000, 0x2000, Access::READ);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let miss = |iova, access| Some(Fault::Miss { iova, access });
    assert_eq!(guard.translate(0x1800, 0x2000, Access::READ).err(), miss(0x3000, Access::READ));
    assert_eq!(guard.translate(0x1800, 0x1000, Access::WRITE).err(), miss(0x2000, Access::WRITE));
    assert_eq!(guard.translate(0x2345, 1, RW).err(), miss(0x2345, RW));
    assert_eq!(guard.translate(0x2345, 1, Access::READ).map(Iterator::count), Ok(1));
    assert_eq!(guard.translate(0x9000, 1, Access::NONE).err(), miss(0x9000, Access::READ));
    assert_eq!(guard.write(0x1ffc, &[9; 8]), Err(Fault::Miss { iova: 0x2000, access: Access::WRITE }));
    assert_eq!(memory.peek(0x1ffc, 4), [0; 4], "nothing was written");
}

#[test]
fn empty_and_wrapping_ranges_are_invalid() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    daemon.map(u64::MAX - 0xfff, 0x1000, 0x1000, RW);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    assert_eq!(guard.translate(0x1000, 0, RW).err(), Some(Fault::Invalid));
    assert_eq!(guard.translate(u64::MAX, 2, RW).err(), Some(Fault::Invalid));
    assert_eq!(guard.translate(0x1001, u64::MAX, RW).err(), Some(Fault::Invalid));
    assert_eq!(guard.translate(u64::MAX, 1, RW).map(Iterator::count), Ok(1), "the last byte is an address too");
}

#[test]
fn targets_outside_the_arena_or_its_regions_are_not_handed_out() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let reader = attachment.reader().expect("a reader");
    daemon.map(0x1000, 0x2000, ARENA_SIZE - 0x1000, RW);
    assert_eq!(reader.pin().expect("pin").translate(0x1000, 0x1001, RW).err(), Some(Fault::Invalid));

    // A region whose memory is shorter than claimed: touching the end would be a SIGBUS.
    let short = Memory::new(4 * PAGE_SIZE);
    daemon.add_region_of(2, 0x10_0000, &short, 8 * PAGE_SIZE);
    daemon.finish_map();
    daemon.map(0x10_0000, 8 * PAGE_SIZE, 0x10_0000, RW);
    daemon.map(0x8000, 0x1000, 0x8000, RW);
    {
        let guard = reader.pin().expect("pin");
        assert_eq!(guard.translate(0x10_0000, 16, RW).err(), Some(Fault::Invalid));
        assert_eq!(guard.read(0x10_7000, &mut [0]), Err(Fault::Invalid));
        assert_eq!(guard.read(0x8000, &mut [0]), Ok(()), "the other region works on");
    }
    // With the bad region gone all is well again.
    daemon.send(&DaemonMessage::RemoveRegion { id: 2 }, &[]);
    let whole = Memory::new(8 * PAGE_SIZE);
    daemon.add_region(3, 0x10_0000, &whole);
    daemon.finish_map();
    assert_eq!(reader.pin().expect("pin").read(0x10_7000, &mut [0]), Ok(()));
}

#[test]
fn a_region_without_its_one_descriptor_is_not_handed_out() {
    let (daemon, memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x8000, 0x1000, 0x8000, RW);
    daemon.map(0x10_0000, 0x4000, 0x10_0000, RW);
    let region = RegionInfo { id: 2, arena_offset: 0x10_0000, guest_address: 0, size: 0x4000, file_offset: 0 };
    let reader = attachment.reader().expect("a reader");
    for fds in [&[][..], &[memory.fd.as_fd(), memory.fd.as_fd()]] {
        let generation = daemon.table().bump_memory_map();
        daemon.send(&DaemonMessage::AddRegion(region.clone()), fds);
        daemon.send(&DaemonMessage::MemoryMap { generation }, &[]);
        assert_eq!(daemon.receive().0, WorkerMessage::Mapped { generation });
        {
            let guard = reader.pin().expect("pin");
            assert_eq!(guard.translate(0x10_0000, 16, RW).err(), Some(Fault::Invalid), "nothing is mapped there");
            assert_eq!(guard.read(0x8000, &mut [0]), Ok(()), "the other region works on");
        }
        daemon.send(&DaemonMessage::RemoveRegion { id: 2 }, &[]);
    }
}

#[test]
fn regions_that_do_not_fit_are_refused_and_the_rest_lives() {
    let (mut daemon, memory, attachment) = Daemon::with_memory(16);
    daemon.map(0, 0x1000, 0, RW);
    let reader = attachment.reader().expect("a reader");
    let good = RegionInfo { id: 9, arena_offset: 0x10_0000, guest_address: 0, size: 0x4000, file_offset: 0 };
    let bad = [
        RegionInfo { arena_offset: ARENA_SIZE - 0x1000, ..good.clone() },
        RegionInfo { arena_offset: 0xf000, ..good.clone() },
        RegionInfo { file_offset: 0x10_0000, ..good.clone() },
    ];
    for region in bad {
        daemon.send(&DaemonMessage::AddRegion(region.clone()), &[memory.fd.as_fd()]);
        daemon.finish_map();
        {
            let guard = reader.pin().expect("pin");
            assert_eq!(guard.read(0, &mut [0]), Ok(()), "{region:?}");
        }
        daemon.send(&DaemonMessage::RemoveRegion { id: 9 }, &[]);
    }
    daemon.send(&DaemonMessage::AddRegion(good), &[]);
    daemon.send(&DaemonMessage::RemoveRegion { id: 77 }, &[]);
    daemon.finish_map();
    assert!(attachment.alive());
    // What is gone is out of reach.
    daemon.unmap(0, 0x1000);
    daemon.send(&DaemonMessage::RemoveRegion { id: 1 }, &[]);
    daemon.add_region(4, 0, &memory);
    daemon.finish_map();
}

#[test]
fn a_newer_memory_map_is_waited_for() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let mut reader = attachment.reader().expect("a reader");
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    let more = Memory::new(4 * PAGE_SIZE);
    more.poke(0, b"late");
    daemon.add_region(2, 0x10_0000, &more);
    daemon.map(0x10_0000, 0x1000, 0x10_0000, RW);
    let mut bytes = [0; 4];
    assert_eq!(reader.pin().expect("pin").read(0x10_0000, &mut bytes), Err(Fault::Remapping));
    assert_eq!(reader.pin().expect("pin").read(0x1000, &mut bytes), Err(Fault::Remapping), "whole table");
    assert!(!reader.wait_mapped(1), "the daemon has not finished");
    daemon.finish_map();
    assert!(reader.wait_mapped(PATIENCE_MS));
    reader.pin().expect("pin").read(0x10_0000, &mut bytes).expect("mapped");
    assert_eq!(&bytes, b"late");
}

#[test]
fn a_map_that_is_finished_during_a_pin_serves_the_pin() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let more = Memory::new(4 * PAGE_SIZE);
    more.poke(0, b"late");
    daemon.add_region(2, 0x10_0000, &more);
    // A page of the usual tree, and one that only the general walk finds.
    for iova in [1 << 30, 1 << 39] {
        daemon.map(iova, 0x1000, 0x10_0000, RW);
        assert_eq!(guard.read(iova, &mut [0; 4]), Err(Fault::Remapping));
    }
    daemon.finish_map();
    for iova in [1 << 30, 1 << 39] {
        let mut bytes = [0; 4];
        assert_eq!(guard.read(iova, &mut bytes), Ok(()));
        assert_eq!(&bytes, b"late");
    }
}

#[test]
fn a_refused_pin_leaves_nothing() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let reader = attachment.reader().expect("a reader");
    let slot = || daemon.segment.slot(0).load(Ordering::SeqCst);
    let outer = reader.pin().expect("pin");
    assert_ne!((slot(), thread_pins::count()), (0, 0));
    drop(outer);
    daemon.kill();
    for _ in 0..3 {
        assert_eq!(reader.pin().err(), Some(PinError::DaemonDead));
        assert_eq!((daemon.segment.slot(0).load(Ordering::SeqCst), thread_pins::count()), (0, 0));
    }
}

#[test]
fn waiting_for_the_map_ends_when_it_is_there() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    let more = Memory::new(4 * PAGE_SIZE);
    daemon.add_region(2, 0x10_0000, &more);
    let mut reader = attachment.reader().expect("a reader");
    let waiting = std::thread::spawn(move || reader.wait_mapped(PATIENCE_MS));
    daemon.finish_map();
    assert!(waiting.join().expect("the thread only waits"));
}

#[test]
fn inner_pins_count_and_inherit() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    let reader = attachment.reader().expect("a reader");
    let other = attachment.reader().expect("a reader");
    let slot = || daemon.segment.slot(0).load(Ordering::SeqCst);
    assert_eq!((slot(), thread_pins::count()), (0, 0));
    let outer = reader.pin().expect("pin");
    let pinned = slot();
    assert_ne!(pinned, 0);
    daemon.unmap(0x1000, 0x1000);
    let target = daemon.table().begin_grace().expect("something was removed");
    assert!(!daemon.segment.is_drained(target));
    let inner = reader.pin().expect("pin");
    assert_eq!((slot(), thread_pins::count()), (pinned, 1), "the outer epoch");
    let elsewhere = other.pin().expect("pin");
    assert_eq!(thread_pins::count(), 2);
    drop(elsewhere);
    drop(outer);
    assert_eq!(slot(), pinned, "whichever goes first");
    drop(inner);
    assert_eq!((slot(), thread_pins::count()), (0, 0));
    assert!(daemon.segment.is_drained(target));
}

#[test]
fn what_one_pin_found_the_next_looks_for_again() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    // High enough for three levels.
    let iova = 5 << 30;
    daemon.map(iova, 0x1000, 0x2000, RW);
    let reader = attachment.reader().expect("a reader");
    let place = |iova| {
        let guard = reader.pin().expect("pin");
        guard.translate_one(iova, 1, RW).map(|piece| piece.as_ptr().addr())
    };
    let first = place(iova);
    // The same address in a new node, while the old one, which nobody has waited for, still says what it said.
    daemon.unmap(0, u64::MAX);
    daemon.map(iova, 0x1000, 0x3000, RW);
    assert_eq!(place(iova), first.map(|first| first + 0x1000));
}

#[test]
fn a_sleeping_writer_is_woken_by_the_outermost_unpin_only() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let reader = attachment.reader().expect("a reader");
    drop(reader.pin().expect("pin"));
    assert_eq!(support::take_count(&daemon.doorbell), 0, "nobody sleeps");
    daemon.table().set_writer_sleeps(true);
    let outer = reader.pin().expect("pin");
    drop(reader.pin().expect("pin"));
    assert_eq!(support::take_count(&daemon.doorbell), 0);
    drop(outer);
    assert_eq!(support::take_count(&daemon.doorbell), 1);
}

#[test]
fn a_forgotten_guard_only_spoils_its_own_reader() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    std::thread::spawn(move || {
        let mut reader = attachment.reader().expect("a reader");
        std::mem::forget(reader.pin().expect("pin"));
        assert!(!reader.wait_mapped(1));
        drop(reader);
        drop(attachment);
    })
    .join()
    .expect("thread");
    assert_eq!(daemon.segment.slot(0).load(Ordering::SeqCst), 0);
}

#[test]
fn lookups_are_counted_in_the_end() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    let reader = attachment.reader().expect("a reader");
    {
        let guard = reader.pin().expect("pin");
        for _ in 0..10 {
            guard.read(0x1000, &mut [0]).expect("mapped");
        }
        assert!(guard.read(0x9000, &mut [0]).is_err());
    }
    drop(reader);
    let counters = &daemon.segment.counters;
    assert_eq!((counters.lookups.load(Ordering::SeqCst), counters.hits.load(Ordering::SeqCst)), (11, 10));
}

#[test]
fn what_a_pin_leaves_to_do_is_done_at_its_end_whatever_was_nested_in_it() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, RW);
    daemon.map(0x2000, 0x1000, 0x5000, RW);
    let reader = attachment.reader().expect("a reader");
    let slot = || daemon.segment.slot(0).load(Ordering::SeqCst);
    let lookups = || daemon.segment.counters.lookups.load(Ordering::SeqCst);
    let outer = reader.pin().expect("pin");
    let pinned = slot();
    let mut kept = outer.translate(0x1ff8, 16, RW).expect("two pieces");
    for _ in 0..3 {
        let (first, second) = (reader.pin().expect("pin"), reader.pin().expect("pin"));
        for _ in 0..1000 {
            first.read(0x1000, &mut [0]).expect("mapped");
            second.read(0x1ff8, &mut [0; 16]).expect("mapped");
        }
        drop(first);
        drop(second);
        assert_eq!((slot(), lookups(), thread_pins::count()), (pinned, 0, 1));
    }
    assert_eq!((kept.next().map(|s| s.len()), kept.next().map(|s| s.len())), (Some(8), Some(8)), "still kept");
    drop(outer);
    assert_eq!((slot(), lookups(), thread_pins::count()), (0, 6001, 0));
    drop(reader.pin().expect("pin"));
    assert_eq!((slot(), lookups(), thread_pins::count()), (0, 6001, 0));
}

#[test]
fn the_guests_state_is_seen() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    let (session, removal, queues) = (guard.session_generation(), guard.removal_generation(), guard.queue_generation());
    assert!(!guard.running());
    let record = iotlb_client::QueueRecord { started: true, size: 256, desc: 0x1000, ..Default::default() };
    {
        let mut table = daemon.table();
        table.set_running(true);
        table.set_acked_features(0x1234);
        table.bump_session();
        table.note_taken();
        table.publish_queue(1, &record);
    }
    assert!(guard.running());
    assert_eq!(guard.acked_features(), 0x1234);
    assert!(guard.session_generation() > session);
    assert!(guard.removal_generation() > removal);
    assert!(guard.queue_generation() > queues);
    assert_eq!(guard.queue_record(1).map(|r| (r.started, r.size, r.desc)), Some((true, 256, 0x1000)));
    assert_eq!(guard.queue_record(u16::MAX), None);
}

mod model {
    //! Random tables against the plainest model there is.

    use iotlb_client::{Access, Fault, Guard};
    use iotlb_proto::iova::IovaRange;
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions};

    use super::support::Daemon;

    /// Bytes of the little space the model plays in, and of its memory.
    const SPACE: usize = 16 * 4096;

    /// Where the space begins: in a tree of one level; in one of three, which has a short way; and with its end where
    /// that way ends.
    const BASES: [u64; 3] = [0, 1 << 30, (1 << 39) - SPACE as u64];

    /// What each byte of the space translates to.
    type Bytes = Vec<Option<(u64, Access)>>;

    #[derive(Clone, Debug)]
    enum Step {
        Map { first: usize, len: usize, target: u64, access: Access },
        Unmap { first: usize, len: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let page = prop_oneof![3 => (0_usize..16).prop_map(|page| page * 4096), 1 => 0..SPACE];
        let len = prop_oneof![3 => (1_usize..5).prop_map(|pages| pages * 4096), 1 => 1_usize..9000];
        let access = (1_u8..4).prop_map(|bits| Access::from_bits(bits).expect("below 4"));
        (page, len, 0_u64..12, access, 0..4).prop_map(|(first, len, target, access, kind)| {
            let len = len.min(SPACE - first);
            // A target has the same offset in its page as the address, as a real front-end's have.
            let target = target * 4096 + first as u64 % 4096;
            if kind == 0 { Step::Unmap { first, len } } else { Step::Map { first, len, target, access } }
        })
    }

    /// The pieces, or the first fault, byte by byte.
    fn expected(bytes: &Bytes, first: usize, len: usize, needed: Access) -> Result<Vec<(u64, usize)>, Fault> {
        let mut pieces: Vec<(u64, usize)> = Vec::new();
        for at in first..first + len {
            let here = bytes.get(at).copied().flatten().filter(|(_, access)| access.allows(needed));
            let Some((target, _)) = here else {
                return Err(Fault::Miss { iova: at as u64, access: needed });
            };
            match pieces.last_mut() {
                Some((start, n)) if *start + *n as u64 == target => *n += 1,
                _ => pieces.push((target, 1)),
            }
        }
        Ok(pieces)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn translations_are_what_a_byte_by_byte_model_says(
            steps in prop::collection::vec(step(), 1..24),
            asks in prop::collection::vec((0..SPACE, 1_usize..20_000, 1_u8..4), 1..40),
            base in prop::sample::select(&BASES[..]),
        ) {
            let (daemon, _memory, attachment) = Daemon::with_memory(32);
            let mut bytes: Bytes = vec![None; SPACE];
            for step in &steps {
                let mut table = daemon.table();
                match *step {
                    Step::Map { first, len, target, access } => {
                        let range = IovaRange::from_len(base + first as u64, len as u64).expect("not empty");
                        if table.insert(range, target, access).is_err() {
                            // A full side array: the daemon would wait for a grace period.
                            let epoch = table.begin_grace().expect("something was unlinked");
                            table.grace_completed(epoch);
                            table.insert(range, target, access).expect("after a grace period");
                        }
                        (first..first + len).for_each(|at| bytes[at] = Some((target + (at - first) as u64, access)));
                    }
                    Step::Unmap { first, len } => {
                        table.remove(IovaRange::from_len(base + first as u64, len as u64).expect("not empty"));
                        (first..first + len).for_each(|at| bytes[at] = None);
                    }
                }
            }
            let reader = attachment.reader().expect("a reader");
            let guard = reader.pin().expect("pin");
            // "At least" the range is removed: whatever is found must be right, what is not found may be a miss.
            for (first, len, access) in asks {
                let access = Access::from_bits(access).expect("below 4");
                let wanted = expected(&bytes, first, len, access);
                let iova = base + first as u64;
                let found = guard.translate(iova, len as u64, access);
                let found = found.map(|all| all.map(|s| (s.as_ptr().addr(), s.len())).collect::<Vec<_>>());
                prop_assert_eq!(in_slices(&guard, iova, len, access), found.clone());
                prop_assert_eq!(guard.check_range(GuestAddress(iova), len, permissions(access)), found.is_ok());
                match found {
                    Ok(found) => {
                        let wanted = wanted.expect("a translation that nobody published");
                        let arena = arena_of(&guard, base, &bytes);
                        let got: Vec<_> = found.into_iter().map(|(at, len)| ((at - arena) as u64, len)).collect();
                        prop_assert_eq!(got, wanted);
                    }
                    Err(Fault::Miss { iova, access: missing }) => {
                        prop_assert_eq!(missing, access);
                        let iova = iova - base;
                        prop_assert!((first as u64..(first + len) as u64).contains(&iova));
                        if let Err(Fault::Miss { iova: at, .. }) = wanted {
                            prop_assert!(iova <= at, "the miss at {:#x} was overlooked", at);
                        }
                    }
                    Err(other) => prop_assert!(false, "{:?}", other),
                }
            }
        }
    }

    fn permissions(access: Access) -> Permissions {
        match (access.allows(Access::READ), access.allows(Access::WRITE)) {
            (false, false) => Permissions::No,
            (true, false) => Permissions::Read,
            (false, true) => Permissions::Write,
            (true, true) => Permissions::ReadWrite,
        }
    }

    /// The same through `vm_memory`, neighbours joined.
    fn in_slices(guard: &Guard<'_>, iova: u64, len: usize, access: Access) -> Result<Vec<(usize, usize)>, Fault> {
        let mut pieces: Vec<(usize, usize)> = Vec::new();
        for slice in guard.get_slices(GuestAddress(iova), len, permissions(access)).expect("no range here wraps") {
            match slice {
                Ok(slice) => {
                    let at = slice.ptr_guard().as_ptr().addr();
                    match pieces.last_mut() {
                        Some((start, n)) if *start + *n == at => *n += slice.len(),
                        _ => pieces.push((at, slice.len())),
                    }
                }
                Err(GuestMemoryError::InvalidGuestAddress(at)) => return Err(Fault::Miss { iova: at.0, access }),
                Err(other) => panic!("{other}"),
            }
        }
        Ok(pieces)
    }

    /// Address of arena offset 0, found through any byte that is mapped.
    fn arena_of(guard: &Guard<'_>, base: u64, bytes: &Bytes) -> usize {
        (0..SPACE)
            .find_map(|at| {
                let (target, _) = bytes[at]?;
                let segment = guard.translate(base + at as u64, 1, Access::NONE).ok()?.next()?;
                Some(segment.as_ptr().addr() - usize::try_from(target).expect("small"))
            })
            .expect("something is mapped, or there would be no translation")
    }
}
