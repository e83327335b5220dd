//! A virtio chain through `virtio_queue`: over a pin, and over plain guest memory as a device without IOMMU has it.
//!
//! Not with the other groups: generic code of `virtio_queue` and `vm_memory` is compiled in the crate that uses it, and
//! how a large crate is cut into units decides what is inlined, in the peer as in ours. Here no other group moves it.

use std::hint::black_box;

use iotlb_client::Reader;
use iotlb_tests::bench::groups::{BURST, Outcome, Run};
use iotlb_tests::bench::measure::{Contestant, interleave};
use iotlb_tests::bench::peers::{PAGE, Page};
use iotlb_tests::bench::report::{Row, Target};
use iotlb_tests::bench::rig::Rig;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Descriptors of the ring.
const RING: u16 = 256;
/// A full Ethernet frame.
const BUFFER: u32 = 1_500;
/// How much of a buffer lies in its first page.
const IN_FIRST_PAGE: u64 = 700;
/// Pages for descriptors, available and used ring, and two a buffer.
const PAGES: u64 = 3 + 2 * RING as u64;

type Failure = Box<dyn std::error::Error>;

/// Where the ring's parts are.
#[derive(Clone, Copy)]
struct Layout {
    desc: u64,
    avail: u64,
    used: u64,
    buffers: u64,
}

impl Layout {
    /// In consecutive addresses.
    fn at(base: u64) -> Layout {
        Layout { desc: base, avail: base + PAGE, used: base + 2 * PAGE, buffers: base + 3 * PAGE }
    }

    /// Plays the driver: a chain of one descriptor for each place in the ring.
    fn write(self, memory: &impl GuestMemory) -> Result<(), Failure> {
        for n in 0..RING {
            let address = self.buffers + u64::from(n) * 2 * PAGE + PAGE - IN_FIRST_PAGE;
            let at = |base: u64, step: u64| GuestAddress(base + u64::from(n) * step);
            memory.write_obj(Descriptor::new(address, BUFFER, 0, 0), at(self.desc, 16))?;
            memory.write_obj(n, at(self.avail + 4, 2))?;
        }
        Ok(())
    }

    fn queue(self) -> Result<Queue, Failure> {
        let mut queue = Queue::new(RING)?;
        queue.set_size(RING);
        queue.set_desc_table_address(low(self.desc), high(self.desc));
        queue.set_avail_ring_address(low(self.avail), high(self.avail));
        queue.set_used_ring_address(low(self.used), high(self.used));
        queue.set_ready(true);
        Ok(queue)
    }
}

fn low(address: u64) -> Option<u32> {
    u32::try_from(address & 0xffff_ffff).ok()
}

fn high(address: u64) -> Option<u32> {
    u32::try_from(address >> 32).ok()
}

/// Measures the group.
///
/// # Errors
/// The service does not stand, or the ring is refused.
pub(crate) fn run(run: &mut Run) -> Outcome {
    eprintln!("chain: one buffer of {BUFFER} bytes over two pages");
    let mut rig = Rig::start()?;
    let pages = rig.fill(PAGES)?;
    let base = pages.first().map(|page: &Page| page.iova).ok_or("pages")?;
    let layout = Layout::at(base);
    let reader = rig.worker.reader()?;
    layout.write(&reader.pin()?)?;
    let size = usize::try_from(PAGES * PAGE)?;
    let plain = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(base), size)])?;
    layout.write(&plain)?;
    let (mut over_pin, mut over_plain, mut alone) = (layout.queue()?, layout.queue()?, layout.queue()?);
    let samples = interleave(
        run.rounds(),
        &mut [
            Contestant::new("ours", |count| pinned(&mut over_pin, &reader, layout, BURST, count)),
            Contestant::new("plain", |count| bursts(&mut over_plain, &plain, layout, count)),
            Contestant::new("ours, a pin a chain", |count| pinned(&mut alone, &reader, layout, 1, count)),
        ],
    );
    let [ours, plain, single] = [0, 1, 2].map(|n| samples[n].median_ns);
    let peer = "plain GuestMemoryMmap";
    run.rows.push(Row::new("virtio chain, 1500 bytes, burst of 32", "ns", ours, plain, peer, Target::CostsAtMost(1.3)));
    run.rows.push(Row::new("virtio chain, 1500 bytes, a pin each", "ns", single, plain, peer, Target::None));
    Ok(())
}

fn pinned(queue: &mut Queue, reader: &Reader, layout: Layout, burst: u64, count: u64) {
    let mut left = count;
    while left > 0 {
        let now = left.min(burst);
        let guard = reader.pin().expect("the daemon lives");
        serve(queue, &guard, layout, now);
        left -= now;
    }
}

fn bursts(queue: &mut Queue, memory: &GuestMemoryMmap<()>, layout: Layout, count: u64) {
    let mut left = count;
    while left > 0 {
        let now = left.min(BURST);
        serve(queue, memory, layout, now);
        left -= now;
    }
}

/// Takes `count` chains, copies each buffer out, and gives them back.
fn serve<M: GuestMemory>(queue: &mut Queue, memory: &M, layout: Layout, count: u64) {
    let mut bytes = [0_u8; BUFFER as usize];
    // Plays the driver once a burst: as many chains are ready.
    let ready = u16::try_from(count).expect("a burst is short");
    let avail = queue.next_avail().wrapping_add(ready);
    memory.write_obj(avail, GuestAddress(layout.avail + 2)).expect("mapped");
    for _ in 0..count {
        let chain = queue.pop_descriptor_chain(memory).expect("a chain is there");
        let head = chain.head_index();
        for descriptor in chain {
            memory.read_slice(&mut bytes, descriptor.addr()).expect("mapped");
            black_box(&bytes);
        }
        queue.add_used(memory, head, 0).expect("mapped");
    }
}
