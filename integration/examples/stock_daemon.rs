//! The device in the daemon of `vhost-user-backend`, for one VMM.
//!
//! `stock_daemon SOCKET DIRECTORY [POLL_US]` listens on SOCKET, shares DIRECTORY with the VMM that
//! connects, and ends when it disconnects. POLL_US is how long the device polls its rings at most. A program that serves devices of several kinds does the same
//! with each. It has no sandbox: see the documentation of `ringfsd::embed` for what is to be done.

#![allow(
    clippy::print_stderr,
    reason = "an example tells its user what is wrong"
)]

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ringfsd::embed::{Options, VhostUserDevice};
use ringfsd::error_chain;
use ringfsd::fs::passthrough::{self, Passthrough};
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

fn main() -> ExitCode {
    env_logger::Builder::new()
        .filter_level(log::LevelFilter::Warn)
        .init();
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let poll = arguments
        .get(2)
        .map(|poll| poll.parse().map(Duration::from_micros));
    let ([socket, directory, ..], Ok(poll)) = (arguments.as_slice(), poll.transpose()) else {
        eprintln!("usage: stock_daemon SOCKET DIRECTORY [POLL_US]");
        return ExitCode::FAILURE;
    };
    match serve(socket.as_ref(), directory.as_ref(), poll) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stock_daemon: {}", error_chain::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

fn serve(socket: &Path, directory: &Path, poll: Option<Duration>) -> Result<(), Box<dyn Error>> {
    let fs = Passthrough::new(directory, passthrough::Options::default())?;
    let mut options = Options::default();
    options.poll = poll.unwrap_or(options.poll);
    let device = VhostUserDevice::new(Arc::new(fs), options)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtio-fs".to_owned(), device.clone(), memory)
        .map_err(|error| error.to_string())?;
    let served = daemon.serve(socket).map_err(|error| error.to_string());
    device.disconnected();
    Ok(served?)
}
