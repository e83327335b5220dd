//! A daemon whose front-end speaks over raw sockets: nothing in between that costs time.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use iotlb_client::{Access, AttachOptions, Attachment};
use iotlbd::server::{DeviceKind, FrontEndSource, Server, ServerConfig, ServerError};
use iotlbd::sim::wire::{BACKEND_IOTLB, HEADER_LEN, Iotlb, MessageHeader, code};
use iotlbd::sim::{FrontEnd, FrontEndOptions, Guest, Unmapping, VirtioNet};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::bench::peers::PAGE;

/// Bytes of an UPDATE, an INVALIDATE, a MISS.
pub const IOTLB_LEN: usize = HEADER_LEN + Iotlb::LEN;
/// Bytes of an acknowledgement.
pub const ACK_LEN: usize = HEADER_LEN + 8;
/// First address used. Far from those the driver takes for its rings, and in a tree as high as theirs.
pub const IOVA_BASE: u64 = 1 << 36;

/// A daemon, a front-end after its handshake, a worker. Ends when dropped.
#[derive(Debug)]
pub struct Service {
    /// The front-end's main channel.
    pub main: UnixStream,
    /// Its back-end channel.
    pub back_end: UnixStream,
    /// The worker.
    pub worker: Attachment,
    /// A page of guest memory, as the front-end names it.
    pub user_address: u64,
    _driver: VirtioNet,
    _front_end: FrontEnd,
    _folder: tempfile::TempDir,
    stop: Option<std::io::PipeWriter>,
    daemon: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Service {
    /// Starts it, with the daemon's loop on `cpu`.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start(cpu: Option<usize>, busy_poll: bool) -> Result<Service, Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let (socket, control) = (folder.path().join("vhost.sock"), folder.path().join("control.sock"));
        let source = FrontEndSource::Path { path: socket.clone(), mode: 0o600 };
        let mut config = ServerConfig::new(DeviceKind::Net { queue_pairs: 1 }, source, control.clone());
        (config.cpu, config.busy_poll) = (cpu, busy_poll);
        let server = Server::start(config)?;
        let (stop_reader, stop) = std::io::pipe()?;
        let daemon = std::thread::spawn(move || server.run(OwnedFd::from(stop_reader)));
        let mut front_end = FrontEnd::connect(&socket, Guest::new(0, 4 << 20)?, FrontEndOptions::default())?;
        let driver = VirtioNet::start(&mut front_end, Unmapping::Strict)?;
        let worker =
            Attachment::connect(&control, &AttachOptions { label: "bench".into(), ..AttachOptions::default() })?;
        let page = front_end.guest.allocate()?;
        let user_address = front_end.guest.user_address(page)?;
        front_end.serve_misses()?;
        let (main, back_end) = front_end.channels();
        let main = UnixStream::from(main.try_clone_to_owned()?);
        let back_end = UnixStream::from(back_end.ok_or("no back-end channel")?.try_clone_to_owned()?);
        main.set_nonblocking(false)?;
        back_end.set_nonblocking(false)?;
        Ok(Service {
            main,
            back_end,
            worker,
            user_address,
            _driver: driver,
            _front_end: front_end,
            _folder: folder,
            stop: Some(stop),
            daemon: Some(daemon),
        })
    }

    /// An UPDATE of the page at `iova`.
    #[must_use]
    pub fn update(&self, iova: u64) -> [u8; IOTLB_LEN] {
        update(iova, self.user_address)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Whoever reads one of the channels meanwhile is to notice. An Err: it is closed already.
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        drop(self.stop.take());
        if let Some(daemon) = self.daemon.take() {
            // The daemon's own result was of interest only while something could be done about it.
            let _ = daemon.join();
        }
    }
}

/// An UPDATE of one page.
#[must_use]
pub fn update(iova: u64, user_address: u64) -> [u8; IOTLB_LEN] {
    message(&Iotlb::update(iova, PAGE, user_address, Access::READ_WRITE))
}

/// What takes the place of a MISS where nobody looks further than [`answer`]: it has the header of one that asks for no
/// reply.
#[must_use]
pub fn miss() -> [u8; IOTLB_LEN] {
    let header = MessageHeader::request(code::IOTLB_UPDATE, Iotlb::LEN, false);
    let mut bytes = update(0, 0);
    bytes[..HEADER_LEN].copy_from_slice(&MessageHeader { request: BACKEND_IOTLB, ..header }.encode());
    bytes
}

/// What the front-end says to a MISS: an UPDATE of the page. `None`: it is no such message.
#[must_use]
pub fn answer(miss: &[u8; IOTLB_LEN], user_address: u64) -> Option<[u8; IOTLB_LEN]> {
    Iotlb::decode(&miss[HEADER_LEN..]).map(|miss| update(miss.iova & !(PAGE - 1), user_address))
}

/// An INVALIDATE of one page.
#[must_use]
pub fn invalidate(iova: u64) -> [u8; IOTLB_LEN] {
    message(&Iotlb::invalidate(iova, PAGE))
}

fn message(body: &Iotlb) -> [u8; IOTLB_LEN] {
    let mut bytes = [0; IOTLB_LEN];
    bytes[..HEADER_LEN].copy_from_slice(&MessageHeader::request(code::IOTLB_UPDATE, Iotlb::LEN, true).encode());
    bytes[HEADER_LEN..].copy_from_slice(&body.encode());
    bytes
}

/// Sends a message and waits for its acknowledgement, blocking as QEMU does.
///
/// # Errors
/// The connection is over, or the answer is not zero.
pub fn round_trip(mut stream: &UnixStream, message: &[u8; IOTLB_LEN]) -> std::io::Result<()> {
    stream.write_all(message)?;
    let mut ack = [0; ACK_LEN];
    stream.read_exact(&mut ack)?;
    check(ack)
}

/// The same, but awake all the time: nobody has to wake the asker up, so what is left is the answerer's work.
///
/// # Errors
/// The connection is over, or the answer is not zero.
pub fn round_trip_awake(mut stream: &UnixStream, message: &[u8; IOTLB_LEN]) -> std::io::Result<()> {
    stream.write_all(message)?;
    let mut ack = [0; ACK_LEN];
    receive_awake(stream, &mut ack)?;
    check(ack)
}

/// Polls until a message of this length is there, without a yield: what it waits for runs elsewhere.
///
/// # Errors
/// The connection is over.
pub fn receive_awake<const LEN: usize>(stream: &UnixStream, message: &mut [u8; LEN]) -> std::io::Result<()> {
    loop {
        match recv(stream, &mut message[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) if count == LEN => return Ok(()),
            Ok(_) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Err(Errno::AGAIN) => std::hint::spin_loop(),
            Err(error) => return Err(error.into()),
        }
    }
}

fn check(ack: [u8; ACK_LEN]) -> std::io::Result<()> {
    if ack[HEADER_LEN..] == [0; 8] { Ok(()) } else { Err(std::io::Error::other("the daemon refused a message")) }
}
