//! Bounds what others can make this process write into its log.
//!
//! Nearly every line is about something that a front-end or a worker did: it connected, claimed a queue, gave one back.
//! Whoever does so in a loop would fill the disk that the log is kept on. So of each kind, that is of each place in the
//! code that writes a line, only so many are written in a time ([`LogBudget`]). Who wants to read `debug` and below
//! has asked for it, and gets all of them; so do errors.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Filter};

use crate::log_budget::{LogBudget, Taken};

/// The filter. It says in the log that it left something out.
pub(super) struct LogLimit<W> {
    now_ns: fn() -> u64,
    kinds: Mutex<HashMap<Identifier, LogBudget>>,
    log: W,
}

impl<W> LogLimit<W> {
    pub(super) fn new(log: W, now_ns: fn() -> u64) -> LogLimit<W> {
        LogLimit { now_ns, kinds: Mutex::default(), log }
    }
}

impl<S: Subscriber, W: for<'a> MakeWriter<'a>> Filter<S> for LogLimit<W> {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        let kind = event.metadata();
        // Errors name what an operator has to do; peers cannot repeat them at will.
        if *kind.level() > Level::INFO || *kind.level() == Level::ERROR {
            return true;
        }
        // A panic elsewhere has left whole numbers behind.
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.entry(kind.callsite()).or_default().spend((self.now_ns)()) {
            Taken::Yes => true,
            Taken::First => {
                let (module, line) = (kind.target(), kind.line().unwrap_or(0));
                let text =
                    format!("(more lines like those of {module}, line {line}, are left out for up to ten seconds)\n");
                // One call, as for any line. An Err means that the log is closed: there is nowhere else to say so.
                let _ = self.log.make_writer().write_all(text.as_bytes());
                false
            }
            Taken::No => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use iotlb_proto::sync::{AtomicU64, Ordering};
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    static NOW_NS: AtomicU64 = AtomicU64::new(0);

    fn now_ns() -> u64 {
        // Relaxed: one thread.
        NOW_NS.load(Ordering::Relaxed)
    }

    #[test]
    fn of_each_kind_some_lines_are_written_and_later_some_more() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let log = {
            let written = Arc::clone(&written);
            move || Lines(Arc::clone(&written))
        };
        let limit = LogLimit::new(log.clone(), now_ns);
        let lines = tracing_subscriber::fmt::layer().with_writer(log).with_ansi(false).with_filter(limit);
        let count = |what: &str| {
            let written = written.lock().expect("no panic before");
            String::from_utf8_lossy(&written).lines().filter(|line| line.contains(what)).count()
        };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            for round in 1..=2 {
                for _ in 0..1000 {
                    tracing::info!("a worker came");
                    tracing::debug!("asked for");
                }
                tracing::warn!("something else");
                assert_eq!((count("a worker came"), count("something else")), (10 * round, round));
                assert_eq!((count("left out"), count("asked for")), (round, 1000 * round));
                NOW_NS.fetch_add(10_000_000_000, Ordering::Relaxed);
            }
        });
    }

    #[derive(Clone)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic before").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
