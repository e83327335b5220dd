//! The payload of a received message.

use std::ops::{Deref, DerefMut};

use smallvec::{SmallVec, smallvec};

/// Bytes that need no allocation: an IOTLB message, a number, a ring's addresses; only the configuration space,
/// and memory tables of several regions, are longer.
const INLINE_MAX: usize = 64;

/// Bytes of one message, without its header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload(SmallVec<[u8; INLINE_MAX]>);

impl Payload {
    /// So many zeros.
    pub(super) fn zeroed(len: usize) -> Payload {
        Payload(smallvec![0; len])
    }

    /// A copy of these bytes.
    pub(super) fn copy_of(bytes: &[u8]) -> Payload {
        Payload(SmallVec::from_slice(bytes))
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
