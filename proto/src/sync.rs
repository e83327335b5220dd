//! The one place atomics come from.
//!
//! Under `--cfg loom` every word is loom's, so the models in `tests/` explore the very code that runs in
//! production. No other module names `std::sync::atomic`.

#[cfg(not(loom))]
pub use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence, fence};

#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// A sequentially consistent fence, in its cheapest form.
///
/// `fence(SeqCst)` becomes `mfence` on x86-64, 16 ns on the machine this was measured on; a locked instruction on the
/// stack orders loads and stores of ordinary memory just as well and takes 2 ns. Elsewhere, and in models, it *is*
/// `fence(SeqCst)`.
#[inline(always)]
pub fn full_fence() {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: or-ing 0 into a word below the stack pointer leaves it as it is, whatever it belongs to; the red zone is
    // mapped memory of this thread's stack. Without `nomem` the compiler moves no memory access across.
    unsafe {
        std::arch::asm!("lock or dword ptr [rsp - 64], 0", options(nostack));
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    fence(Ordering::SeqCst);
}

/// Asks for the cache line of `word`, without waiting for it. Changes nothing but the time of a later load; does
/// nothing where there is no such instruction.
#[inline(always)]
pub fn prefetch(word: &AtomicU64) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: a prefetch reads and writes nothing that the program could see, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(word).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = word;
}
