//! `virtio_net_hdr` (section 5.1.6), and packets whose checksum is unfinished.

use iotlb_proto::vhost_user::features::virtio;

/// Bytes of the header that the TAP and the backlog use: the one with `num_buffers`.
pub const HEADER_LEN: usize = 12;

/// Bytes of the header without `num_buffers`, for drivers older than virtio 1.0.
pub const LEGACY_HEADER_LEN: usize = 10;

/// `flags`: `csum_start` and `csum_offset` say where a checksum is to be filled in.
pub const FLAG_NEEDS_CSUM: u8 = 1;

/// `flags`: the checksum was found to be right.
pub const FLAG_DATA_VALID: u8 = 2;

/// `gso_type`: one packet, not a train of segments.
pub const GSO_NONE: u8 = 0;

/// The header, in host byte order. From a guest every field is hostile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Bit set of `FLAG_*`.
    pub flags: u8,
    /// [`GSO_NONE`] or a kind of segmentation.
    pub gso_type: u8,
    /// Bytes of all protocol headers, a hint.
    pub hdr_len: u16,
    /// Bytes of payload in a segment.
    pub gso_size: u16,
    /// Where the checksummed bytes begin.
    pub csum_start: u16,
    /// Where the checksum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Guest RX: how many buffers the packet was spread over.
    pub num_buffers: u16,
}

impl Header {
    /// Takes the header's bytes apart.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HEADER_LEN]) -> Header {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = bytes;
        let word = |low, high| u16::from_le_bytes([low, high]);
        Header {
            flags,
            gso_type,
            hdr_len: word(a, b),
            gso_size: word(c, d),
            csum_start: word(e, f),
            csum_offset: word(g, h),
            num_buffers: word(i, j),
        }
    }

    /// The header's bytes, little-endian.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }
}

/// Bytes of the header in the guest's buffers.
#[must_use]
pub fn guest_header_len(features: u64) -> usize {
    if features & (virtio::VERSION_1 | virtio::NET_MRG_RXBUF) != 0 { HEADER_LEN } else { LEGACY_HEADER_LEN }
}

/// Fills in the checksum that the guest left to the device: the field holds the sum of the pseudo header, the rest is
/// summed here. Returns whether the frame is complete; `false` when the header points outside of it.
#[must_use]
pub fn finish_checksum(header: &Header, frame: &mut [u8]) -> bool {
    if header.flags & FLAG_NEEDS_CSUM == 0 {
        return true;
    }
    let start = usize::from(header.csum_start);
    let at = start + usize::from(header.csum_offset);
    if at + 2 > frame.len() {
        return false;
    }
    let sum = checksum(&[&frame[start..]]);
    // Zero means "no checksum" to UDP, and the other zero is as good for everybody.
    let sum = if sum == 0 { 0xffff } else { sum };
    frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// The Internet checksum of `parts`, one after the other; all but the last of even length. Zero over data that
/// includes a correct checksum.
#[must_use]
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        let (words, rest) = part.as_chunks::<2>();
        sum += words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>();
        if let [last] = rest {
            sum += u64::from(*last) << 8;
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded into 16 bits by the loop.
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_there_and_back() {
        let bytes = [1, 4, 2, 0, 3, 1, 4, 0, 5, 0, 6, 1];
        let header = Header::from_bytes(bytes);
        assert_eq!((header.flags, header.gso_type, header.gso_size, header.num_buffers), (1, 4, 0x103, 0x106));
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn the_guest_header_has_two_sizes() {
        assert_eq!(guest_header_len(0), 10);
        assert_eq!(guest_header_len(virtio::NET_MRG_RXBUF), 12);
        assert_eq!(guest_header_len(virtio::VERSION_1), 12);
    }

    #[test]
    fn the_checksum_of_the_rfc_1071_example() {
        assert_eq!(checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
        assert_eq!(checksum(&[&[0x00, 0x01], &[0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
        assert_eq!(checksum(&[&[0x12]]), !0x1200);
        assert_eq!(checksum(&[]), 0xffff);
    }

    #[test]
    fn unfinished_checksums_are_finished_and_hostile_offsets_refused() {
        let mut frame = vec![0x55; 14];
        frame.extend([0x01, 0x02, 0x00, 0x00, 0x03]);
        let header = Header { flags: FLAG_NEEDS_CSUM, csum_start: 14, csum_offset: 2, ..Header::default() };
        assert!(finish_checksum(&header, &mut frame));
        assert_eq!(checksum(&[&frame[14..]]), 0);
        assert_eq!(frame[..14], [0x55; 14]);
        for (csum_start, csum_offset) in [(14, 4), (18, 0), (u16::MAX, u16::MAX), (0, u16::MAX)] {
            let before = frame.clone();
            assert!(!finish_checksum(&Header { csum_start, csum_offset, ..header }, &mut frame));
            assert_eq!(frame, before);
        }
        assert!(finish_checksum(&Header::default(), &mut []));
    }
}
