//! The few packets a ping needs: ARP and ICMP echo over IPv4 and Ethernet.

/// An Ethernet address.
pub type Mac = [u8; 6];
/// An IPv4 address.
pub type Ipv4 = [u8; 4];

/// Everybody.
pub const BROADCAST: Mac = [0xff; 6];

const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Hardware type Ethernet, protocol IPv4, address lengths 6 and 4.
const ARP_ETHERNET: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
const ARP_REPLY: [u8; 2] = [0, 2];
const PROTOCOL_ICMP: u8 = 1;
/// Bytes before the ICMP payload: Ethernet, IPv4 without options, ICMP.
const ECHO_OFFSET: usize = 14 + 20 + 8;

/// "Who has `target`? Tell `sender`."
#[must_use]
pub fn arp_request(sender_mac: Mac, sender: Ipv4, target: Ipv4) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend_from_slice(&BROADCAST);
    frame.extend_from_slice(&sender_mac);
    frame.extend_from_slice(&TYPE_ARP);
    frame.extend_from_slice(&ARP_ETHERNET);
    frame.extend_from_slice(&[0, 1]);
    frame.extend_from_slice(&sender_mac);
    frame.extend_from_slice(&sender);
    frame.extend_from_slice(&[0; 6]);
    frame.extend_from_slice(&target);
    frame
}

/// The address that an ARP reply from `target` to `receiver` tells; `None` for any other frame.
#[must_use]
pub fn arp_reply(frame: &[u8], receiver: Mac, target: Ipv4) -> Option<Mac> {
    let ours = frame.get(..6)? == receiver && frame.get(12..14)? == TYPE_ARP && frame.get(14..20)? == ARP_ETHERNET;
    let reply = frame.get(20..22)? == ARP_REPLY && frame.get(28..32)? == target && frame.get(32..38)? == receiver;
    if ours && reply { frame.get(22..28)?.try_into().ok() } else { None }
}

/// Who talks to whom in an echo.
#[derive(Clone, Copy, Debug)]
pub struct Peers {
    /// Our Ethernet address.
    pub mac: Mac,
    /// Our IPv4 address.
    pub ip: Ipv4,
    /// The other side's Ethernet address.
    pub peer_mac: Mac,
    /// The other side's IPv4 address.
    pub peer_ip: Ipv4,
}

/// An ICMP echo request. `payload` up to 1,472 bytes fits an ordinary MTU.
#[must_use]
pub fn echo_request(peers: &Peers, identifier: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0];
    icmp.extend_from_slice(&identifier.to_be_bytes());
    icmp.extend_from_slice(&sequence.to_be_bytes());
    icmp.extend_from_slice(payload);
    let sum = checksum(&icmp).to_be_bytes();
    icmp[2..4].copy_from_slice(&sum);

    let length = u16::try_from(20 + icmp.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut ip = vec![0x45, 0, length[0], length[1]];
    ip.extend_from_slice(&sequence.to_be_bytes());
    ip.extend_from_slice(&[0x40, 0, 64, PROTOCOL_ICMP, 0, 0]);
    ip.extend_from_slice(&peers.ip);
    ip.extend_from_slice(&peers.peer_ip);
    let sum = checksum(&ip).to_be_bytes();
    ip[10..12].copy_from_slice(&sum);

    let mut frame = Vec::with_capacity(14 + ip.len() + icmp.len());
    frame.extend_from_slice(&peers.peer_mac);
    frame.extend_from_slice(&peers.mac);
    frame.extend_from_slice(&TYPE_IPV4);
    frame.extend_from_slice(&ip);
    frame.extend_from_slice(&icmp);
    frame
}

/// What an arriving frame is to somebody who waits for the answer to [`echo_request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EchoAnswer {
    /// The answer, right to the last bit.
    Right,
    /// An answer to this request, but damaged.
    Wrong(&'static str),
    /// Something else.
    Other,
}

/// Compares `frame` with the answer that is due.
#[must_use]
pub fn check_echo(frame: &[u8], peers: &Peers, identifier: u16, sequence: u16, payload: &[u8]) -> EchoAnswer {
    let is_ours = frame.len() >= ECHO_OFFSET
        && frame[..6] == peers.mac
        && frame[12..14] == TYPE_IPV4
        && frame[23] == PROTOCOL_ICMP
        && frame[34..36] == [0, 0]
        && frame[38..40] == identifier.to_be_bytes()
        && frame[40..42] == sequence.to_be_bytes();
    if !is_ours {
        return EchoAnswer::Other;
    }
    let length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    if frame[14] != 0x45 || length != 28 + payload.len() || frame.len() < 14 + length {
        return EchoAnswer::Wrong("length");
    }
    if frame[26..30] != peers.peer_ip || frame[30..34] != peers.ip {
        return EchoAnswer::Wrong("addresses");
    }
    if checksum(&frame[14..34]) != 0 {
        return EchoAnswer::Wrong("IPv4 checksum");
    }
    if checksum(&frame[34..14 + length]) != 0 {
        return EchoAnswer::Wrong("ICMP checksum");
    }
    if frame[ECHO_OFFSET..14 + length] != *payload {
        return EchoAnswer::Wrong("payload");
    }
    EchoAnswer::Right
}

/// The Internet checksum (RFC 1071); 0 over data that contains its own right checksum.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    for pair in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEERS: Peers = Peers { mac: [2; 6], ip: [10, 0, 0, 1], peer_mac: [4; 6], peer_ip: [10, 0, 0, 2] };

    fn answer(mut frame: Vec<u8>) -> Vec<u8> {
        let (mac, peer_mac) = (frame[6..12].to_vec(), frame[..6].to_vec());
        frame[..6].copy_from_slice(&mac);
        frame[6..12].copy_from_slice(&peer_mac);
        let (ip, peer_ip) = (frame[26..30].to_vec(), frame[30..34].to_vec());
        frame[26..30].copy_from_slice(&peer_ip);
        frame[30..34].copy_from_slice(&ip);
        frame[34] = 0;
        frame[36..38].copy_from_slice(&[0, 0]);
        let sum = checksum(&frame[34..]).to_be_bytes();
        frame[36..38].copy_from_slice(&sum);
        frame
    }

    #[test]
    fn only_the_right_answer_is_right() {
        let payload = [1, 2, 3, 4, 5];
        let request = echo_request(&PEERS, 7, 9, &payload);
        let right = answer(request.clone());
        assert_eq!(check_echo(&request, &PEERS, 7, 9, &payload), EchoAnswer::Other);
        assert_eq!(check_echo(&right, &PEERS, 7, 9, &payload), EchoAnswer::Right);
        assert_eq!(check_echo(&right, &PEERS, 7, 8, &payload), EchoAnswer::Other);
        assert_eq!(check_echo(&right[..46], &PEERS, 7, 9, &payload), EchoAnswer::Wrong("length"));
        assert_eq!(check_echo(&right, &PEERS, 7, 9, &[1, 2, 3, 4, 6]), EchoAnswer::Wrong("payload"));
        let mut damaged = right.clone();
        damaged[45] ^= 1;
        assert_eq!(check_echo(&damaged, &PEERS, 7, 9, &payload), EchoAnswer::Wrong("ICMP checksum"));
        damaged[22] ^= 1;
        assert_eq!(check_echo(&damaged, &PEERS, 7, 9, &payload), EchoAnswer::Wrong("IPv4 checksum"));
    }

    #[test]
    fn arp_replies_are_told_from_requests() {
        let request = arp_request([2; 6], [10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(request.len(), 42);
        assert_eq!(arp_reply(&request, [2; 6], [10, 0, 0, 2]), None);
        let mut reply = arp_request([4; 6], [10, 0, 0, 2], [10, 0, 0, 1]);
        reply[..6].copy_from_slice(&[2; 6]);
        reply[21] = 2;
        reply[32..38].copy_from_slice(&[2; 6]);
        assert_eq!(arp_reply(&reply, [2; 6], [10, 0, 0, 2]), Some([4; 6]));
        assert_eq!(arp_reply(&reply[..30], [2; 6], [10, 0, 0, 2]), None);
    }

    #[test]
    fn checksum_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
