//! `iotlb-net` and its TAP.

mod net_support;
mod support;

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use iotlb_proto::iova::PAGE_SIZE;
use net_support::{PAGES, SIZE, Socket, Stage, signal, terminate};
use nix::sys::signal::Signal;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};
use support::namespace::{bring_up_with_addresses, in_a_namespace, ip, queues};
use support::{Memory, PATIENCE, wait_readable, wait_until};

/// An EtherType for experiments, big endian.
const TYPE: u16 = 0x88b5;

/// Sends a packet to each of these ports: the kernel takes each for a flow.
fn send_flows(ports: &BTreeSet<u16>) {
    let socket = UdpSocket::bind("10.9.8.1:0").expect("our address");
    for port in ports {
        socket.send_to(b"to the guest", ("10.9.8.2", *port)).expect("sent");
    }
}

/// The host's end of a TAP, for frames of our type.
fn host_end(name: &str) -> OwnedFd {
    ip(&format!("link set {name} up"));
    let socket = socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .expect("root may open packet sockets");
    let index = nix::net::if_::if_nametoindex(name).expect("the TAP exists");
    // SAFETY: a C structure of numbers, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET.try_into().expect("small");
    address.sll_protocol = TYPE.to_be();
    address.sll_ifindex = index.try_into().expect("small");
    let size = u32::try_from(size_of_val(&address)).expect("small");
    // SAFETY: the address lives across the call and has the size given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
    assert_eq!(bound, 0, "bind: {}", std::io::Error::last_os_error());
    socket
}

fn frame(to: u8, from: u8, text: &[u8]) -> Vec<u8> {
    [&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from][..], &TYPE.to_be_bytes(), text].concat()
}

#[test]
fn two_processes_serve_one_guest_over_one_tap() {
    if !in_a_namespace("two_processes_serve_one_guest_over_one_tap") {
        return;
    }
    let memory = Memory::new(PAGES * PAGE_SIZE);
    let shared = Memory { fd: memory.fd.try_clone().expect("a descriptor"), size: memory.size };
    let (rx_socket, tx_socket) = (Socket::new(), Socket::new());
    // The one that only sends comes first: its queue stays detached, and the other still gets all packets.
    let tx_worker = tx_socket.worker(&["--queues", "1", "--tap", "tap0"]);
    let mut tx = Stage::attach_part(&tx_socket, shared, &[1]);
    let rx_worker = rx_socket.worker(&["--queues", "0", "--tap", "tap0"]);
    let mut rx = Stage::attach_part(&rx_socket, memory, &[0]);
    let host = host_end("tap0");
    wait_until("the receiver's queue", || queues("tap0") == (1, 1));

    rx.post_receive_buffers(100);
    let mut seen = 0;
    for round in 0..50 {
        let sent = frame(200, round, b"from the guest");
        tx.send(&sent);
        tx.bells[1].kick();
        assert!(wait_readable(host.as_fd(), PATIENCE), "nothing came out of the TAP");
        let mut got = [0; 2048];
        let len = socket::recv(host.as_raw_fd(), &mut got, socket::MsgFlags::empty()).expect("readable");
        assert_eq!(got[..len], sent);

        // The answer goes to the station that was just heard on the other process's queue.
        let answer = frame(round, 200, b"to the guest");
        socket::send(host.as_raw_fd(), &answer, socket::MsgFlags::empty()).expect("sent");
        // The kernel announces itself on a new device; the guest drops what it does not know.
        loop {
            wait_until("a packet for the guest", || rx.used_index(0) > seen);
            seen += 1;
            if rx.received(seen - 1) == answer {
                break;
            }
            assert!(seen < 90, "the packet did not come");
        }
    }
    terminate(tx_worker);
    terminate(rx_worker);
}

#[test]
fn a_tap_that_is_down_is_told_once_until_it_is_up() {
    if !in_a_namespace("a_tap_that_is_down_is_told_once_until_it_is_up") {
        return;
    }
    let socket = Socket::new();
    let worker = socket.worker(&["--queues", "0,1", "--tap", "tap0"]);
    let mut stage = Stage::attach(&socket);
    let mut sent = 0;
    for state in ["down", "up", "down"] {
        ip(&format!("link set tap0 {state}"));
        for _ in 0..3 {
            stage.send(&frame(200, 1, b"from the guest"));
            stage.bells[1].kick();
            sent += 1;
            wait_until("the packet is taken", || stage.used_index(1) == sent);
        }
    }
    signal(&worker, Signal::SIGTERM);
    let log = String::from_utf8_lossy(&worker.wait_with_output().expect("it ends").stderr).into_owned();
    let told = log.lines().filter(|line| line.contains("WARN") && line.contains("ip link set tap0 up")).count();
    assert_eq!(told, 2, "{log}");
}

#[test]
fn a_pair_whose_rings_are_not_started_attracts_no_flow() {
    if !in_a_namespace("a_pair_whose_rings_are_not_started_attracts_no_flow") {
        return;
    }
    let socket = Socket::new();
    // A guest that knows one pair only, and a worker that serves two.
    let worker = socket.worker(&["--queues", "0,1,2,3", "--tap", "tap0"]);
    let mut stage = Stage::attach_part(&socket, Memory::new(PAGES * PAGE_SIZE), &[0, 1, 2, 3]);
    stage.post_receive_buffers(SIZE.into());
    bring_up_with_addresses("tap0");
    wait_until("a queue", || queues("tap0").0 > 0);
    let mut flows: BTreeSet<u16> = (1000..1050).collect();
    send_flows(&flows);
    stage.wait_flows(&flows);

    // The guest takes its ring out of service for a while. What comes meanwhile is not for it.
    stage.set_ring(0, false);
    wait_until("no queue", || queues("tap0") == (0, 2));
    send_flows(&(2000..2010).collect());
    stage.set_ring(0, true);
    wait_until("a queue", || queues("tap0") == (1, 1));
    let more = (3000..3020).collect();
    send_flows(&more);
    flows.extend(more);
    stage.wait_flows(&flows);
    terminate(worker);
}

#[test]
fn a_process_that_waits_for_its_daemon_attracts_no_flow() {
    if !in_a_namespace("a_process_that_waits_for_its_daemon_attracts_no_flow") {
        return;
    }
    let (socket, deaf) = (Socket::new(), Socket::new());
    socket::shutdown(deaf.listener.as_raw_fd(), socket::Shutdown::Both).expect("refuses connections from here on");
    let waiting = deaf.worker(&["--queues", "0,1", "--tap", "tap0", "--reconnect"]);
    let worker = socket.worker(&["--queues", "0,1", "--tap", "tap0", "--reconnect"]);
    let mut stage = Stage::attach(&socket);
    stage.post_receive_buffers(SIZE.into());
    wait_until("both", || matches!(queues("tap0"), (attached, detached) if attached > 0 && attached + detached == 2));
    bring_up_with_addresses("tap0");
    let flows = (1000..1050).collect();
    send_flows(&flows);
    stage.wait_flows(&flows);

    stage.daemon.kill();
    stage.daemon.socket = None;
    wait_until("the end of the attachment", || queues("tap0") == (0, 2));
    terminate(waiting);
    terminate(worker);
}
