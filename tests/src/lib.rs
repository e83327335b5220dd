//! Benchmarks, and what the tests with real guests and containers share.
//!
//! - [`mod@bench`]: measuring against peers.
//! - [`containers`]: the shipped image, built and run with podman.
//! - [`guest`]: real guests under QEMU.
//! - [`mod@not_tested`]: what a machine cannot test.
//! - [`processors`]: who runs where.

pub mod bench;
pub mod containers;
pub mod guest;
pub mod not_tested;
pub mod processors;
mod program;

/// The README's Rust code, so that it keeps compiling.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
#[derive(Debug)]
pub struct Readme;
