//! What a device offers to its front-end.

use iotlb_proto::layout::table::QUEUE_CAPACITY;
use iotlb_proto::vhost_user::features::{protocol, virtio};

/// Most queue pairs of a net device: the index of SET_VRING_KICK has 8 bits, which name 256 rings.
pub const QUEUE_PAIRS_MAX: u16 = 128;

/// Virtio features of a net device.
///
/// Not offered: packed rings, IN_ORDER and RING_RESET (not served), LOG_ALL (no dirty log yet). For UDP segmentation
/// see [`NET_USO`].
pub const NET_FEATURES: u64 = virtio::NET_CSUM
    | virtio::NET_GUEST_CSUM
    | virtio::NET_GUEST_TSO4
    | virtio::NET_GUEST_TSO6
    | virtio::NET_GUEST_ECN
    | virtio::NET_HOST_TSO4
    | virtio::NET_HOST_TSO6
    | virtio::NET_HOST_ECN
    | virtio::NET_MRG_RXBUF
    | virtio::NET_CTRL_VQ
    | virtio::NET_CTRL_RX
    | virtio::NET_GUEST_ANNOUNCE
    | virtio::NET_MQ
    | virtio::INDIRECT_DESC
    | virtio::EVENT_IDX
    | virtio::PROTOCOL_FEATURES
    | virtio::VERSION_1
    | virtio::ACCESS_PLATFORM;

/// UDP segmentation, both ways: what a TAP of Linux 6.2 or later passes on. An earlier one refuses such packets from
/// the guest, so it depends on the host whether this is offered.
pub const NET_USO: u64 = virtio::NET_GUEST_USO4 | virtio::NET_GUEST_USO6 | virtio::NET_HOST_USO;

/// Protocol features of a net device.
pub const NET_PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::STATUS;

/// How a device presents itself.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Virtio features offered.
    pub features: u64,
    /// Protocol features offered.
    pub protocol_features: u64,
    /// Rings; those past the table's queue records are never served.
    pub queues: u16,
    /// What GET_QUEUE_NUM answers (queue pairs for net).
    pub queue_num: u16,
    /// Longest a miss stays unanswered, in ms.
    pub miss_timeout_ms: u32,
    /// Arena size in bytes: where workers map guest memory.
    pub arena_size: u64,
    /// Configuration space for GET_CONFIG; empty when the front-end keeps it (net).
    pub config_space: Vec<u8>,
}

impl DeviceConfig {
    /// A net device with `queue_pairs` pairs (kept within 1 to [`QUEUE_PAIRS_MAX`]). The control queue is the
    /// front-end's.
    #[must_use]
    pub fn net(queue_pairs: u16, miss_timeout_ms: u32, arena_size: u64) -> DeviceConfig {
        let pairs = queue_pairs.clamp(1, QUEUE_PAIRS_MAX);
        DeviceConfig {
            features: NET_FEATURES,
            protocol_features: NET_PROTOCOL_FEATURES,
            queues: pairs * 2,
            queue_num: pairs,
            miss_timeout_ms,
            arena_size,
            config_space: Vec::new(),
        }
    }

    /// The same, and with `offered` also UDP segmentation.
    #[must_use]
    pub fn with_uso(mut self, offered: bool) -> DeviceConfig {
        if offered {
            self.features |= NET_USO;
        }
        self
    }

    /// Rings that can be served: as many as asked for, but no more than the table has records for.
    #[must_use]
    pub fn rings(&self) -> usize {
        usize::from(self.queues).min(QUEUE_CAPACITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_ends_with_an_iommu_find_what_they_insist_on() {
        let config = DeviceConfig::net(4, 100, 1 << 40);
        assert_eq!((config.queues, config.queue_num), (8, 4));
        assert_ne!(config.features & virtio::ACCESS_PLATFORM, 0);
        let needed = protocol::REPLY_ACK | protocol::BACKEND_REQ;
        assert_eq!(config.protocol_features & needed, needed);
    }

    #[test]
    fn what_is_not_served_is_not_offered() {
        let config = DeviceConfig::net(1, 100, 1 << 40);
        assert_eq!(config.features & virtio::LOG_ALL, 0);
        let packed_in_order_ring_reset = 1 << 34 | 1 << 35 | 1 << 40;
        assert_eq!(config.features & packed_in_order_ring_reset, 0);
        assert_eq!(config.protocol_features & (protocol::LOG_SHMFD | protocol::INFLIGHT_SHMFD), 0);
    }

    #[test]
    fn udp_segmentation_is_offered_where_the_host_passes_it_on() {
        let config = || DeviceConfig::net(1, 100, 1 << 40);
        assert_eq!(config().with_uso(false).features & NET_USO, 0);
        assert_eq!(config().with_uso(true).features, config().features | 1 << 54 | 1 << 55 | 1 << 56);
    }

    #[test]
    fn the_number_of_pairs_stays_within_what_the_protocol_can_name() {
        assert_eq!(DeviceConfig::net(0, 100, 1 << 40).queues, 2);
        assert_eq!(DeviceConfig::net(9999, 100, 1 << 40).queues, 256);
    }
}
