//! The client library of iotlbd for programs in C: `libiotlb.so`, `libiotlb.a` and `include/iotlb.h`.
//!
//! A thin layer over [`iotlb_client`]: handles instead of values, a status instead of a `Result`, and no state of its
//! own but which reader is pinned. The header is made of these sources by cbindgen and kept in the repository; a test
//! fails when the two differ.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`status`] | what a call came to, and the text of the last failure |
//! | [`attachment`] | the connection to a device |
//! | [`reader`] | a thread's right to pin |
//! | [`translate`] | what may be done under a pin |
//! | [`miss`] | what to do about a miss |
//! | [`queue`] | leased virtqueues |
//! | [`log`] | the library's own complaints |
//! | [`access`] | what a device may do with an address |
//! | `handle` | pointers of C: null or good, in and out |
//!
//! Types and functions have the names that C sees. Rust programs use [`iotlb_client`] itself.
#![allow(non_camel_case_types)]

pub mod access;
pub mod attachment;
mod handle;
pub mod log;
pub mod miss;
pub mod queue;
pub mod reader;
pub mod status;
pub mod translate;

/// Of this header: 10,000 times the major number, 100 times the minor one, and the patch.
pub const IOTLB_VERSION: u32 = 100;

/// [`IOTLB_VERSION`] of the library that is there. Before 1.0 a program goes with the release that it was compiled for.
#[unsafe(no_mangle)]
pub extern "C" fn iotlb_version() -> u32 {
    IOTLB_VERSION
}
