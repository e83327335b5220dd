//! The daemon behind `iotlbd`: command line, server, device state machine, demo.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | the command line and what it refuses |
//! | [`server`] | sockets, processes, clocks: everything that touches the operating system |
//! | [`device`] | one device as a pure state machine, fed by the server |
//! | [`demo`] | a guest, a front-end and workers in one command |
//! | [`sim`] | the simulated guest and front-end behind it |

pub mod cli;
pub mod demo;
pub mod device;
pub mod server;
pub mod sim;

mod log_budget;
