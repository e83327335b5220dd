//! The reference worker: a virtio-net back-end over a TAP, or one that answers by itself.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`options`] | the command line |
//! | [`header`] | `virtio_net_hdr`, and packets whose checksum is unfinished |
//! | [`echo`] | a neighbour that answers ARP, neighbour solicitation and ping |
//! | [`tap`] | a queue of a TAP device |
//! | [`backlog`] | packets between a port and a ring |
//! | [`rx`], [`tx`] | what happens to a ring under one pin |
//! | [`lane`] | one leased queue: ring, misses, calls |
//! | [`pair`] | the queues that share a port |
//! | [`worker`] | the event loop |
//! | [`log`] | lines on their way to standard error |
//!
//! A pin never spans I/O: packets are copied between guest and backlog under the pin; the TAP is read and written
//! after it. Queue numbers are vring indexes: even ones are *guest RX* (the worker fills them), odd ones *guest TX*.

mod asked;
pub mod backlog;
pub mod echo;
pub mod header;
pub mod lane;
pub mod log;
pub mod options;
pub mod pair;
pub mod rx;
pub mod tap;
pub mod tx;
pub mod worker;
