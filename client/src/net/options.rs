//! The command line of `iotlb-net`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::{ArgGroup, Parser};
use iotlb_proto::control;

use super::tap::Direction;
use crate::queue::vring::Limits;

/// Bytes of the longest Unix socket path.
const SOCKET_PATH_MAX: usize = 107;

/// The queues of one virtio-net device: 128 pairs.
const QUEUES_MAX: u16 = 256;

/// The hardware address of the echo neighbour: locally administered, "iotlb".
const ECHO_MAC: &str = "02:69:6f:74:6c:62";

/// Serve virtio-net queues of a guest through iotlbd.
#[derive(Clone, Debug, Parser)]
#[command(name = "iotlb-net", version, group(ArgGroup::new("port").required(true).args(["tap", "echo"])))]
pub struct Options {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", value_parser = socket_path)]
    pub control_socket: PathBuf,

    /// Vrings to serve, separated by commas: even ones are guest RX, odd ones guest TX (0,1 is the first pair)
    #[arg(long, value_name = "LIST", value_delimiter = ',', required = true,
          value_parser = clap::value_parser!(u16).range(..i64::from(QUEUES_MAX)))]
    pub queues: Vec<u16>,

    /// Exchange packets with this TAP device, a queue for each pair
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,

    /// Answer ARP and ping, without any network
    #[arg(long)]
    pub echo: bool,

    /// Hardware address of the echo neighbour
    #[arg(long, value_name = "MAC", default_value = ECHO_MAC, value_parser = mac_address, conflicts_with = "tap")]
    pub echo_mac: [u8; 6],

    /// Answer for this IPv4 address only [default: for every one]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "tap")]
    pub echo_ip: Option<Ipv4Addr>,

    /// Name of the device to attach to; a daemon's only one is "net0" [default: the only one]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true, value_parser = name)]
    pub device: String,

    /// Name of this worker in the daemon's log
    #[arg(long, value_name = "TEXT", default_value = "iotlb-net", value_parser = name)]
    pub label: String,

    /// At most so many posted chains behind the next one are asked for together with it when it misses; 0 for none
    #[arg(long, value_name = "CHAINS", default_value_t = Limits::default().lookahead)]
    pub lookahead: u16,

    /// When the daemon is not there, ends, or has no room or no such queue (yet), keep trying to attach
    #[arg(long)]
    pub reconnect: bool,
}

/// A pair of queues, as the command line asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairPlan {
    /// Pair number: its queues are twice that, and one more.
    pub pair: u16,
    /// Serve guest RX.
    pub rx: bool,
    /// Serve guest TX.
    pub tx: bool,
}

impl PairPlan {
    /// Which way packets go.
    #[must_use]
    pub fn direction(&self) -> Direction {
        if self.rx { Direction::Both } else { Direction::FromGuest }
    }
}

/// A command line that makes no sense although each part of it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// One queue named twice.
    #[error("--queues names queue {queue} twice; name each once")]
    Twice {
        /// The queue.
        queue: u16,
    },
    /// Echo needs both directions.
    #[error(
        "--echo answers on guest RX what came in on guest TX, so one process needs both queues of a pair: --queues has \
         {queue} without {other}; add it, or use --tap to serve them from two processes"
    )]
    HalfPair {
        /// The queue that is there.
        queue: u16,
        /// The one that is not.
        other: u16,
    },
}

impl Options {
    /// The queues as pairs, in order.
    ///
    /// # Errors
    ///
    /// See [`OptionsError`].
    pub fn pairs(&self) -> Result<Vec<PairPlan>, OptionsError> {
        let mut queues = self.queues.clone();
        queues.sort_unstable();
        if let Some([queue, _]) = queues.array_windows().find(|[a, b]| a == b) {
            return Err(OptionsError::Twice { queue: *queue });
        }
        let mut pairs: Vec<PairPlan> = Vec::new();
        for queue in queues {
            let (pair, rx) = (queue / 2, queue.is_multiple_of(2));
            match pairs.last_mut() {
                Some(last) if last.pair == pair => last.tx = true,
                _ => pairs.push(PairPlan { pair, rx, tx: !rx }),
            }
        }
        if self.echo
            && let Some(half) = pairs.iter().find(|pair| !(pair.rx && pair.tx))
        {
            let (rx, tx) = (half.pair * 2, half.pair * 2 + 1);
            let (queue, other) = if half.rx { (rx, tx) } else { (tx, rx) };
            return Err(OptionsError::HalfPair { queue, other });
        }
        Ok(pairs)
    }
}

fn socket_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.len() > SOCKET_PATH_MAX {
        return Err(format!(
            "a socket path has 1 to {SOCKET_PATH_MAX} bytes, this one has {}; use a shorter directory",
            text.len()
        ));
    }
    Ok(PathBuf::from(text))
}

/// What HELLO can carry: another name would be refused by every daemon.
fn name(text: &str) -> Result<String, String> {
    control::check_name("the name", text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn mac_address(text: &str) -> Result<[u8; 6], String> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = parts
            .next()
            .filter(|part| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or("six bytes in hexadecimal, separated by colons, are needed")?;
    }
    if parts.next().is_some() {
        return Err("more than six bytes".to_owned());
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err("this is no address of a single station: the first byte must be even".to_owned());
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use iotlb_proto::control::message::NAME_MAX;

    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        let line = format!("iotlb-net --control-socket /run/c.sock {line}");
        Options::try_parse_from(line.split_whitespace()).map_err(|error| error.to_string())
    }

    #[test]
    fn queues_become_pairs() {
        let plan = |pair, rx, tx| PairPlan { pair, rx, tx };
        let pairs = |line| parse(line).expect("good").pairs();
        assert_eq!(pairs("--queues 0 --tap t").as_deref(), Ok(&[plan(0, true, false)][..]));
        assert_eq!(pairs("--queues 1 --tap t").as_deref(), Ok(&[plan(0, false, true)][..]));
        assert_eq!(
            pairs("--queues 5,1,0,2 --tap t").as_deref(),
            Ok(&[plan(0, true, true), plan(1, true, false), plan(2, false, true)][..])
        );
        assert_eq!(pairs("--queues 3,2,0,1 --echo").as_deref(), Ok(&[plan(0, true, true), plan(1, true, true)][..]));
        assert_eq!(pairs("--queues 1,1 --tap t"), Err(OptionsError::Twice { queue: 1 }));
        assert_eq!(pairs("--queues 0,1,3 --echo"), Err(OptionsError::HalfPair { queue: 3, other: 2 }));
        assert_eq!(plan(0, false, true).direction(), Direction::FromGuest);
        assert_eq!(plan(0, true, false).direction(), Direction::Both);
    }

    #[test]
    fn errors_name_the_flag() {
        let long = format!("--queues 0 --tap t --control-socket {}", "x".repeat(108));
        for (line, words) in [
            ("--queues 0", "--tap <NAME>"),
            ("--tap t", "--queues"),
            ("--queues 0 --tap t --echo", "--tap"),
            ("--queues x --tap t", "--queues"),
            ("--queues 256 --tap t", "--queues"),
            ("--queues 0,1 --echo --echo-mac 02:00:00:00:00", "--echo-mac"),
            ("--queues 0,1 --echo --echo-mac 01:00:00:00:00:00", "must be even"),
            ("--queues 0,1 --echo --echo-mac 02:00:00:00:00:00:00", "more than six"),
            ("--queues 0,1 --tap t --echo-ip 10.0.0.1", "--echo-ip"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(words), "{line}: {error}");
        }
        let error =
            Options::try_parse_from(format!("iotlb-net {long}").split_whitespace()).expect_err("too long").to_string();
        assert!(error.contains("--control-socket") && error.contains("107"), "{error}");
    }

    #[test]
    fn names_that_no_daemon_takes_are_refused_at_once() {
        let long = "n".repeat(NAME_MAX + 1);
        for flag in ["--label", "--device"] {
            for (name, words) in [(long.as_str(), "at most 64"), ("a\u{7}b", "control characters")] {
                let error = parse(&format!("--queues 0 --tap t {flag} {name}")).expect_err(flag);
                assert!(error.contains(flag) && error.contains(words), "{error}");
            }
            assert!(parse(&format!("--queues 0 --tap t {flag} {}", &long[1..])).is_ok());
        }
    }

    #[test]
    fn defaults() {
        let options = parse("--queues 0,1 --echo").expect("good");
        assert_eq!(options.echo_mac, *b"\x02iotlb");
        assert_eq!((options.device.as_str(), options.label.as_str()), ("", "iotlb-net"));
        assert!(options.echo_ip.is_none() && !options.reconnect);
        assert_ne!(options.lookahead, 0);
        assert_eq!(parse("--queues 0,1 --echo --lookahead 0").expect("good").lookahead, 0);
    }
}
