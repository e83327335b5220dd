//! `cargo bench -p iotlb-tests --bench guest`: what a real guest carries over a TAP, served by `iotlbd` and
//! `iotlb-net`, against QEMU's own device on the same kind of TAP in the same run. Prints a table, writes
//! `bench-guest.json` into the build directory. Needs what `tests/guest.rs` needs.
//!
//! An argument limits the run to modes whose name contains it. From the environment:
//!
//! - `IOTLBD_GUEST_ROUNDS`: guests of each kind, in turn.
//! - `IOTLBD_GUEST_SECONDS`: for each of [`REPEATS`] transfers each way in a guest.
//! - `IOTLBD_GUEST_STREAMS`: connections at a time.
//! - `IOTLBD_GUEST_WAY`: `from` or `to` the guest alone, so that the daemon's figures are of that way.
//! - `IOTLBD_GUEST_PLACES=apart`: one processor of this machine for the guest's and the workers, another for the rest
//!   of QEMU and the daemon, instead of leaving that to the system. iperf3 on this side runs where it likes.
//! - `IOTLBD_GUEST_WORKER`: another build of `iotlb-net` to be compared.
//! - `IOTLBD_GUEST_ONLY`: only contestants whose name ends with it, the first of them being the reference: to look at
//!   one of them closely.

use std::path::PathBuf;

use iotlb_tests::bench::report::json_path;
use iotlb_tests::guest::checks::Way;
use iotlb_tests::guest::{
    Backend, GuestError, Iommu, Kernel, Logs, Machine, MachineOptions, Network, Places, Qemu, checks, skipped,
};

/// Transfers each way in one guest.
const REPEATS: usize = 3;
/// Guests of each kind, unless said otherwise.
const ROUNDS: usize = 3;
/// Bits of 64 KiB.
const BLOCK_BITS: f64 = 65_536.0 * 8.0;
/// Seconds a transfer takes, unless said otherwise.
const SECONDS: u32 = 3;

/// The part of what the front-end's pace allows that is wanted in strict mode, and taken as a measure in lazy mode;
/// see [`bound`].
const BOUND_PART: f64 = 0.5;

/// Modes of the guest's IOMMU, and the share of the reference's throughput that is wanted.
const MODES: [(&str, Iommu, f64); 3] =
    [("passthrough", Iommu::Passthrough, 0.8), ("lazy", Iommu::Lazy, 0.4), ("strict", Iommu::Strict, 0.1)];

/// Who serves the guest's device.
#[derive(Clone, Debug)]
enum Contestant {
    /// QEMU itself.
    Reference,
    /// A daemon and two workers.
    Ours { name: &'static str, arguments: &'static [&'static str], worker: Option<PathBuf> },
}

impl Contestant {
    fn name(&self) -> &'static str {
        match self {
            Contestant::Reference => "QEMU in-process",
            Contestant::Ours { name, .. } => name,
        }
    }

    /// Boots a guest and measures.
    fn measure(
        &self,
        iommu: Iommu,
        logs: &Logs,
        load: &checks::Load,
        places: Option<Places>,
    ) -> Result<Measured, GuestError> {
        let _network = Network::new(matches!(self, Contestant::Ours { .. }))?;
        let backend = match self {
            Contestant::Reference => None,
            Contestant::Ours { arguments, worker, .. } => {
                Some(Backend::tap_with(logs, arguments, worker.as_deref(), places)?)
            }
        };
        let vhost_user = backend.as_ref().map(Backend::vhost_user);
        let options = MachineOptions { qemu: Qemu::V10, kernel: Kernel::V6_12, iommu, vhost_user };
        let mut machine = Machine::boot(&options, logs)?;
        places.map_or(Ok(()), |places| machine.stay(places))?;
        let before = ProcessorTime::now();
        let speeds = checks::throughput(&mut machine, logs, load)?;
        let stolen = before.stolen_since();
        let features = machine.run("cat /sys/class/net/eth0/device/features")?;
        machine.power_off()?;
        let figures = backend.map(|backend| backend.end_with_figures(logs)).transpose()?;
        checks::no_trouble(logs)?;
        println!("{iommu:?}, {}: {speeds:.0?}, features {}", self.name(), bits(features.trim()));
        println!("{iommu:?}, {}: {stolen:.0} % of the processors' time went to other machines", self.name());
        let bound = figures.as_ref().and_then(|figures| bound(figures, iommu));
        if let Some(figures) = figures {
            println!("{iommu:?}, {}: bound {bound:.0?} Mbit/s from {figures}", self.name());
            let carried_mbit = speeds.iter().flatten().sum::<f64>() * f64::from(load.seconds);
            if let Some(needs) = Needs::of(&figures, iommu, carried_mbit) {
                println!("{iommu:?}, {}: {needs}", self.name());
            }
        }
        Ok(Measured { speeds, bound })
    }
}

/// Of one guest.
struct Measured {
    /// Mbit/s from and to the guest.
    speeds: [Vec<f64>; 2],
    /// What the front-end's pace allows, in Mbit/s; none for the reference and where pages come once.
    bound: Option<f64>,
}

/// The most that a guest can carry at the front-end's pace, in Mbit/s: 64 KiB take 16 pages, one after the other, and
/// in strict mode one invalidation. In lazy mode flushes are too rare to count, and each page is still new. Times are
/// the means of the daemon's own figures.
fn bound(figures: &serde_json::Value, iommu: Iommu) -> Option<f64> {
    let taken_away = match iommu {
        Iommu::Lazy => 0.0,
        Iommu::Strict => 1.0,
        // Pages come once.
        Iommu::Passthrough | Iommu::VirtioStrict | Iommu::Off => return None,
    };
    allowed(figures, 16.0, taken_away)
}

/// Mbit/s, when 64 KiB take so many pages and invalidations, one after the other.
fn allowed(figures: &serde_json::Value, pages: f64, invalidations: f64) -> Option<f64> {
    let mean = |name: &str| figures.pointer(&format!("/{name}/mean"))?.as_f64();
    let mut busy_ns = pages * mean("page_ns")?;
    if invalidations > 0.0 {
        busy_ns += invalidations * mean("invalidate_ns")?;
    }
    Some(BLOCK_BITS / busy_ns * 1e3)
}

/// What 64 KiB really took: buffers begin and end within pages, and each that is received into is unmapped by itself.
struct Needs {
    pages: f64,
    invalidations: f64,
    allowed: f64,
}

impl Needs {
    /// Of a session in which `carried_mbit` were carried.
    fn of(figures: &serde_json::Value, iommu: Iommu, carried_mbit: f64) -> Option<Needs> {
        if !matches!(iommu, Iommu::Lazy | Iommu::Strict) {
            return None;
        }
        let blocks = carried_mbit * 1e6 / BLOCK_BITS;
        let each = |name: &str| Some(figures.pointer(&format!("/counters/{name}"))?.as_f64()? / blocks);
        let (pages, invalidations) = (each("updates")?, each("invalidations")?);
        Some(Needs { pages, invalidations, allowed: allowed(figures, pages, invalidations)? })
    }
}

impl std::fmt::Display for Needs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Needs { pages, invalidations, allowed } = self;
        write!(f, "64 KiB took {pages:.1} pages and {invalidations:.1} invalidations, which allow {allowed:.0} Mbit/s")
    }
}

/// What the processors of this machine did so far, in ticks.
struct ProcessorTime {
    all: f64,
    /// Taken by the machine's host for others. A guest that was measured meanwhile says little.
    stolen: f64,
}

impl ProcessorTime {
    fn now() -> ProcessorTime {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let ticks: Vec<f64> =
            text.lines().next().unwrap_or_default().split_whitespace().filter_map(|word| word.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; see proc_stat(5).
        ProcessorTime { all: ticks.iter().take(8).sum(), stolen: ticks.get(7).copied().unwrap_or(f64::NAN) }
    }

    /// The part that was stolen since then, in per cent.
    fn stolen_since(&self) -> f64 {
        let now = ProcessorTime::now();
        100.0 * (now.stolen - self.stolen) / (now.all - self.all)
    }
}

/// A device's feature string, lowest bit first, as the numbers of its bits.
fn bits(features: &str) -> String {
    let set = features.bytes().enumerate().filter(|(_, bit)| *bit == b'1').map(|(number, _)| number.to_string());
    set.collect::<Vec<_>>().join(" ")
}

fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    if skipped() {
        return;
    }
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let rounds = setting("IOTLBD_GUEST_ROUNDS", ROUNDS);
    let (seconds, streams) = (setting("IOTLBD_GUEST_SECONDS", SECONDS), setting("IOTLBD_GUEST_STREAMS", 1));
    let ways: &[Way] = match std::env::var("IOTLBD_GUEST_WAY").as_deref() {
        Ok("from") => &[Way::FromGuest],
        Ok("to") => &[Way::ToGuest],
        Err(_) => &Way::BOTH,
        Ok(other) => {
            eprintln!("IOTLBD_GUEST_WAY={other}: it is `from` or `to` the guest, or not set for both");
            std::process::exit(2);
        }
    };
    let places = match std::env::var("IOTLBD_GUEST_PLACES").as_deref() {
        Err(_) => None,
        Ok("apart") => match Places::find() {
            None => {
                eprintln!("IOTLBD_GUEST_PLACES=apart: that takes two processors, and there is one");
                std::process::exit(2);
            }
            places => places,
        },
        Ok(other) => {
            eprintln!("IOTLBD_GUEST_PLACES={other}: it is `apart`, or not set");
            std::process::exit(2);
        }
    };
    let load = checks::Load { seconds, streams, repeats: REPEATS, ways };
    let mut contestants = vec![
        Contestant::Reference,
        Contestant::Ours { name: "iotlb-net", arguments: &[], worker: None },
        Contestant::Ours { name: "iotlb-net, no look-ahead", arguments: &["--lookahead", "0"], worker: None },
    ];
    if let Some(path) = std::env::var_os("IOTLBD_GUEST_WORKER") {
        let worker = Some(PathBuf::from(path));
        contestants.push(Contestant::Ours { name: "iotlb-net, another build", arguments: &[], worker });
    }
    if let Ok(only) = std::env::var("IOTLBD_GUEST_ONLY") {
        contestants.retain(|contestant| contestant.name().ends_with(only.as_str()));
    }
    let mut rows = Vec::new();
    for (mode, iommu, wanted) in MODES.into_iter().filter(|(mode, ..)| mode.contains(&filter)) {
        // All misses of passthrough come once, so there is nothing that look-ahead could change.
        let here: Vec<&Contestant> =
            contestants.iter().filter(|c| iommu != Iommu::Passthrough || !c.name().contains("look-ahead")).collect();
        let mut speeds = vec![[Vec::new(), Vec::new()]; here.len()];
        let mut bounds = vec![Vec::new(); here.len()];
        for round in 0..rounds {
            for (number, contestant) in here.iter().enumerate() {
                eprintln!("{mode}, round {} of {rounds}: {}", round + 1, contestant.name());
                match one(contestant, iommu, mode, number, &load, places) {
                    Ok(measured) => {
                        let ways = measured.speeds.into_iter().zip(&mut speeds[number]);
                        ways.for_each(|(new, all)| all.extend(new));
                        bounds[number].extend(measured.bound);
                    }
                    Err(error) => {
                        eprintln!("{mode}, {}: {error}", contestant.name());
                        std::process::exit(1);
                    }
                }
            }
        }
        let medians: Vec<[f64; 2]> = speeds.iter_mut().map(|ways| [0, 1].map(|way| median(&mut ways[way]))).collect();
        let bounds: Vec<f64> = bounds.iter_mut().map(|bounds| median(bounds)).collect();
        for (way, direction) in ways.iter().map(|way| (*way as usize, way.name())) {
            let Some(reference) = medians.first().map(|median| median[way]) else { continue };
            for (number, contestant) in here.iter().enumerate().skip(1) {
                let (median, bound, all) = (medians[number], bounds[number], &speeds[number]);
                let (ours, ratio) = (median[way], median[way] / reference);
                println!(
                    "{mode:<12} {direction:<15} {:<26} {ours:>6.0} Mbit/s, reference {reference:>6.0}: {ratio:.2} \
                     of it (wanted {wanted})",
                    contestant.name()
                );
                if !bound.is_nan() {
                    let (part, limit) = (ours / bound, bound / reference);
                    println!(
                        "{mode:<12} {direction:<15} {:<26} {ours:>6.0} Mbit/s, bound {bound:>10.0}: {part:.2} of it \
                         (wanted {BOUND_PART}); the bound is {limit:.2} of the reference",
                        contestant.name()
                    );
                    rows.push(serde_json::json!({
                        "mode": mode, "direction": direction, "contestant": contestant.name(), "mbit_per_s": ours,
                        "apart": places.is_some(),
                        "bound_mbit_per_s": bound, "ratio": part, "wanted": BOUND_PART, "ok": part >= BOUND_PART,
                    }));
                }
                rows.push(serde_json::json!({
                    "mode": mode, "direction": direction, "contestant": contestant.name(), "mbit_per_s": ours,
                    "apart": places.is_some(),
                    "reference_mbit_per_s": reference, "ratio": ratio, "wanted": wanted, "ok": ratio >= wanted,
                    "all_mbit_per_s": all[way],
                }));
            }
        }
    }
    let path = json_path().with_file_name("bench-guest.json");
    let text = serde_json::Value::Array(rows).to_string() + "\n";
    if let Err(error) = std::fs::write(&path, text) {
        eprintln!("cannot write {}: {error}", path.display());
        std::process::exit(1);
    }
}

/// In a thread of its own: the network namespace is the thread's, and ends with it.
fn one(
    contestant: &Contestant,
    iommu: Iommu,
    mode: &str,
    number: usize,
    load: &checks::Load,
    places: Option<Places>,
) -> Result<Measured, GuestError> {
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            let logs = Logs::new(&format!("bench-{mode}-{number}"))?;
            contestant.measure(iommu, &logs, load, places)
        });
        run.join().unwrap_or_else(|_| Err(GuestError::Check("the measuring thread panicked".to_owned())))
    })
}
