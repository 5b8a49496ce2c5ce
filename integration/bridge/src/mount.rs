//! One mount: the threads that pass its requests on, and its end.
//!
//! It doesn't know how the session with the server was set up. The invariant: a mount does not
//! outlive its lanes, so no program hangs on it.

use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::Session;

use crate::device::{Device, DeviceError, unmount_by_force, unmount_idle};
use crate::error::LaneError;
use crate::lane::{End, Lane, Shared};
use crate::track::Track;

/// How long a server may take to reply to INIT, and processes to leave a mount that ends.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Errors of a mount.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// Mounting or unmounting failed.
    #[error("can't mount the file system")]
    Device(#[from] DeviceError),
    /// A lane has failed.
    #[error("requests can't be passed on")]
    Lane(#[from] LaneError),
    /// A system call that a mount needs failed.
    #[error("can't {act}")]
    Host {
        /// What failed.
        act: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// INIT got no reply.
    #[error("the server did not reply to INIT in time")]
    NoInit,
    /// The connection is closed.
    #[error("the server has ended the session")]
    ServerGone,
}

/// A mount, with the threads that pass its requests on.
pub(crate) struct Mount<'a> {
    source: &'a str,
    mountpoint: &'a Path,
    shared: Arc<Shared>,
    lanes: Vec<JoinHandle<(Result<End, LaneError>, Track)>>,
    unmounting: Option<JoinHandle<Result<(), DeviceError>>>,
}

impl<'a> Mount<'a> {
    /// A mount that has no lanes and isn't mounted yet.
    pub(crate) fn new(source: &'a str, mountpoint: &'a Path, shared: Arc<Shared>) -> Self {
        Self {
            source,
            mountpoint,
            shared,
            lanes: Vec::new(),
            unmounting: None,
        }
    }

    /// Starts a lane on each track.
    pub(crate) fn start(&mut self, device: Device, tracks: Vec<Track>) -> Result<(), MountError> {
        let clones: Result<Vec<_>, _> = (1..tracks.len())
            .map(|_| device.clone_for_thread())
            .collect();
        let devices = std::iter::once(device).chain(clones?);
        for (number, (device, track)) in devices.zip(tracks).enumerate() {
            let lane = Lane::new(device, track, Arc::clone(&self.shared))?;
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(format!("lane {number}"));
            let thread = thread.spawn(move || {
                let (end, track) = lane.run();
                shared.ended.fetch_add(1, Ordering::Release);
                // One lane without the others is useless.
                let told = if end.is_err() {
                    shared.stop.signal().and(shared.news.signal())
                } else {
                    shared.news.signal()
                };
                if let Err(error) = told {
                    eprintln!("bridge: can't signal a lane's end: {error}");
                }
                (end, track)
            });
            self.lanes.push(thread.map_err(host("start a thread"))?);
        }
        Ok(())
    }

    /// Whether a lane has ended. Its thread may still run, as it signals the end before it exits.
    fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire) > 0
    }

    /// Waits until a lane ends, unmounting when a signal comes.
    pub(crate) fn watch(
        &mut self,
        session: &Session,
        signals: &UnixStream,
    ) -> Result<(), MountError> {
        let mut mounted = false;
        loop {
            let timeout = (!mounted || self.unmounting.is_some()).then_some(TIMEOUT);
            let fds = [
                self.shared.news.as_fd(),
                session.connection.as_fd(),
                signals.as_fd(),
            ];
            let [news, server, signal] = wait(fds, timeout).map_err(host("wait"))?;
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
                return Err(MountError::ServerGone);
            } else if signal && self.unmounting.is_none() {
                self.unmount(signals)?;
            } else if !mounted && !signal {
                return Err(MountError::NoInit);
            } else {
                // A second signal, or the first took too long.
                return Ok(());
            }
        }
    }

    /// Starts to unmount; the lanes still run, for what is still to be written.
    fn unmount(&mut self, mut signals: &UnixStream) -> Result<(), MountError> {
        // One byte for each signal.
        signals.read_exact(&mut [0]).map_err(host("read signals"))?;
        let (source, mountpoint) = (self.source.to_owned(), self.mountpoint.to_owned());
        let thread = std::thread::Builder::new().name("unmount".to_owned());
        let thread = thread.spawn(move || {
            if !unmount_idle(&mountpoint)? {
                eprintln!(
                    "bridge: {} is in use; unmounted nevertheless",
                    mountpoint.display()
                );
                unmount_by_force(&source, &mountpoint)?;
            }
            Ok(())
        });
        self.unmounting = Some(thread.map_err(host("start a thread"))?);
        Ok(())
    }

    /// Whether it ends because this process was asked to end.
    pub(crate) fn was_asked_to_end(&self) -> bool {
        self.unmounting.is_some()
    }

    /// Ends the lanes and the mount. Returns the tracks if there was no error.
    ///
    /// The lanes close the device when they end, and the kernel fails everything that is left: an
    /// unmount that waits for the server ends too.
    pub(crate) fn end(&mut self) -> Result<Option<Vec<Track>>, MountError> {
        if !self.has_ended() {
            self.shared.stop.signal().map_err(host("stop the lanes"))?;
        }
        let mut result = Ok(());
        let mut tracks = Vec::new();
        let lanes = self.lanes.len();
        for lane in self.lanes.drain(..) {
            match lane.join() {
                Ok((Ok(End::Unmounted), track)) => tracks.push(track),
                Ok((Ok(End::Stopped), _)) => {}
                Ok((Err(error), _)) => result = Err(error),
                // It has printed its error itself.
                Err(_panic) => {}
            }
        }
        if let Some(unmounting) = self.unmounting.take()
            && let Ok(unmounted) = unmounting.join()
        {
            unmounted?;
        }
        // Gone already if all lanes have seen it end; there may be another mount at this point now.
        if tracks.len() < lanes {
            unmount_by_force(self.source, self.mountpoint)?;
        }
        result?;
        Ok(Some(tracks).filter(|tracks| tracks.len() == lanes))
    }
}

/// Waits until one of `fds` is readable or hung up; returns which of them are. None on timeout.
pub(crate) fn wait<const N: usize>(
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

pub(crate) fn host(act: &'static str) -> impl Fn(io::Error) -> MountError {
    move |source| MountError::Host { act, source }
}
