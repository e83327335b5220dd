//! A network namespace of a test's own, and the TAPs in it.

use std::path::Path;
use std::process::{Command, Stdio};

use super::not_tested::not_tested;

/// Long after any test has ended: only a hang gets here.
const HANG_S: &str = "600";

/// Set in the copy of a test that runs in a namespace.
const INSIDE: &str = "IOTLB_NET_TEST_INSIDE";

/// Runs the test again, alone, in a network namespace of its own; `true` in there. As a user, or where the kernel has
/// no TAP, there is nothing to run; as root with a TAP device, not getting a namespace is a failure.
pub fn in_a_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/net/tun").exists() {
        not_tested("it takes root and /dev/net/tun");
        return false;
    }
    // In the process group of the run, so that what ends the run ends this too.
    let output = Command::new("unshare")
        .args(["-n", "timeout", "--foreground", HANG_S])
        .arg(std::env::current_exe().expect("a test binary has a path"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("unshare and timeout are part of every Linux");
    let text = String::from_utf8_lossy(&output.stdout);
    let ran = text.contains("1 passed");
    assert!(output.status.success() && ran, "{text}{}", String::from_utf8_lossy(&output.stderr));
    false
}

/// Runs `ip` in the present namespace; returns what it printed.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How many queues of a TAP are attached, and how many are detached. None at all while there is no such device.
pub fn queues(name: &str) -> (u32, u32) {
    if nix::net::if_::if_nametoindex(name).is_err() {
        return (0, 0);
    }
    let text = ip(&format!("-details link show {name}"));
    let mut words = text.split_whitespace().skip_while(|word| *word != "numqueues");
    let mut number = |name| {
        assert_eq!(words.next(), Some(name), "{text}");
        words.next().and_then(|word| word.parse().ok()).expect("a number")
    };
    (number("numqueues"), number("numdisabled"))
}

/// Brings the TAP up with an address, 10.9.8.1, and its other end with one that needs no question, 10.9.8.2.
pub fn bring_up_with_addresses(name: &str) {
    // Without an IPv6 address there is nothing to announce.
    ip(&format!("link set {name} addrgenmode none"));
    ip(&format!("address add 10.9.8.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
    ip(&format!("neighbour add 10.9.8.2 lladdr 02:00:00:00:00:01 dev {name}"));
}
