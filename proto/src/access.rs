//! Access permissions of a translation.

use std::fmt;

/// What a device may do with an address: a set of *read* and *write*.
///
/// The numbers are those of `VHOST_ACCESS_*` (vhost-user specification, "IOTLB message"), so a value read from
/// the wire is valid as it stands when it is below 4.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Access(u8);

impl Access {
    /// Neither read nor write.
    pub const NONE: Access = Access(0);
    /// The device reads guest memory.
    pub const READ: Access = Access(1);
    /// The device writes guest memory.
    pub const WRITE: Access = Access(2);
    /// Both.
    pub const READ_WRITE: Access = Access(3);

    /// The access that `bits` names; `None` when a bit other than read and write is set.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Option<Access> {
        if bits <= 3 { Some(Access(bits)) } else { None }
    }

    /// The `VHOST_ACCESS_*` number.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Whether everything `needed` asks for is allowed by `self`.
    #[must_use]
    pub const fn allows(self, needed: Access) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// Both sets together.
    #[must_use]
    pub const fn union(self, other: Access) -> Access {
        Access(self.0 | other.0)
    }

    /// Whether nothing is allowed.
    #[must_use]
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0 => "none",
            1 => "read",
            2 => "write",
            _ => "read-write",
        })
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
