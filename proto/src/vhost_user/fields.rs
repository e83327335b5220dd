//! Reading and writing the fields of a payload in host byte order, as the protocol has them.

/// Takes fields off the front of a payload whose length was checked before.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Fields<'a> {
        Fields(payload)
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        // Every caller checks the payload's length first. Were one to forget, zeros are wrong but harmless.
        debug_assert!(self.0.len() >= N, "{N} bytes wanted, {} left", self.0.len());
        match self.0.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    pub(super) fn u8(&mut self) -> u8 {
        u8::from_ne_bytes(self.take())
    }

    pub(super) fn u16(&mut self) -> u16 {
        u16::from_ne_bytes(self.take())
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    pub(super) fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    /// What has not been taken yet.
    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }
}
