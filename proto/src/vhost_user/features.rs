//! Feature bits: virtio's (64 bits, with the driver) and the protocol's (with the front-end).

/// Virtio feature bits, as masks.
pub mod virtio {
    /// Net: the device checks and fills checksums of packets the guest sends.
    pub const NET_CSUM: u64 = 1 << 0;
    /// Net: the guest takes packets with partial checksums.
    pub const NET_GUEST_CSUM: u64 = 1 << 1;
    /// Net: the guest takes TCPv4 segments larger than the MTU.
    pub const NET_GUEST_TSO4: u64 = 1 << 7;
    /// Net: the same for TCPv6.
    pub const NET_GUEST_TSO6: u64 = 1 << 8;
    /// Net: the same with ECN.
    pub const NET_GUEST_ECN: u64 = 1 << 9;
    /// Net: the same for UDP fragmentation.
    pub const NET_GUEST_UFO: u64 = 1 << 10;
    /// Net: the device takes TCPv4 segments larger than the MTU.
    pub const NET_HOST_TSO4: u64 = 1 << 11;
    /// Net: the same for TCPv6.
    pub const NET_HOST_TSO6: u64 = 1 << 12;
    /// Net: the same with ECN.
    pub const NET_HOST_ECN: u64 = 1 << 13;
    /// Net: the same for UDP fragmentation.
    pub const NET_HOST_UFO: u64 = 1 << 14;
    /// Net: a received packet may span several buffers.
    pub const NET_MRG_RXBUF: u64 = 1 << 15;
    /// Net: link status field in the configuration space.
    pub const NET_STATUS: u64 = 1 << 16;
    /// Net: a control queue (the front-end serves it).
    pub const NET_CTRL_VQ: u64 = 1 << 17;
    /// Net: receive-mode control.
    pub const NET_CTRL_RX: u64 = 1 << 18;
    /// Net: VLAN filtering control.
    pub const NET_CTRL_VLAN: u64 = 1 << 19;
    /// Net: the guest announces itself on request.
    pub const NET_GUEST_ANNOUNCE: u64 = 1 << 21;
    /// Net: several queue pairs.
    pub const NET_MQ: u64 = 1 << 22;
    /// The front-end logs dirty pages (vhost-user, not seen by the driver).
    pub const LOG_ALL: u64 = 1 << 26;
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// used_event and avail_event.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Protocol features can be negotiated (vhost-user, not seen by the driver).
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Virtio 1.0 and later.
    pub const VERSION_1: u64 = 1 << 32;
    /// The device's addresses go through an IOMMU when there is one.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Net: the guest takes UDPv4 segmentation offload.
    pub const NET_GUEST_USO4: u64 = 1 << 54;
    /// Net: the guest takes UDPv6 segmentation offload.
    pub const NET_GUEST_USO6: u64 = 1 << 55;
    /// Net: the device takes UDP segmentation offload.
    pub const NET_HOST_USO: u64 = 1 << 56;
}

/// Protocol feature bits (`VHOST_USER_PROTOCOL_F_*`), as masks.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log comes as a descriptor.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// NEED_REPLY.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// Net: MTU.
    pub const NET_MTU: u64 = 1 << 4;
    /// A back-end channel.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// Inflight region.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// ADD_MEM_REG and REM_MEM_REG.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS and GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
}
