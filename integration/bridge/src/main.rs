//! Mounts a virtio-fs server with this machine's own FUSE client, without a virtual machine.
//!
//! It takes the place of a guest: the kernel's requests, read from `/dev/fuse`, go over virtqueues
//! to a vhost-user server as a guest's driver would put them there, and the replies go back. This
//! file starts and ends everything; `mount` is the mount, `lane` passes requests. The invariant: a
//! mount does not outlive the server or this process, so no program hangs on it.

mod counters;
mod device;
mod error;
mod init;
mod lane;
mod mount;
mod record;
mod request;
mod slot;
mod track;
mod urgent;

use std::ffi::OsStr;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use clap::Parser;
use rustix::mount::MountFlags;
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm::connection::message::feature;
use vmm::session::SessionError;
use vmm::{Event, Profile, Region, Session};

use counters::Counters;
use device::Device;
use error::LaneError;
use lane::Shared;
use mount::{Mount, MountError, host, wait};
use record::Recorder;
use slot::{AREA_BYTES, SLOT_BYTES, SLOTS};
use track::Track;
use urgent::{AREAS, Urgent};

/// Guest memory for one queue's rings and indirect tables.
const RING_BYTES: u64 = 8 << 20;

/// Mount a virtio-fs server here, without a virtual machine.
///
/// The kernel's FUSE client of this machine uses the server as a guest's would. Stays in the
/// foreground until the file system is unmounted (unless it stays connected), SIGTERM or SIGINT
/// arrives, or the server ends.
#[derive(Clone, Debug, Parser)]
#[command(name = "bridge")]
struct Options {
    /// The server's vhost-user socket.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Request queues to use, each with a thread. The server must offer as many.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    request_queues: u16,

    /// The source in the list of mounts (`bridge-` and the process id).
    #[arg(long, value_name = "NAME")]
    source: Option<String>,

    /// General mount options, as in mount(8): ro, nosuid, noexec, noatime, ...
    #[arg(short = 'o', value_name = "OPTION,...", default_value = "")]
    options: String,

    /// Stay connected to the server over an unmount, as a guest does that mounts again: each line of
    /// standard input is a further mount, with options (or none), a space, and the directory.
    #[arg(long)]
    stay_connected: bool,

    /// Record all requests in this file, without names and contents: time, duration, opcode, node,
    /// size, offset, length of the name, error, and node of the entry.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,

    /// The directory to mount on.
    mountpoint: PathBuf,
}

/// Why the bridge fails.
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
            eprintln!("bridge: {}", vmm::error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), BridgeError> {
    let first = Wanted::new(&options.options, options.mountpoint.clone())?;
    let source = options.source.clone();
    let source = source.unwrap_or_else(|| format!("bridge-{}", std::process::id()));
    let signals = signals().map_err(host("take signals"))?;
    let recorder = options.record.as_deref().map(Recorder::new).transpose();
    let mut session = connect(options)?;
    let mut queues = std::mem::take(&mut session.queues).into_iter();
    let urgent = queues.next();
    let urgent = urgent.ok_or_else(|| BridgeError::NotIndirect(options.socket.clone()))?;
    let no_room = |error| MountError::from(LaneError::Memory(error));
    let shared = Arc::new(Shared {
        memory: session.memory.clone(),
        urgent: Urgent::new(&session.memory, urgent).map_err(no_room)?,
        counters: Counters::default(),
        recorder: recorder.map_err(host("make the recording"))?,
        news: Event::new().map_err(host("make an eventfd"))?,
        ended: AtomicUsize::new(0),
        stop: Event::new().map_err(host("make an eventfd"))?,
    });
    let tracks: Result<_, _> = queues
        .map(|queue| Track::new(&session.memory, queue))
        .collect();
    let mut bridge = Bridge {
        source,
        stays: options.stay_connected,
        session,
        signals,
        tracks: tracks.map_err(no_room)?,
        shared,
    };

    let mut next = Some(first);
    let ended = loop {
        match next {
            Some(wanted) => match bridge.mount(&wanted) {
                Ok(another) => next = another,
                Err(error) => break Err(error),
            },
            None => break Ok(()),
        }
    };
    println!("bridge: {}", bridge.shared.counters);
    if let Some(recorder) = &bridge.shared.recorder {
        recorder.finish().map_err(host("write the recording"))?;
    }
    ended?;
    Ok(())
}

/// A requested mount.
struct Wanted {
    flags: MountFlags,
    mountpoint: PathBuf,
}

impl Wanted {
    fn new(options: &str, mountpoint: PathBuf) -> Result<Self, MountError> {
        let flags = device::flags(options)?;
        Ok(Self { flags, mountpoint })
    }
}

/// What stays from one mount to the next.
struct Bridge {
    source: String,
    /// Whether there is another mount after the first.
    stays: bool,
    session: Session,
    signals: UnixStream,
    /// None after a mount that ended with an error, which is the last.
    tracks: Vec<Track>,
    shared: Arc<Shared>,
}

impl Bridge {
    /// Mounts, and passes requests on until the mount has ended. Returns the next requested mount.
    fn mount(&mut self, wanted: &Wanted) -> Result<Option<Wanted>, MountError> {
        let device = Device::mount(&self.source, &wanted.mountpoint, wanted.flags)?;
        let mut mount = Mount::new(&self.source, &wanted.mountpoint, Arc::clone(&self.shared));
        let started = mount.start(device, std::mem::take(&mut self.tracks));
        let watched = started.and_then(|()| mount.watch(&self.session, &self.signals));
        let is_last = mount.was_asked_to_end() || !self.stays;
        let ended = mount.end();
        let Some(tracks) = watched.and(ended)? else {
            return Ok(None);
        };
        self.tracks = tracks;
        self.destroy();
        if is_last {
            return Ok(None);
        }
        self.shared.begin_anew().map_err(host("read an eventfd"))?;
        println!("bridge: unmounted");
        self.next()
    }

    /// Sends what a guest sends at the end of a mount. If the server has gone, an error here doesn't
    /// matter; the next mount reports a server that stays away.
    fn destroy(&mut self) {
        let settled = self.shared.urgent.settle().map_err(LaneError::from);
        let destroyed = settled.and_then(|()| match self.tracks.first_mut() {
            Some(track) => track.destroy(&self.shared.memory),
            None => Ok(()),
        });
        if let Err(error) = destroyed {
            eprintln!(
                "bridge: ending the file system failed: {}",
                vmm::error_chain(&error)
            );
        }
    }

    /// Waits for a line of standard input that says what to mount. None at its end, or if this process
    /// is asked to end.
    fn next(&self) -> Result<Option<Wanted>, MountError> {
        let input = io::stdin();
        let mut line = Vec::new();
        loop {
            let fds = [
                input.as_fd(),
                self.session.connection.as_fd(),
                self.signals.as_fd(),
            ];
            let [ready, server, signal] = wait(fds, None).map_err(host("wait"))?;
            if server {
                return Err(MountError::ServerGone);
            }
            if signal || !ready {
                return Ok(None);
            }
            // Byte by byte: what follows the line is for the next mount.
            let mut byte = [0];
            let read = rustix::io::read(&input, &mut byte);
            match read.map_err(|errno| host("read what to mount")(errno.into()))? {
                0 => return Ok(None),
                _ if byte != *b"\n" => line.extend(byte),
                _ => break,
            }
        }
        let gap = line.iter().position(|&byte| byte == b' ');
        let (options, mountpoint) = line.split_at(gap.unwrap_or(0));
        let mountpoint = mountpoint.strip_prefix(b" ").unwrap_or(mountpoint);
        let mountpoint = PathBuf::from(OsStr::from_bytes(mountpoint));
        Wanted::new(&String::from_utf8_lossy(options), mountpoint).map(Some)
    }
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
