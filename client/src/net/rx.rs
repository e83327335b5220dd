//! Guest RX under one pin: packets from a backlog into the guest's buffers.

use iotlb_proto::table::QueueRecord;
use iotlb_proto::vhost_user::features::virtio;

use super::backlog::Backlog;
use super::header::{FLAG_DATA_VALID, HEADER_LEN, guest_header_len};
use crate::queue::vring::{Chain, RingFault, RingMemory, Vring};

/// Packets delivered under one pin: a pin may not last long, the guest's CPUs may be waiting for its end.
pub const PACKETS_PER_PIN: usize = 64;

/// Chains looked at under one pin, but for the last packet's, and chains one packet may take: 64 KiB in buffers of 64
/// bytes. With the largest chains that a guest can make they take a quarter of a second. The guest itself waits for the
/// end of the pin; a worker is reported after a tenth of a second and told to let go after one.
pub const CHAINS_PER_PIN: usize = 1024;

/// What happened.
#[derive(Debug, Default)]
pub struct Delivered {
    /// The driver wants a call, now, before the unpin.
    pub call: bool,
    /// Packets that arrived.
    pub packets: u64,
    /// Chains they took.
    pub chains: u64,
    /// Their bytes, with headers.
    pub bytes: u64,
    /// Packets dropped because no number of buffers would have held them.
    pub too_large: u64,
    /// The next packet waits for the driver to post more; it was asked for a kick.
    pub starved: bool,
    /// There may be more to do: come again.
    pub more: bool,
    /// Why it ended before the backlog did.
    pub fault: Option<RingFault>,
}

/// Delivers packets until the backlog is empty, or the posted buffers, or the burst is long enough.
pub fn deliver<M: RingMemory + ?Sized>(
    ring: &mut Vring,
    memory: &M,
    record: &QueueRecord,
    features: u64,
    backlog: &mut Backlog,
) -> Delivered {
    let mut done = Delivered::default();
    let mut burst = match ring.begin(memory, record, features) {
        Ok(burst) => burst,
        Err(fault) => {
            done.fault = Some(fault);
            return done;
        }
    };
    // Posted buffers are of no interest before they are needed.
    burst.disable_kick();
    let mergeable = features & virtio::NET_MRG_RXBUF != 0;
    let header_len = guest_header_len(features);
    // Packets have the long header; an old guest gets the part it knows.
    let skipped = HEADER_LEN - header_len;
    let mut chains: Vec<Chain<'_>> = Vec::new();
    let most = usize::from(record.size).min(CHAINS_PER_PIN);
    let (mut tried, mut looked_at) = (0, 0);
    while record.enabled && !backlog.is_empty() {
        let waiting = backlog.bytes();
        let Some(packet) = backlog.front_mut() else { break };
        if tried >= PACKETS_PER_PIN || looked_at >= CHAINS_PER_PIN {
            done.more = true;
            break;
        }
        tried += 1;
        let wanted = packet.len() - skipped;
        let mut room = 0;
        let ended = loop {
            if room >= wanted || (!mergeable && !chains.is_empty()) {
                break Ok(());
            }
            // As far as the packets reach that wait: what is posted behind may be taken away before it is needed.
            burst.look_ahead_for(waiting.saturating_sub(room));
            match burst.next_chain() {
                Ok(Some(chain)) => {
                    room += chain.writable_len();
                    looked_at += 1;
                    chains.push(chain);
                    if chains.len() >= most {
                        break Ok(());
                    }
                }
                // Asked for while the chains are still taken, so the kick is for what comes behind them.
                Ok(None) => match burst.enable_kick() {
                    Ok(true) => {}
                    Ok(false) => {
                        done.starved = true;
                        break Err(None);
                    }
                    Err(fault) => break Err(Some(fault)),
                },
                Err(fault) => break Err(Some(fault)),
            }
        };
        if let Err(fault) = ended {
            done.fault = fault;
            break;
        }
        if room < wanted {
            // The one chain that an unmergeable packet gets, or as many as a packet may have, do not hold it.
            chains.clear();
            burst.put_back();
            done.too_large += 1;
            backlog.pop();
            continue;
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        packet[HEADER_LEN - 2..HEADER_LEN].copy_from_slice(&count.to_le_bytes());
        if features & virtio::NET_GUEST_CSUM == 0 {
            // The TAP sets it whatever offloads it has, and such a driver may not see it (section 5.1.6.4.1).
            packet[0] &= !FLAG_DATA_VALID;
        }
        scatter(&chains, &[&packet[..header_len], &packet[HEADER_LEN..]]);
        done.packets += 1;
        done.bytes += wanted as u64;
        done.chains += chains.len() as u64;
        let mut left = wanted;
        for chain in chains.drain(..) {
            let written = left.min(chain.writable_len());
            left -= written;
            burst.complete(chain, written);
        }
        backlog.pop();
    }
    burst.put_back();
    done.call = burst.publish();
    done
}

/// Writes `parts`, one after the other, over the writable bytes of `chains`, which hold them all.
fn scatter(chains: &[Chain<'_>], parts: &[&[u8]]) {
    let mut chains = chains.iter();
    let mut chain = chains.next();
    let mut offset = 0;
    for part in parts {
        let mut rest = *part;
        while let Some(current) = chain
            && !rest.is_empty()
        {
            let written = current.write(offset, rest);
            rest = &rest[written..];
            offset += written;
            if !rest.is_empty() {
                chain = chains.next();
                offset = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests;
