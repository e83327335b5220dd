//! Guest memory as the front-end describes it, and where workers map it.
//!
//! The daemon never maps guest memory: a file that shrinks under a mapping would kill it. What little it has to read
//! (a used index) it reads with `pread`.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iotlb_proto::control::RegionInfo;
use iotlb_proto::iova::{IovaRange, PAGE_SIZE};
use iotlb_proto::table::writer::TARGET_LIMIT;
use iotlb_proto::vhost_user::{MemoryRegion, RegionError};
use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::io::Errno;
use smallvec::SmallVec;

/// Most regions at a time, and what GET_MAX_MEM_SLOTS answers. Each costs every worker a mapping and a descriptor.
pub(super) const REGIONS_MAX: usize = 64;
/// Regions that get an arena address of their own are aligned to this, so that huge pages can back them.
const GAP_ALIGN: u64 = 2 << 20;
/// Largest block size of a file that is respected as an alignment: 1 GiB huge pages.
const BLOCK_ALIGN_MAX: u64 = 1 << 30;

/// Why memory is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum MemoryError {
    #[error("{0} memory regions; at most {REGIONS_MAX} are served")]
    TooMany(usize),
    #[error("region at user address {user:#x} overlaps another in the front-end's address space")]
    Overlap { user: u64 },
    #[error("the region at guest address {guest:#x} is not usable: {source}")]
    Shape { guest: u64, source: RegionError },
    #[error("cannot examine the descriptor of the region at guest address {guest:#x}")]
    Stat { guest: u64, source: Errno },
    #[error("the region at guest address {guest:#x} is not backed by a memfd or regular file")]
    Kind { guest: u64 },
    #[error(
        "the region at guest address {guest:#x} cannot be mapped for reading and writing: its descriptor is not open \
         for both, or its file is sealed"
    )]
    Mode { guest: u64 },
    #[error("the region at guest address {guest:#x} needs {needed} bytes of its file, which has {len}")]
    Short { guest: u64, needed: u64, len: u64 },
    #[error("no room in the arena for {size} bytes at guest address {guest:#x}: start with a larger arena")]
    NoRoom { guest: u64, size: u64 },
    #[error("no region at guest address {guest:#x}, user address {user:#x} of {size} bytes")]
    NoSuchRegion { guest: u64, user: u64, size: u64 },
}

/// One region.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) info: RegionInfo,
    user_address: u64,
    fd: Arc<OwnedFd>,
    /// `st_dev` and `st_ino`: names the memory whatever the descriptor's number.
    file: (u64, u64),
    /// What arena addresses of this file must be aligned to.
    align: u64,
}

impl Region {
    /// What workers are told.
    pub(super) fn share(&self) -> (RegionInfo, Arc<OwnedFd>) {
        (self.info.clone(), Arc::clone(&self.fd))
    }

    fn user_last(&self) -> u64 {
        // `check` saw that no address of the region wraps, and that it is not empty.
        self.user_address + (self.info.size - 1)
    }

    /// Arena addresses, first and last.
    pub(super) fn arena(&self) -> (u64, u64) {
        (self.info.arena_offset, self.info.arena_offset + (self.info.size - 1))
    }

    /// The region in guest physical addresses; `None` only for a region that `check` would have refused.
    pub(super) fn guest_range(&self) -> Option<IovaRange> {
        IovaRange::from_len(self.info.guest_address, self.info.size)
    }

    fn is(&self, other: &MemoryRegion) -> bool {
        self.info.guest_address == other.guest_address
            && self.info.size == other.size
            && self.user_address == other.user_address
    }

    /// Whether it is what is described: the same memory, from the same place of `file`, at the same addresses.
    fn is_same(&self, other: &MemoryRegion, file: (u64, u64)) -> bool {
        self.is(other) && self.file == file && self.info.file_offset == other.mmap_offset
    }
}

/// A part of a user address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Distance from the start of the range.
    pub(super) offset: u64,
    /// Bytes, less one.
    pub(super) len_minus_one: u64,
    /// Arena address of the first byte; `None` outside every region.
    pub(super) arena: Option<u64>,
}

/// What SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG or the end of a session makes of the memory.
#[derive(Debug)]
pub(super) struct Plan {
    next: Vec<Region>,
    pub(super) removed: Vec<u64>,
    pub(super) added: Vec<(RegionInfo, Arc<OwnedFd>)>,
}

impl Plan {
    /// Whether nothing changes.
    pub(super) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// The guest physical address of a user range that will lie in one region.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<u64> {
        guest_address(&self.next, user, len)
    }
}

/// A region of a table that is not there yet.
struct NewRegion {
    description: MemoryRegion,
    fd: OwnedFd,
    file: (u64, u64),
    align: u64,
}

/// All regions.
#[derive(Debug)]
pub(super) struct Memory {
    /// Sorted by user address, without overlaps.
    regions: Vec<Region>,
    arena_size: u64,
    next_id: u64,
}

impl Memory {
    pub(super) fn new(arena_size: u64) -> Memory {
        // The table cannot lead further than that.
        Memory { regions: Vec::new(), arena_size: arena_size.min(TARGET_LIMIT), next_id: 1 }
    }

    pub(super) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Checks a whole new table. Regions that are there already, same memory at the same addresses, are kept. So they
    /// are where the table is refused; all others go in any case, since by this table their addresses mean something
    /// else, or nothing.
    pub(super) fn plan_table(&mut self, table: Vec<(MemoryRegion, OwnedFd)>) -> (Plan, Result<(), MemoryError>) {
        let (kept, new) = self.sift(table);
        let mut plan = Plan { next: kept.clone(), removed: Vec::new(), added: Vec::new() };
        let result = new.and_then(|new| self.extend(&mut plan, new));
        if result.is_err() {
            (plan.next, plan.added) = (kept, Vec::new());
        }
        let stays = |id| plan.next.iter().any(|region| region.info.id == id);
        plan.removed = self.regions.iter().map(|region| region.info.id).filter(|id| !stays(*id)).collect();
        (plan, result)
    }

    /// Tells the regions of a table that are there already from those that are not, or why one of those cannot be had.
    fn sift(&self, table: Vec<(MemoryRegion, OwnedFd)>) -> (Vec<Region>, Result<Vec<NewRegion>, MemoryError>) {
        let mut kept: Vec<Region> = Vec::new();
        let mut new = if table.len() > REGIONS_MAX { Err(MemoryError::TooMany(table.len())) } else { Ok(Vec::new()) };
        for (description, fd) in table {
            let (file, align) = match check(&description, &fd) {
                Ok(checked) => checked,
                Err(error) => {
                    new = new.and(Err(error));
                    continue;
                }
            };
            match self.regions.iter().find(|region| region.is_same(&description, file)) {
                Some(region) if !kept.iter().any(|k| k.info.id == region.info.id) => kept.push(region.clone()),
                _ => {
                    if let Ok(new) = &mut new {
                        new.push(NewRegion { description, fd, file, align });
                    }
                }
            }
        }
        kept.sort_unstable_by_key(|region| region.user_address);
        (kept, new)
    }

    fn extend(&mut self, plan: &mut Plan, new: Vec<NewRegion>) -> Result<(), MemoryError> {
        for NewRegion { description, fd, file, align } in new {
            let region = self.place(&plan.next, &description, fd, file, align)?;
            plan.added.push(region.share());
            plan.next.push(region);
        }
        sort(&mut plan.next)
    }

    /// Checks one more region; `None` if it is there already. QEMU up to 7.2 adds every region once for each pair of
    /// queues.
    pub(super) fn plan_add(&mut self, description: &MemoryRegion, fd: OwnedFd) -> Result<Option<Plan>, MemoryError> {
        let (file, align) = check(description, &fd)?;
        if self.regions.iter().any(|region| region.is_same(description, file)) {
            return Ok(None);
        }
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany(self.regions.len() + 1));
        }
        let region = self.place(&self.regions.clone(), description, fd, file, align)?;
        let added = vec![region.share()];
        let mut next = self.regions.clone();
        next.push(region);
        sort(&mut next)?;
        Ok(Some(Plan { next, removed: Vec::new(), added }))
    }

    /// Finds a region to remove, by guest address, user address and size, as the specification has it.
    pub(super) fn plan_remove(&self, description: &MemoryRegion) -> Result<(Plan, Region), MemoryError> {
        let Some(region) = self.regions.iter().find(|region| region.is(description)) else {
            return Err(MemoryError::NoSuchRegion {
                guest: description.guest_address,
                user: description.user_address,
                size: description.size,
            });
        };
        let next = self.regions.iter().filter(|r| r.info.id != region.info.id).cloned().collect();
        Ok((Plan { next, removed: vec![region.info.id], added: Vec::new() }, region.clone()))
    }

    /// Everything goes.
    pub(super) fn plan_clear(&self) -> Plan {
        Plan { next: Vec::new(), removed: self.regions.iter().map(|r| r.info.id).collect(), added: Vec::new() }
    }

    /// Makes a plan true. No plan may have been committed since it was made.
    pub(super) fn commit(&mut self, next: &mut Plan) {
        self.regions = std::mem::take(&mut next.next);
    }

    /// Splits the user addresses `first..=first + len_minus_one` at the borders of regions; `None` when they wrap.
    pub(super) fn split_user(&self, first: u64, len_minus_one: u64) -> Option<SmallVec<[Piece; 1]>> {
        let last = first.checked_add(len_minus_one)?;
        let mut pieces = SmallVec::new();
        let mut at = first;
        for region in &self.regions {
            if region.user_last() < at || region.user_address > last {
                continue;
            }
            if region.user_address > at {
                pieces.push(Piece { offset: at - first, len_minus_one: region.user_address - 1 - at, arena: None });
                at = region.user_address;
            }
            let end = region.user_last().min(last);
            pieces.push(Piece {
                offset: at - first,
                len_minus_one: end - at,
                arena: Some(region.info.arena_offset + (at - region.user_address)),
            });
            if end == last {
                return Some(pieces);
            }
            at = end + 1;
        }
        pieces.push(Piece { offset: at - first, len_minus_one: last - at, arena: None });
        Some(pieces)
    }

    /// The guest physical address of a user range that lies in one region.
    pub(super) fn guest_address(&self, user: u64, len: u64) -> Option<u64> {
        guest_address(&self.regions, user, len)
    }

    /// Whether all of a range of guest addresses lies in regions.
    pub(super) fn holds(&self, guest: IovaRange) -> bool {
        let mut left = Some(guest);
        while let Some(range) = left {
            let mut regions = self.regions.iter().filter_map(Region::guest_range);
            let Some(region) = regions.find(|region| region.contains(range.first())) else { return false };
            // The next one has to go on where this one ends.
            left = region.last().checked_add(1).and_then(|next| IovaRange::new(next, range.last()));
        }
        true
    }

    /// Region and offset in it of an arena address.
    pub(super) fn locate(&self, arena: u64) -> Option<(u64, u64)> {
        let region = self.regions.iter().find(|r| r.arena().0 <= arena && arena <= r.arena().1)?;
        Some((region.info.id, arena - region.info.arena_offset))
    }

    /// Reads a little-endian 16-bit word of guest memory, or `None` when the region is gone or its file too short.
    pub(super) fn read_u16(&self, region: u64, offset: u64) -> Option<u16> {
        let region = self.regions.iter().find(|r| r.info.id == region)?;
        if offset.checked_add(1)? >= region.info.size {
            return None;
        }
        let mut bytes = [0u8; 2];
        match rustix::io::pread(&*region.fd, &mut bytes, region.info.file_offset + offset) {
            Ok(2) => Some(u16::from_le_bytes(bytes)),
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(region = region.info.id, %error, "cannot read guest memory");
                None
            }
        }
    }

    /// Gives a region its id and its place in the arena: at its guest address where that is free, else in a gap.
    fn place(
        &mut self,
        taken: &[Region],
        description: &MemoryRegion,
        fd: OwnedFd,
        file: (u64, u64),
        align: u64,
    ) -> Result<Region, MemoryError> {
        let guest = description.guest_address;
        let no_room = MemoryError::NoRoom { guest, size: description.size };
        let Some(span) = description.size.checked_next_multiple_of(align) else { return Err(no_room) };
        let mut spans: Vec<(u64, u64)> = taken
            .iter()
            .map(|r| (r.info.arena_offset, r.info.arena_offset.saturating_add(r.info.size.next_multiple_of(r.align))))
            .collect();
        spans.sort_unstable();
        let fits = |at: u64| {
            at.checked_add(span).is_some_and(|end| {
                end <= self.arena_size && spans.iter().all(|&(first, past)| end <= first || past <= at)
            })
        };
        let arena_offset = if guest.is_multiple_of(align) && fits(guest) {
            guest
        } else {
            let step = align.max(GAP_ALIGN);
            let ends = spans.iter().filter_map(|&(_, past)| past.checked_next_multiple_of(step));
            match std::iter::once(0).chain(ends).filter(|&at| fits(at)).min() {
                Some(at) => at,
                None => return Err(no_room),
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        Ok(Region {
            info: RegionInfo {
                id,
                arena_offset,
                guest_address: guest,
                size: description.size,
                file_offset: description.mmap_offset,
            },
            user_address: description.user_address,
            fd: Arc::new(fd),
            file,
            align,
        })
    }
}

fn guest_address(regions: &[Region], user: u64, len: u64) -> Option<u64> {
    let last = user.checked_add(len.checked_sub(1)?)?;
    let region = regions.iter().find(|r| r.user_address <= user && last <= r.user_last())?;
    Some(region.info.guest_address + (user - region.user_address))
}

/// Sorts by user address and refuses overlaps.
fn sort(regions: &mut [Region]) -> Result<(), MemoryError> {
    regions.sort_by_key(|r| r.user_address);
    for pair in regions.windows(2) {
        if let [a, b] = pair
            && b.user_address <= a.user_last()
        {
            return Err(MemoryError::Overlap { user: b.user_address });
        }
    }
    Ok(())
}

/// Whether a region can be served from its descriptor: a file of memory that holds all of it. Returns what names the
/// file, and the alignment its mappings need (huge pages tell it as their block size).
fn check(description: &MemoryRegion, fd: &OwnedFd) -> Result<((u64, u64), u64), MemoryError> {
    let guest = description.guest_address;
    // Nobody before has looked at a table's regions, and all that is said of a `Region` rests on this.
    description.check().map_err(|source| MemoryError::Shape { guest, source })?;
    let stat = rustix::fs::fstat(fd).map_err(|source| MemoryError::Stat { guest, source })?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MemoryError::Kind { guest });
    }
    // Every worker has to map it for both, and those that cannot would end. An O_PATH descriptor says "read only" too.
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|source| MemoryError::Stat { guest, source })?;
    if flags & OFlags::ACCMODE != OFlags::RDWR {
        return Err(MemoryError::Mode { guest });
    }
    // An Err means that such a file has no seals.
    let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(MemoryError::Mode { guest });
    }
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    // Wraps only for a region whose last byte is that of 2^64, which no file has.
    let needed = description.mmap_offset.saturating_add(description.size);
    if len < needed {
        return Err(MemoryError::Short { guest, needed, len });
    }
    let block = u64::try_from(stat.st_blksize).unwrap_or(PAGE_SIZE);
    let align = if block.is_power_of_two() { block.clamp(PAGE_SIZE, BLOCK_ALIGN_MAX) } else { PAGE_SIZE };
    Ok(((stat.st_dev, stat.st_ino), align))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memfd(size: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&fd, size).expect("room");
        fd
    }

    fn description(guest_address: u64, size: u64, user_address: u64) -> MemoryRegion {
        MemoryRegion { guest_address, size, user_address, mmap_offset: 0 }
    }

    /// Three regions; the first two are neighbours in the front-end.
    fn memory() -> Memory {
        let mut memory = Memory::new(1 << 40);
        let table = [(0, 0x10_0000), (0x1000_0000, 0x11_0000), (0x2000_0000, 0x20_0000)]
            .map(|(guest, user)| (description(guest, 0x1_0000, user), memfd(0x1_0000)));
        let (mut plan, result) = memory.plan_table(table.into());
        result.expect("a table");
        memory.commit(&mut plan);
        memory
    }

    #[test]
    fn user_ranges_are_split_at_every_border() {
        let memory = memory();
        let pieces = |user, len: u64| {
            let pieces = memory.split_user(user, len - 1).expect("does not wrap");
            assert_eq!(pieces.iter().map(|p| p.len_minus_one + 1).sum::<u64>(), len, "all of it is told");
            pieces.iter().map(|p| (p.offset, p.arena)).collect::<Vec<_>>()
        };
        assert_eq!(pieces(0x10_0010, 16), [(0, Some(0x10))]);
        assert_eq!(pieces(0x10_fff0, 32), [(0, Some(0xfff0)), (16, Some(0x1000_0000))]);
        assert_eq!(pieces(0xf_fff0, 32), [(0, None), (16, Some(0))]);
        assert_eq!(pieces(0x11_fff0, 32), [(0, Some(0x1000_fff0)), (16, None)]);
        assert_eq!(pieces(0x30_0000, 32), [(0, None)]);
        let all = [
            (0, None),
            (0x10_0000, Some(0)),
            (0x11_0000, Some(0x1000_0000)),
            (0x12_0000, None),
            (0x20_0000, Some(0x2000_0000)),
            (0x21_0000, None),
        ];
        assert_eq!(pieces(0, 1 << 40), all);
        assert_eq!(memory.split_user(u64::MAX - 3, 3).map(|p| p.len()), Some(1));
        assert_eq!(memory.split_user(u64::MAX - 3, 4), None);
    }

    #[test]
    fn guest_addresses_are_only_given_for_what_lies_in_one_region() {
        let memory = memory();
        assert_eq!(memory.guest_address(0x11_0010, 0xfff0), Some(0x1000_0010));
        assert_eq!(memory.guest_address(0x11_0010, 0xfff1), None);
        assert_eq!(memory.guest_address(0x10_fff0, 32), None, "neighbours only in the front-end");
        assert_eq!(memory.guest_address(0x10_0000, 0), None);
    }

    #[test]
    fn guest_memory_is_what_lies_in_regions_that_follow_each_other() {
        let mut memory = Memory::new(1 << 40);
        // Neighbours in the guest, and one at the end of its address space.
        let table = [(0x1_0000, 0x30_0000), (0, 0x10_0000), (u64::MAX - 0xffff, 0x50_0000)]
            .map(|(guest, user)| (description(guest, 0x1_0000, user), memfd(0x1_0000)));
        let (mut plan, result) = memory.plan_table(table.into());
        result.expect("a table");
        memory.commit(&mut plan);
        let holds = |first, last| memory.holds(IovaRange::new(first, last).expect("in order"));
        assert!(holds(0, 0) && holds(0xfff0, 0x1_000f) && holds(0, 0x1_ffff) && holds(u64::MAX - 0xffff, u64::MAX));
        assert!(!holds(0x1_fff0, 0x2_0000) && !holds(0x2_0000, 0x2_0000) && !holds(u64::MAX - 0x1_0000, u64::MAX));
    }

    #[test]
    fn guest_memory_is_read_where_the_file_has_it() {
        let mut memory = Memory::new(1 << 40);
        let fd = memfd(0x4000);
        assert_eq!(rustix::io::pwrite(&fd, &[0x34, 0x12], 0x2002), Ok(2));
        let region = MemoryRegion { mmap_offset: 0x2000, ..description(0x10_0000, 0x2000, 0) };
        let shrunk = fd.try_clone().expect("a descriptor");
        let mut plan = memory.plan_add(&region, fd).expect("a region").expect("new");
        memory.commit(&mut plan);
        assert_eq!(memory.locate(0x10_0002), Some((1, 2)));
        assert_eq!(memory.read_u16(1, 2), Some(0x1234));
        assert_eq!(memory.read_u16(1, 0x1fff), None, "half a word");
        assert_eq!(memory.read_u16(2, 0), None);
        rustix::fs::ftruncate(&shrunk, 0x1000).expect("room");
        assert_eq!(memory.read_u16(1, 2), None, "the file has shrunk");
    }

    #[test]
    fn a_small_arena_is_filled_and_then_refused() {
        let mut memory = Memory::new(4 << 20);
        let mut add = |guest, user| {
            let mut plan = memory.plan_add(&description(guest, 2 << 20, user), memfd(2 << 20))?.expect("new");
            let at = plan.added.first().map(|(info, _)| info.arena_offset);
            memory.commit(&mut plan);
            Ok::<_, MemoryError>(at)
        };
        assert_eq!(add(1 << 32, 1 << 40).ok().flatten(), Some(0));
        assert_eq!(add(2 << 32, 2 << 40).ok().flatten(), Some(2 << 20));
        assert!(matches!(add(0, 3 << 40), Err(MemoryError::NoRoom { .. })));
    }
}
