//! The control thread: one an attachment. It maps regions, keeps leases current, revokes, and notices the daemon's end.
//!
//! It is the only thread that changes the arena, so a revocation excludes remapping by coming from the same thread.

pub(crate) mod channel;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{error, info, warn};

use crate::eventfd;
use crate::queue;
use crate::shared::Shared;
use channel::ChannelError;

/// How often the thread looks at the liveness word, in nanoseconds. The socket's end usually comes first; but the
/// socket may outlive the server process, when another process holds it too.
const LIVENESS_PERIOD_NS: i64 = 200_000_000;

/// The running thread; dropping this ends it.
#[derive(Debug)]
pub(crate) struct ControlThread {
    /// Lent to the thread, as `stop` is: what it owned itself would stay open in a forked child, which has no such
    /// thread.
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    /// Taken by the drop.
    thread: Option<JoinHandle<()>>,
}

impl ControlThread {
    pub(crate) fn start(shared: Arc<Shared>) -> io::Result<ControlThread> {
        let stop = Arc::new(eventfd::create()?);
        let builder = std::thread::Builder::new().name("iotlb-control".to_owned());
        let (control, stopped) = (Control { shared: &shared }, &*stop);
        // A signal is for a thread of the program's own, which may block it only later. What the thread inherits holds
        // before its first instruction.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        // SAFETY: what the thread borrows lies behind two counted pointers, which go into the `ControlThread`. There
        // they stay until its drop has joined the thread, and for ever if it is forgotten. In a forked child, where the
        // drop does not join, there is no thread.
        let thread = unsafe { builder.spawn_unchecked(move || control.run(stopped)) };
        // An Err cannot be: the system gave this mask. Nor may it end this here, where the thread runs and borrows.
        let _ = before.thread_set_mask();
        Ok(ControlThread { shared, stop, thread: Some(thread?) })
    }
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.shared.is_ours() {
            // The event would end the parent's thread. Of this process there is none to be joined or detached.
            std::mem::forget(thread);
            return;
        }
        eventfd::signal(self.stop.as_fd());
        // An Err would be a panic that the panic hook has reported.
        let _ = thread.join();
    }
}

struct Control<'a> {
    shared: &'a Shared,
}

/// What an end of the thread leaves to do.
enum End {
    /// Nothing: the daemon was told, or is not there to be told.
    Known,
    /// This side cannot go on, though the daemon may be alive: it is still to be told.
    Untold,
}

impl Control<'_> {
    fn run(&self, stop: &OwnedFd) {
        // A panic, of whoever listens to the log say, was reported by the panic hook. An attachment must not look alive
        // after it that hears of no region and no revocation. Nothing is used afterwards that it could have left half
        // done, but for the socket.
        let end = catch_unwind(AssertUnwindSafe(|| self.serve_to_the_end(stop))).unwrap_or(End::Untold);
        self.shared.set_lost();
        match end {
            End::Known => {}
            End::Untold => self.leave_when_unused(stop),
        }
        self.shared.channel.shut_down();
    }

    /// Where the attachment is over, that is said to its users first and then logged: a log may block.
    fn serve_to_the_end(&self, stop: &OwnedFd) -> End {
        loop {
            match self.wait(stop) {
                Ok(true) => {
                    // The last reader is gone (each holds the attachment), so nothing here pins any more.
                    self.shared.channel.leave();
                    return End::Known;
                }
                Ok(false) => queue::send_releases(self.shared),
                Err(error) => {
                    self.shared.set_lost();
                    error!(%error, "control thread cannot wait; the attachment is over");
                    return End::Untold;
                }
            }
            match self.serve() {
                Ok(()) => {}
                Err(ChannelError::Closed) => {
                    self.shared.set_lost();
                    info!(worker = self.shared.worker, "the daemon closed the control socket; the attachment is over");
                    return End::Known;
                }
                Err(error) => {
                    self.shared.set_lost();
                    error!(%error, "control socket: the attachment is over");
                    return End::Untold;
                }
            }
            if !self.shared.liveness.alive() {
                self.shared.set_lost();
                info!(worker = self.shared.worker, "the daemon died; the attachment is over");
                return End::Known;
            }
        }
    }

    /// Nobody pins anew, and the daemon hears of it when nobody pins any more. Were the socket closed now, the queues
    /// would be lost to this process for as long as it lives.
    fn leave_when_unused(&self, stop: &OwnedFd) {
        let mut fds = [PollFd::new(stop, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: LIVENESS_PERIOD_NS };
        while self.shared.liveness.alive() {
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.shared.channel.leave(),
                // Cannot be: one descriptor, which is open. Then the socket ends as it is.
                Err(_) => return,
            }
        }
    }

    /// Waits for work; `true` when the thread is to end. That releases are to be sent is noticed after a period, if
    /// nothing else comes: the socket was full just now.
    fn wait(&self, stop: &OwnedFd) -> io::Result<bool> {
        let work = if self.shared.leases.owes() { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds = [PollFd::new(&self.shared.channel, work), PollFd::new(stop, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: LIVENESS_PERIOD_NS };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!fds[1].revents().is_empty()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Handles every message there is.
    fn serve(&self) -> Result<(), ChannelError> {
        while let Some((message, fds)) = self.shared.channel.receive()? {
            self.handle(message, fds)?;
        }
        Ok(())
    }

    fn handle(&self, message: DaemonMessage, fds: Vec<OwnedFd>) -> Result<(), ChannelError> {
        let shared = self.shared;
        match message {
            DaemonMessage::AddRegion(region) => {
                if let Err(error) = shared.arena.add(&region, &fds) {
                    error!(
                        region = region.id,
                        offset = format_args!("{:#x}", region.arena_offset),
                        size = format_args!("{:#x}", region.size),
                        %error,
                        "memory region not mapped; translations into it will be refused"
                    );
                }
                shared.arena_changed();
            }
            DaemonMessage::RemoveRegion { id } => {
                if let Err(error) = shared.arena.remove(id) {
                    error!(region = id, %error, "memory region not unmapped");
                }
                shared.arena_changed();
            }
            DaemonMessage::MemoryMap { generation } => {
                shared.set_mapped(generation);
                shared.channel.send(&WorkerMessage::Mapped { generation }, &[])?;
            }
            DaemonMessage::Lease(lease) => {
                if shared.leases.granted(&lease, fds) {
                    shared.raise_events();
                }
            }
            DaemonMessage::LeaseRefused { queue, claim, reason } => {
                if shared.leases.refused(queue, claim, reason) {
                    shared.raise_events();
                }
            }
            DaemonMessage::Revoke => {
                shared.set_revoked();
                match shared.arena.revoke() {
                    Ok(()) => {
                        // Answered first: a log that nobody reads must not hold up the guest, nor have this process
                        // killed.
                        let sent = shared.channel.send(&WorkerMessage::Revoked, &[]);
                        warn!(worker = shared.worker, "the daemon revoked this worker's access to guest memory");
                        sent?;
                    }
                    // Without an answer the daemon goes on to kill this process, which is what is left to do.
                    Err(error) => error!(%error, "guest memory could not be made unreachable"),
                }
            }
            DaemonMessage::Welcome(_) | DaemonMessage::Refused(_) => {
                warn!("the daemon sent a handshake message after the handshake; ignored");
            }
        }
        Ok(())
    }
}
