//! Mounts a virtio-fs server with this machine's own FUSE client, without a virtual machine.
//!
//! Takes the place of a guest: the kernel's requests, read from `/dev/fuse`, go over virtqueues to
//! a vhost-user server as a guest's driver would put them there, and the replies go back. This
//! file starts and ends it all; `mount` is the mount, `lane` is where requests pass. The invariant:
//! a mount does not outlive the server or this process, so nothing hangs on it.

mod counters;
mod device;
mod init;
mod lane;
mod mount;
mod request;
mod slot;
mod urgent;

use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm::connection::message::feature;
use vmm::session::SessionError;
use vmm::{Event, Profile, Region, Session};

use counters::Counters;
use device::Device;
use lane::{LaneError, SLOTS, Shared};
use mount::{Mount, MountError, host};
use slot::{AREA_BYTES, SLOT_BYTES};
use urgent::{AREAS, Urgent};

/// Guest memory for one queue's rings and indirect tables.
const RING_BYTES: u64 = 8 << 20;

/// Mount a virtio-fs server here, without a virtual machine.
///
/// The kernel's FUSE client of this machine uses the server as a guest's would. Stays in the
/// foreground until the file system is unmounted, SIGTERM or SIGINT comes, or the server ends.
#[derive(Clone, Debug, Parser)]
#[command(name = "bridge")]
struct Options {
    /// The server's vhost-user socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Request queues to use, each with a thread. The server has to offer as many.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    request_queues: u16,

    /// What the list of mounts calls its source (`bridge-` and the process id).
    #[arg(long, value_name = "NAME")]
    source: Option<String>,

    /// Options of mounts in general, as mount(8) takes them: ro, nosuid, noexec, noatime, ...
    #[arg(short = 'o', value_name = "OPTION,...", default_value = "")]
    options: String,

    /// Where to mount.
    mountpoint: PathBuf,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
enum BridgeError {
    #[error("no session with the server at {socket}")]
    Session {
        socket: PathBuf,
        #[source]
        source: SessionError,
    },
    #[error("the server at {0} does not offer indirect descriptors")]
    NotIndirect(PathBuf),
    #[error(transparent)]
    Mount(#[from] MountError),
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("bridge: {error}");
            let mut cause = error.source();
            while let Some(source) = cause {
                eprint!(": {source}");
                cause = source.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), BridgeError> {
    let flags = device::flags(&options.options).map_err(MountError::from)?;
    let source = options.source.clone();
    let source = source.unwrap_or_else(|| format!("bridge-{}", std::process::id()));
    let signals = signals().map_err(host("take signals"))?;
    let mut session = connect(options)?;
    let mut queues = std::mem::take(&mut session.queues).into_iter();
    let first = queues.next();
    let first = first.ok_or_else(|| BridgeError::NotIndirect(options.socket.clone()))?;
    let urgent = Urgent::new(&session.memory, first).map_err(LaneError::from);
    let urgent = urgent.map_err(MountError::from)?;
    let shared = Arc::new(Shared {
        memory: session.memory.clone(),
        urgent,
        counters: Counters::default(),
        news: Event::new().map_err(host("make an eventfd"))?,
        ended: AtomicUsize::new(0),
        stop: Event::new().map_err(host("make an eventfd"))?,
    });

    let device = Device::mount(&source, &options.mountpoint, flags).map_err(MountError::from)?;
    let mut mount = Mount::new(&source, &options.mountpoint, Arc::clone(&shared));
    let started = mount.start(device, queues.collect());
    let watched = started.and_then(|()| mount.watch(&session, &signals));
    let ended = mount.end();
    println!("bridge: {}", shared.counters);
    let guest = watched.and(ended)?;
    if let Some(guest) = guest {
        lane::destroy(guest);
        // The server may have gone meanwhile; nobody is left who cares.
        drop(session.stop());
    }
    Ok(())
}

fn connect(options: &Options) -> Result<Session, BridgeError> {
    let lanes = u64::from(options.request_queues);
    let low = (lanes + 1) * RING_BYTES;
    let high = lanes * u64::from(SLOTS) * SLOT_BYTES + u64::from(AREAS) * AREA_BYTES;
    let settings = vmm::Options::default()
        .request_queues(options.request_queues)
        .memory(&[Region::new(0, low), Region::new(4 << 30, high)]);
    let session = Profile::CloudHypervisor.connect_path(&options.socket, &settings);
    let session = session.map_err(|source| BridgeError::Session {
        socket: options.socket.clone(),
        source,
    })?;
    if session.has(feature::INDIRECT_DESC) {
        Ok(session)
    } else {
        Err(BridgeError::NotIndirect(options.socket.clone()))
    }
}

/// A stream that becomes readable when the process is asked to end.
fn signals() -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGTERM, write.try_clone()?)?;
    signal_hook::low_level::pipe::register(SIGINT, write)?;
    Ok(read)
}
