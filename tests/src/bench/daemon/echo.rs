//! The bare peer of an acknowledgement: sends 20 bytes for 44 and does nothing else.

use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::Outcome;
use super::service::{ACK_LEN, IOTLB_LEN};
use crate::processors::bind;

/// How long it polls after a message before it sleeps, about as long as the daemon.
const POLLS: Duration = Duration::from_micros(50);

/// A thread that answers. It sleeps while nobody asks.
pub(super) struct Echo {
    /// Where to ask.
    pub(super) near: UnixStream,
    thread: JoinHandle<()>,
}

impl Echo {
    pub(super) fn start(cpu: Option<usize>) -> std::io::Result<Echo> {
        let (near, far) = UnixStream::pair()?;
        let thread = std::thread::spawn(move || {
            bind(cpu);
            answer(&far);
        });
        Ok(Echo { near, thread })
    }

    pub(super) fn end(self) -> Outcome {
        drop(self.near);
        Ok(self.thread.join().map_err(|_| "the echo panicked")?)
    }
}

/// Polls for a while after a message, yielding, then sleeps.
fn answer(stream: &UnixStream) {
    let mut message = [0; IOTLB_LEN];
    let mut awake_until = Instant::now();
    loop {
        let flags = if Instant::now() < awake_until { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        match recv(stream, &mut message[..], flags) {
            Ok((IOTLB_LEN, _)) => {
                if send(stream, &[0; ACK_LEN], SendFlags::NOSIGNAL).is_err() {
                    return;
                }
                awake_until = Instant::now() + POLLS;
            }
            Err(Errno::AGAIN) => std::thread::yield_now(),
            _ => return,
        }
    }
}
