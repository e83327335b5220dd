//! Packets between a port and a ring, in memory of this process.

use std::collections::VecDeque;
use std::time::Instant;

use super::header::HEADER_LEN;

/// Bytes of the largest packet with its header: an IPv6 packet of 64 KiB, its header, Ethernet with two tags.
pub const PACKET_MAX: usize = HEADER_LEN + 22 + 40 + 65_535;

/// Packets kept at most. Enough for the 41 fragments of a 60,000-byte ping several times over.
pub const BACKLOG_MAX: usize = 256;

/// Bytes kept at most, but for the last packet's. More than the usual ring of receive buffers holds (256 times 1,536
/// bytes): what is kept beyond that only waits here instead of in the kernel, and leaves the processor's cache.
pub const BACKLOG_BYTES_MAX: usize = 512 * 1024;

/// Small buffers kept for the next packets.
const SPARE_MAX: usize = 64;

/// Bytes up to which a buffer is small.
const SPARE_BYTES_MAX: usize = 4096;

/// Large buffers kept for the next packets: as many as find room.
const SPARE_LARGE_MAX: usize = BACKLOG_BYTES_MAX / (64 * 1024) + 1;

/// A bounded queue of packets, each with a header of [`HEADER_LEN`] bytes in front.
#[derive(Debug, Default)]
pub struct Backlog {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
    spare_large: Vec<Vec<u8>>,
    /// Since when the first packet has been first.
    waiting_since: Option<Instant>,
}

impl Backlog {
    /// How many more packets find room, unless they are large. At least one does if this is not 0.
    #[must_use]
    pub fn room(&self) -> usize {
        if self.bytes >= BACKLOG_BYTES_MAX { 0 } else { BACKLOG_MAX - self.packets.len() }
    }

    /// Bytes of all packets, headers included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.packets.len()
    }

    /// An empty buffer to fill and [`push`](Backlog::push).
    #[must_use]
    pub fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// A buffer of `len` bytes, at most [`PACKET_MAX`], with zeros for the header and anything behind it.
    #[must_use]
    pub fn buffer_of(&mut self, len: usize) -> Vec<u8> {
        let mut buffer = if len <= SPARE_BYTES_MAX {
            self.buffer()
        } else {
            self.spare_large.pop().unwrap_or_else(|| Vec::with_capacity(PACKET_MAX))
        };
        // A large one comes with the length and the bytes of its last packet, so that there is little to fill in.
        buffer.resize(len, 0);
        let header = buffer.len().min(HEADER_LEN);
        buffer[..header].fill(0);
        buffer
    }

    /// Adds a packet that was read into `scratch`, the first `len` bytes of it: copies a small one, and exchanges the
    /// buffer for a large one, which saves a copy. As [`push`](Backlog::push); `scratch` keeps its length.
    pub fn push_read(&mut self, scratch: &mut Vec<u8>, len: usize) -> bool {
        let size = scratch.len();
        let mut packet = self.buffer_of(if len <= SPARE_BYTES_MAX { len } else { size });
        if len <= SPARE_BYTES_MAX {
            packet.copy_from_slice(&scratch[..len]);
        } else {
            std::mem::swap(&mut packet, scratch);
            packet.truncate(len);
        }
        self.push(packet)
    }

    /// Takes a buffer back unused.
    pub fn recycle(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() > SPARE_BYTES_MAX {
            if self.spare_large.len() < SPARE_LARGE_MAX && buffer.capacity() >= PACKET_MAX {
                self.spare_large.push(buffer);
            }
        } else if self.spare.len() < SPARE_MAX {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// Adds a packet. Returns whether it was taken: there was room, and it has a header. Else it is dropped.
    pub fn push(&mut self, packet: Vec<u8>) -> bool {
        if self.room() == 0 || packet.len() < HEADER_LEN {
            self.recycle(packet);
            return false;
        }
        self.bytes += packet.len();
        self.packets.push_back(packet);
        true
    }

    /// The next packet.
    #[must_use]
    pub fn front(&self) -> Option<&[u8]> {
        self.packets.front().map(Vec::as_slice)
    }

    /// The next packet, to change it.
    #[must_use]
    pub fn front_mut(&mut self) -> Option<&mut [u8]> {
        self.packets.front_mut().map(Vec::as_mut_slice)
    }

    /// Drops the next packet: it arrived, or never will.
    pub fn pop(&mut self) {
        self.waiting_since = None;
        if let Some(packet) = self.packets.pop_front() {
            self.bytes -= packet.len();
            self.recycle(packet);
        }
    }

    /// Drops everything; returns how many there were.
    pub fn clear(&mut self) -> usize {
        let count = self.packets.len();
        while !self.packets.is_empty() {
            self.pop();
        }
        count
    }

    /// Notes that the next packet has to wait, and returns since when it does.
    pub fn wait(&mut self, now: Instant) -> Instant {
        *self.waiting_since.get_or_insert(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_in_order() {
        let mut backlog = Backlog::default();
        for number in 0..BACKLOG_MAX + 5 {
            let mut packet = backlog.buffer();
            packet.extend([0; HEADER_LEN]);
            packet.extend(number.to_le_bytes());
            assert_eq!(backlog.push(packet), number < BACKLOG_MAX);
        }
        assert_eq!((backlog.room(), backlog.len()), (0, BACKLOG_MAX));
        backlog.pop();
        assert_eq!(backlog.front().map(|packet| &packet[HEADER_LEN..]), Some(&1_usize.to_le_bytes()[..]));
        assert_eq!(backlog.clear(), BACKLOG_MAX - 1);
        assert!(backlog.is_empty() && backlog.front().is_none());
        assert!(backlog.buffer().is_empty());
    }

    #[test]
    fn large_packets_fill_it_sooner_and_their_buffers_come_back() {
        let mut backlog = Backlog::default();
        let mut scratch = vec![7; PACKET_MAX];
        let mut pushed = 0;
        while backlog.room() > 0 {
            scratch[..PACKET_MAX].fill(pushed);
            assert!(backlog.push_read(&mut scratch, PACKET_MAX - usize::from(pushed)));
            assert_eq!(scratch.len(), PACKET_MAX);
            pushed += 1;
        }
        assert_eq!(pushed, 8);
        assert!(backlog.bytes() >= BACKLOG_BYTES_MAX && backlog.bytes() < BACKLOG_BYTES_MAX + PACKET_MAX);
        for number in 0..pushed {
            let packet = backlog.front().expect("as many as were pushed");
            assert_eq!(packet.len(), PACKET_MAX - usize::from(number));
            assert!(packet.iter().all(|byte| *byte == number));
            backlog.pop();
        }
        assert_eq!(backlog.bytes(), 0);
        let reused = backlog.buffer_of(PACKET_MAX);
        assert_eq!(reused[..HEADER_LEN], [0; HEADER_LEN]);
        assert!(backlog.push_read(&mut scratch, HEADER_LEN));
        assert_eq!((backlog.len(), backlog.bytes(), scratch.len()), (1, HEADER_LEN, PACKET_MAX));
    }

    #[test]
    fn waiting_counts_for_the_first_packet_only() {
        let mut backlog = Backlog::default();
        assert!(!backlog.push(vec![0; HEADER_LEN - 1]));
        backlog.push(vec![1; HEADER_LEN]);
        backlog.push(vec![2; HEADER_LEN]);
        let start = Instant::now();
        assert_eq!(backlog.wait(start), start);
        let later = start + std::time::Duration::from_secs(1);
        assert_eq!(backlog.wait(later), start);
        backlog.pop();
        assert_eq!(backlog.wait(later), later);
    }
}
