//! What a reservation keeps when the system refuses a mapping in it.

use std::os::fd::{AsFd, OwnedFd};

use iotlb_proto::control::RegionInfo;
use iotlb_proto::shm::memfd;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use super::*;
use crate::arena::{Arena, RegionError};
use crate::not_tested::not_tested;

const OFFSET: usize = 0x20_0000;
const LEN: usize = 0x1_0000;

/// More huge pages than any machine has free.
const HUGE_LEN: usize = 1 << 40;

/// A huge page of [`small_huge_file`].
const HUGE_PAGE: u64 = 2 << 20;

/// A file of two huge pages, whether there are some or not; `None` where the system knows none of this size.
fn small_huge_file() -> Option<OwnedFd> {
    let huge = rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
    let huge = huge.inspect_err(|error| not_tested(&format!("no files on huge pages: {error}"))).ok()?;
    rustix::fs::ftruncate(&huge, 2 * HUGE_PAGE).expect("a length");
    Some(huge)
}

/// Where a file is mapped in this process: addresses, first and past the last.
fn places_of(file: &OwnedFd) -> Vec<(usize, usize)> {
    let inode = rustix::fs::fstat(file).expect("fstat").st_ino.to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let place = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (first, past) = words.next()?.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).expect("an address");
        // Also the name: every file system counts its inodes by itself.
        (words.nth(3)? == inode && line.contains("memfd:")).then(|| (address(first), address(past)))
    };
    maps.lines().filter_map(place).collect()
}

#[test]
fn whole_huge_pages_come_and_go_with_a_region_that_ends_inside_one() {
    let Some(huge) = small_huge_file() else { return };
    let arena = Arena::new(4 * HUGE_PAGE).expect("an arena");
    let region =
        |id, arena_offset, size| RegionInfo { id, arena_offset, guest_address: arena_offset, size, file_offset: 0 };
    let (file, short) = (std::slice::from_ref(&huge), HUGE_PAGE + 0x1000);
    arena.add(&region(1, HUGE_PAGE, short), file).expect("mapped");
    assert!(arena.is_complete() && arena.is_mapped(HUGE_PAGE, short) && !arena.is_mapped(HUGE_PAGE, short + 1));
    let page = usize::try_from(HUGE_PAGE).expect("small");
    let base = arena.memory.base().as_ptr().addr();
    assert_eq!(places_of(&huge), [(base + page, base + 3 * page)], "in the arena, and nowhere else");
    // What it has of its last page keeps others out.
    let other = [memfd::create("other", 0x1000).expect("a memfd")];
    let error = arena.add(&region(2, HUGE_PAGE + short, 0x1000), &other).expect_err("it would replace a part");
    assert!(matches!(error, RegionError::Overlap { other: 1 }), "{error}");
    arena.remove(2).expect("removed");
    arena.add(&region(2, 3 * HUGE_PAGE, 0x1000), &other).expect("behind it");
    arena.remove(1).expect("removed");
    assert_eq!(places_of(&huge), [], "it stays writable");
    // Nor do others lose what they have by it, in the arena or behind.
    let error = arena.add(&region(3, 2 * HUGE_PAGE, short), file).expect_err("it would replace the other one");
    assert!(matches!(error, RegionError::Overlap { other: 2 }), "{error}");
    let error = arena.add(&region(4, 3 * HUGE_PAGE, short), file).expect_err("it would pass the end");
    assert!(matches!(error, RegionError::Bounds { .. }), "{error}");
    let error = arena.add(&region(5, 0x1000, HUGE_PAGE), file).expect_err("it would begin inside a page");
    assert!(matches!(error, RegionError::HugeAlignment { page: HUGE_PAGE }), "{error}");
    assert!(arena.memory.is_whole() && arena.is_mapped(3 * HUGE_PAGE, 0x1000));
    arena.memory.map_file(0, LEN, huge.as_fd(), 0).expect_err("a part of a page");
    assert_eq!(places_of(&huge), [], "it stays writable after a failure");
    for id in 3..=5 {
        arena.remove(id).expect("removed");
    }
    arena.add(&region(6, HUGE_PAGE, short), file).expect("mapped");
    arena.revoke().expect("revoked");
    assert_eq!(places_of(&huge), [], "it stays writable after a revocation");
    arena.add(&region(7, HUGE_PAGE, short), file).expect_err("revoked");
}

/// A file on huge pages that are not there; `None` where the system knows no huge pages.
fn huge_file() -> Option<OwnedFd> {
    let huge = rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB);
    let huge = huge.inspect_err(|error| not_tested(&format!("no files on huge pages: {error}"))).ok()?;
    rustix::fs::ftruncate(&huge, HUGE_LEN as u64).expect("a length");
    Some(huge)
}

/// Files, with an offset, that `mmap` refuses only when it has unmapped what was in the way, or did so once: Linux 6.14
/// and later look at the seals first.
fn refused_files() -> Vec<(&'static str, OwnedFd, u64)> {
    let sealed = memfd::create("sealed", LEN as u64).expect("a memfd");
    memfd::seal_read_only(sealed.as_fd()).expect("sealed");
    let mut files = vec![("sealed", sealed, 0)];
    // An offset inside a huge page.
    files.extend(huge_file().map(|huge| ("huge", huge, 0x1000)));
    files
}

#[test]
fn huge_pages_are_not_reserved() {
    let Some(huge) = huge_file() else { return };
    let arena = Arena::new((OFFSET + HUGE_LEN) as u64).expect("an arena");
    let (offset, size) = (OFFSET as u64, HUGE_LEN as u64);
    let info = RegionInfo { id: 1, arena_offset: offset, guest_address: offset, size, file_offset: 0 };
    arena.add(&info, std::slice::from_ref(&huge)).expect("mapped, though there are not so many huge pages");
    assert!(arena.is_complete() && arena.is_mapped(offset, size));
}

/// What comes of a mapping of nothing at `offset` that replaces nothing.
fn squat(reservation: &Reservation, offset: usize, len: usize) -> Result<(), Errno> {
    let at = reservation.at(offset, len).expect("inside");
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: nothing that exists is replaced.
    unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }.map(|_| ())
}

#[test]
fn a_refused_file_leaves_no_hole() {
    for (name, file, file_offset) in refused_files() {
        // As long as a huge page.
        let reservation = Reservation::new(2 * OFFSET).expect("a reservation");
        reservation.map_file(OFFSET, OFFSET, file.as_fd(), file_offset).expect_err(name);
        assert_eq!(squat(&reservation, OFFSET, OFFSET), Err(Errno::EXIST), "{name}");
        let good = memfd::create("good", LEN as u64).expect("a memfd");
        reservation.map_file(OFFSET, LEN, good.as_fd(), 0).expect("the place is free for another");
    }
}

/// Puts memory of our own over a part of the reservation, as a thread might that was faster than `put_back`.
fn intrude(reservation: &Reservation) -> *mut u8 {
    let at = reservation.at(OFFSET, LEN).expect("inside");
    // SAFETY: replaces a part of the reservation, where nothing is mapped.
    let there = unsafe { mmap_anonymous(at, LEN, FILE_ACCESS, MapFlags::PRIVATE | MapFlags::FIXED) };
    there.expect("memory").cast::<u8>()
}

#[test]
fn what_somebody_else_took_is_left_alone() {
    let file = memfd::create("guest", 3 * LEN as u64).expect("a memfd");
    let reservation = Reservation::new(4 * OFFSET).expect("a reservation");
    reservation.map_file(OFFSET + LEN, LEN, file.as_fd(), 0).expect("a neighbour");
    let theirs = intrude(&reservation);
    // SAFETY: mapped for writing by the line above.
    unsafe { theirs.write_volatile(7) };
    reservation.put_back(OFFSET, LEN);
    assert!(!reservation.is_whole());
    for (offset, len) in [(OFFSET, LEN), (OFFSET - LEN, 2 * LEN), (OFFSET - LEN, 3 * LEN), (OFFSET, 0x1000)] {
        let error = reservation.map_file(offset, len, file.as_fd(), 0).expect_err("lost");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{len:#x} at {offset:#x}");
    }
    reservation.map_file(OFFSET - LEN, LEN, file.as_fd(), 0).expect("the other neighbour");
    assert!(reservation.kept(OFFSET, LEN).is_empty());
    reservation.clear(OFFSET, LEN).expect("nothing to do");
    reservation.clear(0, reservation.len()).expect("cleared");
    assert_eq!(reservation.kept(0, reservation.len()), [0..OFFSET, OFFSET + LEN..4 * OFFSET]);
    drop(reservation);
    // SAFETY: mapped by `intrude`, and unmapped by nobody, which is what this test is about: else it ends here.
    unsafe {
        assert_eq!(theirs.read_volatile(), 7);
        munmap(theirs.cast(), LEN).expect("unmapped");
    }
}

#[test]
fn an_arena_that_lost_a_place_compares_every_translation() {
    let arena = Arena::new(4 * OFFSET as u64).expect("an arena");
    let file = [memfd::create("guest", LEN as u64).expect("a memfd")];
    let region = |id, arena_offset: usize| {
        let arena_offset = arena_offset as u64;
        RegionInfo { id, arena_offset, guest_address: arena_offset, size: LEN as u64, file_offset: 0 }
    };
    arena.memory.put_back(OFFSET, LEN);
    assert!(matches!(arena.add(&region(1, OFFSET), &file), Err(RegionError::Map(_))));
    arena.add(&region(2, OFFSET + LEN), &file).expect("another place");
    arena.remove(1).expect("removed");
    assert!(!arena.is_complete());
    assert!(arena.is_mapped((OFFSET + LEN) as u64, LEN as u64) && !arena.is_mapped(OFFSET as u64, LEN as u64));
    arena.revoke().expect("revoked");
}
