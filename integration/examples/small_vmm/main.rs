//! A VMM's virtio-fs device, and a guest, in one process.
//!
//! `small_vmm DIRECTORY` shares DIRECTORY with a guest that is a thread of this program: it mounts the
//! share, reads the file `from-the-host`, and writes `from-the-guest`. Half-way the VMM takes a
//! snapshot of the device, makes another device of it, and the guest continues there.
//!
//! What a VMM has of its own is here as it is in one: guest memory that it has mapped anonymously, the
//! registers of the device (`transport.rs`) with queues of `virtio-queue`, and eventfds that KVM would
//! signal and wait for. The guest's driver (`driver.rs`) sees nothing else.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example tells its user what it does"
)]

mod driver;
mod fuse;
mod transport;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use ringfsd::embed::{Options, VirtioFs};
use ringfsd::error_chain;
use ringfsd::fs::passthrough::{self, Passthrough};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::driver::Driver;
use self::fuse::Fuse;
use self::transport::Transport;

/// Guest memory: the rings and buffers of the driver are in it.
const MEMORY: usize = 16 << 20;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: small_vmm DIRECTORY");
        return ExitCode::FAILURE;
    };
    match run(directory.as_ref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("small_vmm: {}", error_chain::one_line(&*error));
            ExitCode::FAILURE
        }
    }
}

pub(crate) fn run(directory: &Path) -> Result<(), Box<dyn Error>> {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])?);
    let mut vmm = Transport::new(device(directory)?, Arc::clone(&memory))?;

    // The guest's driver finds the device, sets up its queues, and mounts the share.
    let driver = Driver::probe(&mut vmm, memory)?;
    let mut fs = Fuse::mount(driver)?;
    let (node, handle) = fs.open(c"from-the-host")?;
    let text = fs.read(node, handle, 4096)?;
    println!("the host's file: {}", String::from_utf8_lossy(&text).trim());
    let (node, handle) = fs.create(c"from-the-guest")?;
    fs.write(node, handle, 0, b"written by the guest")?;

    // A snapshot: guest memory stays where it is; the device is made anew.
    let snapshot = vmm.snapshot()?;
    drop(vmm);
    let mut vmm = Transport::restore(device(directory)?, snapshot)?;
    println!("the device continues from a snapshot");

    fs.write(node, handle, 20, b", before and after a snapshot\n")?;
    fs.unmount()?;
    vmm.reset();
    println!(
        "the guest's file: {}",
        directory.join("from-the-guest").display()
    );
    Ok(())
}

fn device(directory: &Path) -> Result<VirtioFs, Box<dyn Error>> {
    let fs = Passthrough::new(directory, passthrough::Options::default())?;
    let options = Options {
        tag: Some("shared".parse()?),
        ..Options::default()
    };
    Ok(VirtioFs::new(Arc::new(fs), options)?)
}
