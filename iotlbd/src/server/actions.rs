//! Carrying out what the device wants.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use iotlb_proto::control::DaemonMessage;
use iotlb_proto::vhost_user::{VringState, reply_bytes, reply_u64, reply_vring_state};
use tracing::{debug, warn};

use super::alarm::now_ns;
use super::back_end::BackEnd;
use super::event_loop::EventLoop;
use super::leases::Lease;
use super::link::Outgoing;
use super::poller::Token;
use crate::device::{Action, Event, MemoryChange, ReplyPayload, WorkerId};

impl EventLoop {
    pub(super) fn carry_out(&mut self, action: Action) {
        match action {
            Action::Reply { request, payload } => self.reply(request, payload),
            Action::UseBackEndChannel(channel) => self.use_back_end_channel(channel),
            Action::SendBackEnd { message, need_reply } => {
                let lost = match &mut self.back_end {
                    Some(back_end) => back_end.put(&message, need_reply).err(),
                    None => None,
                };
                if let Some(reason) = lost {
                    self.back_end_lost(&reason.to_string());
                }
            }
            Action::AnswerMiss { worker, cell, ticket, answer } => {
                let mut more = Vec::new();
                if let Some(worker) = self.registry.get_mut(worker)
                    && worker.answer(cell, ticket, answer, |cell, request| more.push((cell, request)))
                {
                    self.sleepers.push((worker.id, cell));
                }
                for (cell, request) in more {
                    self.device.handle(Event::Miss { worker, cell, request }, now_ns());
                }
            }
            Action::Memory(change) => self.tell_all(change),
            Action::QueueDescriptors { queue, call_changed: _ } => {
                // Workers compare descriptors by themselves: each lease that brings a call descriptor is signalled
                // once.
                if let Some(Lease { owner, claim }) = self.leases.get(queue) {
                    self.push(owner, Outgoing::Lease { queue, claim });
                    self.flush(owner);
                }
            }
            Action::CloseDescriptor(fd) => self.ring_closer.give(vec![fd]),
            Action::CloseFrontEnd { reason } => self.close_front_end(&reason),
        }
    }

    /// Sends what was put together for the front-end, on both channels, and wakes up whose misses were answered.
    ///
    /// A single sleeper is woken up first: the front-end, which the acknowledgement wakes up, often gets this very
    /// processor, and would keep it until it has asked for or answered the next page. It waits for one call to the
    /// kernel more; it is not to wait for many.
    pub(super) fn send_out(&mut self) {
        if self.sleepers.len() == 1 {
            self.wake_up();
        }
        if let Some(front_end) = &mut self.front_end {
            front_end.flush();
            self.busy |= front_end.has_bad_news();
            if self.figures.waits() && self.device.accepts_requests() {
                self.figures.answered(now_ns());
            }
        }
        if let Some(back_end) = &mut self.back_end
            && let Err(reason) = back_end.flush()
        {
            self.back_end_lost(&reason.to_string());
            // What the device makes of it is to be carried out.
            self.busy = true;
        }
        self.wake_up();
    }

    /// Wakes up the threads that sleep behind answered misses.
    fn wake_up(&mut self) {
        for (worker, cell) in self.sleepers.drain(..) {
            if let Some(worker) = self.registry.get_mut(worker) {
                worker.wake(cell);
            }
        }
    }

    fn reply(&mut self, request: u32, payload: ReplyPayload) {
        let Some(front_end) = &mut self.front_end else { return };
        match payload {
            ReplyPayload::U64(value) => front_end.put(&reply_u64(request, value)),
            ReplyPayload::VringState { index, num } => {
                front_end.put(&reply_vring_state(request, VringState { index, num }));
            }
            ReplyPayload::Bytes(bytes) => match reply_bytes(request, &bytes) {
                Ok(bytes) => front_end.put(&bytes),
                Err(error) => warn!("a reply cannot be sent: {error}"),
            },
        }
    }

    fn use_back_end_channel(&mut self, channel: Option<OwnedFd>) {
        self.drop_back_end();
        let Some(fd) = channel else { return };
        let opened = BackEnd::new(fd).map_err(|error| error.to_string()).and_then(|back_end| {
            let watched = self.poller.watch(&back_end, Token::BackEnd);
            watched.map(|()| back_end).map_err(|error| error.to_string())
        });
        match opened {
            Ok(back_end) => self.back_end = Some(back_end),
            Err(reason) => {
                warn!("the back-end channel cannot be used: {reason}");
                self.device.handle(Event::BackEndLost, now_ns());
            }
        }
    }

    pub(super) fn drop_back_end(&mut self) {
        if let Some(back_end) = self.back_end.take() {
            self.poller.forget(&back_end);
        }
    }

    pub(super) fn back_end_lost(&mut self, reason: &str) {
        warn!("the back-end channel is over: {reason}");
        self.drop_back_end();
        self.device.handle(Event::BackEndLost, now_ns());
    }

    /// Reads what the front-end answered to misses. That is judged when everything was read that it may have sent
    /// before on the main channel: nothing orders the two, and the answer to a miss is that its UPDATE was sent.
    pub(super) fn read_back_end(&mut self) {
        let Some(back_end) = &mut self.back_end else { return };
        let end = back_end.receive();
        self.heard_ns = now_ns();
        if back_end.has_too_many() {
            self.judge_replies();
        } else if let Some(front_end) = &mut self.front_end {
            front_end.look();
        }
        match end {
            Ok(true) => {}
            Ok(false) => {
                // More is there than one round's share. What was not read yet is reported again.
                let rearmed = self
                    .back_end
                    .as_ref()
                    .map(|back_end| self.poller.rearm(back_end, Token::BackEnd, back_end.waits_for_room()));
                if let Some(Err(error)) = rearmed {
                    self.back_end_lost(&error.to_string());
                }
            }
            Err(error) => self.back_end_lost(&error.to_string()),
        }
    }

    /// Tells the device what the front-end answered to misses. Returns whether there was anything.
    pub(super) fn judge_replies(&mut self) -> bool {
        let replies = self.back_end.as_mut().map(BackEnd::take_replies).unwrap_or_default();
        let any = !replies.is_empty();
        for value in replies {
            self.device.handle(Event::MissReply { value }, now_ns());
        }
        any
    }

    fn tell_all(&mut self, change: MemoryChange) {
        for id in self.registry.ids() {
            self.push(id, memory_message(&change));
            self.flush(id);
        }
    }

    fn close_front_end(&mut self, reason: &str) {
        debug!("the front-end's session is drained and closed: {reason}");
        self.figures.forget();
        self.figures.write(&self.device);
        self.drop_back_end();
        if let Some(front_end) = self.front_end.take() {
            self.poller.forget(&front_end);
        }
        if self.stopping || self.door.is_over() {
            self.done = true;
            return;
        }
        self.front_end_waits();
    }

    pub(super) fn tell_memory(&mut self, id: WorkerId) {
        let (regions, generation) = self.device.regions();
        for (region, fd) in regions {
            self.push(id, memory_message(&MemoryChange::Add(region, fd)));
        }
        self.push(id, memory_message(&MemoryChange::Generation(generation)));
    }
}

fn memory_message(change: &MemoryChange) -> Outgoing {
    match change {
        MemoryChange::Add(region, fd) => {
            Outgoing::Message(DaemonMessage::AddRegion(region.clone()), vec![Arc::clone(fd)])
        }
        MemoryChange::Remove { id } => Outgoing::Message(DaemonMessage::RemoveRegion { id: *id }, Vec::new()),
        MemoryChange::Generation(generation) => {
            Outgoing::Message(DaemonMessage::MemoryMap { generation: *generation }, Vec::new())
        }
    }
}
