//! Recorded QEMU sessions, fed through the device: every reply must be right, and the table must always be what an
//! independent reading of the recording says. What the recordings are: `tests/traces/README.md`.

mod harness;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use flate2::read::GzDecoder;
use harness::{Bench, ROOMY, channel, eventfd, memfd};
use iotlb_proto::access::Access;
use iotlb_proto::vhost_user::features::virtio;
use iotlb_proto::vhost_user::{IotlbKind, IotlbMessage, MemoryRegion, Request, VringAddress, VringFd, VringState};
use iotlbd::device::{Action, DeviceConfig, Event, ReplyPayload};
use serde_json::Value;

const PAGE: u64 = 4096;

/// Where guest memory is, by the recording's own names: inode and offset.
type Place = (u64, u64);

/// What the recording says the table must be: written without looking at the device.
#[derive(Default)]
struct Model {
    /// Guest address, size, user address, offset in the file, inode.
    regions: Vec<(u64, u64, u64, u64, u64)>,
    /// By page of IOVA: where it leads to.
    pages: BTreeMap<u64, Place>,
    features: Option<u64>,
    status: u64,
    /// Started rings, and the address of the used ring.
    rings: BTreeMap<u32, u64>,
    /// Where the used index of a ring was last known to be.
    used_index: BTreeMap<u32, Place>,
    addresses: BTreeMap<u32, u64>,
}

impl Model {
    fn iommu(&self) -> bool {
        self.features.is_some_and(|features| features & virtio::ACCESS_PLATFORM != 0)
    }

    fn place(&self, user: u64) -> Option<Place> {
        self.regions
            .iter()
            .find(|(_, size, start, _, _)| user >= *start && user - start < *size)
            .map(|(_, _, start, offset, ino)| (*ino, offset + (user - start)))
    }

    /// Guest memory as it is, for sessions without IOMMU.
    fn identity(&mut self) {
        if self.iommu() || (self.features.is_none() && self.rings.is_empty()) {
            return;
        }
        for (guest, size, _, offset, ino) in self.regions.clone() {
            for page in (0..size).step_by(4096) {
                self.pages.insert(guest + page, (ino, offset + page));
            }
        }
    }

    fn learn_used_indexes(&mut self) {
        for (ring, used) in &self.rings {
            let at = used + 2;
            let place = if self.iommu() {
                self.pages.get(&(at & !(PAGE - 1))).map(|(ino, offset)| (*ino, offset + at % PAGE))
            } else {
                self.place(at)
            };
            if let Some(place) = place {
                self.used_index.insert(*ring, place);
            }
        }
    }

    fn invalidate(&mut self, iova: u64, size: u64) {
        // Arithmetic in 128 bits, so that no end wraps.
        let end = if size == 0 { 1u128 << 64 } else { u128::from(iova) + u128::from(size) };
        self.pages
            .retain(|page, _| u128::from(*page) + u128::from(PAGE) <= u128::from(iova) || u128::from(*page) >= end);
    }

    fn reset(&mut self) {
        self.pages.clear();
        self.rings.clear();
        self.used_index.clear();
        self.addresses.clear();
        self.features = None;
        self.status = 0;
    }
}

fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).expect("a hexadecimal number"),
            None => text.parse().expect("a number"),
        },
        other => other.as_u64().unwrap_or_else(|| panic!("not a number: {other}")),
    }
}

fn small(value: &Value) -> u32 {
    u32::try_from(number(value)).expect("32 bits")
}

fn read_trace(name: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/traces").join(name);
    let file = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    BufReader::new(GzDecoder::new(file))
        .lines()
        .map(|line| serde_json::from_str(&line.expect("gzip")).expect("JSON"))
        .collect()
}

struct Replay {
    bench: Bench,
    model: Model,
    files: HashMap<u64, OwnedFd>,
    /// Device and inode of our files, back to the recording's inode.
    names: HashMap<(u64, u64), u64>,
    /// How often everything was flushed, and how often that left the table empty.
    flushes: u32,
    most_entries: u64,
    acks: u32,
    misses_sent: u32,
}

impl Replay {
    fn file(&mut self, description: &Value) -> OwnedFd {
        let ino = number(&description["ino"]);
        let size = number(&description["size"]);
        let fd = self.files.entry(ino).or_insert_with(|| memfd(size));
        let stat = rustix::fs::fstat(&*fd).expect("stat");
        self.names.insert((stat.st_dev, stat.st_ino), ino);
        fd.try_clone().expect("a descriptor")
    }

    fn region(value: &Value) -> MemoryRegion {
        MemoryRegion {
            guest_address: number(&value["gpa"]),
            size: number(&value["size"]),
            user_address: number(&value["uaddr"]),
            mmap_offset: number(&value["mmap_offset"]),
        }
    }

    fn remember(&mut self, region: &MemoryRegion, fd: &Value) {
        self.model.regions.push((
            region.guest_address,
            region.size,
            region.user_address,
            region.mmap_offset,
            number(&fd["ino"]),
        ));
    }

    /// One line of the front-end. `later`: what the recording has from there on.
    fn front_end(&mut self, line: &Value, later: &[Value]) {
        let p = &line["p"];
        let need = line["need"] == 1;
        let state = || VringState { index: small(&p["index"]), num: small(&p["num"]) };
        let vring_fd = || VringFd {
            index: u8::try_from(number(&p["index"])).expect("8 bits"),
            fd: (p["nofd"] == 0).then(eventfd),
        };
        let mut expected = need.then_some(ReplyPayload::U64(0));
        let request = match line["req"].as_str().expect("a name") {
            "GET_FEATURES" => {
                expected = Some(ReplyPayload::U64(self.bench.device.config().features));
                Request::GetFeatures
            }
            "SET_FEATURES" => {
                let features = number(&p["u64"]);
                let first = self.model.features != Some(features);
                self.model.features = Some(features);
                if first {
                    self.model.identity();
                }
                Request::SetFeatures(features)
            }
            "SET_OWNER" => Request::SetOwner,
            "GET_PROTOCOL_FEATURES" => {
                expected = Some(ReplyPayload::U64(self.bench.device.config().protocol_features));
                Request::GetProtocolFeatures
            }
            "SET_PROTOCOL_FEATURES" => Request::SetProtocolFeatures(number(&p["u64"])),
            "GET_QUEUE_NUM" => {
                expected = Some(ReplyPayload::U64(u64::from(self.bench.device.config().queue_num)));
                Request::GetQueueNum
            }
            "GET_MAX_MEM_SLOTS" => {
                expected = Some(ReplyPayload::U64(64));
                Request::GetMaxMemSlots
            }
            "SET_BACKEND_REQ_FD" => Request::SetBackendReqFd(channel()),
            "SET_MEM_TABLE" => {
                self.model.regions.clear();
                self.model.pages.clear();
                let mut table = Vec::new();
                let regions = p["regions"].as_array().expect("regions");
                for (region, fd) in regions.iter().zip(line["fds"].as_array().expect("descriptors")) {
                    let region = Replay::region(region);
                    self.remember(&region, fd);
                    table.push((region, self.file(fd)));
                }
                self.model.identity();
                Request::SetMemTable(table)
            }
            "ADD_MEM_REG" => {
                let region = Replay::region(&p["region"]);
                let fd = &line["fds"][0];
                self.remember(&region, fd);
                self.model.identity();
                Request::AddMemReg(region, self.file(fd))
            }
            "SET_VRING_NUM" => Request::SetVringNum(state()),
            "SET_VRING_BASE" => Request::SetVringBase(state()),
            "SET_VRING_ADDR" => {
                let address = VringAddress {
                    index: small(&p["index"]),
                    flags: small(&p["flags"]),
                    desc: number(&p["desc"]),
                    used: number(&p["used"]),
                    avail: number(&p["avail"]),
                    log: number(&p["log"]),
                };
                self.model.addresses.insert(address.index, address.used);
                Request::SetVringAddr(address)
            }
            "SET_VRING_KICK" => {
                let index = small(&p["index"]);
                self.model.rings.insert(index, self.model.addresses[&index]);
                self.model.learn_used_indexes();
                Request::SetVringKick(vring_fd())
            }
            "SET_VRING_CALL" => Request::SetVringCall(vring_fd()),
            "SET_VRING_ERR" => Request::SetVringErr(vring_fd()),
            "SET_VRING_ENABLE" => Request::SetVringEnable(state()),
            "GET_VRING_BASE" => {
                let index = small(&p["index"]);
                let num = self.write_used_index(index, later);
                expected = Some(ReplyPayload::VringState { index, num });
                self.model.rings.remove(&index);
                if self.model.rings.is_empty() && self.model.iommu() {
                    self.model.pages.clear();
                }
                Request::GetVringBase { index }
            }
            "GET_STATUS" => {
                expected = Some(ReplyPayload::U64(self.model.status));
                Request::GetStatus
            }
            "SET_STATUS" => {
                let status = number(&p["u64"]);
                if status == 0 {
                    // QEMU 7 asks how far the rings got only after this.
                    for index in self.model.rings.keys().copied().collect::<Vec<_>>() {
                        self.write_used_index(index, later);
                    }
                    self.model.reset();
                }
                self.model.status = status;
                Request::SetStatus(status)
            }
            "SET_LOG_BASE" => {
                expected = Some(ReplyPayload::Bytes(Vec::new()));
                let size = number(&p["mmap_size"]);
                Request::SetLogBase { size, offset: number(&p["mmap_offset"]), fd: Some(memfd(size)) }
            }
            "GET_CONFIG" => {
                let (offset, size) = (small(&p["offset"]), small(&p["size"]));
                let mut bytes = Vec::new();
                for word in [offset, size, small(&p["flags"])] {
                    bytes.extend_from_slice(&word.to_ne_bytes());
                }
                bytes.extend((0..size).map(|_| 0xc5));
                expected = Some(ReplyPayload::Bytes(bytes));
                Request::GetConfig { offset, size, flags: small(&p["flags"]) }
            }
            "GET_INFLIGHT_FD" => {
                let queues = u16::try_from(number(&p["num_queues"])).expect("16 bits");
                let queue_size = u16::try_from(number(&p["queue_size"])).expect("16 bits");
                let mut bytes = vec![0; 16];
                bytes.extend_from_slice(&queues.to_ne_bytes());
                bytes.extend_from_slice(&queue_size.to_ne_bytes());
                bytes.extend_from_slice(&[0; 4]);
                expected = Some(ReplyPayload::Bytes(bytes));
                Request::GetInflightFd { queues, queue_size }
            }
            "SET_INFLIGHT_FD" => {
                let size = number(&p["mmap_size"]);
                Request::SetInflightFd {
                    size,
                    offset: number(&p["mmap_offset"]),
                    queues: u16::try_from(number(&p["num_queues"])).expect("16 bits"),
                    queue_size: u16::try_from(number(&p["queue_size"])).expect("16 bits"),
                    fd: memfd(size),
                }
            }
            "IOTLB_MSG" => {
                let (iova, size, user) = (number(&p["iova"]), number(&p["size"]), number(&p["uaddr"]));
                let access = match p["perm"].as_str().expect("a permission") {
                    "RW" => Access::READ_WRITE,
                    "RO" | "R" => Access::READ,
                    "WO" | "W" => Access::WRITE,
                    _ => Access::NONE,
                };
                let kind = match p["type"].as_str().expect("a type") {
                    "UPDATE" => {
                        for offset in (0..size).step_by(4096) {
                            let place = self.model.place(user + offset).expect("an update inside memory");
                            self.model.pages.insert(iova + offset, place);
                        }
                        IotlbKind::Update
                    }
                    "INVALIDATE" => {
                        if u128::from(iova) + u128::from(size) >= 1 << 64 {
                            self.flushes += 1;
                        }
                        self.model.learn_used_indexes();
                        self.model.invalidate(iova, size);
                        IotlbKind::Invalidate
                    }
                    other => panic!("unexpected {other}"),
                };
                Request::Iotlb(IotlbMessage { iova, size, user_address: user, access, kind })
            }
            other => panic!("line {}: no idea what {other} is", line["n"]),
        };
        self.model.learn_used_indexes();
        let compare = matches!(
            request,
            Request::Iotlb(_)
                | Request::SetMemTable(_)
                | Request::AddMemReg(..)
                | Request::SetStatus(_)
                | Request::GetVringBase { .. }
                | Request::SetFeatures(_)
        );
        let replies = self.bench.request(request, need);
        assert_eq!(replies, expected.into_iter().collect::<Vec<_>>(), "line {}", line["n"]);
        self.acks += u32::try_from(replies.len()).expect("few");
        self.play_back_end();
        if compare {
            self.compare(&line["n"]);
        }
    }

    /// Puts into guest memory what the recorded back-end had there, so that the device has to answer it.
    fn write_used_index(&mut self, ring: u32, later: &[Value]) -> u32 {
        let reply = later
            .iter()
            .find(|l| l["req"] == "GET_VRING_BASE" && l["dir"] == "B>Q" && l["p"]["index"] == ring)
            .expect("every ring is stopped in the recording");
        let num = small(&reply["p"]["num"]);
        if let Some((ino, offset)) = self.model.used_index.get(&ring) {
            let bytes = u16::try_from(num).expect("16 bits").to_le_bytes();
            assert_eq!(rustix::io::pwrite(&self.files[ino], &bytes, *offset), Ok(2));
        }
        num
    }

    /// The front-end of the recording answers misses of another back-end. Ours are answered "done", as if the update
    /// had been one of those in the recording.
    fn play_back_end(&mut self) {
        loop {
            let sent = self.bench.messages();
            if sent.is_empty() {
                break;
            }
            assert!(sent.last().is_some_and(|(_, need_reply)| *need_reply), "nothing ends the wait for the last miss");
            for (message, need_reply) in sent {
                assert_eq!(message.kind, IotlbKind::Miss);
                self.misses_sent += 1;
                if need_reply {
                    self.bench.event(Event::MissReply { value: 0 });
                }
            }
        }
    }

    /// The table and the model must agree on every page.
    fn compare(&mut self, n: &Value) {
        let (regions, _) = self.bench.device.regions();
        let regions: Vec<_> = regions
            .iter()
            .map(|(info, fd)| {
                let stat = rustix::fs::fstat(fd.as_fd()).expect("stat");
                (info.arena_offset, info.size, info.file_offset, self.names[&(stat.st_dev, stat.st_ino)])
            })
            .collect();
        let mut pages = BTreeMap::new();
        self.bench.device.table().for_each(|leaf| {
            assert_eq!(leaf.access, Access::READ_WRITE);
            for offset in (0..=leaf.last - leaf.first).step_by(4096) {
                let target = leaf.target + offset;
                let place = regions
                    .iter()
                    .find(|(arena, size, _, _)| target >= *arena && target - arena < *size)
                    .map(|(arena, _, file, ino)| (*ino, file + (target - arena)));
                pages.insert(leaf.first + offset, place.expect("an entry that leads into a region"));
            }
        });
        assert!(pages == self.model.pages, "line {n}: table {:x?}\nmodel {:x?}", pages, self.model.pages);
        self.most_entries = self.most_entries.max(self.bench.device.table().stats().entries);
    }

    fn disconnect(&mut self) {
        self.bench.event(Event::FrontEndLost { reason: "end of the recording".to_owned() });
        assert!(matches!(self.bench.actions.back(), Some(Action::CloseFrontEnd { .. })));
        self.bench.actions.clear();
        self.model.reset();
        self.model.regions.clear();
        self.compare(&Value::from("end"));
        assert_eq!(self.bench.device.regions().0.len(), 0);
        assert_eq!(self.bench.device.table().stats().entries, 0);
    }
}

fn replay(name: &str) -> Replay {
    let lines = read_trace(name);
    let of = |req: &str, dir: &str| {
        lines
            .iter()
            .filter(|l| l["req"] == req && l["dir"] == dir)
            .map(|l| number(&l["p"]["u64"]))
            .fold(0, |a, b| a | b)
    };
    let config = DeviceConfig {
        features: of("GET_FEATURES", "B>Q"),
        protocol_features: of("GET_PROTOCOL_FEATURES", "B>Q") | of("SET_PROTOCOL_FEATURES", "Q>B"),
        queues: 2,
        queue_num: 1,
        config_space: vec![0xc5; 64],
        ..DeviceConfig::net(1, 1000, 1 << 40)
    };
    let mut replay = Replay {
        bench: Bench::new(config, ROOMY),
        model: Model::default(),
        files: HashMap::new(),
        names: HashMap::new(),
        flushes: 0,
        most_entries: 0,
        acks: 0,
        misses_sent: 0,
    };
    for (at, line) in lines.iter().enumerate() {
        match line["event"].as_str() {
            Some("connected") => replay.bench.event(Event::FrontEndConnected),
            Some("disconnected") => replay.disconnect(),
            Some(_) => {}
            None if line["ch"] == "main" && line["dir"] == "Q>B" => {
                replay.front_end(line, &lines[at..]);
            }
            None => {}
        }
    }
    assert!(replay.acks > 20, "the recording was not read");
    replay
}

#[test]
fn strict_with_qemu_10() {
    let replay = replay("q10-strict-icmp.jsonl.gz");
    assert!(replay.bench.device.counters().invalidations > 1000 && replay.bench.device.counters().updates > 1000);
    assert!(replay.misses_sent > 0, "rings were never asked for");
}

#[test]
fn strict_with_qemu_7() {
    // Resets the device before it asks how far the rings got.
    replay("q7-strict-icmp.jsonl.gz");
}

#[test]
fn a_lazy_flush_empties_the_table() {
    // The recorded back-end kept all its entries here. `compare` saw after every message that ours went.
    let replay = replay("q10-lazy-tap.jsonl.gz");
    assert!(replay.flushes > 1000, "{} flushes", replay.flushes);
    assert!(replay.most_entries > 0);
}

#[test]
fn passthrough_only_grows() {
    let replay = replay("q10-pt.jsonl.gz");
    assert_eq!(replay.bench.device.counters().invalidations, 0);
    assert!(replay.bench.device.counters().updates > 1000);
}

#[test]
fn reboot_leaves_nothing_behind() {
    replay("q10-reboot.jsonl.gz");
}

#[test]
fn memory_is_plugged_while_rings_run() {
    replay("q10-memhotplug.jsonl.gz");
}

#[test]
fn migration_switches_the_log() {
    replay("q10-migrate.jsonl.gz");
}

#[test]
fn block_device_without_iommu_and_with_a_reconnect() {
    let replay = replay("q10-blk-inflight.jsonl.gz");
    assert_eq!(replay.bench.device.counters().sessions, 2);
    assert_eq!(replay.misses_sent, 0, "nothing is asked without an IOMMU");
}
