//! The library's own complaints: memory that cannot be mapped, a lease that was lost, a revocation.

use std::ffi::{CString, c_char, c_void};
use std::fmt::{Debug, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::status::iotlb_status::IOTLB_REFUSED;
use crate::status::{Failure, iotlb_status, told};

/// How grave a line is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum iotlb_log_level {
    /// Something does not work.
    IOTLB_LOG_ERROR = 1,
    /// Something is amiss.
    IOTLB_LOG_WARN = 2,
    /// What an operator may want to know.
    IOTLB_LOG_INFO = 3,
    /// What helps to find a fault.
    IOTLB_LOG_DEBUG = 4,
}

/// Takes one line, without a newline, that is gone when the call returns. Called by any thread of the library or of the
/// caller, several at once. It must return, and not by an exception, a jump or the end of its thread; it must not call
/// this library; and it should not wait: others may wait for whoever logs.
pub type iotlb_log_function =
    Option<unsafe extern "C" fn(context: *mut c_void, level: iotlb_log_level, line: *const c_char)>;

/// Who takes the lines.
struct Sink {
    function: unsafe extern "C" fn(context: *mut c_void, level: iotlb_log_level, line: *const c_char),
    context: *mut c_void,
    least: Level,
}

// SAFETY: the context is only handed to the function, which by the promise of `iotlb_set_log`'s caller may be called
// with it by any thread.
unsafe impl Send for Sink {}
// SAFETY: the same; several threads at once are part of the promise.
unsafe impl Sync for Sink {}

/// Has lines of `least` and graver ones handed to `log`, with `context`, until the program ends. Before that nothing is
/// logged. Once only: log and context must stay good.
///
/// IOTLB_OK, IOTLB_INVALID, or IOTLB_REFUSED when lines go somewhere already; iotlb_last_error has the reason.
///
/// # Safety
/// `log` may be called with `context` by any thread, by several at once, until the program ends.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn iotlb_set_log(log: iotlb_log_function, context: *mut c_void, least: u32) -> iotlb_status {
    let Some(function) = log else { return told(Err(Failure::null("the log function"))) };
    let least = match least {
        _ if least == iotlb_log_level::IOTLB_LOG_ERROR as u32 => Level::ERROR,
        _ if least == iotlb_log_level::IOTLB_LOG_WARN as u32 => Level::WARN,
        _ if least == iotlb_log_level::IOTLB_LOG_INFO as u32 => Level::INFO,
        _ if least == iotlb_log_level::IOTLB_LOG_DEBUG as u32 => Level::DEBUG,
        _ => return told(Err(Failure::level(least))),
    };
    let taken = tracing::subscriber::set_global_default(Sink { function, context, least });
    told(taken.map_err(|_| Failure::of(IOTLB_REFUSED, &"the library's lines go somewhere already")))
}

impl Subscriber for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Graver levels are smaller.
        metadata.is_event() && *metadata.level() <= self.least
    }

    // There are no spans: none is enabled.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let level = match *event.metadata().level() {
            Level::ERROR => iotlb_log_level::IOTLB_LOG_ERROR,
            Level::WARN => iotlb_log_level::IOTLB_LOG_WARN,
            Level::INFO => iotlb_log_level::IOTLB_LOG_INFO,
            _ => iotlb_log_level::IOTLB_LOG_DEBUG,
        };
        let text = CString::new(line.whole().replace('\0', " ")).unwrap_or_default();
        // SAFETY: the promise of `iotlb_set_log`'s caller.
        unsafe { (self.function)(self.context, level, text.as_ptr()) };
    }
}

/// A message and what belongs to it: `message key=value key=value`.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn whole(mut self) -> String {
        self.message.push_str(&self.fields);
        self.message
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        // An Err cannot be: a string takes everything.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
