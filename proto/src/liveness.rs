//! The word that tells every worker that the daemon has died.
//!
//! A worker whose daemon is gone can be told of no invalidation any more, so it must stop *at once*, and it must
//! notice without a system call. The kernel offers one thing that is done for a process on every way to die, before its
//! sockets close: it walks the robust-futex list of each dying thread and sets `FUTEX_OWNER_DIED` in the words that the
//! thread owns. So the event-loop thread of the daemon registers one such word for as long as it lives, in a small
//! shared page that workers map read-only; [`LivenessView::alive`] is a load and a test.
//!
//! Two traps. The list head must be in shared memory too: when the out-of-memory killer reaps the daemon's private
//! memory first, a private head reads as zeros and the walk ends before it began. So this module talks to
//! `set_robust_list` itself and does not go through the C library, whose head is in thread-private memory. While a
//! [`LivenessOwner`] lives, robust pthread mutexes do not work in its thread; the daemon has none. And the word dies
//! with the *thread*: the daemon is built with `panic = "abort"`, and the loop's thread is never left behind.
//!
//! The list is in a page of its own, which stays with the daemon: it holds two addresses, and where the daemon's memory
//! is, is nothing a worker should be told. An owner is made after the last `fork`: a child inherits neither the
//! registration nor the pages.

use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::shm::{Mapping, MappingError, MemfdError, SharedObject, memfd};
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Size of the shared page.
pub const PAGE_LEN: usize = 4096;
/// Offset in the list's page of `robust_list_head`: next pointer, futex offset, pending pointer.
const HEAD_OFFSET: usize = 0;
/// Offset in the list's page of the one list element.
const ELEMENT_OFFSET: usize = 24;
/// Byte offset of the futex word in the page.
pub const WORD_OFFSET: u32 = 32;

/// `FUTEX_OWNER_DIED` of the futex ABI.
const OWNER_DIED: u32 = 0x4000_0000;
/// `FUTEX_TID_MASK` of the futex ABI.
const TID_MASK: u32 = 0x3fff_ffff;
const _: () = assert!(OWNER_DIED > TID_MASK, "a marked word is larger than any thread's number");

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum LivenessError {
    /// The page could not be created or checked.
    #[error("liveness page: {0}")]
    Memfd(#[from] MemfdError),
    /// The page could not be mapped.
    #[error("liveness page: {0}")]
    Mapping(#[from] MappingError),
    /// `set_robust_list`.
    #[error("the kernel refuses a robust-futex list: {0}")]
    Register(std::io::Error),
    /// WELCOME named another place than this build expects.
    #[error("the daemon keeps its liveness word at offset {0}, this build expects {WORD_OFFSET}")]
    Offset(u32),
}

/// The daemon's side: holds the word in the name of the thread that made it, until dropped in that thread.
#[derive(Debug)]
pub struct LivenessOwner {
    page: Mapping,
    /// Head and element. Held for the kernel, which reads them when the thread dies.
    _list: Mapping,
    former_head: usize,
    former_len: usize,
    /// The registration belongs to one thread.
    not_send: PhantomData<*const ()>,
}

impl LivenessOwner {
    /// Registers the calling thread as owner; returns the page to hand to workers, sealed against writing.
    ///
    /// # Errors
    /// Creating, mapping or registering failed.
    pub fn create() -> Result<(LivenessOwner, OwnedFd), LivenessError> {
        let fd = memfd::create("iotlbd-liveness", PAGE_LEN as u64)?;
        let page = Mapping::read_write(fd.as_fd(), PAGE_LEN)?;
        memfd::seal_read_only(fd.as_fd())?;
        // Shared memory too, but never handed out.
        let list_fd = memfd::create("iotlbd-liveness-list", PAGE_LEN as u64)?;
        let list = Mapping::read_write(list_fd.as_fd(), PAGE_LEN)?;
        let (head_at, element_at) = (list.address() + HEAD_OFFSET, list.address() + ELEMENT_OFFSET);
        let word_at = page.address() + WORD_OFFSET as usize;
        let head = list.array::<AtomicU64>(HEAD_OFFSET, 3)?;
        head[0].store(element_at as u64, Ordering::Relaxed);
        // From the element to its word, as the kernel adds it: a signed number of bytes, whichever page comes first.
        head[1].store(word_at.wrapping_sub(element_at) as u64, Ordering::Relaxed);
        head[2].store(0, Ordering::Relaxed);
        list.object::<AtomicU64>(ELEMENT_OFFSET)?.store(head_at as u64, Ordering::Relaxed);
        let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        page.object::<AtomicU32>(WORD_OFFSET as usize)?.store(tid & TID_MASK, Ordering::Release);

        let (former_head, former_len) = registered()?;
        register(head_at, 24)?;
        Ok((LivenessOwner { page, _list: list, former_head, former_len, not_send: PhantomData }, fd))
    }
}

/// Head and length of the calling thread's list.
fn registered() -> Result<(usize, usize), LivenessError> {
    let (mut head, mut len) = (0_usize, 0_usize);
    // SAFETY: both pointers are to locals that live across the call; pid 0 is this thread.
    let got = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    if got == 0 { Ok((head, len)) } else { Err(LivenessError::Register(std::io::Error::last_os_error())) }
}

fn register(head: usize, len: usize) -> Result<(), LivenessError> {
    // SAFETY: the kernel only reads the list when this thread dies or execs, checks every user access, and follows
    // at most 2,048 elements; the head is in the list's page of a `LivenessOwner`, which registers the former head
    // again before it unmaps its pages, or it is that former head itself.
    let done = unsafe { libc::syscall(libc::SYS_set_robust_list, head, len) };
    if done == 0 { Ok(()) } else { Err(LivenessError::Register(std::io::Error::last_os_error())) }
}

impl Drop for LivenessOwner {
    fn drop(&mut self) {
        if let Ok(word) = self.page.object::<AtomicU32>(WORD_OFFSET as usize) {
            word.store(0, Ordering::Release);
        }
        // The former length is the kernel's own answer, so it takes it back; when it does not, there is nothing to do.
        let _ = register(self.former_head, self.former_len);
    }
}

/// A worker's side.
#[derive(Debug)]
pub struct LivenessView {
    word: SharedObject<AtomicU32>,
}

impl LivenessView {
    /// Maps the page read-only. `word_offset` comes from WELCOME.
    ///
    /// # Errors
    /// Not a sealed page of the right size, or another build's.
    pub fn open(fd: BorrowedFd<'_>, word_offset: u32) -> Result<LivenessView, LivenessError> {
        if word_offset != WORD_OFFSET {
            return Err(LivenessError::Offset(word_offset));
        }
        memfd::check_sealed(fd, PAGE_LEN as u64)?;
        let page = Arc::new(Mapping::read_only(fd, PAGE_LEN)?);
        Ok(LivenessView { word: SharedObject::new(&page, WORD_OFFSET as usize)? })
    }

    /// Whether the daemon is alive: a load, no system call.
    #[inline]
    #[must_use]
    pub fn alive(&self) -> bool {
        self.word().alive()
    }

    /// Where the word is, for a reader that finds that out before its fence and looks at the word after it.
    #[inline]
    #[must_use]
    pub fn word(&self) -> LivenessWord<'_> {
        LivenessWord(&self.word)
    }
}

/// The word of a [`LivenessView`].
#[derive(Clone, Copy, Debug)]
pub struct LivenessWord<'v>(&'v AtomicU32);

impl LivenessWord<'_> {
    /// See [`LivenessView::alive`].
    #[inline]
    #[must_use]
    pub fn alive(self) -> bool {
        // Acquire pairs with the release store in `create`; the kernel's store at death needs no partner: nothing
        // the dead process wrote is looked at afterwards.
        let word = self.0.load(Ordering::Acquire);
        // In one comparison: a thread's number, and none of the bits above. The one above `OWNER_DIED`, for waiters, is
        // never set: a wait that would set it needs to write the page.
        word.wrapping_sub(1) < TID_MASK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_dies_with_its_thread() {
        let (page_out, page_in) = std::sync::mpsc::channel();
        let (stop_out, stop_in) = std::sync::mpsc::channel::<()>();
        let owner = std::thread::spawn(move || {
            let (owner, page) = LivenessOwner::create().expect("create");
            page_out.send(page).expect("the test waits");
            let _ = stop_in.recv();
            // As when a thread is killed: nobody drops the owner.
            std::mem::forget(owner);
        });
        let page = page_in.recv().expect("page");
        let view = LivenessView::open(page.as_fd(), WORD_OFFSET).expect("open");
        assert!(view.alive());
        drop(stop_out);
        owner.join().expect("thread");
        assert!(!view.alive());
        let word = view.word.load(Ordering::Relaxed);
        assert_eq!(word & OWNER_DIED, OWNER_DIED, "set by the kernel");
    }

    #[test]
    fn a_clean_end_is_seen_too_and_the_former_list_comes_back() {
        let view = std::thread::spawn(|| {
            let former = registered().expect("list");
            let (owner, page) = LivenessOwner::create().expect("create");
            let view = LivenessView::open(page.as_fd(), WORD_OFFSET).expect("open");
            assert!(view.alive());
            assert_ne!(registered().expect("list"), former);
            drop(owner);
            assert_eq!(registered().expect("list"), former);
            view
        })
        .join()
        .expect("thread");
        assert!(!view.alive());
    }

    #[test]
    fn workers_see_the_word_and_no_address() {
        let (_owner, page) = LivenessOwner::create().expect("create");
        let seen = Mapping::read_only(page.as_fd(), PAGE_LEN).expect("map");
        for (index, word) in seen.array::<AtomicU32>(0, PAGE_LEN / 4).expect("words").iter().enumerate() {
            let is_word = index == WORD_OFFSET as usize / 4;
            assert_eq!(word.load(Ordering::Relaxed) != 0, is_word, "word {index}");
        }
    }

    #[test]
    fn a_thread_and_no_mark_is_alive() {
        let waiters = 1 << 31;
        for (word, alive) in [(0, false), (1, true), (TID_MASK, true), (OWNER_DIED, false), (OWNER_DIED | 7, false)] {
            assert_eq!(LivenessWord(&AtomicU32::new(word)).alive(), alive, "{word:#x}");
            assert!(!LivenessWord(&AtomicU32::new(word | waiters)).alive(), "what nobody sets does no harm: {word:#x}");
        }
    }

    #[test]
    fn another_builds_page_is_refused() {
        let fd = memfd::create("test", PAGE_LEN as u64).expect("memfd");
        assert!(matches!(LivenessView::open(fd.as_fd(), 40), Err(LivenessError::Offset(40))));
        assert!(matches!(LivenessView::open(fd.as_fd(), WORD_OFFSET), Err(LivenessError::Memfd(_))));
    }
}
