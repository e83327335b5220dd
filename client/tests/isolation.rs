//! What a worker needs, and what it cannot do: no system call on a hit, no way to write the table.

mod support;

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;

use iotlb_client::{Access, AttachOptions, Attachment};
use iotlb_proto::control::{DaemonMessage, WorkerMessage};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::shm::memfd;
use iotlb_proto::sync::{AtomicU32, Ordering};
use rustix::fs::{FallocateFlags, SealFlags};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use support::program::Program;
use support::{Daemon, Memory, wait_readable, wait_until};

/// Where the child finds the daemon of the test.
const SOCKET: &str = "IOTLB_TEST_SOCKET";
/// Set: the child makes one system call too many.
const PLANT: &str = "IOTLB_TEST_PLANT";
/// Exit status of a child whose thread was killed.
const KILLED: i32 = 7;
const PAGES: u64 = 32;
const HITS: u64 = 1_000_000;

#[test]
fn a_million_hits_without_a_system_call() {
    if let Some(socket) = std::env::var_os(SOCKET) {
        strict_worker(socket.as_ref());
    }
    assert_eq!(run_child(false).code(), Some(0), "a hit made a system call");
    assert_eq!(run_child(true).code(), Some(KILLED), "the planted system call went unnoticed");
}

fn run_child(plant: bool) -> ExitStatus {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("control.sock");
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("a short path")).expect("bind");
    rustix::net::listen(&listener, 1).expect("listen");

    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["a_million_hits_without_a_system_call", "--exact", "--nocapture"]).env(SOCKET, &path);
    if plant {
        command.env(PLANT, "1");
    }
    let mut child = Program::start(&mut command);

    let mut daemon = Daemon::new();
    assert!(wait_readable(listener.as_fd(), support::PATIENCE), "the child does not connect");
    daemon.adopt(rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).expect("accept"));
    assert!(matches!(daemon.receive().0, WorkerMessage::Hello(_)));
    daemon.send(&DaemonMessage::Welcome(daemon.welcome()), &daemon.welcome_fds());
    let memory = Memory::new(PAGES * PAGE_SIZE);
    for page in 0..PAGES {
        memory.poke(page * PAGE_SIZE, &page.to_ne_bytes());
    }
    daemon.add_region(1, 0, &memory);
    daemon.finish_map();
    // Backwards, so that nothing is an accident.
    for page in 0..PAGES {
        daemon.map(page * PAGE_SIZE, PAGE_SIZE, (PAGES - 1 - page) * PAGE_SIZE, Access::READ);
    }
    wait_for(&mut child)
}

fn wait_for(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_until("the child ends", || {
        status = child.try_wait().expect("wait");
        status.is_some()
    });
    status.expect("ended")
}

/// The child: a worker whose reading thread may only read, write and exit.
fn strict_worker(socket: &std::path::Path) -> ! {
    let attachment = Attachment::connect(socket, &AttachOptions::default()).expect("attach");
    let ready = attachment.reader().expect("a reader");
    wait_until("all pages are there", || {
        let guard = ready.pin().expect("pin");
        (0..PAGES).all(|page| guard.translate(page * PAGE_SIZE, 8, Access::READ).is_ok())
    });
    let plant = std::env::var_os(PLANT).is_some();
    let (thread, done) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (its_thread, its_done) = (Arc::clone(&thread), Arc::clone(&done));
    let its_attachment = attachment.clone();
    std::thread::spawn(move || {
        let reader = its_attachment.reader().expect("a reader");
        its_thread.store(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs(), Ordering::SeqCst);
        // SAFETY: changes the calling thread only, and takes no pointers.
        let strict = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
        let mut wrong = u32::from(strict != 0);
        for i in 0..HITS {
            let page = i % PAGES;
            let mut bytes = [0; 8];
            let read = reader.pin().is_ok_and(|guard| guard.read(page * PAGE_SIZE, &mut bytes).is_ok());
            if !read || u64::from_ne_bytes(bytes) != PAGES - 1 - page {
                wrong += 1;
            }
            if plant && i == HITS / 2 {
                // SAFETY: takes no arguments; the kernel kills the thread for it.
                unsafe { libc::syscall(libc::SYS_getppid) };
            }
        }
        its_done.store(1 + wrong, Ordering::SeqCst);
        // A thread's ordinary end makes system calls.
        // SAFETY: ends this thread without running anything else; nothing waits for what it owned.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    wait_until("the thread begins", || thread.load(Ordering::SeqCst) != 0);
    let task = format!("/proc/self/task/{}", thread.load(Ordering::SeqCst));
    wait_until("the thread ends", || !std::path::Path::new(&task).exists());
    std::process::exit(match done.load(Ordering::SeqCst) {
        0 => KILLED,
        1 => 0,
        _ => 1,
    })
}

/// Every way to write into a memory file that this test knows, and whether it worked.
fn attempts(fd: &OwnedFd, size: u64) -> Vec<(&'static str, bool)> {
    let len = usize::try_from(size).expect("it is mapped");
    let map = |fd: &OwnedFd, prot, flags| {
        // SAFETY: the kernel chooses a free range.
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) }
    };
    let unmap = |address: Result<*mut std::ffi::c_void, _>| {
        if let Ok(address) = address {
            // SAFETY: mapped right here, and used by nobody.
            unsafe { rustix::mm::munmap(address, len) }.expect("munmap");
        }
        address.is_ok()
    };
    let mut results = vec![("mmap", unmap(map(fd, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED)))];

    let read_only = map(fd, ProtFlags::READ, MapFlags::SHARED).expect("reading is allowed");
    // SAFETY: the range was mapped above, and is used by nobody.
    let writable = unsafe { rustix::mm::mprotect(read_only, len, MprotectFlags::READ | MprotectFlags::WRITE) };
    results.push(("mprotect", writable.is_ok()));
    if writable.is_err() {
        let memory = OpenOptions::new().write(true).open("/proc/self/mem").expect("our own memory");
        let at = read_only.addr() as u64;
        results.push(("/proc/self/mem", rustix::io::pwrite(&memory, &[1], at).is_ok()));
    }
    unmap(Ok::<_, rustix::io::Errno>(read_only));

    results.push(("write", rustix::io::pwrite(fd, &[1], 0).is_ok()));
    results.push(("ftruncate", rustix::fs::ftruncate(fd, size / 2).is_ok()));
    results.push(("grow", rustix::fs::ftruncate(fd, size * 2).is_ok()));
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    results.push(("punch hole", rustix::fs::fallocate(fd, hole, 0, 4096).is_ok()));
    results.push(("zero range", rustix::fs::fallocate(fd, FallocateFlags::ZERO_RANGE, 0, 4096).is_ok()));
    let (reader, writer) = std::io::pipe().expect("a pipe");
    rustix::io::write(&writer, &[1]).expect("into the pipe");
    results.push((
        "splice",
        rustix::pipe::splice(&reader, None, fd, Some(&mut 0), 1, rustix::pipe::SpliceFlags::empty()).is_ok(),
    ));

    let again = OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if let Ok(again) = again.map(OwnedFd::from) {
        results.push(("reopen and mmap", unmap(map(&again, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED))));
        results.push(("reopen and write", rustix::io::pwrite(&again, &[1], 0).is_ok()));
        results.push(("unseal", rustix::fs::fcntl_add_seals(&again, SealFlags::WRITE).is_ok()));
    }
    results
}

#[test]
fn the_table_cannot_be_written_by_any_path() {
    let mut daemon = Daemon::new();
    let _attachment = daemon.attach().expect("attach");
    daemon.map(0x1000, 0x1000, 0x2000, Access::READ);
    let before = daemon.table().lookup(0x1000);
    for (how, worked) in attempts(&daemon.table_fd, support::TABLE_SIZE) {
        assert!(!worked, "{how} wrote the table");
    }
    // The mapping the reader really uses.
    let page = std::ptr::with_exposed_provenance_mut(support::table_address(&daemon.table_fd));
    // SAFETY: fails, which is what is tested; were it allowed, nothing would be written here.
    let writable = unsafe { rustix::mm::mprotect(page, 4096, MprotectFlags::READ | MprotectFlags::WRITE) };
    assert!(writable.is_err(), "the reader's own mapping became writable");
    assert_eq!(daemon.table().lookup(0x1000), before);

    // The same attempts on memory without seals: so they would have been noticed.
    let open = memfd::create("open", support::TABLE_SIZE).expect("a memfd");
    for (how, worked) in attempts(&open, support::TABLE_SIZE).into_iter().filter(|(how, _)| *how != "zero range") {
        assert!(worked, "{how} does not work at all");
    }
}
