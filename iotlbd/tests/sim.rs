//! The simulated front-end against the real server, in one process, with a worker's reader on this thread.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use iotlb_client::net::options::Options as NetOptions;
use iotlb_client::net::worker::Signals;
use iotlb_client::{Access, AttachOptions, Attachment, Fault, Guard, Reader, ResolveError};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::vhost_user::features::virtio;
use iotlbd::demo::oracle::load_word;
use iotlbd::server::{DeviceKind, FrontEndSource, Server, ServerConfig, ServerError, StallPolicy};
use iotlbd::sim::{FrontEnd, FrontEndOptions, Guest, RingAddresses, SimError, Unmapping, VirtioNet};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const GUEST: u64 = 0x4000_0000;
const PAGES: u64 = 64;
const WATCHDOG: Duration = Duration::from_secs(60);
const WATCHDOG_MS: u32 = 60_000;

/// A running server; stopped and joined when dropped.
struct Harness {
    directory: tempfile::TempDir,
    stop: EventFd,
    server: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Harness {
    fn start(queue_pairs: u16) -> Harness {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| directory.path().join(name);
        let source = FrontEndSource::Path { path: path("front-end.sock"), mode: 0o600 };
        let mut config = ServerConfig::new(DeviceKind::Net { queue_pairs }, source, path("control.sock"));
        // The worker is this process: on a busy machine it must not be taken for one that stalls.
        config.stall = StallPolicy { report_ms: 100_000, revoke_ms: 200_000, kill_ms: 300_000 };
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("an eventfd");
        let their_stop: OwnedFd = stop.as_fd().try_clone_to_owned().expect("a descriptor");
        let server = Server::start(config).expect("fresh paths");
        let server = std::thread::spawn(move || server.run(their_stop));
        Harness { directory, stop, server: Some(server) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn front_end(&self, options: FrontEndOptions) -> FrontEnd {
        let guest = Guest::new(GUEST, PAGES * PAGE_SIZE).expect("memfd");
        let options = FrontEndOptions { timeout: WATCHDOG, ..options };
        FrontEnd::connect(&self.path("front-end.sock"), guest, options).expect("the server answers")
    }

    /// A worker that answers pings on these queues. It ends when the server does.
    fn echo(&self, queues: &str) -> JoinHandle<Result<(), String>> {
        let flags = ["iotlb-net", "--echo", "--queues", queues, "--control-socket"].map(OsString::from);
        let options = NetOptions::parse_from(flags.into_iter().chain([self.path("control.sock").into_os_string()]));
        std::thread::spawn(move || {
            let signals = Signals::block().expect("a signal descriptor");
            // The end of the server is an error to a worker that was not told to reconnect.
            iotlb_client::net::worker::run(&options, &signals).map_err(|error| error.to_string())
        })
    }

    /// A front-end whose rings have started.
    fn started(&self, options: FrontEndOptions) -> FrontEnd {
        let mut front_end = self.front_end(options);
        let rings = map_rings(&mut front_end);
        front_end.start(&rings).expect("the server answers");
        front_end
    }

    fn worker(&self) -> Attachment {
        Attachment::connect(&self.path("control.sock"), &AttachOptions::default()).expect("the server takes workers")
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.stop.write(1).expect("an eventfd");
        let result = self.server.take().expect("joined once").join();
        if !std::thread::panicking() {
            result.expect("the server does not panic").expect("the server ends well");
        }
    }
}

fn map_rings(front_end: &mut FrontEnd) -> Vec<RingAddresses> {
    (0..front_end.options().queue_pairs * 2)
        .map(|index| {
            let (desc, ring) = (0x10_0000 + u64::from(index) * 0x2000, 0x10_1000 + u64::from(index) * 0x2000);
            for iova in [desc, ring] {
                let page = front_end.guest.allocate().expect("pages");
                front_end.guest.fill_page(page, 0).expect("in memory");
                front_end.viommu.map(iova, page, Access::READ_WRITE).expect("free");
            }
            RingAddresses { desc, avail: ring, used: ring + 0x240, base: 0 }
        })
        .collect()
}

/// Maps a fresh page full of `word`.
fn map(front_end: &mut FrontEnd, iova: u64, word: u64, access: Access) -> u64 {
    let page = front_end.guest.allocate().expect("pages");
    front_end.guest.fill_page(page, word).expect("in memory");
    front_end.viommu.map(iova, page, access).expect("free");
    page
}

/// Resolves on this thread while the front-end serves misses on another.
fn resolve(front_end: &mut FrontEnd, reader: &mut Reader, iova: u64, access: Access) -> Result<(), ResolveError> {
    std::thread::scope(|scope| {
        let (done, finished) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        let serving = scope.spawn(move || front_end.serve_until(&[finished.as_fd()], WATCHDOG));
        let answer = reader.resolve(iova, 8, access, WATCHDOG_MS);
        drop(done);
        serving.join().expect("no panic").expect("the server keeps to the protocol");
        answer
    })
}

/// The first word at `iova`, or what is in the way.
fn word(guard: &Guard<'_>, iova: u64) -> Result<u64, Fault> {
    let mut bytes = [0; 8];
    guard.read(iova, &mut bytes).map(|()| u64::from_le_bytes(bytes))
}

/// Resolves and reads, again when the page or the memory map changed in between.
fn fetch(front_end: &mut FrontEnd, reader: &mut Reader, iova: u64) -> u64 {
    let deadline = Instant::now() + WATCHDOG;
    loop {
        let fault = match word(&reader.pin().expect("the server lives"), iova) {
            Ok(word) => return word,
            Err(fault) => fault,
        };
        match fault {
            Fault::Miss { iova, access } => resolve(front_end, reader, iova, access).expect("mapped"),
            Fault::Remapping => assert!(reader.wait_mapped(WATCHDOG_MS), "no new memory map"),
            fault => panic!("{fault:?}"),
        }
        assert!(Instant::now() < deadline, "never there");
    }
}

fn assert_miss(reader: &Reader, iova: u64) {
    let found = word(&reader.pin().expect("the server lives"), iova);
    assert!(matches!(found, Err(Fault::Miss { .. })), "{found:?}");
}

#[test]
fn a_page_is_found_until_it_is_unmapped() {
    let harness = Harness::start(1);
    let mut front_end = harness.started(FrontEndOptions::default());
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    map(&mut front_end, 0x7000, 0x1111, Access::READ_WRITE);
    assert_eq!(fetch(&mut front_end, &mut reader, 0x7008), 0x1111);
    front_end.unmap(0x7000).expect("acknowledged");
    assert_miss(&reader, 0x7000);
    let answer = resolve(&mut front_end, &mut reader, 0x7000, Access::READ);
    assert!(matches!(answer, Err(ResolveError::Denied)), "{answer:?}");
    // The page comes back under another name, and another page under the old one.
    map(&mut front_end, 0x7000, 0x2222, Access::READ_WRITE);
    assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x2222);
}

#[test]
fn a_lazy_flush_reaches_both_ends_of_the_space() {
    let harness = Harness::start(1);
    let mut front_end = harness.started(FrontEndOptions::default());
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    let iovas = [0x7000, 0xfedf_f000, 0xfef0_0000, 0xffff_ffff_ffff_f000];
    for iova in iovas {
        map(&mut front_end, iova, iova, Access::READ_WRITE);
        assert_eq!(fetch(&mut front_end, &mut reader, iova), iova);
    }
    for iova in iovas {
        front_end.unmap_lazily(iova).expect("mapped");
        assert_eq!(word(&reader.pin().expect("alive"), iova), Ok(iova), "not flushed yet");
    }
    front_end.flush().expect("acknowledged");
    iovas.iter().for_each(|iova| assert_miss(&reader, *iova));
}

#[test]
fn the_acknowledgement_waits_for_the_pin() {
    let harness = Harness::start(1);
    let mut front_end = harness.started(FrontEndOptions::default());
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    for round in 0..20 {
        let page = map(&mut front_end, 0x7000, 0x1111, Access::READ_WRITE);
        assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x1111);
        std::thread::scope(|scope| {
            let guard = reader.pin().expect("alive");
            let held = guard.translate(0x7000, 8, Access::READ).expect("just fetched").next().expect("eight bytes");
            let taking = scope.spawn(|| {
                front_end.unmap(0x7000).expect("acknowledged");
                front_end.guest.fill_page(page, 0xdead).expect("in memory");
                front_end.guest.release(page);
            });
            // The mapping disappears under the pin; the page must not.
            let deadline = Instant::now() + WATCHDOG;
            while word(&guard, 0x7000).is_ok() {
                assert!(Instant::now() < deadline, "the invalidation never came");
                std::thread::yield_now();
            }
            for _ in 0..200 {
                assert_eq!(load_word(&held, 0), Some(0x1111), "round {round}");
                std::thread::yield_now();
            }
            assert!(!taking.is_finished(), "acknowledged under a pin");
            drop(guard);
            taking.join().expect("no panic");
        });
    }
}

#[test]
fn memory_comes_and_goes_by_slots_and_by_table() {
    for memory_slots in [true, false] {
        let harness = Harness::start(1);
        let mut front_end = harness.started(FrontEndOptions { memory_slots, ..FrontEndOptions::default() });
        let worker = harness.worker();
        let mut reader = worker.reader().expect("a slot");
        map(&mut front_end, 0x7000, 0x1111, Access::READ_WRITE);
        assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x1111);
        let hot = 0x1_0000_0000;
        for round in 1..4 {
            front_end.add_region(hot, 4 * PAGE_SIZE).expect("acknowledged");
            front_end.guest.fill_page(hot + PAGE_SIZE, round).expect("in memory");
            front_end.viommu.map(0x8000, hot + PAGE_SIZE, Access::READ_WRITE).expect("free");
            assert_eq!(fetch(&mut front_end, &mut reader, 0x8000), round);
            front_end.viommu.unmap(0x8000).expect("mapped");
            front_end.remove_region(hot).expect("acknowledged");
            assert_miss(&reader, 0x8000);
            assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x1111);
        }
    }
}

#[test]
fn a_stop_takes_everything_without_an_invalidation() {
    let harness = Harness::start(2);
    let mut front_end = harness.started(FrontEndOptions { queue_pairs: 2, ..FrontEndOptions::default() });
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    for round in 0..3 {
        map(&mut front_end, 0x7000, round, Access::READ_WRITE);
        assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), round);
        assert_eq!(front_end.stop().expect("answered"), [0; 4]);
        assert_miss(&reader, 0x7000);
        let answer = resolve(&mut front_end, &mut reader, 0x7000, Access::READ);
        assert!(matches!(answer, Err(ResolveError::Stopped)), "{answer:?}");
        front_end.viommu.unmap(0x7000).expect("mapped");
        let rings: Vec<_> = (0..4)
            .map(|index| 0x10_0000 + index * 0x2000)
            .map(|desc| RingAddresses { desc, avail: desc + 0x1000, used: desc + 0x1240, base: 0 })
            .collect();
        front_end.start(&rings).expect("answered");
    }
}

#[test]
fn a_worker_outlives_the_front_end() {
    let harness = Harness::start(1);
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    for session in 0..3 {
        let mut front_end = harness.started(FrontEndOptions::default());
        map(&mut front_end, 0x7000, session, Access::READ_WRITE);
        assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), session);
        drop(front_end.disconnect());
        let deadline = Instant::now() + WATCHDOG;
        while word(&reader.pin().expect("alive"), 0x7000).is_ok() {
            assert!(Instant::now() < deadline, "the mapping outlived its session");
            std::thread::yield_now();
        }
    }
    assert!(worker.alive());
}

#[test]
fn a_read_only_page_is_not_written() {
    let harness = Harness::start(1);
    let mut front_end = harness.started(FrontEndOptions { exact_permissions: true, ..FrontEndOptions::default() });
    let worker = harness.worker();
    let mut reader = worker.reader().expect("a slot");
    map(&mut front_end, 0x7000, 0x1111, Access::READ);
    assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x1111);
    assert!(matches!(reader.pin().expect("alive").write(0x7000, &[1]), Err(Fault::Miss { .. })));
    let answer = resolve(&mut front_end, &mut reader, 0x7000, Access::WRITE);
    assert!(matches!(answer, Err(ResolveError::Denied)), "{answer:?}");
    assert_eq!(fetch(&mut front_end, &mut reader, 0x7000), 0x1111);
}

#[test]
fn pings_come_back_strictly_and_lazily() {
    let harness = Harness::start(2);
    let workers = [harness.echo("0,1"), harness.echo("2,3")];
    for (unmapping, features) in [
        (Unmapping::Strict, FrontEndOptions::default().features),
        (Unmapping::Lazy, FrontEndOptions::default().features),
        (Unmapping::Strict, virtio::VERSION_1 | virtio::ACCESS_PLATFORM),
    ] {
        let guest = Guest::new(GUEST, 1024 * PAGE_SIZE).expect("memfd");
        let options = FrontEndOptions { queue_pairs: 2, features, timeout: WATCHDOG, ..FrontEndOptions::default() };
        let mut front_end =
            FrontEnd::connect(&harness.path("front-end.sock"), guest, options).expect("the server answers");
        let mut net = VirtioNet::start(&mut front_end, unmapping).expect("the server answers");
        let summary = net.ping(&mut front_end, 200, WATCHDOG).expect("no ring breaks");
        assert_eq!((summary.sent, summary.received, summary.wrong, summary.missing), (200, 200, 0, 0));
        assert!(front_end.stats.invalidations > 0 && front_end.stats.denied == 0, "{:?}", front_end.stats);
        front_end.stop().expect("answered");
        net.check_free_pages(&front_end.guest).expect("nobody writes to a page that was taken away");
    }
    assert!(workers.iter().all(|worker| !worker.is_finished()));
    drop(harness);
    for worker in workers {
        let ended = worker.join().expect("no panic");
        assert!(ended.is_err(), "the daemon's death went unnoticed");
    }
}

#[test]
fn a_ring_costs_the_front_end_three_descriptors_and_no_fourth() {
    const PAIRS: u16 = 16;
    let harness = Harness::start(PAIRS);
    let queues: Vec<String> = (0..PAIRS * 2).map(|queue| queue.to_string()).collect();
    let _worker = harness.echo(&queues.join(","));
    let mut command = Command::new(env!("CARGO_BIN_EXE_iotlbd"));
    command.arg("demo-front-end").arg(format!("--socket-path={}", harness.path("front-end.sock").display()));
    command.args([format!("--queue-pairs={PAIRS}"), format!("--timeout-ms={WATCHDOG_MS}"), "--pings=16".to_owned()]);
    // What is left for everything else would not do for one more a ring, as with 128 pairs and the usual limit of 1024.
    let limit = Rlimit { current: Some(u64::from(PAIRS) * 2 * 3 + 16), ..getrlimit(Resource::Nofile) };
    // SAFETY: between fork and exec only setrlimit is called, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || Ok(setrlimit(Resource::Nofile, limit)?));
    }
    let output = command.stdin(Stdio::null()).output().expect("cargo has built the program");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn more_queue_pairs_than_there_are() {
    let harness = Harness::start(1);
    let guest = Guest::new(GUEST, PAGES * PAGE_SIZE).expect("memfd");
    let options = FrontEndOptions { queue_pairs: 2, timeout: WATCHDOG, ..FrontEndOptions::default() };
    let error = FrontEnd::connect(&harness.path("front-end.sock"), guest, options).expect_err("one pair only");
    assert!(matches!(error, SimError::Usage { .. }), "{error}");
}
