//! What a device may do with an address.

use iotlb_client::Access;

/// The device reads guest memory.
pub const IOTLB_READ: u32 = 1;
/// The device writes guest memory. Both: IOTLB_READ | IOTLB_WRITE.
pub const IOTLB_WRITE: u32 = 2;

/// The access that C means; `None` when a bit is set that the header does not know.
pub(crate) fn access_of(bits: u32) -> Option<Access> {
    u8::try_from(bits).ok().and_then(Access::from_bits)
}

const _: () = assert!(IOTLB_READ == Access::READ.bits() as u32 && IOTLB_WRITE == Access::WRITE.bits() as u32);
