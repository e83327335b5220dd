//! Lines of a log on their way to standard error, written by a thread of its own.
//!
//! Whoever reads the log may stop to (a full pipe, a stopped terminal, a busy collector) or be gone, and a guest must
//! not stand still for that, let alone lose its device. So lines are queued, and dropped when the queue is full.
//!
//! The daemon, which depends on this library for its demo, queues its log here as well.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use iotlb_proto::sync::{AtomicU64, Ordering};
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written.
const LINES_MAX: usize = 4096;
/// Longest wait at the end for lines to be written.
const FLUSH_MS: u64 = 200;

#[derive(Debug)]
enum Item {
    Line(Vec<u8>),
    /// Everything before it was written.
    Flush(SyncSender<()>),
}

/// Queues lines. Never blocks, and never fails.
#[derive(Clone, Debug)]
pub struct Log {
    queue: SyncSender<Item>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    /// Starts the thread that writes, under this name. It inherits the signals that are blocked: block them first.
    #[must_use]
    pub fn start(thread: &str) -> Log {
        let (queue, lines) = sync_channel(LINES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let log = Log { queue, dropped: Arc::clone(&dropped) };
        // An Err leaves the process without a log, but serving.
        let _ = thread::Builder::new().name(thread.to_owned()).spawn(move || write_all(&lines, &dropped));
        log
    }

    /// Waits a moment until all that was logged is written.
    pub fn flush(&self) {
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
