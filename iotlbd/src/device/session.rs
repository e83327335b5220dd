//! What one front-end negotiated.

use iotlb_proto::vhost_user::features::{protocol, virtio};

/// `DRIVER_OK` of the device status (virtio specification, 2.1).
const STATUS_DRIVER_OK: u8 = 4;
/// `FEATURES_OK` of the device status (virtio specification, 2.1).
pub(super) const STATUS_FEATURES_OK: u8 = 8;

/// One connection of a front-end, from connect to close.
#[derive(Debug, Default)]
pub(super) struct Session {
    /// Whether there is a front-end.
    pub(super) connected: bool,
    /// Virtio features as acknowledged; `None` before SET_FEATURES and after a reset.
    pub(super) acked: Option<u64>,
    /// The last SET_FEATURES named bits that were not offered.
    pub(super) acked_too_much: bool,
    /// Protocol features as acknowledged.
    pub(super) protocol: u64,
    /// Device status (virtio specification, 2.1).
    pub(super) status: u8,
    /// Whether a back-end channel exists.
    pub(super) channel: bool,
    /// Whether there ever was one: the front-end is, or was, asked for pages.
    pub(super) had_channel: bool,
}

impl Session {
    /// Whether addresses are IOVAs, translated by what the front-end sends.
    pub(super) fn iommu(&self) -> bool {
        self.features() & virtio::ACCESS_PLATFORM != 0
    }

    /// Acknowledged virtio features, 0 before there are any.
    pub(super) fn features(&self) -> u64 {
        self.acked.unwrap_or(0)
    }

    /// Whether the front-end may be asked for pages. Not while the driver is on its way, as the status says, which a
    /// front-end that does not speak of it leaves at 0: QEMU 7.2.0 to 7.2.2 starts the rings and then waits for
    /// GET_STATUS, answers a MISS meanwhile, and takes the one reply for the other. Nothing is lost by it, since a
    /// device uses no buffers before DRIVER_OK.
    pub(super) fn may_ask(&self) -> bool {
        self.channel && (self.status == 0 || self.status & STATUS_DRIVER_OK != 0)
    }

    /// Whether every bit of `feature` (a protocol feature) was acknowledged.
    pub(super) fn has(&self, feature: u64) -> bool {
        self.protocol & feature == feature
    }

    /// Whether NEED_REPLY counts.
    pub(super) fn reply_ack(&self) -> bool {
        self.has(protocol::REPLY_ACK)
    }

    /// Whether rings wait for SET_VRING_ENABLE; without PROTOCOL_FEATURES they start enabled.
    pub(super) fn rings_start_disabled(&self) -> bool {
        self.features() & virtio::PROTOCOL_FEATURES != 0
    }

    /// Back to before SET_FEATURES. What the two ends of the connection agreed on (protocol features) stays.
    pub(super) fn reset(&mut self) {
        self.acked = None;
        self.acked_too_much = false;
        self.status = 0;
    }
}
