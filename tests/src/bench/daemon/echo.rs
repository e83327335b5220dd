//! The bare peer of an acknowledgement: sends 20 bytes for 44 and does nothing else. It waits as the daemon does, and
//! lets others run as often: a peer that yields after every empty poll has a yield's work in half of its answers.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::Outcome;
use super::rhythm::Rhythm;
use super::service::{ACK_LEN, IOTLB_LEN};
use crate::processors::bind;

/// How long it polls after a message before it sleeps, about as long as the daemon.
const POLLS: Duration = Duration::from_micros(50);

/// Where it sleeps.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sleeps {
    /// In `epoll_wait`, as the daemon does, which has more to wait for than one socket.
    InEpoll,
    /// In the call that receives.
    InReceive,
}

/// When it takes a message from its socket. To take it wakes up an asker that sleeps on its end, for nothing or for an
/// answer that comes within the microsecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// Before it answers.
    First,
    /// After, as the daemon does.
    Last,
}

/// A thread that answers. It sleeps while nobody asks.
pub(super) struct Echo {
    /// Where to ask.
    pub(super) near: UnixStream,
    thread: JoinHandle<()>,
}

impl Echo {
    pub(super) fn start(cpu: Option<usize>, sleeps: Sleeps, takes: Takes) -> std::io::Result<Echo> {
        let (near, far) = UnixStream::pair()?;
        let set = match sleeps {
            Sleeps::InReceive => None,
            Sleeps::InEpoll => {
                let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
                let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
                epoll::add(&set, &far, epoll::EventData::new_u64(0), flags)?;
                Some(set)
            }
        };
        let thread = std::thread::spawn(move || {
            bind(cpu);
            answer(&far, set.as_ref(), takes);
        });
        Ok(Echo { near, thread })
    }

    pub(super) fn end(self) -> Outcome {
        drop(self.near);
        Ok(self.thread.join().map_err(|_| "the echo panicked")?)
    }
}

/// Polls for a while after a message, yielding now and then, then sleeps, in `set` if there is one.
fn answer(stream: &UnixStream, set: Option<&OwnedFd>, takes: Takes) {
    let mut message = [0; IOTLB_LEN];
    let mut awake_until = Instant::now();
    let mut events = Vec::with_capacity(1);
    let mut rhythm = Rhythm::default();
    loop {
        let is_awake = Instant::now() < awake_until;
        let mut flags = if is_awake || set.is_some() { RecvFlags::DONTWAIT } else { RecvFlags::empty() };
        flags.set(RecvFlags::PEEK, takes == Takes::Last);
        match recv(stream, &mut message[..], flags) {
            Ok((IOTLB_LEN, _)) => {
                if send(stream, &[0; ACK_LEN], SendFlags::NOSIGNAL).is_err() {
                    return;
                }
                if takes == Takes::Last
                    && !matches!(recv(stream, &mut message[..], RecvFlags::DONTWAIT), Ok((IOTLB_LEN, _)))
                {
                    return;
                }
                awake_until = Instant::now() + POLLS;
                rhythm.worked();
            }
            Err(Errno::AGAIN) => match set.filter(|_| !is_awake) {
                Some(set) => {
                    events.clear();
                    // Every way to wake up is a reason to look.
                    let _ = epoll::wait(set, spare_capacity(&mut events), None);
                }
                None => rhythm.idle(),
            },
            _ => return,
        }
    }
}
