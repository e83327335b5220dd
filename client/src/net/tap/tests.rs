//! Offload flags and names; and, as root, real TAPs in a network namespace of their own.

use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, sockopt};

use super::*;
use crate::net::header::{FLAG_NEEDS_CSUM, Header};
use crate::not_tested::not_tested;

#[test]
fn names_are_checked_before_the_kernel_sees_them() {
    for bad in ["", "a-name-with-16-chars", "a b", "a/b", ".", "..", "tap%d", "tap:0", "täp"] {
        assert!(matches!(Tap::open(bad, Direction::Both), Err(TapError::Name { .. })), "{bad:?}");
    }
    let request = request_for("tap0").expect("a good name");
    let name: Vec<u8> = request.ifr_name.iter().map(|c| c.to_ne_bytes()[0]).collect();
    assert_eq!(&name[..6], b"tap0\0\0");
}

#[test]
fn offloads_follow_the_acknowledged_features() {
    assert_eq!(offloads(0), 0);
    assert_eq!(offloads(virtio::NET_GUEST_TSO4), 0, "segmentation needs checksum offload");
    assert_eq!(offloads(virtio::NET_GUEST_CSUM), 1);
    let all = virtio::NET_GUEST_CSUM
        | virtio::NET_GUEST_TSO4
        | virtio::NET_GUEST_TSO6
        | virtio::NET_GUEST_ECN
        | virtio::NET_GUEST_USO4
        | virtio::NET_GUEST_USO6;
    assert_eq!(offloads(all), 0x6f);
    assert_eq!(offloads(all & !virtio::NET_GUEST_USO6), 0x0f);
    assert_eq!(offloads(virtio::NET_GUEST_CSUM | virtio::NET_GUEST_ECN), 1);
}

/// Long after any test has ended: only a hang gets here.
const HANG_S: &str = "600";

/// Set in the copy of this test that runs in a namespace.
const INSIDE: &str = "IOTLB_TAP_TEST_INSIDE";

/// Runs one of the tests below again, alone, in a network namespace of its own. As a user, or where the kernel has no
/// TAP, there is nothing to run; as root with a TAP device, not getting a namespace is a failure.
fn in_a_namespace(test: &str, body: fn()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    if !nix::unistd::geteuid().is_root() || !std::path::Path::new(DEVICE).exists() {
        not_tested(&format!("it takes root and {DEVICE}"));
        return;
    }
    // In the process group of the run, so that what ends the run ends this too.
    let output = Command::new("unshare")
        .args(["-n", "timeout", "--foreground", HANG_S])
        .arg(std::env::current_exe().expect("a test binary has a path"))
        .args(["--exact", &format!("net::tap::tests::{test}"), "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare and timeout are part of every Linux");
    let text = String::from_utf8_lossy(&output.stdout);
    let ran = text.contains("1 passed");
    assert!(output.status.success() && ran, "{text}{}", String::from_utf8_lossy(&output.stderr));
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments}");
}

/// A socket on the host's end of the TAP, for frames of a type of our own.
fn host_end(name: &str) -> OwnedFd {
    let socket = nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .expect("root may open packet sockets");
    let index = nix::net::if_::if_nametoindex(name).expect("the TAP exists");
    // SAFETY: a C structure of numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET.try_into().expect("small");
    address.sll_protocol = u16::from_be_bytes(TYPE).to_be();
    address.sll_ifindex = index.try_into().expect("small");
    let size = u32::try_from(size_of_val(&address)).expect("small");
    // SAFETY: the address lives across the call and has the size given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
    setsockopt(&socket, sockopt::ReceiveTimeout, &nix::sys::time::TimeVal::new(20, 0)).expect("a watchdog");
    socket
}

/// An EtherType for experiments.
const TYPE: [u8; 2] = [0x88, 0xb5];

fn frame(source: u8, text: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &[2, 0, 0, 0, 0, source], &TYPE, text, &[0; 46]].concat()
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN], frame].concat()
}

/// All frames of our type that wait in a queue; others (the kernel's own announcements) are dropped.
fn drain(tap: &mut Tap) -> Vec<Vec<u8>> {
    let mut packet = [0; 4096];
    let mut frames = Vec::new();
    while let Some(len) = tap.read(&mut packet).expect("readable") {
        if packet[HEADER_LEN + 12..HEADER_LEN + 14] == TYPE {
            frames.push(packet[HEADER_LEN..len].to_vec());
        }
    }
    frames
}

#[test]
fn packets_go_both_ways() {
    in_a_namespace("packets_go_both_ways", || {
        let mut tap = Tap::open("tap0", Direction::Both).expect("root may");
        tap.set_offloads(virtio::NET_GUEST_CSUM | virtio::NET_GUEST_TSO4).expect("every kernel has these");
        tap.set_offloads(u64::MAX).expect("falls back where the kernel is older");
        tap.set_offloads(0).expect("every kernel has none");
        tap.attach().expect("detached");
        ip("link set tap0 up");
        let host = host_end("tap0");
        let hello = frame(1, b"from the guest");
        assert_eq!(tap.write(&with_header(&hello)).expect("open"), Written::Sent);
        let mut got = [0; 200];
        let len = recv(host.as_raw_fd(), &mut got, MsgFlags::empty()).expect("arrives");
        assert_eq!(&got[..len], &hello[..]);
        let back = frame(2, b"to the guest");
        send(host.as_raw_fd(), &back, MsgFlags::empty()).expect("sent");
        assert_eq!(drain(&mut tap), [back]);
        // A header that points outside of the packet: refused, and nothing else happens.
        let mut hostile = with_header(&hello);
        hostile[0] = 1;
        hostile[6..10].fill(0xff);
        assert_eq!(tap.write(&hostile).expect("open"), Written::Refused);
        assert_eq!(tap.write(&[0; 5]).expect("open"), Written::Refused);
    });
}

/// A UDP packet of 3,000 bytes that is to be cut into three.
fn udp_train() -> Vec<u8> {
    const PAYLOAD: u16 = 3_000;
    let mut ip = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 8, 7, 10, 9, 8, 6];
    ip[2..4].copy_from_slice(&(20 + 8 + PAYLOAD).to_be_bytes());
    let mut udp = [0x12, 0x34, 0x43, 0x21, 0, 0, 0, 0];
    udp[4..6].copy_from_slice(&(8 + PAYLOAD).to_be_bytes());
    // VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4; 42 bytes of headers, segments of 1,000, the checksum 6
    // bytes into what begins at 34.
    let header = [1, 5, 42, 0, 0xe8, 0x03, 34, 0, 6, 0, 0, 0];
    [&header[..], &[0xff; 6], &[2, 0, 0, 0, 0, 1], &[8, 0], &ip, &udp, &[0x5a; PAYLOAD as usize]].concat()
}

#[test]
fn udp_segmentation_is_passed_on_since_linux_6_2() {
    in_a_namespace("udp_segmentation_is_passed_on_since_linux_6_2", || {
        let mut tap = Tap::open("tap3", Direction::Both).expect("root may");
        ip("link set tap3 up");
        let name = nix::sys::utsname::uname().expect("every system has a name");
        let release = name.release().to_string_lossy();
        let numbers: Vec<u32> = release.split(|c: char| !c.is_ascii_digit()).flat_map(str::parse).take(2).collect();
        let expected = if numbers >= vec![6, 2] { Written::Sent } else { Written::Refused };
        assert_eq!(tap.write(&udp_train()).expect("open"), expected, "{release}");
    });
}

#[test]
fn a_queue_from_the_guest_only_attracts_nothing_and_still_sends() {
    in_a_namespace("a_queue_from_the_guest_only_attracts_nothing_and_still_sends", || {
        // In either order; the second one finds a device whose only queue is detached.
        for rx_first in [true, false] {
            let (mut rx, mut tx);
            if rx_first {
                rx = Tap::open("tap0", Direction::Both).expect("root may");
                tx = Tap::open("tap0", Direction::FromGuest).expect("a second queue");
            } else {
                tx = Tap::open("tap0", Direction::FromGuest).expect("root may");
                rx = Tap::open("tap0", Direction::Both).expect("a second queue");
            }
            rx.attach().expect("detached");
            ip("link set tap0 up");
            let host = host_end("tap0");
            let mut got = [0; 200];
            for round in 0..100 {
                // From the guest through `tx`: an attached queue would now be where answers to this station go.
                let sent = frame(round, b"from the guest");
                assert_eq!(tx.write(&with_header(&sent)).expect("open"), Written::Sent);
                let len = recv(host.as_raw_fd(), &mut got, MsgFlags::empty()).expect("arrives");
                assert_eq!(&got[..len], &sent[..]);
                let mut answer = frame(200, b"to the guest");
                answer[..6].copy_from_slice(&sent[6..12]);
                send(host.as_raw_fd(), &answer, MsgFlags::empty()).expect("sent");
                assert_eq!(drain(&mut rx), [answer]);
                assert!(drain(&mut tx).is_empty());
            }
        }
    });
}

/// The headers of all datagrams of [`send_datagram`] that wait in a queue.
fn drain_datagrams(tap: &mut Tap) -> Vec<Header> {
    let mut packet = [0; 4096];
    let mut headers = Vec::new();
    while let Some(len) = tap.read(&mut packet).expect("readable") {
        // Ethernet, IPv4 and UDP have 42 bytes; the kernel's own announcements are others.
        if packet[..len].get(HEADER_LEN + 42..) == Some(b"to the guest") {
            headers.push(Header::from_bytes(*packet.first_chunk().expect("longer")));
        }
    }
    headers
}

fn send_datagram() {
    let socket = std::net::UdpSocket::bind("10.9.8.1:0").expect("our address");
    socket.send_to(b"to the guest", "10.9.8.2:9").expect("sent");
}

#[test]
fn a_detached_queue_is_empty_and_keeps_the_settings() {
    in_a_namespace("a_detached_queue_is_empty_and_keeps_the_settings", || {
        let mut tap = Tap::open("tap0", Direction::Both).expect("root may");
        ip("address add 10.9.8.1/24 dev tap0");
        ip("link set tap0 up");
        ip("neighbour add 10.9.8.2 lladdr 02:00:00:00:00:01 dev tap0");
        let unfinished = [Header { flags: FLAG_NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..Header::default() }];
        let finished = [Header::default()];

        send_datagram();
        assert!(!tap.attached());
        assert_eq!(drain_datagrams(&mut tap), [], "no queue was attached");
        // What is set of a detached queue holds when it is attached, and what is set of an attached one after it was
        // detached.
        tap.set_offloads(virtio::NET_GUEST_CSUM).expect("every kernel has this");
        for _ in 0..2 {
            tap.attach().expect("detached");
            tap.attach().expect("nothing to do");
            send_datagram();
            assert_eq!(drain_datagrams(&mut tap), unfinished);
            send_datagram();
            tap.detach();
            tap.detach();
            assert_eq!(drain_datagrams(&mut tap), [], "what waited is dropped");
        }
        tap.set_offloads(0).expect("every kernel has none");
        tap.attach().expect("detached");
        send_datagram();
        assert_eq!(drain_datagrams(&mut tap), finished);
    });
}

#[test]
fn a_queue_that_is_not_detached_on_request_stays_attached() {
    in_a_namespace("a_queue_that_is_not_detached_on_request_stays_attached", || {
        let mut tap = Tap::open("tap0", Direction::Both).expect("root may");
        tap.attach().expect("detached");
        // Behind its back, so that the kernel refuses the next request.
        tap.set_queue(libc::IFF_DETACH_QUEUE).expect("attached");
        tap.detach();
        tap.set_queue(libc::IFF_ATTACH_QUEUE).expect("detached");
        tap.detach();
        tap.attach().expect("nothing to do");
        assert!(tap.attached());
        ip("link set tap0 up");
        let hello = frame(1, b"to the guest");
        send(host_end("tap0").as_raw_fd(), &hello, MsgFlags::empty()).expect("sent");
        assert_eq!(drain(&mut tap), [hello]);
    });
}

#[test]
fn a_tap_of_another_kind_is_refused_with_the_way_out() {
    in_a_namespace("a_tap_of_another_kind_is_refused_with_the_way_out", || {
        ip("tuntap add dev single mode tap");
        let error = Tap::open("single", Direction::Both).expect_err("not multi-queue");
        assert!(error.to_string().contains("multi_queue vnet_hdr"), "{error}");
        ip("tuntap add dev ready mode tap multi_queue vnet_hdr");
        Tap::open("ready", Direction::Both).expect("made for it");
    });
}

/// Who has 10.9.8.3? asks 10.9.8.2.
fn question() -> Vec<u8> {
    let station = [2, 0, 0, 0, 0, 1];
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &station, &[10, 9, 8, 2], &[0; 6], &[10, 9, 8, 3]].concat();
    with_header(&[&[0xff; 6][..], &station, &[8, 6], &arp].concat())
}

#[test]
fn a_full_queue_says_when_there_is_room() {
    in_a_namespace("a_full_queue_says_when_there_is_room", || {
        nix::ioctl_write_ptr_bad!(set_send_buffer, nix::request_code_write!(b'T', 212, size_of::<i32>()), i32);
        let mut tap = Tap::open("tap0", Direction::Both).expect("root may");
        // Of an attached queue only.
        tap.attach().expect("detached");
        // SAFETY: the call reads one int that lives across it; the descriptor is open.
        unsafe { set_send_buffer(tap.as_fd().as_raw_fd(), &10_000) }.expect("root may");
        // Nothing is steered to it from here on, so that room is the only event.
        assert!(tap.detach());
        ip("address add 10.9.8.1/24 dev tap0");
        ip("link set tap0 up");
        // The host answers for its neighbours, but not at once: meanwhile, up to 0.8 seconds, a question stays in the
        // queue's account.
        for setting in ["forwarding", "proxy_arp_pvlan"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/tap0/{setting}"), "1").expect("this namespace's own");
        }
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("a descriptor");
        let both_edges = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        epoll.add(tap.as_fd(), EpollEvent::new(both_edges, 0)).expect("added");
        let mut events = [EpollEvent::empty()];
        assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO), Ok(1), "there is room");
        let start = Instant::now();
        while tap.write(&question()).expect("open") == Written::Sent {
            assert!(start.elapsed() < Duration::from_secs(20), "the host keeps nothing");
        }
        assert_eq!(epoll.wait(&mut events, EpollTimeout::from(20_000_u16)), Ok(1), "nobody said that there is room");
        assert!(events[0].events().contains(EpollFlags::EPOLLOUT));
        assert_eq!(tap.write(&question()).expect("open"), Written::Sent);
    });
}
