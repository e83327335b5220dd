//! Programs that tests start. The tests of other crates take this file by its path.
#![allow(dead_code, unreachable_pub)] // each uses a part of it

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// A running program that does not outlive the test: it is killed when the value goes, and by the kernel when the
/// thread that started it ends, which is the test's own, also where the whole process is aborted.
#[derive(Debug)]
pub struct Program(Option<Child>);

impl Program {
    pub fn start(command: &mut Command) -> Program {
        end_with_test(command);
        Program(Some(command.spawn().expect("the program starts")))
    }

    pub fn wait_with_output(mut self) -> io::Result<Output> {
        self.0.take().expect(NOT_COLLECTED).wait_with_output()
    }
}

const NOT_COLLECTED: &str = "only what takes the value takes the child";

impl Deref for Program {
    type Target = Child;

    fn deref(&self) -> &Child {
        self.0.as_ref().expect(NOT_COLLECTED)
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Child {
        self.0.as_mut().expect(NOT_COLLECTED)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // An Err: it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Has the kernel kill the child when the calling thread ends.
pub fn end_with_test(command: &mut Command) {
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe functions may be called. These are two plain system calls,
    // and the closure neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // It may have died before we could say so.
            if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
        });
    }
}
