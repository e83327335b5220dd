//! `virtio_queue::Queue` over a pin: chains whose parts straddle pages, indirect tables, event index, no allocation.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use iotlb_client::{Access, Guard};
use iotlb_proto::control::DaemonMessage;
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::Ordering;
use support::{ARENA_SIZE, Daemon, Memory};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes everything on; counting touches a thread-local without a destructor, which does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: u16 = 16;
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x10_2000;
const USED: u64 = 0x10_4000;
const BUFFERS: u64 = 0x20_0000;
const TABLES: u64 = 0x30_0fc0; // an indirect table of eight descriptors that straddles two pages
const BUFFER_LEN: u32 = 1500;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Where the `i`-th buffer is: each starts 100 bytes before the end of a page.
fn buffer(i: u16) -> u64 {
    BUFFERS + (u64::from(i) + 1) * PAGE_SIZE - 100
}

/// Plays the driver.
struct Driver<'g> {
    guard: &'g Guard<'g>,
    avail: u16,
}

impl Driver<'_> {
    fn put(&self, iova: u64, bytes: &[u8]) {
        self.guard.write(iova, bytes).expect("the driver's own memory");
    }

    fn describe(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.guard.write_obj(Descriptor::new(addr, len, flags, next), GuestAddress(at)).expect("mapped");
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, &self.avail.to_le_bytes());
    }

    fn want_event_at(&self, used_index: u16) {
        self.put(AVAIL + 4 + 2 * u64::from(SIZE), &used_index.to_le_bytes());
    }

    fn used(&self, slot: u16) -> (u32, u32) {
        let at = GuestAddress(USED + 4 + 8 * u64::from(slot % SIZE));
        (self.guard.read_obj(at).expect("mapped"), self.guard.read_obj(GuestAddress(at.0 + 4)).expect("mapped"))
    }
}

/// The device: reads what is readable, writes its sum where it may. Returns chains served, and whether to interrupt.
fn serve(queue: &mut Queue, guard: &Guard<'_>) -> (u32, bool) {
    let mut chains = 0;
    while let Some(chain) = queue.pop_descriptor_chain(guard) {
        let head = chain.head_index();
        let (mut sum, mut written) = (0_u64, 0);
        for descriptor in chain {
            let mut bytes = [0; BUFFER_LEN as usize];
            let len = (descriptor.len() as usize).min(bytes.len());
            if descriptor.is_write_only() {
                bytes[..len].fill(sum.to_le_bytes()[0]);
                guard.write_slice(&bytes[..len], descriptor.addr()).expect("mapped");
                written += descriptor.len();
            } else {
                guard.read_slice(&mut bytes[..len], descriptor.addr()).expect("mapped");
                sum += bytes[..len].iter().map(|byte| u64::from(*byte)).sum::<u64>();
            }
        }
        queue.add_used(guard, head, written).expect("mapped");
        chains += 1;
    }
    (chains, queue.needs_notification(guard).expect("mapped"))
}

#[test]
fn a_split_ring_is_served_without_allocation() {
    let (daemon, _memory, attachment) = Daemon::with_memory(256);
    // Every page of the guest's space somewhere else, neighbours never together.
    for (i, iova) in [DESC, AVAIL, USED, TABLES & !0xfff, (TABLES & !0xfff) + PAGE_SIZE].into_iter().enumerate() {
        daemon.map(iova, PAGE_SIZE, (200 - 3 * i as u64) * PAGE_SIZE, Access::READ_WRITE);
    }
    for page in 0..40 {
        daemon.map(BUFFERS + page * PAGE_SIZE, PAGE_SIZE, (150 - 2 * page) * PAGE_SIZE, Access::READ_WRITE);
    }
    let reader = attachment.reader().expect("a reader");
    let outer = reader.pin().expect("pin");
    let mut driver = Driver { guard: &outer, avail: 0 };

    let mut queue = Queue::new(SIZE).expect("a size");
    queue.try_set_desc_table_address(GuestAddress(DESC)).expect("aligned");
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).expect("aligned");
    queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
    queue.set_event_idx(true);
    queue.set_ready(true);
    assert!(queue.is_valid(&outer));

    // Head 0: two direct descriptors. Head 2: an indirect table of eight, four read and four written.
    driver.describe(DESC, buffer(0), BUFFER_LEN, F_NEXT, 1);
    driver.describe(DESC + 16, buffer(1), BUFFER_LEN, F_WRITE, 0);
    driver.describe(DESC + 32, TABLES, 8 * 16, F_INDIRECT, 0);
    for i in 0..8_u16 {
        let flags = if i < 4 { 0 } else { F_WRITE } | if i < 7 { F_NEXT } else { 0 };
        driver.describe(TABLES + 16 * u64::from(i), buffer(2 + i), BUFFER_LEN, flags, i + 1);
    }
    driver.put(buffer(0), &[1; BUFFER_LEN as usize]);
    for i in 2..6 {
        driver.put(buffer(i), &[2; BUFFER_LEN as usize]);
    }

    // Everything once before counting: thread-locals, the logger.
    driver.want_event_at(0);
    driver.offer(0);
    assert_eq!(serve(&mut queue, &outer), (1, true));
    assert_eq!(driver.used(0), (0, BUFFER_LEN));

    let before = ALLOCATIONS.get();
    for round in 0..50_u16 {
        let guard = reader.pin().expect("pin");
        let first = driver.avail;
        driver.offer(2);
        driver.offer(0);
        // Wanted for the second of the two, then for a far one.
        let wanted = round % 2 == 0;
        driver.want_event_at(if wanted { first.wrapping_add(1) } else { first.wrapping_add(1000) });
        let (chains, interrupt) = serve(&mut queue, &guard);
        assert!(chains == 2 && interrupt == wanted);
        assert!(driver.used(first) == (2, 4 * BUFFER_LEN) && driver.used(first.wrapping_add(1)) == (0, BUFFER_LEN));
        assert!(!queue.enable_notification(&guard).expect("mapped"));
    }
    let after = ALLOCATIONS.get();
    assert_eq!(after - before, 0, "serving allocates");
    drop(vec![1_u8; usize::from(SIZE)]);
    assert!(ALLOCATIONS.get() > after, "the counter counts");

    let mut bytes = [0; BUFFER_LEN as usize];
    outer.read(buffer(9), &mut bytes).expect("mapped");
    assert_eq!(bytes, [(u64::from(BUFFER_LEN) * 2 * 4).to_le_bytes()[0]; BUFFER_LEN as usize]);
    outer.read(buffer(1), &mut bytes).expect("mapped");
    assert_eq!(bytes, [u64::from(BUFFER_LEN).to_le_bytes()[0]; BUFFER_LEN as usize]);
}

#[test]
fn faults_are_errors_of_the_trait() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(0x1000, 0x1000, 0x1000, Access::READ_WRITE);
    daemon.map(0x2000, 0x1000, 0x4000, Access::READ);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    assert!(guard.check_range(GuestAddress(0x1000), 0x2000, Permissions::Read));
    assert!(!guard.check_range(GuestAddress(0x1000), 0x2000, Permissions::Write));
    assert!(guard.check_range(GuestAddress(0x2000), 0x1000, Permissions::No));
    assert!(!guard.check_range(GuestAddress(0x3000), 1, Permissions::No));
    assert!(guard.check_range(GuestAddress(0x9000), 0, Permissions::ReadWrite), "nothing is asked for");
    assert!(!guard.check_range(GuestAddress(u64::MAX), 2, Permissions::Read));

    let error = guard.write_slice(&[1; 8], GuestAddress(0x3000)).expect_err("unmapped").to_string();
    assert!(error.contains(&0x3000.to_string()), "{error}");
    let error = guard.write_slice(&[1; 8], GuestAddress(0x1ffc)).expect_err("half of it is read-only");
    assert!(matches!(error, vm_memory::GuestMemoryError::PartialBuffer { expected: 8, completed: 4 }));
    assert_eq!(Bytes::read(&guard, &mut [], GuestAddress(0x9000)).expect("nothing to read"), 0);
    assert!(guard.get_slices(GuestAddress(0x1000), 0x3000, Permissions::Read).expect("lazy").any(|s| s.is_err()));
    assert!(guard.physical_memory().is_none());
    let lens: Vec<_> = guard
        .get_slices(GuestAddress(0x1800), 0x1000, Permissions::Read)
        .expect("mapped")
        .map(|slice| slice.expect("mapped").len())
        .collect();
    assert_eq!(lens, [0x800, 0x800]);
}

/// Where the tree has three levels, so that pages are found the short way.
const HIGH: u64 = 1 << 30;

fn lens(guard: &Guard<'_>, iova: u64, count: usize) -> Vec<usize> {
    let slices = guard.get_slices(GuestAddress(iova), count, Permissions::Read).expect("it does not wrap");
    slices.map(|slice| slice.expect("mapped").len()).collect()
}

fn refused(guard: &Guard<'_>, iova: u64, count: usize) -> Option<u64> {
    assert!(!guard.check_range(GuestAddress(iova), count, Permissions::Read));
    match guard.read_slice(&mut vec![0; count], GuestAddress(iova)) {
        Err(GuestMemoryError::InvalidGuestAddress(at)) => Some(at.0),
        Err(GuestMemoryError::PartialBuffer { completed, .. }) => Some(iova + completed as u64),
        _ => None,
    }
}

#[test]
fn slices_end_with_the_leaf_they_are_in() {
    let (daemon, memory, attachment) = Daemon::with_memory(1024);
    let large = 2 << 20;
    // A superpage, a page behind it, and behind that page a piece of another one.
    daemon.map(HIGH, large, 0x10_0000, Access::READ_WRITE);
    daemon.map(HIGH + large, PAGE_SIZE, 0x4000, Access::READ_WRITE);
    daemon.map(HIGH + large + PAGE_SIZE, 0x300, 0x8000, Access::READ_WRITE);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    assert_eq!(lens(&guard, HIGH + 0x800, 0x3000), [0x3000]);
    assert_eq!(lens(&guard, HIGH + large - 8, 16), [8, 8]);
    assert_eq!(lens(&guard, HIGH + large, 0x1000), [0x1000]);
    assert_eq!(lens(&guard, HIGH + large + 0x10, 0x1100), [0xff0, 0x110]);
    assert_eq!(lens(&guard, HIGH + large - 0x10, 0x1310), [0x10, 0x1000, 0x300]);
    assert_eq!(lens(&guard, HIGH + large + 0x1100, 0x200), [0x200]);
    assert!(guard.check_range(GuestAddress(HIGH + large - 0x10), 0x1310, Permissions::Read));
    assert_eq!(refused(&guard, HIGH + large - 0x10, 0x1311), Some(HIGH + large + 0x1300));
    assert_eq!(refused(&guard, HIGH + large + 0x1300, 8), Some(HIGH + large + 0x1300));
    assert_eq!(refused(&guard, HIGH - 8, 16), Some(HIGH - 8));

    let all: Vec<u8> = (0..0x1310).map(|i: u32| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    guard.write_slice(&all, GuestAddress(HIGH + large - 0x10)).expect("mapped");
    assert_eq!(memory.peek(0x10_0000 + large - 0x10, 0x10), all[..0x10]);
    assert_eq!(memory.peek(0x4000, 0x1000), all[0x10..0x1010]);
    assert_eq!(memory.peek(0x8000, 0x300), all[0x1010..]);
    let mut back = vec![0; all.len()];
    guard.read_slice(&mut back, GuestAddress(HIGH + large - 0x10)).expect("mapped");
    assert_eq!(back, all);
    guard.store(0x1234_u16, GuestAddress(HIGH + large + 2), Ordering::Release).expect("mapped");
    assert_eq!(guard.load::<u16>(GuestAddress(HIGH + large + 2), Ordering::Acquire).expect("mapped"), 0x1234);
    assert!(guard.load::<u32>(GuestAddress(HIGH + large - 2), Ordering::Acquire).is_err(), "it is in two leaves");
}

#[test]
fn ranges_that_wrap_yield_nothing() {
    let (daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(HIGH, PAGE_SIZE, 0, Access::READ_WRITE);
    daemon.map(u64::MAX - 0xfff, PAGE_SIZE, 0x1000, Access::READ_WRITE);
    let reader = attachment.reader().expect("a reader");
    let guard = reader.pin().expect("pin");
    assert_eq!(lens(&guard, u64::MAX - 7, 8), [8], "the last byte is an address too");
    for (iova, count) in [(u64::MAX - 7, 9), (HIGH, usize::MAX), (u64::MAX, usize::MAX)] {
        assert!(!guard.check_range(GuestAddress(iova), count, Permissions::Read));
        let slices = guard.get_slices(GuestAddress(iova), count, Permissions::Read);
        assert!(slices.into_iter().flatten().all(|slice| slice.is_err()), "{iova:#x}");
    }
}

#[test]
fn memory_that_is_not_mapped_is_not_handed_out() {
    let (mut daemon, _memory, attachment) = Daemon::with_memory(16);
    daemon.map(HIGH, 2 * PAGE_SIZE, 0, Access::READ_WRITE);
    daemon.map(HIGH + 2 * PAGE_SIZE, PAGE_SIZE, ARENA_SIZE, Access::READ_WRITE);
    let reader = attachment.reader().expect("a reader");
    {
        let guard = reader.pin().expect("pin");
        assert_eq!(lens(&guard, HIGH + 8, 0x1000), [0xff8, 8]);
        assert_eq!(refused(&guard, HIGH + 2 * PAGE_SIZE, 8), Some(HIGH + 2 * PAGE_SIZE), "behind the arena");
    }
    // A region whose memory is too short is refused: the others go on, it does not.
    let short = Memory::new(PAGE_SIZE);
    daemon.add_region_of(2, 0x10_0000, &short, 2 * PAGE_SIZE);
    daemon.map(HIGH + 3 * PAGE_SIZE, PAGE_SIZE, 0x10_0000, Access::READ_WRITE);
    assert_eq!(refused(&reader.pin().expect("pin"), HIGH, 8), Some(HIGH), "a newer map");
    daemon.finish_map();
    {
        let guard = reader.pin().expect("pin");
        assert_eq!(lens(&guard, HIGH + 8, 0x1000), [0xff8, 8]);
        assert_eq!(refused(&guard, HIGH + 3 * PAGE_SIZE, 8), Some(HIGH + 3 * PAGE_SIZE));
    }
    daemon.unmap(HIGH + 3 * PAGE_SIZE, PAGE_SIZE);
    daemon.send(&DaemonMessage::RemoveRegion { id: 2 }, &[]);
    daemon.finish_map();
    assert_eq!(lens(&reader.pin().expect("pin"), HIGH + 8, 0x1000), [0xff8, 8]);
}

#[test]
fn what_was_near_is_forgotten_with_the_pin() {
    /// A whole node is taken off by one store, so that the old one keeps what it said.
    const PLACE: u64 = 1 << 21;
    const IOVA: u64 = 0xc000_0000;
    let (daemon, memory, attachment) = Daemon::with_memory(16);
    for page in 1..=3 {
        memory.poke(page * PAGE_SIZE, &page.to_le_bytes());
    }
    let at = GuestAddress(IOVA);
    let renew = |target: u64| {
        daemon.unmap(IOVA, PLACE);
        daemon.map(IOVA, PAGE_SIZE, target, Access::READ_WRITE);
    };
    let reader = attachment.reader().expect("a reader");
    renew(PAGE_SIZE);
    {
        let outer = reader.pin().expect("pin");
        for _ in 0..2 {
            let inner = reader.pin().expect("pin");
            assert_eq!(inner.read_obj::<u64>(at).expect("mapped"), 1);
        }
        renew(2 * PAGE_SIZE);
        // As every lookup under a pin that is older than the removal.
        assert_eq!(outer.read_obj::<u64>(at).expect("mapped"), 1);
    }
    assert_eq!(reader.pin().expect("pin").read_obj::<u64>(at).expect("mapped"), 2);
    renew(3 * PAGE_SIZE);
    let guard = reader.pin().expect("pin");
    assert_eq!(guard.read_obj::<u64>(at).expect("mapped"), 3);
    // Emptied under the pin: found nowhere, whatever is kept.
    daemon.unmap(IOVA, PAGE_SIZE);
    assert!(guard.read_obj::<u64>(at).is_err());
    drop(guard);
    daemon.unmap(IOVA, PLACE);
    let guard = reader.pin().expect("pin");
    assert!(guard.read_obj::<u64>(at).is_err());
}
