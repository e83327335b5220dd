//! A neighbour that answers by itself: ARP, IPv6 neighbour solicitation, and ping over both.
//!
//! A ping larger than the MTU arrives in fragments. They are answered one by one, without reassembly: the
//! reply's fragments are those of the request with the addresses swapped, and the ICMP checksum, which covers all of
//! them but stands in the first, changes by a constant. What has to be remembered is only which datagrams
//! began with an echo request: the last [`DATAGRAMS_MAX`] of them. Fragments that overtake their first one are not
//! answered. Nor is a wrong ICMP checksum of a fragmented request noticed here; the reply's is as wrong, so the guest
//! drops it.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::header::checksum;

/// Fragmented echo requests that are remembered. As many can be on their way at once.
pub const DATAGRAMS_MAX: usize = 64;

const ETHERNET_LEN: usize = 14;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// Ethernet and IPv4 addresses of 6 and 4 bytes, request.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_LEN: usize = 28;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;
const ICMP_LEN: usize = 8;
const ICMP_ECHO_REQUEST: u8 = 8;
const ICMPV6_ECHO_REQUEST: u8 = 128;
const ICMPV6_ECHO_REPLY: u8 = 129;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Type, checksum and flags, target address.
const NEIGHBOUR_LEN: usize = 24;
const TTL: u8 = 64;

/// The neighbour.
#[derive(Debug)]
pub struct Echo {
    mac: [u8; 6],
    ip: Option<Ipv4Addr>,
    datagrams: VecDeque<Datagram>,
}

/// What names a fragmented datagram: addresses and identification.
type Datagram = ([u8; 8], [u8; 2]);

impl Echo {
    /// A neighbour with hardware address `mac`. It answers for `ip`, and for the IPv6 link-local address made from
    /// `mac`; with no `ip`, for every unicast address.
    #[must_use]
    pub fn new(mac: [u8; 6], ip: Option<Ipv4Addr>) -> Echo {
        Echo { mac, ip, datagrams: VecDeque::with_capacity(DATAGRAMS_MAX) }
    }

    /// Appends the answer to `frame` to `reply` and returns `true`, or leaves `reply` as it is: there is none.
    pub fn answer(&mut self, frame: &[u8], reply: &mut Vec<u8>) -> bool {
        let Some((ethernet, body)) = frame.split_at_checked(ETHERNET_LEN) else {
            return false;
        };
        let for_us = ethernet[..6] == self.mac;
        let group = ethernet[0] & 1 != 0;
        // Nobody answers to a group.
        if !(for_us || group) || ethernet[6] & 1 != 0 {
            return false;
        }
        let start = reply.len();
        reply.extend_from_slice(&ethernet[6..12]);
        reply.extend_from_slice(&self.mac);
        reply.extend_from_slice(&ethernet[12..14]);
        let answered = match [ethernet[12], ethernet[13]] {
            TYPE_ARP => self.arp(body, reply),
            TYPE_IPV4 if for_us => self.ipv4(body, reply),
            TYPE_IPV6 => self.ipv6(body, for_us, reply),
            _ => None,
        };
        if answered.is_none() {
            reply.truncate(start);
        }
        answered.is_some()
    }

    fn is_ours(&self, ip: Ipv4Addr) -> bool {
        match self.ip {
            Some(ours) => ours == ip,
            None => !(ip.is_unspecified() || ip.is_broadcast() || ip.is_multicast() || ip.is_loopback()),
        }
    }

    fn is_ours_v6(&self, ip: Ipv6Addr) -> bool {
        match self.ip {
            Some(_) => link_local(self.mac) == ip,
            None => !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback()),
        }
    }

    /// RFC 826.
    fn arp(&self, body: &[u8], reply: &mut Vec<u8>) -> Option<()> {
        let body = body.get(..ARP_LEN)?;
        let (kind, rest) = body.split_first_chunk::<8>()?;
        let (sender, target) = (&rest[..10], &rest[10..]);
        let sender_ip = Ipv4Addr::from(<[u8; 4]>::try_from(&sender[6..]).ok()?);
        let target_ip = Ipv4Addr::from(<[u8; 4]>::try_from(&target[6..]).ok()?);
        // A sender of 0.0.0.0 asks whether an address is free (RFC 5227), one that asks for itself announces it: when
        // we answer for every address, an answer to either would take it away.
        let probe = sender_ip.is_unspecified() && self.ip.is_none();
        if *kind != ARP_REQUEST || !self.is_ours(target_ip) || probe || sender_ip == target_ip {
            return None;
        }
        reply.extend_from_slice(&ARP_REQUEST[..7]);
        reply.push(2);
        reply.extend_from_slice(&self.mac);
        reply.extend_from_slice(&target[6..]);
        reply.extend_from_slice(sender);
        Some(())
    }

    /// RFC 791 and RFC 792.
    fn ipv4(&mut self, body: &[u8], reply: &mut Vec<u8>) -> Option<()> {
        let fixed = body.first_chunk::<IPV4_LEN>()?;
        let header_len = usize::from(fixed[0] & 0xf) * 4;
        let total_len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if fixed[0] >> 4 != 4 || header_len < IPV4_LEN || total_len < header_len || fixed[9] != PROTOCOL_ICMP {
            return None;
        }
        // What follows is padding of the frame.
        let (header, data) = body.get(..total_len)?.split_at_checked(header_len)?;
        let source = Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]);
        let target = Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]);
        if checksum(&[header]) != 0 || !self.is_ours(target) || !unicast(source) {
            return None;
        }
        let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
        let (more, offset) = (fragment & 0x2000 != 0, usize::from(fragment & 0x1fff) * 8);
        if offset + data.len() > usize::from(u16::MAX) {
            return None;
        }
        let datagram: Datagram = (*fixed[12..].first_chunk()?, [fixed[4], fixed[5]]);
        if offset > 0 {
            if !self.datagrams.contains(&datagram) {
                return None;
            }
        } else {
            if data.len() < ICMP_LEN || data[..2] != [ICMP_ECHO_REQUEST, 0] || (!more && checksum(&[data]) != 0) {
                return None;
            }
            if more {
                self.remember(datagram);
            }
        }
        let start = reply.len();
        reply.extend_from_slice(header);
        let out = &mut reply[start..];
        out[8] = TTL;
        out[12..16].copy_from_slice(&fixed[16..20]);
        out[16..20].copy_from_slice(&fixed[12..16]);
        out[10..12].fill(0);
        let sum = checksum(&[out]);
        out[10..12].copy_from_slice(&sum.to_be_bytes());
        let start = reply.len();
        reply.extend_from_slice(data);
        if offset == 0 {
            let out = &mut reply[start..];
            let sum = u16::from_be_bytes([out[2], out[3]]);
            out[0] = 0;
            out[2..4].copy_from_slice(&adjust(sum, u16::from(ICMP_ECHO_REQUEST) << 8, 0).to_be_bytes());
        }
        Some(())
    }

    fn remember(&mut self, datagram: Datagram) {
        if !self.datagrams.contains(&datagram) {
            if self.datagrams.len() == DATAGRAMS_MAX {
                self.datagrams.pop_front();
            }
            self.datagrams.push_back(datagram);
        }
    }

    /// RFC 4443 and RFC 4861. Extension headers, so fragments too, are not answered.
    fn ipv6(&self, body: &[u8], for_us: bool, reply: &mut Vec<u8>) -> Option<()> {
        let (header, rest) = body.split_first_chunk::<IPV6_LEN>()?;
        let data = rest.get(..usize::from(u16::from_be_bytes([header[4], header[5]])))?;
        if header[0] >> 4 != 6 || header[6] != PROTOCOL_ICMPV6 || data.len() < ICMP_LEN {
            return None;
        }
        let (source, target) = (*header[8..].first_chunk::<16>()?, *header[24..].first_chunk::<16>()?);
        let from = Ipv6Addr::from(source);
        if from.is_unspecified() || from.is_multicast() || checksum_v6(&source, &target, data) != 0 {
            return None;
        }
        match (data[0], data[1]) {
            (ICMPV6_ECHO_REQUEST, 0) if for_us && self.is_ours_v6(target.into()) => {
                ipv6_header(target, source, data.len(), TTL, reply);
                let start = reply.len();
                reply.extend_from_slice(data);
                reply[start] = ICMPV6_ECHO_REPLY;
                finish_v6(&target, &source, &mut reply[start..]);
                Some(())
            }
            // A hop limit of 255 shows that no router was between.
            (NEIGHBOUR_SOLICITATION, 0) if header[7] == 255 => {
                let wanted = *data.get(8..NEIGHBOUR_LEN)?.first_chunk::<16>()?;
                if !self.is_ours_v6(wanted.into()) || wanted == source {
                    return None;
                }
                ipv6_header(wanted, source, NEIGHBOUR_LEN + 8, 255, reply);
                let start = reply.len();
                // Solicited, override.
                reply.extend_from_slice(&[NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0x60, 0, 0, 0]);
                reply.extend_from_slice(&wanted);
                // Target link-layer address, one unit of eight bytes.
                reply.extend_from_slice(&[2, 1]);
                reply.extend_from_slice(&self.mac);
                finish_v6(&wanted, &source, &mut reply[start..]);
                Some(())
            }
            _ => None,
        }
    }
}

fn unicast(ip: Ipv4Addr) -> bool {
    !(ip.is_unspecified() || ip.is_broadcast() || ip.is_multicast())
}

/// The link-local address that belongs to a hardware address (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// A checksum after one word of the data changed from `old` to `new` (RFC 1624, equation 3).
fn adjust(sum: u16, old: u16, new: u16) -> u16 {
    checksum(&[&(!sum).to_be_bytes(), &(!old).to_be_bytes(), &new.to_be_bytes()])
}

fn checksum_v6(source: &[u8; 16], target: &[u8; 16], data: &[u8]) -> u16 {
    // The length is that of an IPv6 payload, below 64 KiB.
    let len = u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes();
    checksum(&[source, target, &len, &[0, 0, 0, PROTOCOL_ICMPV6], data])
}

fn finish_v6(source: &[u8; 16], target: &[u8; 16], data: &mut [u8]) {
    data[2..4].fill(0);
    let sum = checksum_v6(source, target, data);
    data[2..4].copy_from_slice(&sum.to_be_bytes());
}

fn ipv6_header(source: [u8; 16], target: [u8; 16], len: usize, hop_limit: u8, reply: &mut Vec<u8>) {
    reply.extend_from_slice(&[0x60, 0, 0, 0]);
    // The length came from a 16-bit field.
    reply.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes());
    reply.extend_from_slice(&[PROTOCOL_ICMPV6, hop_limit]);
    reply.extend_from_slice(&source);
    reply.extend_from_slice(&target);
}

#[cfg(test)]
mod tests;
