//! Mounts a virtio-fs server with this machine's own FUSE client, without a virtual machine.
//!
//! Takes the place of a guest: the kernel's requests, read from `/dev/fuse`, go over virtqueues to
//! a vhost-user server as a guest's driver would put them there, and the replies go back. This
//! file starts and ends it all; `lane` is where requests pass. The invariant: a mount does not
//! outlive the server or this process, so nothing hangs on it.

mod counters;
mod device;
mod init;
mod lane;
mod request;
mod slot;
mod urgent;

use std::error::Error;
use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Parser;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm::connection::message::feature;
use vmm::session::SessionError;
use vmm::{Event, Profile, Queue, Region, Session};

use counters::Counters;
use device::{Device, DeviceError, unmount_by_force, unmount_idle};
use lane::{End, Lane, LaneError, SLOTS, Shared};
use slot::{AREA_BYTES, SLOT_BYTES};
use urgent::{AREAS, Urgent};

/// How long a server may take to answer INIT, and processes to leave a mount that ends.
const PATIENCE: Duration = Duration::from_secs(10);

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
    #[error("can't mount the file system")]
    Device(#[from] DeviceError),
    #[error("requests can't be passed on")]
    Lane(#[from] LaneError),
    #[error("can't {act}")]
    Host {
        act: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the server did not answer INIT in time")]
    NoInit,
    #[error("the server has ended the session")]
    ServerGone,
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
    let flags = device::flags(&options.options)?;
    let source = options.source.clone();
    let source = source.unwrap_or_else(|| format!("bridge-{}", std::process::id()));
    let signals = signals().map_err(host("take signals"))?;
    let mut session = connect(options)?;
    let mut queues = std::mem::take(&mut session.queues).into_iter();
    let first = queues.next();
    let first = first.ok_or_else(|| BridgeError::NotIndirect(options.socket.clone()))?;
    let shared = Arc::new(Shared {
        memory: session.memory.clone(),
        urgent: Urgent::new(&session.memory, first).map_err(LaneError::from)?,
        counters: Counters::default(),
        news: Event::new().map_err(host("make an eventfd"))?,
        ended: AtomicUsize::new(0),
        stop: Event::new().map_err(host("make an eventfd"))?,
    });

    let device = Device::mount(&source, &options.mountpoint, flags)?;
    let mut mount = Mount {
        source: &source,
        mountpoint: &options.mountpoint,
        shared: Arc::clone(&shared),
        lanes: Vec::new(),
        unmounting: None,
    };
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

/// A mount, with the threads that pass its requests on.
struct Mount<'a> {
    source: &'a str,
    mountpoint: &'a Path,
    shared: Arc<Shared>,
    lanes: Vec<JoinHandle<(Result<End, LaneError>, vmm::fuse::Lane)>>,
    unmounting: Option<JoinHandle<Result<(), DeviceError>>>,
}

impl Mount<'_> {
    /// Starts a lane for each queue.
    fn start(&mut self, device: Device, queues: Vec<Queue>) -> Result<(), BridgeError> {
        let clones: Result<Vec<_>, _> = (1..queues.len())
            .map(|_| device.clone_for_thread())
            .collect();
        let devices = std::iter::once(device).chain(clones?);
        for (number, (device, queue)) in devices.zip(queues).enumerate() {
            let lane = Lane::new(device, queue, Arc::clone(&self.shared))?;
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(format!("lane {number}"));
            let thread = thread.spawn(move || {
                let (end, guest) = lane.run();
                shared.ended.fetch_add(1, Ordering::Release);
                // One without the others is of no use.
                let told = if end.is_err() {
                    shared.stop.signal().and(shared.news.signal())
                } else {
                    shared.news.signal()
                };
                if let Err(error) = told {
                    eprintln!("bridge: a lane's end can't be told: {error}");
                }
                (end, guest)
            });
            self.lanes.push(thread.map_err(host("start a thread"))?);
        }
        Ok(())
    }

    /// Whether a lane has ended: not whether its thread has, which tells of the end before.
    fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire) > 0
    }

    /// Waits until a lane ends, unmounting when a signal comes.
    fn watch(&mut self, session: &Session, signals: &UnixStream) -> Result<(), BridgeError> {
        let mut mounted = false;
        loop {
            let patience = (!mounted || self.unmounting.is_some()).then_some(PATIENCE);
            let fds = [
                self.shared.news.as_fd(),
                session.connection.as_fd(),
                signals.as_fd(),
            ];
            let [news, server, signal] = wait(fds, patience).map_err(host("wait"))?;
            if news {
                self.shared.news.take().map_err(host("read an eventfd"))?;
                if self.has_ended() {
                    return Ok(());
                }
                if !mounted {
                    mounted = true;
                    println!("bridge: mounted on {}", self.mountpoint.display());
                }
            } else if server {
                return Err(BridgeError::ServerGone);
            } else if signal && self.unmounting.is_none() {
                self.unmount(signals)?;
            } else if !mounted && !signal {
                return Err(BridgeError::NoInit);
            } else {
                // A second signal, or the first took too long.
                return Ok(());
            }
        }
    }

    /// Begins to unmount; the lanes go on meanwhile, for what is still to be written.
    fn unmount(&mut self, mut signals: &UnixStream) -> Result<(), BridgeError> {
        // One byte for each signal.
        signals.read_exact(&mut [0]).map_err(host("read signals"))?;
        let (source, mountpoint) = (self.source.to_owned(), self.mountpoint.to_owned());
        let thread = std::thread::Builder::new().name("unmount".to_owned());
        let thread = thread.spawn(move || {
            if !unmount_idle(&mountpoint)? {
                eprintln!(
                    "bridge: {} is in use; unmounted all the same",
                    mountpoint.display()
                );
                unmount_by_force(&source, &mountpoint)?;
            }
            Ok(())
        });
        self.unmounting = Some(thread.map_err(host("start a thread"))?);
        Ok(())
    }

    /// Ends the lanes and the mount. Returns a queue to say DESTROY on if all went in order.
    ///
    /// The lanes close the device when they end, upon which the kernel fails all that is left: an
    /// unmount that waits for the server ends too.
    fn end(&mut self) -> Result<Option<vmm::fuse::Lane>, BridgeError> {
        if !self.has_ended() {
            self.shared.stop.signal().map_err(host("stop the lanes"))?;
        }
        let mut result = Ok(());
        let mut guests = Vec::new();
        let lanes = self.lanes.len();
        for lane in self.lanes.drain(..) {
            match lane.join() {
                Ok((Ok(End::Unmounted), guest)) => guests.push(guest),
                Ok((Ok(End::Stopped), _)) => {}
                Ok((Err(error), _)) => result = Err(error),
                // It has said so itself.
                Err(_panic) => {}
            }
        }
        if let Some(unmounting) = self.unmounting.take()
            && let Ok(unmounted) = unmounting.join()
        {
            unmounted?;
        }
        // Gone already, where all lanes have seen it end; another may be in its place by now.
        if guests.len() < lanes {
            unmount_by_force(self.source, self.mountpoint)?;
        }
        result?;
        Ok(guests.pop().filter(|_| guests.len() + 1 == lanes))
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

/// Waits until one of `fds` is readable or hung up; which of them are. None when the time is up.
fn wait<const N: usize>(
    fds: [std::os::fd::BorrowedFd<'_>; N],
    timeout: Option<Duration>,
) -> io::Result<[bool; N]> {
    let timeout = timeout.map(Timespec::try_from).transpose();
    let timeout = timeout.map_err(io::Error::other)?;
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => return Ok(fds.map(|fd| !fd.revents().is_empty())),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn host(act: &'static str) -> impl Fn(io::Error) -> BridgeError {
    move |source| BridgeError::Host { act, source }
}
