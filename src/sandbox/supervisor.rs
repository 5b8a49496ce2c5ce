//! A guardian that can make another serving process when one has been killed.
//!
//! The two share one descriptor table (`clone(2)` with `CLONE_FILES`). Whatever the serving process
//! has open stays open under its number when it is killed, and the next one uses it. This module
//! makes serving processes and reports events; `server` decides when to make one and when to
//! upgrade.
//!
//! The invariant: a compromised serving process may have put any file at any descriptor number. So
//! the guardian uses no descriptor that was open while one served. The next serving process, as
//! long as it has privileges, uses only descriptors whose identity was recorded before the first
//! one served. The records are in memory, which is not shared.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open};

use super::guardian::{DeathPipe, Ending, ending};
use super::id_map::{self, Maps};
use super::report::{Report, now};
use super::{Inside, Kind, Options, SandboxError};
use crate::sys::process::{self, Fork, SUPERVISED};
use crate::sys::supervision::{self, Queued};

/// Which file a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: (u32, u32),
    inode: u64,
    kind: u16,
    /// The mount through which it was opened.
    mount: u64,
}

impl Identity {
    /// The identity of the file that is open at `fd`.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?;
        let has_mount = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            kind: stat.stx_mode & 0o170_000,
            mount: if has_mount { stat.stx_mnt_id } else { 0 },
        })
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            device: (major, minor),
            inode,
            kind,
            mount,
        } = self;
        write!(f, "{major}:{minor}:{inode}:{kind}:{mount}")
    }
}

impl std::str::FromStr for Identity {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(':');
        let mut part = || parts.next().unwrap_or("");
        Ok(Self {
            device: (part().parse()?, part().parse()?),
            inode: part().parse()?,
            kind: part().parse()?,
            mount: part().parse()?,
        })
    }
}

/// A descriptor and the identity that its file had when it was recorded.
#[derive(Debug)]
pub struct FdIdentity {
    /// The descriptor.
    pub fd: OwnedFd,
    identity: Identity,
}

impl FdIdentity {
    /// Records which file `fd` refers to now.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let identity = Identity::of(&fd)?;
        Ok(Self { fd, identity })
    }

    /// Takes over a descriptor whose identity an earlier program in this process has recorded.
    ///
    /// # Errors
    ///
    /// The descriptor isn't open.
    pub fn inherited(fd: RawFd, identity: Identity) -> std::io::Result<Self> {
        let fd = crate::sys::inherit::inherited_fd(fd)?;
        Ok(Self { fd, identity })
    }

    /// The recorded identity.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns the descriptor if it still refers to the recorded file.
    ///
    /// # Errors
    ///
    /// The descriptor refers to another file.
    pub fn take(self) -> Result<OwnedFd, SandboxError> {
        if Identity::of(&self.fd) == Ok(self.identity) {
            return Ok(self.fd);
        }
        let number = self.fd.as_raw_fd();
        // This process doesn't own what is open there now.
        std::mem::forget(self.fd);
        Err(SandboxError::Replaced(number))
    }
}

/// The root and the mount namespace of the first serving process, which every later one enters.
#[derive(Debug)]
pub struct SandboxRefs {
    /// The shared directory.
    pub root: FdIdentity,
    /// The mount namespace, with `--sandbox namespace`.
    pub mounts: Option<FdIdentity>,
}

/// The same, checked and opened in a later serving process.
#[derive(Debug)]
pub(super) struct OpenRefs {
    pub(super) root: OwnedFd,
    pub(super) mounts: Option<OwnedFd>,
}

/// The ids of the serving process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// User and group in the user namespace, if there is one.
    pub inside: Option<(u32, u32)>,
    /// Whether there are ids beside the server's own.
    pub change: bool,
}

/// What an earlier program in this process has passed on.
#[derive(Debug)]
pub struct Past {
    /// The ids of the serving process. This process is in its user namespace already.
    pub ids: Ids,
    /// The root and the mount namespace of the serving process.
    pub sandbox_refs: SandboxRefs,
}

/// What a supervisor waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The serving process serves, since this time ([`now`]).
    Serving(Duration),
    /// The serving process has ended.
    Ended(Ending),
    /// A client asks for an upgrade; with what its signal carried.
    Upgrade(Option<Queued>),
    /// The server was asked to end, and so was the serving process.
    Stopping,
}

/// The serving process.
#[derive(Debug)]
struct Child {
    pid: Pid,
    /// Never closed here, like the other descriptors that were made for the process: the number may
    /// refer to another file by then. The next serving process closes those that it doesn't need.
    reports: ManuallyDrop<OwnedFd>,
}

/// The guardian's side.
#[derive(Debug)]
pub struct Supervisor {
    options: Options,
    ids: Ids,
    keep: Vec<(RawFd, Identity)>,
    sandbox_refs: Option<SandboxRefs>,
    child: Option<Child>,
    stopping: bool,
    /// An upgrade was requested before the report of a serving process was read.
    requested: Option<Event>,
}

impl Supervisor {
    /// Prepares to make serving processes; from here on signals are blocked. `keep` are the
    /// descriptors that each serving process gets. All others but standard error are closed.
    ///
    /// To be called while the process has one thread.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`].
    pub fn begin(
        options: &Options,
        keep: &[BorrowedFd<'_>],
        past: Option<Past>,
    ) -> Result<Self, SandboxError> {
        process::block_signals().map_err(SandboxError::Fork)?;
        process::block_supervisors_signals().map_err(SandboxError::Fork)?;
        let (ids, sandbox_refs) = match past {
            Some(past) => (past.ids, Some(past.sandbox_refs)),
            None => (enter_user_namespace(options)?, None),
        };
        let record = |fd: &BorrowedFd<'_>| Ok((fd.as_raw_fd(), Identity::of(fd)?));
        let keep: Result<_, Errno> = keep.iter().map(record).collect();
        Ok(Self {
            options: options.clone(),
            ids,
            keep: keep.map_err(SandboxError::Fork)?,
            sandbox_refs,
            child: None,
            stopping: false,
            requested: None,
        })
    }

    /// Makes a serving process. Returns `Some` in it, and `None` in the guardian. `keep` is the
    /// same as for [`begin`](Self::begin). `own` are descriptors that only the guardian uses, and
    /// that the serving process neither uses nor closes.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`]; in the serving process also if a descriptor of `keep` was replaced.
    pub fn start(
        &mut self,
        keep: &[BorrowedFd<'_>],
        own: &[RawFd],
    ) -> Result<Option<Inside>, SandboxError> {
        let this = rustix::process::getpid();
        let death_pipe = pidfd_open(this, PidfdFlags::empty()).map_err(SandboxError::Fork)?;
        let death_pipe = DeathPipe::of(death_pipe);
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (reports, report) = pipe_with(flags).map_err(SandboxError::Fork)?;
        supervision::signal_on_input(&reports).map_err(SandboxError::Fork)?;
        let own_pids = self.options.kind == Kind::Namespace;
        let fork = supervision::clone_sharing_descriptors(own_pids);
        let fork = fork.map_err(|errno| match errno {
            Errno::PERM => SandboxError::Privilege(errno),
            errno => SandboxError::Fork(errno),
        })?;
        if let Fork::Parent(pid) = fork {
            let reports = ManuallyDrop::new(reports);
            self.child = Some(Child { pid, reports });
            // The serving process owns them.
            std::mem::forget((report, death_pipe));
            return Ok(None);
        }
        let mut shared: Vec<RawFd> = self.keep.iter().map(|(fd, _)| *fd).collect();
        shared.extend([death_pipe.as_raw_fd(), report.as_raw_fd()]);
        shared.extend(own);
        // The guardian owns this end.
        shared.push(reports.into_raw_fd());
        let previous = match self.sandbox_refs.take() {
            None => {
                crate::sys::inherit::close_all_but(&shared).map_err(SandboxError::Descriptors)?;
                None
            }
            Some(sandbox_refs) => {
                for (fd, (number, identity)) in keep.iter().zip(&self.keep) {
                    if fd.as_raw_fd() != *number || Identity::of(fd) != Ok(*identity) {
                        return Err(SandboxError::Replaced(fd.as_raw_fd()));
                    }
                }
                let root = sandbox_refs.root.take()?;
                shared.push(root.as_raw_fd());
                let mounts = sandbox_refs.mounts.map(FdIdentity::take).transpose()?;
                shared.extend(mounts.as_ref().map(AsRawFd::as_raw_fd));
                Some(OpenRefs { root, mounts })
            }
        };
        Ok(Some(Inside {
            options: self.options.clone(),
            ids: self.ids.inside,
            change_ids: self.ids.change,
            death_pipe,
            report: Some(report),
            supervised: true,
            shared,
            previous,
        }))
    }

    /// Waits for the next event. Signals that ask this process to end are passed on to the serving
    /// process. Returns `None` after `timeout`.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub fn next_event(&mut self, timeout: Option<Duration>) -> std::io::Result<Option<Event>> {
        loop {
            if let Some(event) = self.poll()? {
                return Ok(Some(event));
            }
            if let Some(requested) = self.requested.take() {
                return Ok(Some(requested));
            }
            // A signal that has arrived since then is still pending, as all are blocked.
            match supervision::take_signal(&SUPERVISED, timeout)? {
                None => return Ok(None),
                // The kernel delivers the lowest number first, so the report of a process that has
                // started to serve may be waiting too, and must be read first.
                Some(signal) if signal.number == libc::SIGHUP => {
                    self.requested = Some(Event::Upgrade(signal.queued));
                }
                Some(signal) if matches!(signal.number, libc::SIGTERM | libc::SIGINT) => {
                    self.stopping = true;
                    self.signal(Signal::TERM)?;
                    return Ok(Some(Event::Stopping));
                }
                Some(_) => {}
            }
        }
    }

    /// Like [`next_event`](Self::next_event), but returns `None` after `timeout`. Signals but those
    /// of a child's end and of its reports stay pending.
    ///
    /// # Errors
    ///
    /// As for [`next_event`](Self::next_event).
    pub fn next_within(&mut self, timeout: Duration) -> std::io::Result<Option<Event>> {
        let end = now() + timeout;
        loop {
            if let Some(event) = self.poll()? {
                return Ok(Some(event));
            }
            let Some(left) = end.checked_sub(now()) else {
                return Ok(None);
            };
            supervision::take_signal(&[libc::SIGCHLD, libc::SIGIO], Some(left))?;
        }
    }

    fn poll(&mut self) -> std::io::Result<Option<Event>> {
        let Some(child) = &self.child else {
            return Ok(None);
        };
        if let Some(report) = Report::read(&child.reports) {
            self.record_refs(report)?;
            return Ok(Some(Event::Serving(report.since)));
        }
        match rustix::process::waitpid(Some(child.pid), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => {
                let Some(ending) = ending(status) else {
                    return Ok(None);
                };
                self.child = None;
                Ok(Some(Event::Ended(ending)))
            }
            Ok(None) | Err(Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Records the root and the mount namespace of the first serving process, before a guest can
    /// have compromised it.
    fn record_refs(&mut self, report: Report) -> std::io::Result<()> {
        if self.sandbox_refs.is_some() {
            return Ok(());
        }
        let record =
            |fd| Ok::<_, std::io::Error>(FdIdentity::new(crate::sys::inherit::inherited_fd(fd)?)?);
        let root = record(report.root)?;
        let mounts = report.mounts.map(record).transpose()?;
        self.sandbox_refs = Some(SandboxRefs { root, mounts });
        Ok(())
    }

    /// Whether the server was asked to end.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub fn is_to_stop(&mut self) -> std::io::Result<bool> {
        let signals = [libc::SIGTERM, libc::SIGINT];
        self.stopping |= supervision::take_signal(&signals, Some(Duration::ZERO))?.is_some();
        Ok(self.stopping)
    }

    /// The serving process, if there is one.
    #[must_use]
    pub fn child(&self) -> Option<Pid> {
        self.child.as_ref().map(|child| child.pid)
    }

    /// Whether there is a serving process.
    #[must_use]
    pub fn has_child(&self) -> bool {
        self.child.is_some()
    }

    /// Asks the serving process to return all requests and to end, leaving everything open.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub fn drain(&self) -> std::io::Result<()> {
        self.signal(Signal::HUP)
    }

    /// Kills the serving process.
    ///
    /// # Errors
    ///
    /// A seccomp filter of the launcher forbids a call.
    pub fn kill(&self) -> std::io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        let Some(child) = &self.child else {
            return Ok(());
        };
        match rustix::process::kill_process(child.pid, signal) {
            // It has ended, and its SIGCHLD is pending.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The ids of the serving process.
    #[must_use]
    pub fn ids(&self) -> Ids {
        self.ids
    }

    /// The root and the mount namespace of the serving process, once the first one has served.
    #[must_use]
    pub fn sandbox_refs(&self) -> Option<&SandboxRefs> {
        self.sandbox_refs.as_ref()
    }
}

/// Enters a user namespace if one is needed. Each serving process gets its PID namespace by
/// `clone`.
fn enter_user_namespace(options: &Options) -> Result<Ids, SandboxError> {
    let maps = Maps::wanted(options)?;
    if let Some(maps) = &maps {
        id_map::enter_user_namespace(maps, false)?;
    }
    Ok(Ids {
        inside: maps.as_ref().map(Maps::own_ids),
        change: maps.is_none_or(|maps| !maps.is_single()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_file_is_refused() {
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        assert!(FdIdentity::new(open("/dev/null")).unwrap().take().is_ok());
        let mut recorded = FdIdentity::new(open("/dev/null")).unwrap();
        rustix::io::dup2(open("/dev/zero"), &mut recorded.fd).unwrap();
        assert!(matches!(recorded.take(), Err(SandboxError::Replaced(_))));
    }
}
