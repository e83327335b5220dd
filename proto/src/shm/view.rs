//! Typed views that keep their mapping alive: bounds are checked once, at the start.

use std::cell::Cell;
use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{Mapping, MappingError, SharedWords};

/// A slice of shared objects inside a mapping it co-owns.
pub struct SharedSlice<T: SharedWords> {
    slice: NonNull<[T]>,
    mapping: Arc<Mapping>,
}

impl<T: SharedWords> SharedSlice<T> {
    /// The `count` objects from `offset` of `mapping`.
    ///
    /// # Errors
    /// They would reach past the end, or are not aligned.
    pub fn new(mapping: &Arc<Mapping>, offset: usize, count: usize) -> Result<SharedSlice<T>, MappingError> {
        let slice = NonNull::from(mapping.array::<T>(offset, count)?);
        Ok(SharedSlice { slice, mapping: Arc::clone(mapping) })
    }
}

// SAFETY: `T` is atomics only, and the mapping lives as long as the view; nothing belongs to one thread.
unsafe impl<T: SharedWords> Send for SharedSlice<T> {}
// SAFETY: as above; shared access is through atomics.
unsafe impl<T: SharedWords> Sync for SharedSlice<T> {}

impl<T: SharedWords> Deref for SharedSlice<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `new` took the pointer from a checked reference into the mapping, which `self.mapping` keeps there.
        // `SharedObject::part` took it from a function that makes a reference of *any* life out of one into the mapping
        // with the same life: so it points into the mapping too, or to something that lives for ever.
        unsafe { self.slice.as_ref() }
    }
}

impl<T: SharedWords> Clone for SharedSlice<T> {
    fn clone(&self) -> Self {
        SharedSlice { slice: self.slice, mapping: Arc::clone(&self.mapping) }
    }
}

impl<T: SharedWords> fmt::Debug for SharedSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedSlice").field("count", &self.slice.len()).field("mapping", &self.mapping).finish()
    }
}

/// One shared object inside a mapping it co-owns.
#[derive(Debug)]
pub struct SharedObject<T: SharedWords>(SharedSlice<T>);

impl<T: SharedWords> SharedObject<T> {
    /// The object at `offset` of `mapping`.
    ///
    /// # Errors
    /// It would reach past the end, or is not aligned.
    pub fn new(mapping: &Arc<Mapping>, offset: usize) -> Result<SharedObject<T>, MappingError> {
        SharedSlice::new(mapping, offset, 1).map(SharedObject)
    }

    /// A part of the object, as an object of its own: where it is need not be found again for each access.
    #[must_use]
    pub fn part<U: SharedWords>(&self, pick: impl FnOnce(&T) -> &U) -> SharedObject<U> {
        let slice = NonNull::from(std::slice::from_ref(pick(self)));
        SharedObject(SharedSlice { slice, mapping: Arc::clone(&self.0.mapping) })
    }
}

impl<T: SharedWords> Deref for SharedObject<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the slice has one element by construction; the cast is to its first.
        unsafe { self.0.slice.cast::<T>().as_ref() }
    }
}

/// `N` objects of a slice, and others later: to get at one takes no look at the bounds. For one thread at a time.
#[derive(Debug)]
pub struct SharedChoice<T: SharedWords, const N: usize> {
    slice: SharedSlice<T>,
    otherwise: SharedObject<T>,
    /// Each points into the slice, or to the other object.
    chosen: [Cell<NonNull<T>>; N],
}

impl<T: SharedWords, const N: usize> SharedChoice<T, N> {
    /// Of this slice; for each place, `otherwise` is chosen.
    #[must_use]
    pub fn new(slice: SharedSlice<T>, otherwise: SharedObject<T>) -> SharedChoice<T, N> {
        let chosen = std::array::from_fn(|_| Cell::new(NonNull::from(&*otherwise)));
        SharedChoice { slice, otherwise, chosen }
    }

    /// Chooses this one for `place`, or the other object if there is no such. There is no place from `N` on.
    pub fn choose(&self, place: usize, index: Option<usize>) {
        if let Some(chosen) = self.chosen.get(place) {
            let object = index.and_then(|index| self.slice.get(index));
            chosen.set(NonNull::from(object.unwrap_or(&self.otherwise)));
        }
    }

    /// The one that was chosen last for `place`.
    #[inline(always)]
    #[must_use]
    pub fn chosen(&self, place: usize) -> Option<&T> {
        // SAFETY: `new` and `choose` took the pointer from a reference to what `self.slice` or `self.otherwise` views,
        // and these keep their mappings for as long as they live.
        self.chosen.get(place).map(|object| unsafe { object.get().as_ref() })
    }

    /// All of them.
    #[inline(always)]
    #[must_use]
    pub fn all(&self) -> &[T] {
        &self.slice
    }
}

// SAFETY: what it points to is atomics only, in a mapping that it keeps; nothing belongs to one thread.
unsafe impl<T: SharedWords, const N: usize> Send for SharedChoice<T, N> {}
