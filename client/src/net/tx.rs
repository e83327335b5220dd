//! Guest TX under one pin: packets out of the guest's buffers into a backlog.

use iotlb_proto::table::QueueRecord;

use super::backlog::{Backlog, PACKET_MAX};
use super::header::{HEADER_LEN, guest_header_len};
use super::rx::PACKETS_PER_PIN;
use crate::queue::vring::{RingFault, RingMemory, Vring};

/// Bytes in the ring from the next packet on whose buffers are asked for together: that packet and the one behind it
/// where they are as large as packets come, dozens of small ones. A front-end takes one page after the other, so more
/// would not be here sooner; but QEMU's loop holds the lock meanwhile that the guest needs to make the next packet.
const AHEAD_BYTES: usize = PACKET_MAX + 1;

/// Bytes of an Ethernet header: shorter frames are none.
const FRAME_MIN: usize = 14;

/// What happened.
#[derive(Debug, Default)]
pub struct Collected {
    /// The driver wants a call, now, before the unpin.
    pub call: bool,
    /// Chains that were completed, with or without a packet in the backlog.
    pub chains: u64,
    /// Bytes of the packets, with headers.
    pub bytes: u64,
    /// Chains that held no packet (too short, too long).
    pub malformed: u64,
    /// There may be more: come again without waiting for a kick.
    pub more: bool,
    /// Why it ended before the ring did.
    pub fault: Option<RingFault>,
}

/// Takes packets until the ring is empty, or `room` packets were taken, or the burst is long enough. A ring that is
/// disabled is emptied all the same, and its packets are discarded.
pub fn collect<M: RingMemory + ?Sized>(
    ring: &mut Vring,
    memory: &M,
    record: &QueueRecord,
    features: u64,
    backlog: &mut Backlog,
    room: usize,
) -> Collected {
    let mut done = Collected::default();
    let mut burst = match ring.begin(memory, record, features) {
        Ok(burst) => burst,
        Err(fault) => {
            done.fault = Some(fault);
            return done;
        }
    };
    let header_len = guest_header_len(features);
    let mut budget = room.min(backlog.room()).min(PACKETS_PER_PIN);
    burst.disable_kick();
    burst.look_ahead_for(AHEAD_BYTES);
    done.fault = loop {
        if budget == 0 || backlog.room() == 0 {
            // Whoever makes room comes again.
            done.more = true;
            break None;
        }
        budget -= 1;
        // A disabled ring's buffers are not even looked at, so they need no translation.
        let taken = if record.enabled {
            burst.next_chain()
        } else {
            match burst.reject_next() {
                Ok(true) => {
                    done.chains += 1;
                    continue;
                }
                Ok(false) => Ok(None),
                Err(fault) => Err(fault),
            }
        };
        let chain = match taken {
            Ok(Some(chain)) => chain,
            Ok(None) => match burst.enable_kick() {
                Ok(false) => break None,
                Ok(true) => continue,
                Err(fault) => break Some(fault),
            },
            Err(fault) => break Some(fault),
        };
        let len = chain.readable_len();
        if len < header_len + FRAME_MIN || len - header_len > PACKET_MAX - HEADER_LEN {
            done.malformed += 1;
        } else {
            let mut packet = backlog.buffer_of(HEADER_LEN + len - header_len);
            chain.read(0, &mut packet[..header_len]);
            chain.read(header_len, &mut packet[HEADER_LEN..]);
            done.bytes += len as u64;
            backlog.push(packet);
        }
        done.chains += 1;
        burst.complete(chain, 0);
    };
    done.call = burst.publish();
    done
}

#[cfg(test)]
mod tests;
