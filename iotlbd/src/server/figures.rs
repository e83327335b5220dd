//! What a server measures of itself, and where it writes that.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hdrhistogram::Histogram;
use rustix::fs::OFlags;
use serde::Serialize;
use tracing::warn;

use crate::device::{Counters, Device};

/// Digits kept of a time: two tell one per cent apart.
const DIGITS: u8 = 2;

/// Times of one kind.
#[derive(Clone, Copy, Debug, Serialize)]
struct Times {
    count: u64,
    mean: f64,
    p50: u64,
    p99: u64,
    max: u64,
}

impl Times {
    fn of(histogram: &Histogram<u64>) -> Times {
        Times {
            count: histogram.len(),
            mean: histogram.mean(),
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        }
    }
}

/// What is written: one JSON object.
#[derive(Debug, Serialize)]
struct Report {
    counters: Counters,
    /// How long the front-end was busy with each page it was asked for, acknowledgement included.
    page_ns: Times,
    /// From an INVALIDATE to its acknowledgement, as far as it is in the daemon's hands.
    invalidate_ns: Times,
}

/// Figures of one server.
#[derive(Debug)]
pub(crate) struct Figures {
    path: Option<PathBuf>,
    invalidate_ns: Histogram<u64>,
    /// When the invalidation arrived that is not answered yet.
    invalidated_ns: Option<u64>,
}

impl Figures {
    pub(crate) fn new(path: Option<PathBuf>) -> Figures {
        // Grows with the times that come: an idle device has none.
        let invalidate_ns = Histogram::new(DIGITS).expect("0 to 5 digits");
        Figures { path, invalidate_ns, invalidated_ns: None }
    }

    /// An INVALIDATE arrived.
    pub(crate) fn invalidated(&mut self, now_ns: u64) {
        self.invalidated_ns = Some(now_ns);
    }

    /// Whether an INVALIDATE waits to be [`answered`](Figures::answered).
    pub(crate) fn waits(&self) -> bool {
        self.invalidated_ns.is_some()
    }

    /// What had arrived was answered.
    pub(crate) fn answered(&mut self, now_ns: u64) {
        if let Some(since) = self.invalidated_ns.take() {
            // An Err cannot be: it grows up to any number.
            let _ = self.invalidate_ns.record(now_ns.saturating_sub(since));
        }
    }

    /// The front-end is gone, and with it whoever waited for an answer.
    pub(crate) fn forget(&mut self) {
        self.invalidated_ns = None;
    }

    /// Writes everything, if somebody wants it. A failure is told and changes nothing else.
    pub(crate) fn write(&self, device: &Device) {
        let Some(path) = &self.path else { return };
        let report = Report {
            counters: device.counters(),
            page_ns: Times::of(device.page_ns()),
            invalidate_ns: Times::of(&self.invalidate_ns),
        };
        if let Err(error) = write(path, &report) {
            warn!("--stats: cannot write {}: {error}", path.display());
        }
    }
}

/// Under another name first, so that a reader finds a whole file. What is there and is no file (a pipe, a terminal,
/// `/dev/null`, a link to one) is written to as it stands: a file put in its place would take it from everybody. What
/// has the other name is nobody's: it is removed, and nothing is written through it.
fn write(path: &Path, report: &Report) -> io::Result<()> {
    let mut text = serde_json::to_vec(report)?;
    text.push(b'\n');
    if std::fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        // Without waiting: nobody may read.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        return OpenOptions::new().write(true).truncate(true).custom_flags(flags).open(path)?.write_all(&text);
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // What somebody puts there in this moment is not opened (EXCL): a link would lead anywhere, a pipe could block.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    OpenOptions::new().write(true).create_new(true).custom_flags(flags).open(&new)?.write_all(&text)?;
    std::fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use iotlb_proto::table::{TableConfig, TableWriter};

    use super::*;
    use crate::device::DeviceConfig;

    fn device() -> Device {
        let (table, _fd) = TableWriter::create(&TableConfig { size: 1 << 20, generation: 1 }).expect("a table");
        Device::new(DeviceConfig::net(1, 400, 1 << 30), table)
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let (link, aim) = (folder.path().join("link"), folder.path().join("aim"));
        std::fs::write(&aim, "x".repeat(1 << 16)).expect("a file");
        std::os::unix::fs::symlink(&aim, &link).expect("a link");
        Figures::new(Some(link.clone())).write(&device());
        assert!(std::fs::symlink_metadata(&link).expect("still there").is_symlink());
        let text = std::fs::read_to_string(&aim).expect("a file");
        assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "what was there before is left behind");

        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        Figures::new(Some(pipe.clone())).write(&device());
        assert!(!std::fs::symlink_metadata(&pipe).expect("still there").is_file());
    }

    #[test]
    fn what_stands_where_the_new_file_is_made_is_not_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, new) = (folder.path().join("stats.json"), folder.path().join("stats.json.new"));
        let (aim, alien) = (folder.path().join("aim"), "not ours");
        let figures = Figures::new(Some(path.clone()));
        let written = || {
            let text = std::fs::read_to_string(&path).expect("written");
            assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
            assert!(std::fs::symlink_metadata(&path).expect("written").is_file());
            assert!(std::fs::symlink_metadata(&new).is_err(), "nothing is left behind");
            std::fs::remove_file(&path).expect("ours");
        };
        std::fs::write(&aim, alien).expect("a file");
        std::os::unix::fs::symlink(&aim, &new).expect("a link");
        figures.write(&device());
        assert_eq!(std::fs::read_to_string(&aim).expect("still there"), alien);
        written();

        std::fs::hard_link(&aim, &new).expect("a second name");
        figures.write(&device());
        assert_eq!(std::fs::read_to_string(&aim).expect("still there"), alien);
        written();

        // Nobody reads: to open it for writing would last for ever.
        nix::unistd::mkfifo(&new, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            figures.write(&device());
            done.send(()).expect("the test waits");
        });
        ended.recv_timeout(std::time::Duration::from_secs(60)).expect("the loop would stand still");
        written();
    }

    #[test]
    fn only_invalidations_that_arrived_are_counted_and_a_missing_folder_is_no_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("stats.json");
        let mut figures = Figures::new(Some(path.clone()));
        figures.answered(5);
        figures.invalidated(100);
        assert!(figures.waits());
        figures.answered(350);
        figures.answered(999);
        let device = device();
        figures.write(&device);
        let text = std::fs::read_to_string(&path).expect("written");
        let value: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value.pointer("/invalidate_ns/count").and_then(serde_json::Value::as_u64), Some(1));
        assert!(value.pointer("/invalidate_ns/max").and_then(serde_json::Value::as_u64).is_some_and(|max| max >= 250));
        assert_eq!(value.pointer("/counters/misses").and_then(serde_json::Value::as_u64), Some(0));
        drop(folder);
        figures.write(&device);
    }
}
