//! What a guest is asked to show. Each prints its figures; none judges a speed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::logs::{read_lossy, say};
use super::process::{Process, eventually, readable};
use super::{GUEST_ADDRESS, GuestError, HOST_ADDRESS, Logs, Machine, WATCHDOG};

/// How much is carried each way by [`transfers`], bytes.
const TRANSFER_BYTES: usize = 16 << 20;
/// How long iperf3 sends each way, seconds.
const IPERF_SECONDS: u32 = 2;

/// All of the checks below that need a TAP.
///
/// # Errors
/// The first that fails.
pub fn all(machine: &mut Machine, logs: &Logs) -> Result<(), GuestError> {
    echoes(machine)?;
    let host = ping_host("-c 10 -i 0.1")?;
    lossless(&host, 10, "ping from the host")?;
    transfers(machine)?;
    iperf(machine, logs)
}

/// Ping, flood ping and a ping larger than any buffer of the rings, none of which may lose a packet.
///
/// # Errors
/// A packet was lost.
pub fn echoes(machine: &mut Machine) -> Result<(), GuestError> {
    ping(machine, 10, "-i 0.1")?;
    ping(machine, 1000, "-f")?;
    ping(machine, 5, "-i 0.2 -s 60000")
}

/// Pings the host from the guest; no packet may be lost.
///
/// # Errors
/// A packet was lost.
pub fn ping(machine: &mut Machine, count: u32, options: &str) -> Result<(), GuestError> {
    let command = format!("/programs/ping -q -n -c {count} {options} {HOST_ADDRESS}");
    // Its status is 1 when nothing came back; the summary says so better.
    let output = machine.run(&format!("{command} || true"))?;
    lossless(&output, count, &command)
}

/// Pings the host until it answers once.
///
/// # Errors
/// It does not within [`WATCHDOG`].
pub fn answered(machine: &mut Machine) -> Result<(), GuestError> {
    let limit = WATCHDOG.as_secs() - 10;
    machine.run(&format!("/programs/ping -q -n -i 0.1 -c 1 -w {limit} {HOST_ADDRESS}")).map(drop)
}

fn ping_host(options: &str) -> Result<String, GuestError> {
    let mut command = Command::new("ping");
    command.args(["-q", "-n"]).args(options.split(' ')).arg(GUEST_ADDRESS.to_string());
    super::process::run(&mut command)
}

/// Checks ping's summary.
fn lossless(output: &str, count: u32, what: &str) -> Result<(), GuestError> {
    let summary = output.lines().find(|line| line.contains("packets transmitted")).unwrap_or_default();
    let times = output.lines().find(|line| line.starts_with("rtt")).unwrap_or_default();
    // "N packets transmitted, N received, 0% packet loss"; duplicates or errors would stand between.
    if !summary.starts_with(&format!("{count} packets transmitted, {count} received, 0% packet loss")) {
        return Err(GuestError::Check(format!("{what}: packets lost: {output}")));
    }
    say(&format!("{what}: {summary}; {times}"));
    Ok(())
}

/// Carries random bytes from the guest to the host and back the other way, and compares their checksums.
///
/// # Errors
/// The checksums differ, or a transfer did not end.
pub fn transfers(machine: &mut Machine) -> Result<(), GuestError> {
    machine.run(&format!("head -c {TRANSFER_BYTES} /dev/urandom >/tmp/data"))?;
    let here = machine.run("sha256sum </tmp/data")?;
    let (listener, port) = listen()?;
    let started = Instant::now();
    let (_, there) =
        machine.run_with(&format!("nc {HOST_ADDRESS} {port} </tmp/data"), || receive_checksum(&listener))?;
    report("transfer from the guest", started);
    same_checksum("from the guest", &here, &there)?;
    machine.run("rm /tmp/data")?;

    let mut data = vec![0; TRANSFER_BYTES];
    let here = File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut data))
        .and_then(|()| checksum(&mut data.as_slice()))
        .map_err(GuestError::io("making data to send"))?;
    let (listener, port) = listen()?;
    let started = Instant::now();
    let (there, ()) =
        machine.run_with(&format!("nc {HOST_ADDRESS} {port} </dev/null | sha256sum"), || send(&listener, &data))?;
    report("transfer to the guest", started);
    same_checksum("to the guest", &here, &there)
}

fn same_checksum(what: &str, sent: &str, received: &str) -> Result<(), GuestError> {
    let (sent, received) = (sent.trim(), received.trim());
    // An empty answer must not equal an empty answer.
    if sent.len() < 64 || sent != received {
        return Err(GuestError::Check(format!("transfer {what}: sent {sent}, received {received}")));
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "a figure for the log")]
fn report(what: &str, started: Instant) {
    let seconds = started.elapsed().as_secs_f64();
    let megabits = TRANSFER_BYTES as f64 * 8e-6 / seconds;
    say(&format!("{what}: {TRANSFER_BYTES} bytes in {seconds:.2} s, {megabits:.0} Mbit/s, checksum compared"));
}

fn listen() -> Result<(TcpListener, u16), GuestError> {
    let listener = TcpListener::bind((HOST_ADDRESS, 0)).map_err(GuestError::io("listening for the guest"))?;
    let port = listener.local_addr().map_err(GuestError::io("listening for the guest"))?.port();
    Ok((listener, port))
}

fn accept(listener: &TcpListener) -> Result<TcpStream, GuestError> {
    if !readable(&[listener.as_fd()], Instant::now() + WATCHDOG)? {
        return Err(GuestError::TimedOut { what: "the guest to connect".into(), limit: WATCHDOG });
    }
    let (stream, _) = listener.accept().map_err(GuestError::io("accepting the guest"))?;
    let limited = stream.set_read_timeout(Some(WATCHDOG)).and_then(|()| stream.set_write_timeout(Some(WATCHDOG)));
    limited.map_err(GuestError::io("limiting the guest's connection"))?;
    Ok(stream)
}

fn receive_checksum(listener: &TcpListener) -> Result<String, GuestError> {
    let mut stream = accept(listener)?;
    checksum(&mut stream).map_err(GuestError::io("receiving from the guest"))
}

fn send(listener: &TcpListener, data: &[u8]) -> Result<(), GuestError> {
    let mut stream = accept(listener)?;
    stream.write_all(data).map_err(GuestError::io("sending to the guest"))
}

/// SHA-256 in sha256sum's notation, made by the same program as the guest's.
fn checksum(data: &mut impl Read) -> io::Result<String> {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let copied = match child.stdin.take() {
        Some(mut input) => io::copy(data, &mut input),
        None => Err(io::Error::other("sha256sum has no input")),
    };
    let output = child.wait_with_output()?;
    copied?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// iperf3, TCP, both ways.
///
/// # Errors
/// It fails, or carries nothing.
pub fn iperf(machine: &mut Machine, logs: &Logs) -> Result<(), GuestError> {
    for (way, speeds) in ["from the guest", "to the guest"].iter().zip(throughput(machine, logs, &Load::default())?) {
        say(&format!("iperf3 {way}: {:.0} Mbit/s", speeds.first().unwrap_or(&0.0)));
    }
    Ok(())
}

/// What iperf3 is to do.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// How long it sends each way, seconds.
    pub seconds: u32,
    /// Transfers each way.
    pub repeats: usize,
    /// Connections at a time.
    pub streams: u32,
    /// Which ways, in turn.
    pub ways: &'static [Way],
}

impl Default for Load {
    fn default() -> Load {
        Load { seconds: IPERF_SECONDS, repeats: 1, streams: 1, ways: &Way::BOTH }
    }
}

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The guest sends.
    FromGuest,
    /// The guest receives.
    ToGuest,
}

impl Way {
    /// One after the other.
    pub const BOTH: [Way; 2] = [Way::FromGuest, Way::ToGuest];

    /// In words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Way::FromGuest => "from the guest",
            Way::ToGuest => "to the guest",
        }
    }

    /// What iperf3 in the guest is told.
    fn option(self) -> &'static str {
        match self {
            Way::FromGuest => "",
            Way::ToGuest => "--reverse",
        }
    }
}

/// What iperf3 carries over TCP, in Mbit/s, all connections together: from the guest and to the guest in turn.
///
/// # Errors
/// It fails, or carries nothing.
pub fn throughput(machine: &mut Machine, logs: &Logs, load: &Load) -> Result<[Vec<f64>; 2], GuestError> {
    let Load { seconds, repeats, streams, ways } = load;
    let mut speeds = [Vec::new(), Vec::new()];
    let mut command = Command::new("iperf3");
    command.args(["--server", "--forceflush", "--bind", &HOST_ADDRESS.to_string()]);
    let mut server = Process::start("iperf3", command, logs)?;
    eventually("iperf3 to listen", WATCHDOG, || {
        server.check_running()?;
        Ok(logs.read("iperf3").contains("Server listening"))
    })?;
    for way in ways.repeat(*repeats) {
        let (name, option) = (way.name(), way.option());
        let command =
            format!("/programs/iperf3 --client {HOST_ADDRESS} --time {seconds} --parallel {streams} --json {option}");
        let output = machine.run(&command)?;
        let bits = serde_json::from_str::<serde_json::Value>(&output)
            .ok()
            .and_then(|report| report.pointer("/end/sum_received/bits_per_second")?.as_f64())
            .ok_or_else(|| GuestError::Check(format!("iperf3 {name}: no result in {output}")))?;
        // Not a speed: a connection that opens and then carries nothing.
        if bits <= 0.0 {
            return Err(GuestError::Check(format!("iperf3 {name}: nothing was carried")));
        }
        speeds[way as usize].push(bits / 1e6);
    }
    Ok(speeds)
}

/// Lines of the guest kernel that mean trouble: a crash, memory overwritten, a device that does nothing, or an access
/// that the IOMMU refused (a back-end asked for a page that the guest had not mapped).
const TROUBLE: [&str; 8] = [
    "BUG:",
    "Oops",
    "general protection",
    "Kernel panic",
    "memory corruption",
    "NETDEV WATCHDOG",
    "DMAR: [DMA",
    // virtio-iommu's words for the same.
    "page fault from EP",
];

/// Lines of a program that mean trouble: it panicked, or logged at level error.
const PROGRAM_TROUBLE: [&str; 2] = ["panicked at", "ERROR"];

/// Checks that neither the guest's kernel nor any program logged trouble.
///
/// # Errors
/// [`GuestError::Check`] with the lines.
pub fn no_trouble(logs: &Logs) -> Result<(), GuestError> {
    for path in logs.paths() {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let marks = match name.as_str() {
            "console" => &TROUBLE[..],
            // What commands in the guest print is theirs.
            "serial" => continue,
            _ => &PROGRAM_TROUBLE[..],
        };
        let text = read_lossy(&path);
        let lines: Vec<&str> = text.lines().filter(|line| marks.iter().any(|mark| line.contains(mark))).collect();
        if !lines.is_empty() {
            return Err(GuestError::Check(format!("{name} logged trouble:\n{}", lines.join("\n"))));
        }
    }
    Ok(())
}
