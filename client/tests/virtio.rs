//! `virtio_queue::Queue` over a pin: chains whose parts straddle pages, indirect tables, event index, no allocation.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use iotlb_client::{Access, Guard};
use iotlb_proto::iova::PAGE_SIZE;
use support::Daemon;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

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
