//! One timer for all deadlines of the loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime, timerfd_create,
    timerfd_settime,
};

/// A descriptor that becomes readable at the time it was set to. Its expiry is never read: it is watched
/// edge-triggered, and each setting starts it afresh. Finer than the milliseconds of `epoll_wait`, and open to every
/// seccomp profile.
#[derive(Debug)]
pub(crate) struct Alarm {
    fd: OwnedFd,
    /// What it is set to, to spare system calls. `None`: it is not set, or went off.
    due_ns: Option<u64>,
}

impl Alarm {
    pub(crate) fn new() -> io::Result<Alarm> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Alarm { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, due_ns: None })
    }

    /// Sees to it that it goes off at `due_ns` of [`now_ns`] at the latest.
    ///
    /// It may go off earlier, once: a deadline that moved back or went away is not worth a system call for every
    /// message. Then it is set anew if need be.
    pub(crate) fn set(&mut self, due_ns: Option<u64>) -> io::Result<()> {
        let Some(due_ns) = due_ns else { return Ok(()) };
        if self.due_ns.is_some_and(|set| set <= due_ns) {
            return Ok(());
        }
        // An all-zero time would switch the timer off, so a deadline of 0 is moved by a nanosecond.
        let setting = Itimerspec { it_interval: timespec(0), it_value: timespec(due_ns.max(1)) };
        timerfd_settime(&self.fd, TimerfdTimerFlags::ABSTIME, &setting)?;
        self.due_ns = Some(due_ns);
        Ok(())
    }

    /// It went off: the next setting must reach the kernel whatever time it names.
    pub(crate) fn expired(&mut self) {
        self.due_ns = None;
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Monotonic time in nanoseconds.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Monotonic time starts at boot: never negative, and 64 bits of nanoseconds last 584 years.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

fn timespec(ns: u64) -> Timespec {
    const SECOND: u64 = 1_000_000_000;
    // Both fit: u64::MAX / 10^9 is far below i64::MAX, and the remainder is below 10^9.
    Timespec {
        tv_sec: i64::try_from(ns / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % SECOND).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::time::timerfd_gettime;

    /// In how many ns it goes off; 0: it is not set.
    fn left_ns(alarm: &Alarm) -> i64 {
        let left = timerfd_gettime(&alarm.fd).expect("the kernel knows").it_value;
        left.tv_sec * 1_000_000_000 + left.tv_nsec
    }

    #[test]
    fn it_never_goes_off_too_late() {
        const HOUR_NS: u64 = 3_600_000_000_000;
        let mut alarm = Alarm::new().expect("a timer");
        let start = now_ns();
        alarm.set(Some(start + 2 * HOUR_NS)).expect("set");
        alarm.set(Some(start + HOUR_NS)).expect("set");
        let early = left_ns(&alarm);
        assert!(early > 0 && early <= i64::try_from(HOUR_NS).expect("small"), "{early} ns");
        // Later, and never: it may stay as it is, but not be off.
        alarm.set(Some(start + 2 * HOUR_NS)).expect("set");
        alarm.set(None).expect("set");
        assert!(left_ns(&alarm) > 0 && left_ns(&alarm) <= early);
        // A time that is over already.
        alarm.set(Some(0)).expect("set");
        poll(&mut [PollFd::new(&alarm.fd, PollFlags::IN)], None).expect("it goes off");
        alarm.expired();
        alarm.set(Some(start + 2 * HOUR_NS)).expect("set");
        assert!(left_ns(&alarm) > early, "after it went off it is set to what is asked for");
    }
}
