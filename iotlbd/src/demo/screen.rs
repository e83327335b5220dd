//! The terminal: taken over for the live view, given back on every path. And the signals that end the demo.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use iotlb_proto::signals::stop_set;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use super::view::{Snapshot, Theme, draw};
use crate::sim::channel::poll_fds;

/// The terminal in raw mode on its alternate screen. Dropping it gives it back; so does a panic.
#[derive(Debug)]
pub struct Screen {
    terminal: DefaultTerminal,
    theme: Theme,
}

impl Screen {
    /// Takes the terminal over.
    pub fn open() -> io::Result<Screen> {
        Ok(Screen { terminal: ratatui::try_init()?, theme: Theme::from_environment() })
    }

    /// Draws the view.
    pub fn show(&mut self, snapshot: &Snapshot) -> io::Result<()> {
        let theme = self.theme;
        self.terminal.draw(|frame| draw(frame, snapshot, theme)).map(drop)
    }

    /// Whether the user asked to end, waiting at most `timeout` for a key.
    pub fn wants_to_quit(&mut self, timeout: Duration) -> io::Result<bool> {
        let mut left = timeout;
        while event::poll(left)? {
            left = Duration::ZERO;
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                let interrupted = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
                if interrupted || matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Should it fail there is no terminal left to say so on.
        let _ = ratatui::try_restore();
    }
}

/// The signals that end the demo, as they end the daemon, as something to look at.
#[derive(Debug)]
pub struct StopSignals {
    fd: SignalFd,
}

impl StopSignals {
    /// Blocks the signals for this thread and those it starts. Children would inherit that: they are started with none
    /// blocked.
    pub fn block() -> io::Result<StopSignals> {
        let set = stop_set();
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(StopSignals { fd })
    }

    /// Whether one came, waiting at most `timeout`.
    pub fn came(&self, timeout: Duration) -> io::Result<bool> {
        Ok(poll_fds(&[self.fd.as_fd()], timeout)?[0])
    }
}
