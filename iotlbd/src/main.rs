//! `iotlbd`: the device IOTLB of a vhost-user device as a service.

use std::process::ExitCode;

fn main() -> ExitCode {
    iotlbd::cli::main()
}
