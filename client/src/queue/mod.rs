//! Leased virtqueues.
//!
//! A queue belongs to at most one worker at a time. Its ring's addresses are in the table
//! ([`Guard::queue_record`](crate::Guard::queue_record)); its kick and call descriptors come over the control socket,
//! and may be replaced at any time: the guest masks an interrupt, the front-end reconnects.

pub(crate) mod lease;
mod snapshot;
pub mod vring;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use iotlb_proto::control::{WorkerMessage, clip_reason};
use iotlb_proto::layout::worker::PROGRESS_VALID;
use iotlb_proto::socket::packet::PacketError;
use iotlb_proto::sync::Ordering;

use crate::attach::Attachment;
use crate::control::channel::ChannelError;
use crate::eventfd;
use crate::shared::{Down, Shared, deadline_in, slice_until};
use lease::{Busy, Lease, Unclaimed};

/// Why queues were not leased. None of those asked for is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimError {
    /// The daemon, or this process, says no to one of them.
    #[error("queue {queue} was not leased: {reason}")]
    Refused {
        /// Which.
        queue: u16,
        /// Why.
        reason: String,
    },
    /// The daemon did not answer all of them in time.
    #[error("the daemon did not lease all queues within {timeout_ms} ms")]
    TimedOut {
        /// What the caller allowed.
        timeout_ms: u32,
    },
    /// The daemon died, or closed the control socket: attach anew.
    #[error("the daemon died: attach anew")]
    DaemonDead,
    /// The daemon took access away: attach anew.
    #[error("the daemon revoked this worker's access: attach anew")]
    Revoked,
    /// The claim could not be sent.
    #[error("the claim could not be sent: {0}")]
    Send(#[from] ChannelError),
}

impl From<Down> for ClaimError {
    fn from(down: Down) -> Self {
        match down {
            Down::DaemonDead => ClaimError::DaemonDead,
            Down::Revoked => ClaimError::Revoked,
        }
    }
}

/// A queue that belongs to this worker, until it is dropped or [lost](Queue::held). May be used from any thread.
#[derive(Debug)]
pub struct Queue {
    attachment: Attachment,
    lease: Arc<Lease>,
}

impl Queue {
    pub(crate) fn claim(attachment: &Attachment, queues: &[u16], timeout_ms: u32) -> Result<Vec<Queue>, ClaimError> {
        let shared = attachment.shared();
        shared.check()?;
        if let Some(queue) = queues.iter().find(|queue| **queue >= shared.queues) {
            let reason = format!("the device has {} queues", shared.queues);
            return Err(ClaimError::Refused { queue: *queue, reason });
        }
        if queues.is_empty() {
            return Ok(Vec::new());
        }
        let book = &shared.leases;
        let claim = match book.begin(queues) {
            Ok(claim) => claim,
            Err(Busy(queue)) => {
                return Err(ClaimError::Refused { queue, reason: "this process has it already".to_owned() });
            }
        };
        let message = WorkerMessage::ClaimQueues { claim, queues: queues.to_vec() };
        let deadline = deadline_in(timeout_ms);
        let failure = match send_until(shared, &message, deadline) {
            Ok(true) => match book.wait(queues, deadline, || shared.check().is_err()) {
                Ok(leases) => {
                    let own = |lease| Queue { attachment: attachment.clone(), lease };
                    return Ok(leases.into_iter().map(own).collect());
                }
                Err(failure) => {
                    // Also those that were not answered yet: the daemon takes messages in order, so the release
                    // follows the lease.
                    for queue in queues {
                        give_up(shared, *queue, claim);
                    }
                    Ok(failure)
                }
            },
            unsent => {
                // The daemon never hears of the claim: there is nothing to give back.
                for queue in queues {
                    book.forget(*queue, claim);
                }
                unsent.map(|_| Unclaimed::Unanswered)
            }
        };
        Err(match failure {
            // This thread may see it before the control thread does.
            Err(ChannelError::Closed) => shared.check().err().unwrap_or(Down::DaemonDead).into(),
            Err(error) => error.into(),
            Ok(Unclaimed::Refused(queue, reason)) => ClaimError::Refused { queue, reason },
            Ok(Unclaimed::Unanswered) => match shared.check() {
                Ok(()) => ClaimError::TimedOut { timeout_ms },
                Err(down) => down.into(),
            },
        })
    }

    /// Ring index.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.lease.queue
    }

    /// The descriptor that becomes readable when the driver made buffers available. `None`: the ring is not set up
    /// yet, or is to be polled. Ask again when [`Queue::descriptors_generation`] has grown.
    #[must_use]
    pub fn kick(&self) -> Option<Arc<OwnedFd>> {
        self.lease.descriptors.with(|descriptors| descriptors.kick.clone())
    }

    /// Interrupts the driver. Call it inside the pin under which the used ring was written: a stopped ring must not
    /// interrupt. `false` when there is no call descriptor (the driver polls) or it is broken.
    ///
    /// Does not wait for who reads the descriptor, unless somebody means it to: whoever else has it, the front-end or a
    /// worker that had the queue before, can make it block and fill its counter, and then this sleeps until the counter
    /// is read. A pin that lasts so long has this worker revoked, as any other. To look first would cost a system call
    /// each time.
    pub fn signal_call(&self) -> bool {
        self.lease
            .descriptors
            .with(|descriptors| descriptors.call.as_ref().is_some_and(|call| eventfd::signal(call.as_fd())))
    }

    /// Reports that the ring is broken, or names an address that was denied. The daemon logs the reason and signals the
    /// ring's error descriptor. The reason is one line: [`clip_reason`] makes any text one.
    pub fn signal_error(&self, reason: &str) {
        let message = WorkerMessage::QueueError { queue: self.lease.queue, reason: clip_reason(reason) };
        if let Err(error) = self.attachment.shared().channel.send(&message, &[]) {
            tracing::warn!(queue = self.lease.queue, %error, "ring error could not be reported");
        }
    }

    /// Grows whenever the descriptors were replaced.
    #[must_use]
    pub fn descriptors_generation(&self) -> u64 {
        // Acquire pairs with the release in `Lease::replace`.
        self.lease.generation.load(Ordering::Acquire)
    }

    /// Notes how far the available ring was completely processed, for a successor that cannot read the used ring. Call
    /// it inside the pin under which the used ring was written: what is said of a stopped ring counts for its next run.
    pub fn set_progress(&self, avail_index: u16) {
        if let Some(word) = self.attachment.shared().segment.progress.get(usize::from(self.lease.queue)) {
            // Release pairs with the daemon's acquire: the used ring was written before.
            word.store(PROGRESS_VALID | u64::from(avail_index), Ordering::Release);
        }
    }

    /// Whether the queue still belongs to this worker. `false` after the daemon took it back, or died.
    #[must_use]
    pub fn held(&self) -> bool {
        // Acquire pairs with the release in `LeaseBook::refused`.
        self.lease.lost.load(Ordering::Acquire) == 0 && self.attachment.alive()
    }

    /// Gives the queue back; so does dropping it. The caller has stopped touching the ring. This does not wait for the
    /// daemon: of one that does not read, the control thread sees to it that it is told when it does again. (The last
    /// handle of an attachment detaches, which may wait.)
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // What a forked child drops is still its parent's.
        if self.attachment.shared().is_ours() {
            give_up(self.attachment.shared(), self.lease.queue, self.lease.claim);
        }
    }
}

/// Sends, as soon as the socket has room. `false`: it had none until the deadline, or the attachment ended, and nothing
/// was sent.
fn send_until(shared: &Shared, message: &WorkerMessage, deadline: Instant) -> Result<bool, ChannelError> {
    while !shared.channel.try_send(message)? {
        let Some(slice) = slice_until(deadline).filter(|_| shared.check().is_ok()) else { return Ok(false) };
        shared.channel.wait_for_room(slice).map_err(|error| ChannelError::Packet(PacketError::Send(error)))?;
    }
    Ok(true)
}

/// Ends what this process has to do with a queue. Without waiting: whoever gives up because the daemon is stuck must
/// not be held up by it for each queue.
fn give_up(shared: &Shared, queue: u16, claim: u64) {
    if shared.leases.forget(queue, claim) && shared.check().is_ok() {
        shared.leases.owe(queue, claim);
        send_releases(shared);
    }
}

/// Tells the daemon what was given back, while the socket has room. What is left over the control thread sends, so that
/// the daemon does not keep a queue for a process that goes on without it. However late, it ends no other lease:
/// if this process has claimed the queue anew meanwhile, the daemon took the claim for the release of the former lease.
pub(crate) fn send_releases(shared: &Shared) {
    while let Some((queue, claim)) = shared.leases.next_owed() {
        match shared.channel.try_send(&WorkerMessage::ReleaseQueue { queue, claim }) {
            Ok(true) => {}
            Ok(false) => return shared.leases.owe(queue, claim),
            Err(error) => {
                tracing::debug!(queue, %error, "release not sent; the queue is free when this worker is gone")
            }
        }
    }
}
