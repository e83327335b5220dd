//! epoll with names in place of numbers.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};

/// What a descriptor in the loop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// Front-ends connect.
    FrontEndListener,
    /// The front-end's main channel.
    FrontEnd,
    /// The back-end channel.
    BackEnd,
    /// Workers connect.
    ControlListener,
    /// Time to stop.
    Stop,
    /// A deadline.
    Alarm,
    /// A connection that has not said HELLO yet, by its number.
    Arrival(u32),
    /// A worker's connection.
    Control(u32),
    /// A worker's process.
    Process(u32),
    /// A worker's doorbell.
    Doorbell(u32),
}

impl Token {
    fn to_u64(self) -> u64 {
        let (kind, id) = match self {
            Token::FrontEndListener => (0_u64, 0),
            Token::FrontEnd => (1, 0),
            Token::BackEnd => (2, 0),
            Token::ControlListener => (3, 0),
            Token::Stop => (4, 0),
            Token::Alarm => (5, 0),
            Token::Arrival(id) => (6, id),
            Token::Control(id) => (7, id),
            Token::Process(id) => (8, id),
            Token::Doorbell(id) => (9, id),
        };
        kind << 32 | u64::from(id)
    }

    fn from_u64(value: u64) -> Option<Token> {
        let id = u32::try_from(value & 0xffff_ffff).ok()?;
        Some(match value >> 32 {
            0 => Token::FrontEndListener,
            1 => Token::FrontEnd,
            2 => Token::BackEnd,
            3 => Token::ControlListener,
            4 => Token::Stop,
            5 => Token::Alarm,
            6 => Token::Arrival(id),
            7 => Token::Control(id),
            8 => Token::Process(id),
            9 => Token::Doorbell(id),
            _ => return None,
        })
    }
}

/// What happened to a descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    pub(crate) token: Token,
    /// Both directions are closed: nobody would hear an answer.
    pub(crate) hung_up: bool,
}

/// The set of watched descriptors. All are edge-triggered: an event says that something changed, and whoever stops
/// before "would block" calls [`Poller::rearm`] or [`Poller::rearm_both`].
pub(crate) struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The events have no Debug, and are old ones anyway.
        f.debug_struct("Poller").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

/// Events taken in one round: bounds what is done before clocks and workers are looked at again.
const EVENTS_PER_ROUND: usize = 64;

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Poller { epoll, events: Vec::with_capacity(EVENTS_PER_ROUND) })
    }

    /// Watches for input and hang-up.
    pub(crate) fn watch(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, data(token), input())?)
    }

    /// Watches for input, hang-up and room for output.
    pub(crate) fn watch_both(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, data(token), input() | epoll::EventFlags::OUT)?)
    }

    /// Looks at a descriptor of [`Poller::watch`] anew, from now on with or without room for output: what is ready now
    /// is reported in the next round. Room is reported each time the peer reads, so it is asked for only when needed.
    pub(crate) fn rearm(&self, fd: impl AsFd, token: Token, room: bool) -> io::Result<()> {
        let flags = if room { input() | epoll::EventFlags::OUT } else { input() };
        Ok(epoll::modify(&self.epoll, fd, data(token), flags)?)
    }

    /// Looks at a descriptor of [`Poller::watch_both`] anew: what is ready now is reported in the next round.
    pub(crate) fn rearm_both(&self, fd: impl AsFd, token: Token) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, data(token), input() | epoll::EventFlags::OUT)?)
    }

    /// Forgets a descriptor. To be called before it is closed: a duplicate elsewhere would keep it in the set.
    pub(crate) fn forget(&self, fd: impl AsFd) {
        // An Err means that it was not in the set, which is what is wanted.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Takes what is ready; with `sleep`, waits until something is.
    pub(crate) fn wait(&mut self, sleep: bool, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        self.events.clear();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if sleep { None } else { Some(&now) };
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &self.events {
            let Some(token) = Token::from_u64(event.data.u64()) else { continue };
            // A copy: the kernel packs the structure.
            let flags = event.flags;
            let hung_up = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            ready.push(Ready { token, hung_up });
        }
        Ok(())
    }
}

/// Whether something can be read from a descriptor now, or it is at its end. Without an epoll set.
pub(crate) fn is_readable(fd: impl AsFd) -> bool {
    let mut watched = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

fn data(token: Token) -> epoll::EventData {
    epoll::EventData::new_u64(token.to_u64())
}

fn input() -> epoll::EventFlags {
    epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        for token in [
            Token::FrontEndListener,
            Token::FrontEnd,
            Token::BackEnd,
            Token::ControlListener,
            Token::Stop,
            Token::Alarm,
            Token::Arrival(7),
            Token::Control(u32::MAX),
            Token::Process(0),
            Token::Doorbell(1 << 31),
        ] {
            assert_eq!(Token::from_u64(token.to_u64()), Some(token));
        }
        assert_eq!(Token::from_u64(u64::MAX), None);
    }
}
