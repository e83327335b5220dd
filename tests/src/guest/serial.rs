//! The line to the guest: commands out, their output in. The other end is `tests/guest/init`.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::GuestError;
use super::process::readable;

/// The most a command may write, bytes. A guest that goes on for ever must not fill the host's memory.
const OUTPUT_BYTES_MAX: usize = 4 << 20;

/// The guest's second serial port.
#[derive(Debug)]
pub(crate) struct Serial {
    stream: UnixStream,
    received: Vec<u8>,
    next_id: u32,
    log: File,
}

impl Serial {
    pub(crate) fn new(stream: UnixStream, log: File) -> Serial {
        Serial { stream, received: Vec::new(), next_id: 1, log }
    }

    /// Waits until the guest takes commands, and returns the seconds its boot took by its own clock.
    pub(crate) fn ready(&mut self, deadline: Instant) -> Result<String, GuestError> {
        let (_, rest) = self.lines_until("the guest to boot", "ready ", deadline)?;
        Ok(rest)
    }

    /// Runs a command. Returns its exit status and what it wrote.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<(i32, String), GuestError> {
        let deadline = Instant::now() + limit;
        let id = self.send(command)?;
        let (output, status) = self.lines_until(&format!("`{command}`"), &format!("done {id} "), deadline)?;
        let status = status.trim().parse().map_err(|_| GuestError::Check(format!("guest sent status {status:?}")))?;
        Ok((status, output))
    }

    /// Starts a command that will not be waited for: one that ends the guest.
    pub(crate) fn send(&mut self, command: &str) -> Result<u32, GuestError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = format!("run {id} {command}\n");
        let _ = self.log.write_all(format!("> {line}").as_bytes());
        self.stream.write_all(line.as_bytes()).map_err(GuestError::io("sending a command to the guest"))?;
        Ok(id)
    }

    /// Collects lines until one begins with `mark`; returns those before it and the rest of that line.
    fn lines_until(&mut self, what: &str, mark: &str, deadline: Instant) -> Result<(String, String), GuestError> {
        let started = Instant::now();
        let mut output = String::new();
        loop {
            while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let bytes: Vec<u8> = self.received.drain(..=end).collect();
                let line = String::from_utf8_lossy(&bytes);
                let line = line.trim_end_matches(['\n', '\r']);
                if let Some(rest) = line.strip_prefix(mark) {
                    return Ok((output, rest.to_string()));
                }
                output.push_str(line);
                output.push('\n');
            }
            if output.len() + self.received.len() > OUTPUT_BYTES_MAX {
                return Err(GuestError::Check(format!("guest: {what} writes more than {OUTPUT_BYTES_MAX} bytes")));
            }
            if !readable(&[self.stream.as_fd()], deadline)? {
                return Err(GuestError::TimedOut {
                    what: format!("{what} (written so far: {output})"),
                    limit: deadline.saturating_duration_since(started),
                });
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(GuestError::Check(format!("guest: QEMU ended while waiting for {what}"))),
                Ok(count) => {
                    let _ = self.log.write_all(&chunk[..count]);
                    self.received.extend_from_slice(&chunk[..count]);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(GuestError::io("reading from the guest")(error)),
            }
        }
    }
}
