//! `--busy-poll` from a worker's side: a miss needs no system call.

mod server_support;

use std::process::{Command, ExitStatus};
use std::sync::Arc;

use iotlb_client::{Access, Answer, AttachOptions, Attachment};
use iotlb_proto::iova::PAGE_SIZE;
use iotlb_proto::sync::{AtomicBool, AtomicU32, Ordering};
use server_support::{Running, started_front_end, watchdog};

/// Where the child finds the server.
const CONTROL: &str = "IOTLBD_TEST_CHILD_CONTROL";
/// Set: the child makes one system call too many.
const PLANT: &str = "IOTLBD_TEST_CHILD_PLANT";
/// Exit status of a child whose thread was killed.
const KILLED: i32 = 7;
const MISSES: u64 = 500;
/// Requests that one thread has under way.
const ASKED: usize = 64;
/// A page the front-end sends by itself when it starts.
const IOVA: u64 = 0x2_0000 + 2 * PAGE_SIZE;

#[test]
fn with_busy_polling_a_miss_makes_no_system_call() {
    let _watchdog = watchdog();
    if let Some(control) = std::env::var_os(CONTROL) {
        strict_worker(control.as_ref());
    }
    let server = Running::start_with(|config| config.busy_poll = true);
    let front_end = started_front_end(&server.front_end());
    assert_eq!(run_child(&server, false).code(), Some(0), "a miss made a system call");
    assert_eq!(run_child(&server, true).code(), Some(KILLED), "the planted system call went unnoticed");
    drop(front_end);
    server.stop();
}

#[test]
fn a_worker_that_never_stops_asking_hides_nobody() {
    for busy_poll in [false, true] {
        let _watchdog = watchdog();
        let server = Running::start_with(|config| config.busy_poll = busy_poll);
        let front_end = started_front_end(&server.front_end());
        let asking = Attachment::connect(&server.control(), &AttachOptions::default()).expect("attach");
        let over = AtomicBool::new(false);
        let answers = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut reader = asking.reader().expect("a reader");
                // So many that one is always there to be taken up. When the daemon ends there are no more answers.
                let mut asked = Vec::new();
                while !over.load(Ordering::SeqCst) {
                    while asked.len() < ASKED
                        && let Ok(ticket) = reader.request(IOVA, 8, Access::READ)
                    {
                        asked.push(ticket);
                    }
                    asked.retain_mut(|ticket| reader.poll(ticket).is_none());
                    answers.fetch_add(1, Ordering::SeqCst);
                }
            });
            while answers.load(Ordering::SeqCst) < 1_000 {
                std::thread::yield_now();
            }
            let end = End(&over);
            // Both are seen only by looking at their descriptors.
            drop(Attachment::connect(&server.control(), &AttachOptions::default()).expect("another worker attaches"));
            drop(front_end);
            server.stop();
            drop(end);
        });
    }
}

/// Ends the asking, also when the test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn run_child(server: &Running, plant: bool) -> ExitStatus {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["with_busy_polling_a_miss_makes_no_system_call", "--exact", "--nocapture"]);
    command.env(CONTROL, server.control());
    if plant {
        command.env(PLANT, "1");
    }
    command.status().expect("the child runs")
}

/// The child: a worker whose missing thread may only read, write and exit.
fn strict_worker(control: &std::path::Path) -> ! {
    let attachment = Attachment::connect(control, &AttachOptions::default()).expect("attach");
    let plant = std::env::var_os(PLANT).is_some();
    let (thread, done) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (its_thread, its_done) = (Arc::clone(&thread), Arc::clone(&done));
    std::thread::spawn(move || {
        let mut reader = attachment.reader().expect("a reader");
        its_thread.store(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs(), Ordering::SeqCst);
        // SAFETY: changes the calling thread only, and takes no pointers.
        let strict = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
        let mut wrong = u32::from(strict != 0);
        for n in 0..MISSES {
            let answer = reader.request(IOVA, 8, Access::READ).map(|mut ticket| {
                loop {
                    if let Some(answer) = reader.poll(&mut ticket) {
                        return answer;
                    }
                    // The watchdog ends a wait for nothing.
                    std::hint::spin_loop();
                }
            });
            wrong += u32::from(answer != Ok(Answer::Resolved));
            if plant && n == MISSES / 2 {
                // SAFETY: takes no arguments; the kernel kills the thread for it.
                unsafe { libc::syscall(libc::SYS_getppid) };
            }
        }
        its_done.store(1 + wrong, Ordering::SeqCst);
        // A thread's ordinary end makes system calls.
        // SAFETY: ends this thread without running anything else; nothing waits for what it owned.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    while thread.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    let task = format!("/proc/self/task/{}", thread.load(Ordering::SeqCst));
    while std::path::Path::new(&task).exists() {
        std::thread::yield_now();
    }
    std::process::exit(match done.load(Ordering::SeqCst) {
        0 => KILLED,
        1 => 0,
        _ => 1,
    })
}
