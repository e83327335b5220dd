//! Closes what came from workers and strangers, and what workers had, away from the loop.
//!
//! Whoever closes the last descriptor of a file does what the file wants done then. A TCP socket with SO_LINGER waits
//! until its data is sent, a file of a stranger's file system until that answers, whatever an epoll set watches until
//! the set's lock is free; and a socket closes all that was sent on it and not received. None of it has an end that
//! the daemon could count on, so threads of their own do it, the first of which starts with the first descriptor. All
//! that can hang is these threads, and then nobody is let in who could bring more.
//!
//! The event descriptors of rings have a queue and threads apart. Whoever leased a ring can make those hang; a stranger
//! who never got that far must not be able to, since the front-end sends new ones again and again, and is cut off when
//! the daemon has no room for another.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tracing::warn;

/// Threads at most. More peers than that who send such things are no accident.
const THREADS_MAX: usize = 8;
/// Descriptors that wait to be closed, at most, before nobody is let in: one more message may bring 253, and all of
/// them count against the daemon's limit of open files.
const DESCRIPTORS_MAX: usize = 64;
/// After so long it is said that nobody is let in.
const SILENCE_NS: u64 = 1_000_000_000;

/// The threads and what they are to close.
#[derive(Debug)]
pub(crate) struct Closer {
    /// What it closes, for the log.
    what: &'static str,
    shared: Arc<Shared>,
    behind_since_ns: Option<u64>,
    said: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What came from one peer is closed in order: what hangs in it holds up that peer's only.
    waiting: VecDeque<Vec<OwnedFd>>,
    /// All that was given and is not closed yet.
    descriptors: usize,
    threads: usize,
    /// Threads that wait for something to close.
    idle: usize,
    over: bool,
}

impl Closer {
    pub(crate) fn of(what: &'static str) -> Closer {
        Closer { what, shared: Arc::default(), behind_since_ns: None, said: false }
    }

    /// Closes descriptors of one peer some time soon.
    pub(crate) fn give(&self, fds: Vec<OwnedFd>) {
        if fds.is_empty() {
            return;
        }
        let mut state = self.shared.lock();
        state.descriptors += fds.len();
        state.waiting.push_back(fds);
        self.see_to_it(&mut state);
    }

    /// Whether what comes now could not be closed: too much hangs already. Says so once it has been so for long.
    pub(crate) fn is_behind(&mut self, now_ns: u64) -> bool {
        let mut state = self.shared.lock();
        // No thread could be had before, maybe.
        self.see_to_it(&mut state);
        let (threads, descriptors) = (state.threads, state.descriptors);
        let all_are_busy = state.idle == 0 && threads == THREADS_MAX;
        let is_stuck = all_are_busy || (threads == 0 && !state.waiting.is_empty());
        drop(state);
        if !is_stuck && descriptors <= DESCRIPTORS_MAX {
            (self.behind_since_ns, self.said) = (None, false);
            return false;
        }
        let since_ns = *self.behind_since_ns.get_or_insert(now_ns);
        if !self.said && now_ns.saturating_sub(since_ns) >= SILENCE_NS {
            self.said = true;
            warn!(
                threads,
                descriptors,
                "closing {} hangs: no worker is let in until it goes on; end the processes that have such descriptors, \
                 or restart the daemon",
                self.what
            );
        }
        true
    }

    /// As if each thread hung.
    #[cfg(test)]
    pub(super) fn hang(&self) {
        self.shared.lock().threads = THREADS_MAX;
    }

    /// As if those of [`Closer::hang`] had ended.
    #[cfg(test)]
    pub(super) fn go_on(&self) {
        self.shared.lock().threads = 0;
    }

    /// Has a thread for what waits.
    fn see_to_it(&self, state: &mut State) {
        if state.waiting.len() <= state.idle {
            if !state.waiting.is_empty() {
                self.shared.news.notify_one();
            }
            return;
        }
        if state.threads == THREADS_MAX {
            return;
        }
        let shared = Arc::clone(&self.shared);
        // An Err means that there may be no more threads now: what waits is seen to with the next that comes.
        if thread::Builder::new().name(String::from("iotlbd-close")).spawn(move || shared.work()).is_ok() {
            state.threads += 1;
        }
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.news.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics under the lock; the numbers would be whole all the same.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            while let Some(fds) = state.waiting.pop_front() {
                drop(state);
                let count = fds.len();
                drop(fds);
                state = self.lock();
                state.descriptors -= count;
            }
            // One that waits is enough.
            if state.over || state.idle > 0 {
                break;
            }
            state.idle += 1;
            let nothing = |state: &mut State| state.waiting.is_empty() && !state.over;
            state = self.news.wait_while(state, nothing).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
        state.threads -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    use super::*;

    const WATCHDOG: Duration = Duration::from_secs(30);

    fn wait_until(mut is_so: impl FnMut() -> bool) {
        let since = Instant::now();
        while !is_so() {
            assert!(since.elapsed() < WATCHDOG, "in vain");
            thread::yield_now();
        }
    }

    #[test]
    fn no_thread_without_something_to_close() {
        let mut closer = Closer::of("what tests give it");
        closer.give(Vec::new());
        assert!(!closer.is_behind(0));
        assert_eq!(closer.shared.lock().threads, 0);
    }

    #[test]
    fn what_is_given_is_closed_and_one_thread_stays() {
        let mut closer = Closer::of("what tests give it");
        for _ in 0..100 {
            let (near, mut far) = UnixStream::pair().expect("a socket pair");
            closer.give(vec![near.into()]);
            far.set_read_timeout(Some(WATCHDOG)).expect("a socket");
            assert_eq!(far.read(&mut [0]).expect("the end"), 0);
        }
        wait_until(|| {
            let state = closer.shared.lock();
            (state.descriptors, state.threads, state.idle) == (0, 1, 1)
        });
        assert!(!closer.is_behind(0));
    }

    #[test]
    fn nobody_is_let_in_while_too_much_waits() {
        let mut closer = Closer::of("what tests give it");
        closer.hang();
        assert!(closer.is_behind(0));
        let file = || fs::File::open("/dev/null").expect("opens").into();
        closer.give(vec![file()]);
        assert!(closer.is_behind(SILENCE_NS - 1) && !closer.said);
        assert!(closer.is_behind(SILENCE_NS) && closer.said);
        // One goes on.
        closer.shared.lock().threads -= 1;
        closer.give((0..DESCRIPTORS_MAX).map(|_| file()).collect());
        wait_until(|| !closer.is_behind(2 * SILENCE_NS));
        assert!(!closer.said, "the next time is said again");
        wait_until(|| closer.shared.lock().descriptors == 0);
    }
}
