//! Bytes: an entry, an attached worker, an idle device.

use iotlb_client::{Access, AttachOptions, Attachment};
use iotlb_proto::iova::IovaRange;
use iotlb_proto::layout::worker::SEGMENT_SIZE;
use iotlb_proto::table::{TableConfig, TableWriter};
use iotlbd::sim::{FrontEnd, FrontEndOptions, Guest, Unmapping, VirtioNet};

use super::{Outcome, Run};
use crate::bench::child::{self, Helper};
use crate::bench::report::{Row, Target};
use crate::bench::rig;

/// Workers attached at once. Each has threads of its own in this process.
const WORKERS: u32 = 16;
/// Bytes of guest memory of the idle device.
const GUEST_SIZE: u64 = 16 << 20;
/// Bytes of the table with a million entries.
const TABLE_SIZE: u64 = 32 << 20;

/// Measures the group.
///
/// # Errors
/// The service does not stand, or the system does not tell.
pub fn run(run: &mut Run) -> Outcome {
    entries(run)?;
    daemon(run)
}

fn entries(run: &mut Run) -> Outcome {
    let count: u64 = if run.quick { 1 << 14 } else { 1 << 20 };
    eprintln!("footprint: {count} entries");
    let pages = rig::pages(count);
    let before = written("self")?;
    let (mut writer, _fd) = TableWriter::create(&TableConfig { size: TABLE_SIZE, generation: 1 })?;
    for page in &pages {
        writer.insert(IovaRange::page_of(page.iova), page.target, Access::READ_WRITE)?;
    }
    let bytes = written("self")?.saturating_sub(before) as f64 / writer.stats().entries as f64;
    let name = format!("memory of a live 4 KiB entry, {count} entries");
    run.rows.push(Row::new(name, "B", bytes, 8.0, "the bare word", Target::CostsAtMost(9.0 / 8.0)));
    Ok(())
}

fn daemon(run: &mut Run) -> Outcome {
    eprintln!("footprint: a daemon, idle and with {WORKERS} workers");
    let folder = tempfile::tempdir()?;
    let mut daemon = Helper::daemon(folder.path())?;
    let process = daemon.id().to_string();
    let before = written(&process)?;
    daemon.order(b's')?;
    let guest = Guest::new(0, GUEST_SIZE)?;
    let socket = child::front_end_socket(folder.path());
    let mut front_end = FrontEnd::connect(&socket, guest, FrontEndOptions::default())?;
    let _driver = VirtioNet::start(&mut front_end, Unmapping::Strict)?;
    let control = child::control_socket(folder.path());
    let idle = written(&process)?.saturating_sub(before);
    let name = "idle device: memory the daemon wrote, but no page tables, no kernel objects";
    run.rows.push(Row::new(name, "KiB", kib(idle), 128.0, "the limit", Target::CostsAtMost(1.0)));
    let name = "the same, all that is resident, program included";
    run.rows.push(Row::new(name, "KiB", kib(resident(&process)?), 128.0, "for scale", Target::None));
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        let worker = Attachment::connect(&control, &AttachOptions::default())?;
        // A reader raises the mark up to which the daemon looks at slots.
        workers.push((worker.reader()?, worker));
    }
    front_end.flush()?;
    let attached = written(&process)?.saturating_sub(before).saturating_sub(idle) / u64::from(WORKERS);
    let name = "an attached worker: memory the daemon wrote";
    run.rows.push(Row::new(name, "KiB", kib(attached), 64.0, "the limit", Target::CostsAtMost(1.0)));
    let name = "an attached worker: shared segment, all of it";
    run.rows.push(Row::new(name, "KiB", kib(SEGMENT_SIZE as u64), 64.0, "the limit", Target::CostsAtMost(1.0)));
    // A process of its own: in this one, other workers have long paid for what they share.
    let mut worker = Helper::worker(&control)?;
    let process = worker.id().to_string();
    let before = private(&process)?;
    worker.order(b'a')?;
    let attached = private(&process)?.saturating_sub(before);
    let name = "a worker in its own process: anonymous memory and page tables";
    run.rows.push(Row::new(name, "KiB", kib(attached), 64.0, "for scale", Target::None));
    Ok(())
}

fn kib(bytes: u64) -> f64 {
    bytes as f64 / 1024.0
}

/// Bytes of a process that are its own doing: anonymous memory, changed copies of its program's data, and what is
/// resident of shared memory it made. Clean pages of programs and libraries are not: all processes share them.
fn written(process: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let (mut bytes, mut memfd) = (0, false);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else { continue };
        match name {
            "Rss:" if memfd => bytes += value.parse::<u64>()? * 1024,
            "Anonymous:" if !memfd => bytes += value.parse::<u64>()? * 1024,
            // A mapping's own line: its addresses come first, its name after four more words.
            _ if !name.ends_with(':') => memfd = words.nth(3).is_some_and(|name| name.starts_with("/memfd:")),
            _ => {}
        }
    }
    Ok(bytes)
}

/// Bytes of a process that nobody else has a use for: anonymous memory and page tables.
fn private(process: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    Ok(field(&rollup, "Anonymous:")? + field(&status, "VmPTE:")?)
}

fn resident(process: &str) -> Result<u64, Box<dyn std::error::Error>> {
    field(&std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?, "Rss:")
}

fn field(text: &str, name: &str) -> Result<u64, Box<dyn std::error::Error>> {
    let line =
        text.lines().find(|line| line.starts_with(name)).ok_or("the system does not tell a field of a process")?;
    let kib: u64 = line.split_whitespace().nth(1).ok_or("a number")?.parse()?;
    Ok(kib * 1024)
}
