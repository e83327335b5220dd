//! The front-end's main channel: who may connect, whole requests in, replies out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use iotlb_proto::socket::{MessageStream, Received};
use iotlb_proto::vhost_user::{self, DecodeError, Header, Request};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use tracing::{info, warn};

use super::alarm::now_ns;
use super::event_loop::EventLoop;
use super::listen::NamedListener;
use super::poller::Token;
use crate::device::Event;

/// Where front-ends come from.
#[derive(Debug)]
pub(crate) enum FrontEndDoor {
    /// A socket made here, removed at the end.
    Named(NamedListener),
    /// A listening socket that was handed in.
    Given(OwnedFd),
    /// One connection, handed in, and no other after it.
    Once(Option<OwnedFd>),
}

impl FrontEndDoor {
    pub(crate) fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            FrontEndDoor::Named(listener) => Some(listener.as_fd()),
            FrontEndDoor::Given(fd) => Some(fd.as_fd()),
            FrontEndDoor::Once(_) => None,
        }
    }

    /// Whether nobody will come any more.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, FrontEndDoor::Once(None))
    }
}

/// A connected front-end.
#[derive(Debug)]
pub(crate) struct FrontEnd {
    stream: MessageStream,
    /// Something may be there to be read.
    readable: bool,
    /// Nobody hears replies any more.
    hung_up: bool,
    /// Replies wait, and the poller was asked to report room for them.
    waits_for_room: bool,
    lost: Lost,
}

/// The end of a connection, told to the device once.
#[derive(Debug)]
enum Lost {
    No,
    Untold(String),
    Told,
}

/// What is there for the device.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// Nothing now.
    Nothing,
    /// A request.
    Request(Header, Request),
    /// A message that makes no sense.
    Bad(Header, DecodeError),
    /// The end.
    Lost(String),
}

impl FrontEnd {
    fn new(stream: MessageStream) -> FrontEnd {
        FrontEnd { stream, readable: true, hung_up: false, waits_for_room: false, lost: Lost::No }
    }

    /// The loop saw something happen.
    pub(crate) fn ready(&mut self, hung_up: bool) {
        self.readable = true;
        self.hung_up |= hung_up;
        self.flush();
    }

    /// Somebody polls: whether something is there is seen by reading.
    pub(crate) fn look(&mut self) {
        self.readable = true;
    }

    /// Nothing is expected soon: requests that were read are taken from the socket.
    pub(crate) fn put_away(&mut self) {
        if let Err(error) = self.stream.put_away() {
            self.lose(error.to_string());
        }
    }

    /// Whether the poller has to be told anew if room for replies matters, and what.
    pub(crate) fn room_matters(&mut self) -> Option<bool> {
        let wanted = self.stream.wants_write();
        let news = self.waits_for_room != wanted;
        self.waits_for_room = wanted;
        news.then_some(wanted)
    }

    /// The connection is over: told to the device with the next [`FrontEnd::next`].
    pub(crate) fn lose(&mut self, reason: String) {
        if matches!(self.lost, Lost::No) {
            self.lost = Lost::Untold(reason);
        }
    }

    /// Whether the next request is here already, so that answers may wait for the one to it.
    pub(crate) fn has_request(&self) -> bool {
        self.stream.has_message()
    }

    /// What comes next. With `accepts` false only the end does: requests stay in the socket, in order.
    pub(crate) fn next(&mut self, accepts: bool) -> Incoming {
        match std::mem::replace(&mut self.lost, Lost::Told) {
            Lost::Told => return Incoming::Nothing,
            Lost::Untold(reason) => return Incoming::Lost(reason),
            Lost::No => self.lost = Lost::No,
        }
        if !accepts {
            // Requests that are still in the socket have nobody to answer to either.
            if self.hung_up {
                self.lost = Lost::Told;
                return Incoming::Lost(String::from("closed while a reply was held back"));
            }
            return Incoming::Nothing;
        }
        if !self.readable {
            return Incoming::Nothing;
        }
        match self.stream.receive() {
            Ok(Received::Message { header, payload, fds }) => match vhost_user::decode(header, &payload, fds) {
                Ok(request) => Incoming::Request(header, request),
                Err(error) => Incoming::Bad(header, error),
            },
            Ok(Received::WouldBlock) => {
                self.readable = false;
                Incoming::Nothing
            }
            Ok(Received::Closed) => {
                self.lost = Lost::Told;
                Incoming::Lost(String::from("closed by the front-end"))
            }
            Err(error) => {
                self.lost = Lost::Told;
                Incoming::Lost(error.to_string())
            }
        }
    }

    /// Puts a reply behind those that wait for [`FrontEnd::flush`].
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        if matches!(self.lost, Lost::Told) {
            return;
        }
        if let Err(error) = self.stream.put(bytes) {
            self.lose(format!("a reply cannot be sent: {error}"));
        }
    }

    /// Whether the end of the connection is still to be told, by [`FrontEnd::next`].
    pub(crate) fn has_bad_news(&self) -> bool {
        matches!(self.lost, Lost::Untold(_))
    }

    /// Sends what waits, as far as the socket takes it.
    pub(crate) fn flush(&mut self) {
        if let Err(error) = self.stream.flush() {
            self.lose(format!("a reply cannot be sent: {error}"));
        }
    }
}

impl AsFd for FrontEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl EventLoop {
    /// A front-end waits to be accepted, or may.
    pub(super) fn front_end_waits(&mut self) {
        if self.stopping {
            return;
        }
        let Some(listener) = self.door.listener() else { return };
        if self.front_end.is_some() {
            info!("another front-end waits: there is one already, and it is served when that one is gone");
            return;
        }
        loop {
            match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => {
                    self.front_end_connected(fd);
                    return;
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    warn!("a front-end cannot be accepted now: {error}");
                    self.pause_accept();
                    return;
                }
            }
        }
    }

    pub(super) fn front_end_connected(&mut self, fd: OwnedFd) {
        let opened = MessageStream::from_fd(fd, vhost_user::Incoming::Requests)
            .map_err(|error| error.to_string())
            .and_then(|stream| self.poller.watch(&stream, Token::FrontEnd).map(|()| stream).map_err(|e| e.to_string()));
        match opened {
            Ok(stream) => self.front_end = Some(FrontEnd::new(stream)),
            Err(error) => {
                warn!("the front-end's connection cannot be used: {error}");
                self.done |= self.door.is_over();
                // Another may wait, and is not reported again.
                self.pause_accept();
                return;
            }
        }
        info!("a front-end connected");
        self.device.handle(Event::FrontEndConnected, now_ns());
    }
}
