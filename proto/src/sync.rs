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
    #[cfg(loom)]
    count_fence();
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    fence(Ordering::SeqCst);
}

/// A model tries both orders of two steps only where they touch one word, and nothing comes between a fence and the
/// step before it; so fences have a word of their own. A model calls this before it starts threads: the word is made
/// when it is needed, and whoever comes second would see what the first one did until then.
#[cfg(loom)]
pub fn count_fence() {
    // Relaxed: it orders nothing.
    FENCES.fetch_add(1, Ordering::Relaxed);
}

#[cfg(loom)]
loom::lazy_static! {
    static ref FENCES: AtomicU64 = AtomicU64::new(0);
}

/// Asks for the cache line of `word` to store to it, without waiting for it: other processors lose theirs. Changes
/// nothing but the time of a later store; does nothing where there is no such instruction.
#[inline(always)]
pub fn prefetch_to_store(word: &AtomicU64) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: a prefetch reads and writes nothing that the program could see, whatever the address. Processors without
    // it pass over it. The intrinsic would become a prefetch to load, unless the program is built for a processor that
    // has this one.
    unsafe {
        std::arch::asm!(
            "prefetchw [{}]",
            in(reg) std::ptr::from_ref(word),
            options(nostack, readonly, preserves_flags)
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = word;
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
