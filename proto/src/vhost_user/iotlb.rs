//! The IOTLB message: 32 bytes, the same on both channels.

use super::fields::Fields;
use crate::access::Access;

/// Length on the wire, in bytes.
pub const IOTLB_LEN: usize = IOTLB_SIZE as usize;
/// The same, as a header announces it.
pub(super) const IOTLB_SIZE: u32 = 32;

/// What an IOTLB message says (`VHOST_IOTLB_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IotlbKind {
    /// Back-end to front-end: a translation is wanted.
    Miss = 1,
    /// Front-end to back-end: a translation.
    Update = 2,
    /// Front-end to back-end: forget a range.
    Invalidate = 3,
    /// Back-end to front-end: a translation exists but does not allow what was wanted.
    AccessFail = 4,
}

impl IotlbKind {
    /// The kind of that number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<IotlbKind> {
        match number {
            1 => Some(IotlbKind::Miss),
            2 => Some(IotlbKind::Update),
            3 => Some(IotlbKind::Invalidate),
            4 => Some(IotlbKind::AccessFail),
            _ => None,
        }
    }
}

/// Why 32 bytes are no IOTLB message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IotlbError {
    /// The type field has no meaning.
    #[error("type {0} is not miss (1), update (2), invalidate (3) or access fail (4)")]
    UnknownKind(u8),
    /// The permission field has bits without a meaning.
    #[error("permission {0:#x} has bits other than read (1) and write (2)")]
    UnknownAccess(u8),
}

/// An IOTLB message, in host byte order. `size` and `iova` are as on the wire: see
/// [`IovaRange::from_invalidate`](crate::iova::IovaRange::from_invalidate) for what they mean in an invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IotlbMessage {
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front-end's own address space.
    pub user_address: u64,
    /// Permission.
    pub access: Access,
    /// What is meant.
    pub kind: IotlbKind,
}

impl IotlbMessage {
    /// A miss for the page around `iova`.
    #[must_use]
    pub const fn miss(iova: u64, access: Access) -> IotlbMessage {
        IotlbMessage { iova, size: crate::iova::PAGE_SIZE, user_address: 0, access, kind: IotlbKind::Miss }
    }

    /// A translation of `size` bytes.
    #[must_use]
    pub const fn update(iova: u64, size: u64, user_address: u64, access: Access) -> IotlbMessage {
        IotlbMessage { iova, size, user_address, access, kind: IotlbKind::Update }
    }

    /// Forget `size` bytes from `iova`.
    #[must_use]
    pub const fn invalidate(iova: u64, size: u64) -> IotlbMessage {
        IotlbMessage { iova, size, user_address: 0, access: Access::NONE, kind: IotlbKind::Invalidate }
    }

    /// Reads a message. Addresses and sizes are taken as they are: what a size means depends on the kind. The six bytes
    /// of padding are ignored.
    ///
    /// Front-ends leave garbage where a field has no meaning: QEMU sets neither `user_address` nor the permission of an
    /// invalidation. So what the kind does not use is not looked at, and the permission of an invalidation is none. An
    /// update whose permission has bits without a meaning allows nothing, as one without permission: it still replaces
    /// what its range meant before.
    ///
    /// # Errors
    ///
    /// A type without a meaning, or a miss or access failure with a permission without one.
    pub fn from_bytes(bytes: &[u8; IOTLB_LEN]) -> Result<IotlbMessage, IotlbError> {
        let mut fields = Fields::new(bytes);
        let (iova, size, user_address) = (fields.u64(), fields.u64(), fields.u64());
        let (access, kind) = (fields.u8(), fields.u8());
        let kind = IotlbKind::from_number(kind).ok_or(IotlbError::UnknownKind(kind))?;
        let access = match (kind, Access::from_bits(access)) {
            (IotlbKind::Invalidate, _) | (IotlbKind::Update, None) => Access::NONE,
            (_, Some(known)) => known,
            (IotlbKind::Miss | IotlbKind::AccessFail, None) => return Err(IotlbError::UnknownAccess(access)),
        };
        Ok(IotlbMessage { iova, size, user_address, access, kind })
    }

    /// The message as it goes on the wire, padding zeroed.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; IOTLB_LEN] {
        let mut bytes = [0; IOTLB_LEN];
        bytes[0..8].copy_from_slice(&self.iova.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.user_address.to_ne_bytes());
        bytes[24] = self.access.bits();
        bytes[25] = self.kind as u8;
        bytes
    }
}
