//! vhost-user messages over real sockets: fragments, descriptors, hostile peers.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixStream};

use iotlb_proto::access::Access;
use iotlb_proto::socket::stream::{OUTGOING_BYTES_MAX, OUTGOING_FDS_MAX};
use iotlb_proto::socket::{AddressError, MessageStream, Received, StreamError, StreamListener};
use iotlb_proto::vhost_user::header::{FDS_MAX, HEADER_LEN, PAYLOAD_MAX};
use iotlb_proto::vhost_user::{
    Header, HeaderError, Incoming, IotlbMessage, Request, VringFd, backend_iotlb, decode, encode,
};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const WATCHDOG_MS: u32 = 20_000;

/// A stream that receives requests, and the raw other end.
fn pair() -> (MessageStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    (MessageStream::from_fd(ours.into(), Incoming::Requests).expect("a unix stream"), theirs)
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").expect("/dev/null opens").into()
}

fn send_raw(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> usize {
    let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let control = if fds.is_empty() { &[][..] } else { &control };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).expect("sends")
}

fn is_close_on_exec(fd: &OwnedFd) -> bool {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).expect("flags") & libc::FD_CLOEXEC != 0
}

fn update() -> Vec<u8> {
    let message = IotlbMessage::update(0x1000, 0x1000, 0x7000, Access::READ_WRITE);
    encode(&Request::Iotlb(message), true).expect("encodes").bytes
}

/// A message that comes with a descriptor.
fn kick() -> Vec<u8> {
    encode(&Request::SetVringKick(VringFd { index: 1, fd: Some(null()) }), false).expect("encodes").bytes
}

/// Bytes that were not taken yet.
fn unread(stream: &MessageStream) -> usize {
    usize::try_from(rustix::io::ioctl_fionread(stream).expect("a socket")).expect("few")
}

fn would_block(stream: &mut MessageStream) {
    assert!(matches!(stream.receive(), Ok(Received::WouldBlock)));
}

#[test]
fn a_message_may_be_cut_at_every_byte() {
    let bytes = update();
    for cut in 1..bytes.len() {
        let (mut stream, mut peer) = pair();
        would_block(&mut stream);
        peer.write_all(&bytes[..cut]).expect("writes");
        would_block(&mut stream);
        peer.write_all(&bytes[cut..]).expect("writes");
        let Ok(Received::Message { header, payload, fds }) = stream.receive() else { panic!("cut at {cut}") };
        assert!(matches!(decode(header, &payload, fds), Ok(Request::Iotlb(_))));
        would_block(&mut stream);
    }
}

#[test]
fn descriptors_may_come_with_any_byte() {
    let request = Request::SetVringKick(iotlb_proto::vhost_user::VringFd { index: 1, fd: Some(null()) });
    let outgoing = encode(&request, false).expect("encodes");
    for at in 0..outgoing.bytes.len() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&outgoing.bytes[..at]).expect("writes");
        send_raw(&peer, &outgoing.bytes[at..=at], &outgoing.fds);
        peer.write_all(&outgoing.bytes[at + 1..]).expect("writes");
        let Ok(Received::Message { fds, .. }) = stream.receive() else { panic!("descriptor at {at}") };
        assert_eq!(fds.len(), 1);
        assert!(is_close_on_exec(&fds[0]));
    }
}

/// Two messages sent in one go, and descriptors of the second one: each stays with its own.
#[test]
fn messages_do_not_take_each_others_bytes_or_descriptors() {
    let (mut stream, peer) = pair();
    send_raw(&peer, &[update(), update()].concat(), &[]);
    let request = Request::SetBackendReqFd(null());
    let outgoing = encode(&request, true).expect("encodes");
    send_raw(&peer, &outgoing.bytes, &outgoing.fds);
    send_raw(&peer, &update(), &[]);
    for expected in [0, 0, 1, 0] {
        let Ok(Received::Message { fds, .. }) = stream.receive() else { panic!("a message is missing") };
        assert_eq!(fds.len(), expected);
    }
    would_block(&mut stream);
}

/// Small messages are looked at several at a time.
#[test]
fn descriptors_stay_with_their_message_whatever_stands_around_it() {
    let kick = |index, fd: Option<OwnedFd>| Request::SetVringKick(VringFd { index, fd });
    let cases: [[Request; 3]; 5] = [
        [Request::GetFeatures, kick(1, Some(null())), Request::GetStatus],
        [kick(1, None), kick(2, Some(null())), Request::GetFeatures],
        [kick(1, Some(null())), Request::GetFeatures, kick(2, Some(null()))],
        [Request::SetBackendReqFd(null()), Request::SetBackendReqFd(null()), Request::SetOwner],
        [Request::SetOwner, Request::SetStatus(8), Request::SetBackendReqFd(null())],
    ];
    for requests in cases {
        // Each sent by itself, as front-ends do; all may wait by the time they are read. Then at most one of them with
        // descriptors and all in one go.
        for at_once in [false, true] {
            let (mut stream, peer) = pair();
            send_raw(&peer, &update(), &[]);
            assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
            let sent: Vec<_> = requests.iter().map(|request| encode(request, false).expect("encodes")).collect();
            let with_descriptors = sent.iter().filter(|outgoing| !outgoing.fds.is_empty()).count();
            if at_once && with_descriptors == 1 {
                let bytes: Vec<u8> = sent.iter().flat_map(|outgoing| outgoing.bytes.clone()).collect();
                let fds: Vec<_> = sent.iter().flat_map(|outgoing| outgoing.fds.clone()).collect();
                // Descriptors stand at the first byte, which is right for a first message only.
                if sent[0].fds.is_empty() {
                    continue;
                }
                send_raw(&peer, &bytes, &fds);
            } else {
                for outgoing in &sent {
                    send_raw(&peer, &outgoing.bytes, &outgoing.fds);
                }
            }
            for (number, outgoing) in sent.iter().enumerate() {
                let Ok(Received::Message { header, payload, fds }) = stream.receive() else {
                    panic!("{requests:?}: message {number} is missing")
                };
                assert_eq!(fds.len(), outgoing.fds.len(), "{requests:?}: message {number}");
                assert!(decode(header, &payload, fds).is_ok(), "{requests:?}: message {number}");
            }
            would_block(&mut stream);
        }
    }
}

#[test]
fn the_last_of_several_messages_may_be_cut_at_every_byte() {
    let bytes = [Header::request(1, 0, false).to_bytes().to_vec(), update(), update()].concat();
    for cut in 1..bytes.len() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&update()).expect("writes");
        let mut sizes = Vec::new();
        for part in [&bytes[..cut], &bytes[cut..]] {
            peer.write_all(part).expect("writes");
            while let Ok(Received::Message { header, payload, fds }) = stream.receive() {
                sizes.push(payload.len());
                assert!(decode(header, &payload, fds).is_ok(), "cut at {cut}");
            }
        }
        assert_eq!(sizes, [32, 0, 32, 32], "cut at {cut}");
    }
}

#[test]
fn messages_that_were_put_together_arrive_in_order() {
    let (mut stream, mut peer) = pair();
    let (one, two) = (Header::reply(1, 0).to_bytes(), Header::reply(2, 0).to_bytes());
    assert!(matches!(stream.put(&[]), Err(StreamError::Unsendable { .. })));
    stream.put(&one).expect("room");
    stream.put(&two).expect("room");
    assert!(stream.wants_write());
    // What is sent at once stays behind them, and its descriptors with it.
    stream.send(&one, &[null().as_fd()]).expect("room");
    stream.put(&two).expect("room");
    stream.flush().expect("sends");
    assert!(!stream.wants_write());
    let mut bytes = [0; 4 * HEADER_LEN];
    peer.read_exact(&mut bytes[..2 * HEADER_LEN]).expect("reads");
    peer.read_exact(&mut bytes[2 * HEADER_LEN..]).expect("reads");
    assert_eq!(bytes, *[one, two, one, two].concat());
    let mut full = Ok(());
    while full.is_ok() {
        full = stream.put(&[7; 4096]);
    }
    assert!(matches!(full, Err(StreamError::OutgoingFull { bytes: OUTGOING_BYTES_MAX, .. })), "{full:?}");
}

#[test]
fn answered_messages_stay_in_the_socket_until_they_are_put_away() {
    let (mut stream, mut peer) = pair();
    let mut receive = |stream: &mut MessageStream| {
        peer.write_all(&update()).expect("sent");
        assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
        unread(stream)
    };
    let length = update().len();
    for count in 1..=3 {
        assert_eq!(receive(&mut stream), count * length, "answered before it is taken");
        would_block(&mut stream);
    }
    stream.put_away().expect("taken");
    assert_eq!(unread(&stream), 0);
    stream.put_away().expect("nothing is left");
    // However long it goes on, the socket does not fill up.
    let most = (0..100).map(|_| receive(&mut stream)).max();
    assert!(most.is_some_and(|bytes| bytes > 3 * length && bytes <= 32 * length), "{most:?}");
    // Descriptors come with what follows: it is found all the same.
    send_raw(&peer, &kick(), &[null().as_fd()]);
    assert!(matches!(stream.receive(), Ok(Received::Message { fds, .. }) if fds.len() == 1));
    peer.write_all(&update()).expect("sent");
    assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
    would_block(&mut stream);
    drop(peer);
    assert!(matches!(stream.receive(), Ok(Received::Closed)), "the end is seen behind what was left");
}

#[test]
fn small_messages_without_a_payload_do_not_pile_up() {
    let (mut stream, mut peer) = pair();
    let header = Header::request(1, 0, false).to_bytes();
    let most = (0..200).map(|_| {
        peer.write_all(&header).expect("sent");
        assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
        unread(&stream)
    });
    assert!(most.max().is_some_and(|bytes| bytes <= 32 * HEADER_LEN), "each costs the peer as much as a long one");
}

/// What waits behind a message with descriptors may be in one piece with it, so that a look ends in the middle.
#[test]
fn what_follows_descriptors_in_one_piece_is_not_skipped() {
    let (mut stream, peer) = pair();
    let null = null();
    for round in 0..3 {
        let three = [kick(), update(), update()].concat();
        send_raw(&peer, &update(), &[]);
        send_raw(&peer, &three, &[null.as_fd()]);
        send_raw(&peer, &update(), &[]);
        let fds: Vec<usize> = (0..5)
            .map(|at| match stream.receive() {
                Ok(Received::Message { fds, .. }) => fds.len(),
                other => panic!("round {round}, message {at}: {other:?}"),
            })
            .collect();
        assert_eq!(fds, [0, 1, 0, 0, 0]);
        would_block(&mut stream);
        if round == 1 {
            stream.put_away().expect("taken");
        }
    }
}

#[test]
fn waiting_for_a_message_sleeps_whatever_was_left_in_the_socket() {
    let (mut stream, mut peer) = pair();
    peer.write_all(&update()).expect("sent");
    assert!(stream.receive_blocking(1_000).is_ok());
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(stream.receive_blocking(1).map(|_| ())));
    let end = end.recv_timeout(std::time::Duration::from_secs(20)).expect("it does not go around for ever");
    assert!(matches!(end, Err(StreamError::TimedOut { timeout_ms: 1 })));
}

#[test]
fn bytes_that_somebody_else_takes_are_missed() {
    let (mut stream, mut peer) = pair();
    peer.write_all(&update()).expect("sent");
    assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
    let thief = UnixStream::from(stream.as_fd().try_clone_to_owned().expect("a duplicate"));
    (&thief).read_exact(&mut vec![0; update().len()]).expect("stolen");
    would_block(&mut stream);
    assert!(matches!(stream.put_away(), Err(StreamError::Receive(_))));
    assert!(matches!(stream.receive(), Err(StreamError::Broken)));
}

#[test]
fn a_close_between_messages_is_an_end_and_one_inside_an_error() {
    let (mut stream, peer) = pair();
    send_raw(&peer, &update(), &[]);
    drop(peer);
    assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
    assert!(matches!(stream.receive(), Ok(Received::Closed)));
    assert!(matches!(stream.receive(), Ok(Received::Closed)));

    let bytes = update();
    for cut in 1..bytes.len() {
        let (mut stream, peer) = pair();
        send_raw(&peer, &bytes[..cut], &[]);
        drop(peer);
        assert!(matches!(stream.receive(), Err(StreamError::ClosedInMessage { bytes }) if bytes == cut));
        assert!(matches!(stream.receive(), Err(StreamError::Broken)));
    }
}

#[test]
fn a_bad_header_breaks_the_stream_before_any_payload_is_read() {
    let header = Header { request: 22, flags: 1, size: u32::MAX };
    let (mut stream, peer) = pair();
    send_raw(&peer, &header.to_bytes(), &[null().as_fd()]);
    assert!(matches!(stream.receive(), Err(StreamError::Header(HeaderError::TooLong { request: 22, size: u32::MAX }))));
    assert!(matches!(stream.receive(), Err(StreamError::Broken)));
    assert!(matches!(stream.send(&update(), &[]), Err(StreamError::Broken)));

    let (mut stream, peer) = pair();
    send_raw(&peer, &Header::reply(22, 0).to_bytes(), &[]);
    assert!(matches!(stream.receive(), Err(StreamError::Header(HeaderError::UnexpectedReply { .. }))));
}

#[test]
fn the_longest_payload_and_the_most_descriptors_are_taken() {
    let (mut stream, peer) = pair();
    let size = u32::try_from(PAYLOAD_MAX).expect("small");
    let bytes = [&Header::request(99, size, false).to_bytes()[..], &vec![7; PAYLOAD_MAX]].concat();
    let fd = null();
    send_raw(&peer, &bytes, &[fd.as_fd(); FDS_MAX]);
    let Ok(Received::Message { payload, fds, .. }) = stream.receive() else { panic!("not taken") };
    assert_eq!((&payload[..], fds.len()), (&[7; PAYLOAD_MAX][..], FDS_MAX));
    assert!(fds.iter().all(is_close_on_exec));
}

/// IOTLB messages have no descriptors, so nobody looks for any.
#[test]
fn a_descriptor_with_an_iotlb_message_is_closed_when_that_is_taken() {
    let (mut stream, peer) = pair();
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    send_raw(&peer, &update(), &[writer.as_fd()]);
    drop(writer);
    for _ in 0..2 {
        assert!(matches!(stream.receive(), Ok(Received::Message { fds, .. }) if fds.is_empty()));
        send_raw(&peer, &update(), &[]);
    }
    stream.put_away().expect("taken");
    assert_eq!(reader.read(&mut [0]).expect("the end"), 0, "nobody has the other end");
    assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
    would_block(&mut stream);
}

/// In pieces it is received byte by byte, with what comes along.
#[test]
fn a_descriptor_with_a_piece_of_an_iotlb_message_is_closed_and_the_message_taken() {
    let bytes = update();
    for cut in [1, HEADER_LEN, HEADER_LEN + 1, bytes.len() - 1] {
        for with_first in [true, false] {
            let (mut stream, peer) = pair();
            let (mut reader, writer) = std::io::pipe().expect("a pipe");
            let fd = [writer.as_fd()];
            send_raw(&peer, &bytes[..cut], if with_first { &fd } else { &[] });
            would_block(&mut stream);
            send_raw(&peer, &bytes[cut..], if with_first { &[] } else { &fd });
            drop(writer);
            let Ok(Received::Message { header, payload, fds }) = stream.receive() else { panic!("cut at {cut}") };
            assert_eq!(fds.len(), 1, "cut at {cut}: received");
            let request = decode(header, &payload, fds);
            assert!(matches!(request, Ok(Request::Iotlb(_))), "cut at {cut}: {request:?}");
            assert_eq!(reader.read(&mut [0]).expect("the end"), 0, "nobody has the other end");
        }
    }
}

#[test]
fn too_many_descriptors_break_the_stream() {
    let fd = null();
    for count in [FDS_MAX + 1, 60, 61, 200, 253] {
        let (mut stream, peer) = pair();
        send_raw(&peer, &kick(), &vec![fd.as_fd(); count]);
        assert!(matches!(stream.receive(), Err(StreamError::TooManyDescriptors { count }) if count > FDS_MAX));
        assert!(matches!(stream.receive(), Err(StreamError::Broken)));
    }
    // One byte at a time, each with a few.
    let (mut stream, peer) = pair();
    for byte in &kick()[..5] {
        send_raw(&peer, &[*byte], &[fd.as_fd(); 8]);
    }
    assert!(matches!(stream.receive(), Err(StreamError::TooManyDescriptors { count: 40 })));
}

#[test]
fn what_the_socket_does_not_take_is_queued_with_its_descriptors() {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    let mut sender = MessageStream::from_fd(ours.into(), Incoming::Replies).expect("a unix stream");
    let mut receiver = MessageStream::from_fd(theirs.into(), Incoming::Requests).expect("a unix stream");
    let request = Request::SetVringCall(iotlb_proto::vhost_user::VringFd { index: 1, fd: Some(null()) });
    let mut sent = 0;
    // Large ones first: they fill the socket fast, and the last one goes in part.
    let filler = [&Header::request(99, 4096, false).to_bytes()[..], &[0; PAYLOAD_MAX]].concat();
    while !sender.wants_write() {
        sender.send(&filler, &[]).expect("queued at the latest");
        sent += 1;
    }
    {
        let outgoing = encode(&request, false).expect("encodes");
        sender.send(&outgoing.bytes, &outgoing.fds).expect("queued");
    }
    drop(request); // the queue holds a duplicate of its own
    sender.send(&backend_iotlb(&IotlbMessage::miss(0x1000, Access::READ), true), &[]).expect("queued");
    sent += 2;

    let mut received = Vec::new();
    while received.len() < sent {
        match receiver.receive().expect("whole messages") {
            Received::Message { header, payload, fds } => {
                assert_eq!(payload.len(), header.size as usize);
                received.push((header.request, fds.len()));
            }
            Received::WouldBlock => sender.flush().expect("peer is alive"),
            Received::Closed => panic!("closed"),
        }
    }
    assert!(!sender.wants_write());
    assert!(received[..sent - 2].iter().all(|&what| what == (99, 0)));
    assert_eq!(received[sent - 2..], [(13, 1), (1, 0)]);
}

/// With a send buffer so small that messages go in parts, each descriptor still arrives once.
#[test]
fn a_message_sent_in_parts_carries_its_descriptors_once() {
    let (ours, theirs) = UnixStream::pair().expect("socket pair");
    // The kernel rounds up to its least, about 4,600 bytes.
    nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::SndBuf, &1).expect("SO_SNDBUF");
    let mut sender = MessageStream::from_fd(ours.into(), Incoming::Replies).expect("a unix stream");
    let mut receiver = MessageStream::from_fd(theirs.into(), Incoming::Requests).expect("a unix stream");
    // Four messages in one go, 16 KiB: only a part fits. The first of the four has the descriptors.
    let message = [&Header::request(99, 4096, false).to_bytes()[..], &[0; PAYLOAD_MAX]].concat().repeat(4);
    let fd = null();
    let sends = 3;
    for _ in 0..sends {
        sender.send(&message, &[fd.as_fd(); 2]).expect("queued");
    }
    let mut arrived = Vec::new();
    let mut flushes = 0;
    while arrived.len() < 4 * sends {
        match receiver.receive().expect("whole messages") {
            Received::Message { fds, .. } => arrived.push(fds.len()),
            Received::WouldBlock => {
                sender.flush().expect("peer is alive");
                flushes += 1;
            }
            Received::Closed => panic!("closed"),
        }
    }
    assert_eq!(arrived, [2, 0, 0, 0].repeat(sends));
    assert!(flushes > sends, "everything went in one part, so this shows nothing");
}

#[test]
fn the_outgoing_queue_is_bounded() {
    let (mut stream, peer) = pair();
    let message = update();
    let mut taken = 0;
    let waiting = loop {
        match stream.send(&message, &[]) {
            Ok(()) => taken += 1,
            Err(StreamError::OutgoingFull { bytes, .. }) => break bytes,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(waiting <= OUTGOING_BYTES_MAX && waiting > OUTGOING_BYTES_MAX - message.len());
    // Refusing was not an error of the stream: all that was taken arrives, and nothing else.
    let mut reader = MessageStream::from_fd(peer.into(), Incoming::Requests).expect("a unix stream");
    let mut arrived = 0;
    while arrived < taken {
        match reader.receive().expect("whole messages") {
            Received::Message { .. } => arrived += 1,
            Received::WouldBlock => stream.flush().expect("peer is alive"),
            Received::Closed => panic!("closed"),
        }
    }
    assert!(!stream.wants_write());
    would_block(&mut reader);
    stream.send(&message, &[]).expect("there is room again");

    let fd = null();
    let (mut stream, _peer) = pair();
    let full = loop {
        match stream.send(&[0; HEADER_LEN], &[fd.as_fd(); FDS_MAX]) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(full, StreamError::OutgoingFull { fds, .. } if fds == OUTGOING_FDS_MAX), "{full}");
}

#[test]
fn what_cannot_be_sent_is_said() {
    let (mut stream, peer) = pair();
    let fd = null();
    assert!(matches!(stream.send(&[], &[fd.as_fd()]), Err(StreamError::Unsendable { bytes: 0, fds: 1 })));
    assert!(matches!(
        stream.send(&[0], &[fd.as_fd(); FDS_MAX + 1]),
        Err(StreamError::Unsendable { bytes: 1, fds: 33 })
    ));
    drop(peer);
    assert!(matches!(stream.send(&update(), &[]), Err(StreamError::Closed)));
}

/// What a peer said before it went can still be read after a failed send.
#[test]
fn a_failed_send_does_not_lose_what_came_before() {
    let (mut stream, peer) = pair();
    send_raw(&peer, &update(), &[]);
    drop(peer);
    assert!(matches!(stream.send(&update(), &[]), Err(StreamError::Closed)));
    assert!(matches!(stream.receive(), Ok(Received::Message { .. })));
    assert!(matches!(stream.receive(), Ok(Received::Closed)));
}

/// Whoever made the pair can make either end blocking, and ask for credentials on it, at any time.
#[test]
fn flags_of_the_shared_description_do_not_matter() {
    let (ours, peer) = UnixStream::pair().expect("socket pair");
    let meddler = ours.try_clone().expect("dup");
    let mut stream = MessageStream::from_fd(ours.into(), Incoming::Requests).expect("a unix stream");
    meddler.set_nonblocking(false).expect("flags");
    would_block(&mut stream);
    nix::sys::socket::setsockopt(&meddler, nix::sys::socket::sockopt::PassCred, &true).expect("SO_PASSCRED");
    let fd = null();
    send_raw(&peer, &kick(), &[fd.as_fd(); FDS_MAX]);
    let Ok(Received::Message { fds, .. }) = stream.receive() else { panic!("not taken") };
    assert_eq!(fds.len(), FDS_MAX);
}

#[test]
fn only_connected_unix_streams_are_taken() {
    let name = SocketAddr::from_abstract_name(format!("iotlb-test-{}", std::process::id())).expect("a name");
    let listener = std::os::unix::net::UnixListener::bind_addr(&name).expect("binds");
    let datagram = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    for wrong in [listener.into(), datagram.into()] {
        assert!(matches!(
            MessageStream::from_fd(wrong, Incoming::Requests),
            Err(AddressError::WrongSocket { expected: "a connected AF_UNIX SOCK_STREAM socket", .. })
        ));
    }
    assert!(matches!(MessageStream::from_fd(null(), Incoming::Requests), Err(AddressError::NotASocket { .. })));
    let (one, _two) = UnixStream::pair().expect("socket pair");
    assert!(matches!(StreamListener::from_fd(one.into()), Err(AddressError::WrongSocket { .. })));
}

/// A directory of this test's own, removed when done.
struct Directory(std::path::PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("iotlb-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a fresh directory");
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn listening_and_connecting() {
    let directory = Directory::new("stream");
    let path = directory.0.join("socket");
    let missing = MessageStream::connect(&path, Incoming::Replies, 100).expect_err("nobody there");
    assert!(missing.to_string().contains(&path.display().to_string()), "{missing}");

    let listener = StreamListener::bind(&path, 0o666).expect("binds");
    let file = std::fs::metadata(&path).expect("a file");
    assert!(file.file_type().is_socket());
    assert_eq!(file.permissions().mode() & 0o777, 0o666);
    assert!(matches!(StreamListener::bind(&path, 0o600), Err(AddressError::Bind { .. })));
    assert!(listener.accept(Incoming::Requests).expect("accepts").is_none());

    let mut front = MessageStream::connect(&path, Incoming::Replies, WATCHDOG_MS).expect("connects");
    let mut back = listener.accept(Incoming::Requests).expect("accepts").expect("one connection");
    front.send_blocking(&update(), &[], WATCHDOG_MS).expect("sends");
    let (header, _, _) = back.receive_blocking(WATCHDOG_MS).expect("receives");
    back.send(&iotlb_proto::vhost_user::reply_u64(header.request, 0), &[]).expect("sends");
    let (header, payload, _) = front.receive_blocking(WATCHDOG_MS).expect("receives");
    assert_eq!(iotlb_proto::vhost_user::decode_reply_u64(22, header, &payload), Ok(0));
    assert!(matches!(front.receive_blocking(1), Err(StreamError::TimedOut { timeout_ms: 1 })));
    drop(back);
    assert!(matches!(front.receive_blocking(WATCHDOG_MS), Err(StreamError::Closed)));
}

#[test]
fn paths_that_do_not_fit_are_named() {
    let directory = Directory::new("path");
    let room = 107 - directory.0.as_os_str().len() - 1;
    let longest = directory.0.join("s".repeat(room));
    StreamListener::bind(&longest, 0o600).expect("107 bytes fit");
    let long = directory.0.join("s".repeat(room + 1));
    let error = StreamListener::bind(&long, 0o600).expect_err("108 bytes do not fit");
    assert!(matches!(error, AddressError::PathTooLong { .. }));
    assert!(error.to_string().contains("108 bytes long"), "{error}");
    assert!(matches!(MessageStream::connect(&long, Incoming::Replies, 1), Err(AddressError::PathTooLong { .. })));
    let empty = std::path::Path::new("");
    assert!(matches!(StreamListener::bind(empty, 0o600), Err(AddressError::PathInvalid { .. })));
}

/// `send_blocking` to a peer that reads later, from another thread.
#[test]
fn blocking_sends_wait_for_the_reader() {
    let (ours, mut theirs) = UnixStream::pair().expect("socket pair");
    let mut sender = MessageStream::from_fd(ours.into(), Incoming::Replies).expect("a unix stream");
    let message = [&Header::request(99, 4096, false).to_bytes()[..], &[1; PAYLOAD_MAX]].concat();
    let count = 1000;
    let total = message.len() * count;
    let reader = std::thread::spawn(move || {
        let mut bytes = vec![0; total];
        theirs.read_exact(&mut bytes).expect("all of it");
        bytes
    });
    for _ in 0..count {
        sender.send_blocking(&message, &[], WATCHDOG_MS).expect("sends");
    }
    assert_eq!(reader.join().expect("no panic"), message.repeat(count));
}
