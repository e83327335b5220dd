//! The bare chains that a miss is measured against: a word from the asker to the answerer, 44 bytes over a socket to a
//! blocked thread, which makes an UPDATE of them as the front-end does, 44 bytes back, a word to the asker.
//!
//! In `Polling` the asker spins and the answerer polls, for as long as it takes, and yields as often as the daemon
//! ([`rhythm`](super::rhythm)). Its front-end is the one
//! that the daemon has, so UPDATEs are acknowledged, and it can be asked for many pages. In `Sleeping` nobody polls: an
//! eventfd wakes the answerer up in `epoll_wait`, the socket the front-end in `read`, the socket the answerer in
//! `epoll_wait`, a futex the asker, unless it is told to spin.

use std::hint::spin_loop;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use iotlb_proto::sync::{AtomicU32, Ordering};
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use rustix::thread::futex;

use super::Outcome;
use super::front_end::{BATCH, FrontEnd};
use super::rhythm::Rhythm;
use super::service::{ACK_LEN, IOTLB_LEN, answer, miss, update};
use crate::processors::bind;

/// How long an asker that is to sleep in the end spins before, as a client does (`SPIN_MAX` there); one that only spins
/// lets others run from then on.
const SPIN: Duration = Duration::from_micros(100);

/// The chain whose asker and answerer poll.
pub(super) struct Polling {
    shared: Arc<Words>,
    answerer: JoinHandle<()>,
    front_end: FrontEnd,
}

/// What the asker and the answerer share, on lines of their own. The words carry nothing but themselves, so they are
/// relaxed.
#[derive(Default)]
struct Words {
    /// How many pages were asked for since the start.
    asked: Line,
    /// The last value of `asked` that all pages have come for.
    answered: Line,
    state: Line,
}

#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU32);

/// The answerer sleeps.
const REST: u32 = 0;
/// It polls.
const AWAKE: u32 = 1;
/// It ends.
const END: u32 = 2;

impl Polling {
    pub(super) fn start(cpu: Option<usize>) -> std::io::Result<Polling> {
        let shared = Arc::new(Words::default());
        let (main, their_main) = UnixStream::pair()?;
        let (back_end, their_back_end) = UnixStream::pair()?;
        let front_end = FrontEnd::spawn(their_main, their_back_end, 0, cpu);
        let words = Arc::clone(&shared);
        let answerer = std::thread::spawn(move || {
            bind(cpu);
            // An Err is the end.
            let _ = relay(&words, &main, &back_end);
        });
        Ok(Polling { shared, answerer, front_end })
    }

    pub(super) fn awake(&self, awake: bool) {
        self.shared.state.0.store(if awake { AWAKE } else { REST }, Ordering::Relaxed);
        self.answerer.thread().unpark();
    }

    /// One chain from end to end, for `pages` pages, at most [`BATCH`].
    ///
    /// # Errors
    /// The answerer is gone.
    pub(super) fn ask(&self, pages: usize) -> Outcome {
        let words = &self.shared;
        let pages = u32::try_from(pages.min(BATCH))?;
        let asked = words.asked.0.load(Ordering::Relaxed).wrapping_add(pages);
        words.asked.0.store(asked, Ordering::Relaxed);
        let yield_after = Instant::now() + SPIN;
        while words.answered.0.load(Ordering::Relaxed) != asked {
            spin_loop();
            if Instant::now() >= yield_after {
                if self.answerer.is_finished() {
                    return Err("the bare chain has ended".into());
                }
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// As [`FrontEnd::plain_updates`].
    ///
    /// # Errors
    /// The answerer is gone.
    pub(super) fn plain_updates(&self, times: &mut Vec<f64>, batches: u64) -> Outcome {
        self.front_end.plain_updates(times, batches, || 0)
    }

    /// Ends it.
    pub(super) fn end(self) -> Outcome {
        self.shared.state.0.store(END, Ordering::Relaxed);
        self.answerer.thread().unpark();
        self.answerer.join().map_err(|_| "the answerer panicked")?;
        self.front_end.join()
    }
}

/// The answerer: a word in, messages out; a message in, a word out if it was the last that was asked for, an
/// acknowledgement out; yields now and then while there is nothing.
fn relay(words: &Words, mut main: &UnixStream, mut back_end: &UnixStream) -> std::io::Result<()> {
    let misses = [miss(); BATCH];
    let mut update = [0; IOTLB_LEN];
    // Pages asked for since the start, and how many of them have not come.
    let (mut taken, mut open) = (0, 0);
    let mut rhythm = Rhythm::default();
    loop {
        match words.state.0.load(Ordering::Relaxed) {
            REST => {
                std::thread::park();
                continue;
            }
            AWAKE => {}
            _ => return Ok(()),
        }
        let asked = words.asked.0.load(Ordering::Relaxed);
        if asked != taken {
            open = BATCH.min(asked.wrapping_sub(taken) as usize);
            taken = asked;
            back_end.write_all(misses[..open].as_flattened())?;
            rhythm.worked();
        }
        match recv(main, &mut update[..], RecvFlags::DONTWAIT) {
            Ok((IOTLB_LEN, _)) => {
                // A plain UPDATE is one that nobody has asked for.
                if open == 1 {
                    words.answered.0.store(taken, Ordering::Relaxed);
                }
                open = open.saturating_sub(1);
                main.write_all(&[0; ACK_LEN])?;
                rhythm.worked();
            }
            Err(Errno::AGAIN) => rhythm.idle(),
            _ => return Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// The chain in which everybody sleeps.
pub(super) struct Sleeping {
    bell: Arc<OwnedFd>,
    answered: Arc<Line>,
    answerer: JoinHandle<()>,
    front_end: JoinHandle<()>,
}

/// The front-end of this chain: it answers each message, blocking, and hears of no acknowledgement. It ends with the
/// stream that is returned.
fn spawn_front_end(cpu: Option<usize>) -> std::io::Result<(UnixStream, JoinHandle<()>)> {
    let (near, far) = UnixStream::pair()?;
    let front_end = std::thread::spawn(move || {
        bind(cpu);
        let (mut far, mut miss) = (&far, [0; IOTLB_LEN]);
        // A MISS is as long as an UPDATE. An Err or None is the end.
        while far.read_exact(&mut miss).is_ok() {
            let Some(update) = answer(&miss, 0) else { return };
            if far.write_all(&update).is_err() {
                return;
            }
        }
    });
    Ok((near, front_end))
}

/// Rung so often at once: the end.
const LAST_BELL: u64 = 1 << 32;

impl Sleeping {
    pub(super) fn start(cpu: Option<usize>) -> std::io::Result<Sleeping> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let answered = Arc::new(Line::default());
        let (near, front_end) = spawn_front_end(cpu)?;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&set, &bell, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        epoll::add(&set, &near, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
        let (their_bell, their_answered) = (Arc::clone(&bell), Arc::clone(&answered));
        let answerer = std::thread::spawn(move || {
            bind(cpu);
            // An Err is the end.
            let _ = serve(&set, &their_bell, &near, &their_answered);
        });
        Ok(Sleeping { bell, answered, answerer, front_end })
    }

    /// One chain from end to end; with `spins` the asker spins first, as a client does.
    pub(super) fn ask(&self, spins: bool) -> std::io::Result<()> {
        let before = self.answered.0.load(Ordering::Acquire);
        rustix::io::write(&*self.bell, &1u64.to_ne_bytes())?;
        let spin_until = Instant::now() + if spins { SPIN } else { Duration::ZERO };
        while self.answered.0.load(Ordering::Acquire) == before {
            if Instant::now() < spin_until {
                spin_loop();
                continue;
            }
            // Every way to wake up is a reason to look again.
            let _ = futex::wait(&self.answered.0, futex::Flags::empty(), before, None);
        }
        Ok(())
    }

    pub(super) fn end(self) {
        // An Err cannot be: the counter is far from full.
        let _ = rustix::io::write(&*self.bell, &LAST_BELL.to_ne_bytes());
        // A panic there has already been told on the terminal.
        let _ = (self.answerer.join(), self.front_end.join());
    }
}

/// The answerer: a bell in, a message out, a message in, a word out.
fn serve(set: &OwnedFd, bell: &OwnedFd, mut stream: &UnixStream, answered: &Line) -> std::io::Result<()> {
    let mut message = update(0, 0);
    let mut events = Vec::with_capacity(2);
    loop {
        events.clear();
        epoll::wait(set, spare_capacity(&mut events), None)?;
        for event in &events {
            if event.data.u64() == 0 {
                let mut rung = [0; 8];
                rustix::io::read(bell, &mut rung)?;
                if u64::from_ne_bytes(rung) >= LAST_BELL {
                    return Ok(());
                }
                stream.write_all(&message)?;
            } else {
                stream.read_exact(&mut message)?;
                // Release: partner of the load in `ask`.
                answered.0.fetch_add(1, Ordering::Release);
                futex::wake(&answered.0, futex::Flags::empty(), 1)?;
            }
        }
    }
}
