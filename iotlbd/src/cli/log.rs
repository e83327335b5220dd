//! The log on standard error, written by a thread of its own.
//!
//! Whoever reads the log may stop to (a full pipe, a stopped terminal, a busy collector), and a guest must not stand
//! still for that. So lines are queued, and dropped when the queue is full.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use iotlb_proto::sync::{AtomicU64, Ordering};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use super::log_limit::LogLimit;
use crate::server::now_ns;

/// Lines that wait to be written.
const LINES_MAX: usize = 4096;
/// Longest wait at the end for lines to be written.
const FLUSH_MS: u64 = 200;

enum Item {
    Line(Vec<u8>),
    /// Everything before it was written.
    Flush(SyncSender<()>),
}

/// Queues lines.
#[derive(Clone)]
pub(super) struct Log {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

/// Sets the log up. `filter` is one the parser took.
pub(super) fn start(filter: &str) -> Log {
    let (queue, lines) = sync_channel(LINES_MAX);
    let dropped = Arc::new(AtomicU64::new(0));
    let log = Log { queue, dropped: Arc::clone(&dropped) };
    // An Err leaves the process without a log, but serving.
    let _ = thread::Builder::new().name(String::from("iotlbd-log")).spawn(move || write_all(&lines, &dropped));
    // The filter was checked by the parser; should it not parse here, `info` is the better log than none.
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = tracing_subscriber::fmt::layer().with_writer(log.clone()).with_ansi(io::stderr().is_terminal());
    let lines = lines.with_filter(LogLimit::new(log.clone(), now_ns));
    // An Err means that a log is set up already, which serves as well.
    let _ = tracing_subscriber::registry().with(filter).with(lines).try_init();
    log
}

impl Log {
    /// Waits a moment until all that was logged is written.
    pub(super) fn flush(&self) {
        let (done, written) = sync_channel(1);
        if self.queue.try_send(Item::Flush(done)).is_ok() {
            // An Err means that nobody reads the log: the end does not wait for that.
            let _: Result<(), RecvTimeoutError> = written.recv_timeout(Duration::from_millis(FLUSH_MS));
        }
    }
}

fn write_all(lines: &Receiver<Item>, dropped: &AtomicU64) {
    let mut out = io::stderr();
    for item in lines {
        // Relaxed: a count that stands for itself.
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            // An Err means that standard error is closed. There is nowhere else to say so.
            let _ = writeln!(out, "({lost} lines of the log were dropped here: it was not read fast enough)");
        }
        match item {
            Item::Line(line) => {
                let _ = out.write_all(&line);
            }
            Item::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

impl Write for Log {
    /// One call a line: that is how the formatter writes.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Item::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}
