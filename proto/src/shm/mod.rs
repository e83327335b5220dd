//! Sealed memfds and raw mappings: every `unsafe` that reaches into shared memory is in [`mapping`] and [`view`].
//!
//! Only memfds, never named segments: a memfd works across mount, pid, ipc and user namespaces, is not capped by the
//! size of `/dev/shm`, cannot outlive its users, and can be sealed.

pub mod mapping;
pub mod memfd;
pub mod view;

pub use mapping::{Mapping, MappingError, SharedWords};
pub use memfd::MemfdError;
pub use view::{SharedChoice, SharedObject, SharedSlice};
