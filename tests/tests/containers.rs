//! The shipped image at work: daemon and workers in containers of their own, with nothing in common but two volumes.
//!
//! Needs podman and runc, and as root no more than those. `IOTLBD_SKIP_CONTAINERS=1` leaves these tests out.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use iotlb_tests::containers::{Compose, Container, Engine, Settings, View, image};
use iotlb_tests::not_tested::not_tested;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// For everything that takes well under a second when nothing is wrong.
const PATIENCE: Duration = Duration::from_secs(60);

/// The daemon's view: both volumes. Workers see the control socket only, the front-end its own socket only.
const FRONT_END_VOLUME: &str = "frontend:/run/iotlbd/frontend";
const CONTROL_VOLUME: &str = "control:/run/iotlbd/control";
const FRONT_END_SOCKET: &str = "--socket-path=/run/iotlbd/frontend/vhost.sock";
const CONTROL_SOCKET: &str = "--control-socket=/run/iotlbd/control/control.sock";

/// Namespaces that must differ between any two containers, and from this machine's.
const NAMESPACES: [&str; 5] = ["ipc", "mnt", "net", "pid", "uts"];

/// With the first version of control groups podman shares this one unless told otherwise, and compose files cannot.
const CGROUP_NAMESPACE: &str = "cgroup";

#[test]
fn daemon_and_two_workers_in_three_containers() {
    shown(three_containers());
}

#[test]
fn compose_file_brings_up_the_same() {
    shown(compose());
}

/// Errors carry the output of whole builds: lines, not a string literal.
#[track_caller]
fn shown(result: Result) {
    if let Err(error) = result {
        panic!("{error}");
    }
}

fn three_containers() -> Result {
    let _only = exclusive();
    let Some(engine) = engine()? else { return Ok(()) };
    let mut daemon = daemon(&engine)?;
    let first = worker(&engine, "worker-0", "65531:65532", "0,1", &[])?;
    // This one has a user namespace of its own too. Only the group is common property: it is the access right.
    let own_users = ["--uidmap=0:300000:65536", "--gidmap=0:300000:65532", "--gidmap=65532:65532:1"];
    let second = worker(&engine, "worker-1", "1000:65532", "2,3", &own_users)?;
    let views = [daemon.view(), first.view(), second.view()];
    confined(&views, &[&NAMESPACES[..], &[CGROUP_NAMESPACE]].concat())?;
    stranger_is_refused(&engine)?;
    ping(&engine, "front-end-0", FRONT_END_VOLUME)?;

    second.signal("KILL")?;
    let mut second = second;
    assert_eq!(second.wait_end(PATIENCE)?, 137, "{}", second.output());
    drop(second);
    assert!(daemon.view().running()?, "the daemon went with its worker:\n{}", daemon.output());
    assert!(first.view().running()?, "one worker went with the other:\n{}", first.output());
    let _second = worker(&engine, "worker-1", "1000:65532", "2,3", &own_users)?;
    ping(&engine, "front-end-1", FRONT_END_VOLUME)?;

    daemon.signal("TERM")?;
    assert_eq!(daemon.wait_end(PATIENCE)?, 0, "no clean end on SIGTERM:\n{}", daemon.output());
    Ok(())
}

fn compose() -> Result {
    let _only = exclusive();
    let Some(engine) = engine()? else { return Ok(()) };
    let _compose = Compose::up(&engine, &repository().join("deploy/compose.yaml"), &scratch())?;
    let views = ["iotlbd_iotlbd_1", "iotlbd_worker-0_1", "iotlbd_worker-1_1"].map(|name| View::new(&engine, name));
    confined(&views, &NAMESPACES)?;
    ping(&engine, "front-end", "iotlbd_frontend:/run/iotlbd/frontend")
}

/// One test at a time: both build, and both measure their patience on two cores.
fn exclusive() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    // A test that panicked leaves nothing behind that the next could trip over.
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An engine with the image in it. None if these tests are to be left out.
fn engine() -> Result<Option<Engine>> {
    if std::env::var_os("IOTLBD_SKIP_CONTAINERS").is_some_and(|value| value == "1") {
        not_tested("IOTLBD_SKIP_CONTAINERS=1");
        return Ok(None);
    }
    let engine = Engine::open(&scratch())?;
    image::build(&engine, &repository(), &scratch().join("image-build"))?;
    Ok(Some(engine))
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a directory of the workspace").to_owned()
}

fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn daemon(engine: &Engine) -> Result<Container<'_>> {
    let container = Container::start(
        engine,
        &Settings {
            name: "daemon",
            user: "65532:65532",
            memory: "256m",
            volumes: &[FRONT_END_VOLUME, CONTROL_VOLUME],
            flags: &[],
            command: &["/bin/iotlbd", FRONT_END_SOCKET, "--socket-mode=0660", CONTROL_SOCKET, "--queue-pairs=2"],
        },
    )?;
    container.wait_for("serving", PATIENCE)?;
    Ok(container)
}

fn worker<'e>(engine: &'e Engine, name: &str, user: &str, queues: &str, flags: &[&str]) -> Result<Container<'e>> {
    let queues = format!("--queues={queues}");
    let container = Container::start(
        engine,
        &Settings {
            name,
            user,
            memory: "128m",
            volumes: &[CONTROL_VOLUME],
            flags,
            command: &["/bin/iotlb-net", CONTROL_SOCKET, &queues, "--echo"],
        },
    )?;
    container.wait_for("attached", PATIENCE)?;
    Ok(container)
}

/// A simulated guest behind a vIOMMU pings through all queue pairs and expects every answer.
fn ping(engine: &Engine, name: &str, volume: &str) -> Result {
    let mut front_end = Container::start(
        engine,
        &Settings {
            name,
            user: "65529:65532",
            memory: "256m",
            volumes: &[volume],
            flags: &[],
            command: &["/bin/iotlbd", "demo-front-end", FRONT_END_SOCKET, "--queue-pairs=2", "--pings=200"],
        },
    )?;
    let status = front_end.wait_end(PATIENCE)?;
    let output = front_end.output();
    assert_eq!(status, 0, "{output}");
    let line = output.lines().rfind(|line| line.starts_with('{')).ok_or_else(|| format!("no JSON in:\n{output}"))?;
    let result: serde_json::Value = serde_json::from_str(line)?;
    assert_eq!(result["received"], 200, "{result}");
    assert_eq!((&result["wrong"], &result["missing"]), (&0.into(), &0.into()), "{result}");
    // Behind a vIOMMU, and strictly so: without misses and invalidations the table was not in the way.
    assert!(result["misses"].as_u64() > Some(0) && result["invalidations"].as_u64() > Some(0), "{result}");
    Ok(())
}

/// Every container in namespaces of its own, without rights, under a seccomp filter.
fn confined(containers: &[View<'_>], namespaces: &[&str]) -> Result {
    for kind in namespaces {
        let mut seen = vec![std::fs::read_link(format!("/proc/self/ns/{kind}"))?];
        for container in containers {
            let namespace = container.namespace(kind)?;
            assert!(!seen.contains(&namespace), "{}: shares {}", container.name(), namespace.display());
            seen.push(namespace);
        }
    }
    for container in containers {
        assert_eq!(container.status_field("CapEff")?, "0000000000000000");
        assert_eq!(container.status_field("CapBnd")?, "0000000000000000");
        assert_eq!(container.status_field("NoNewPrivs")?, "1");
        assert_eq!(container.status_field("Seccomp")?, "2", "2 is: a filter");
        assert_eq!(container.inspect("{{.HostConfig.ReadonlyRootfs}}")?, "true");
    }
    Ok(())
}

/// Outside the group of the control socket there is no way in.
fn stranger_is_refused(engine: &Engine) -> Result {
    let stranger = Container::start(
        engine,
        &Settings {
            name: "stranger",
            user: "65600:65600",
            memory: "128m",
            volumes: &[CONTROL_VOLUME],
            flags: &[],
            command: &["/bin/iotlb-net", CONTROL_SOCKET, "--queues=0,1", "--echo"],
        },
    )?;
    stranger.wait_for("Permission denied", PATIENCE)?;
    Ok(())
}
