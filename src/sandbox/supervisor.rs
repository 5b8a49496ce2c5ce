//! A guardian that makes another serving process when one has been killed.
//!
//! Both share one table of descriptors (`clone(2)` with `CLONE_FILES`), so whatever the serving
//! process has open stays open under its number when it is killed, and the next one goes on with
//! it. What becomes of an end, and what of a wish to be upgraded, others decide; here is how.
//!
//! The invariant: a serving process that a guest has taken over may have put anything at any
//! number. So the guardian acts on no descriptor that was open while one served, and the next
//! serving process uses, as long as it has privileges, only those whose identity is the one that
//! was noted before the first one served. What was noted lies in memory, which is not shared.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open};

use super::guardian::{DeathPipe, Ending, ending};
use super::id_map::{self, Maps};
use super::{Inside, Kind, Options, SandboxError};
use crate::sys::process::{self, Fork, SUPERVISED};
use crate::sys::supervision::{self, Queued};

/// What a file is, whatever number it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: (u32, u32),
    inode: u64,
    kind: u16,
    /// By which mount it is reached.
    mount: u64,
}

impl Identity {
    /// Of what is open there.
    ///
    /// # Errors
    ///
    /// Nothing is.
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

/// A descriptor that the next serving process is to find as the first one left it.
#[derive(Debug)]
pub struct FdIdentity {
    /// It.
    pub fd: OwnedFd,
    identity: Identity,
}

impl FdIdentity {
    /// Notes what `fd` is now.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let identity = Identity::of(&fd)?;
        Ok(Self { fd, identity })
    }

    /// What an earlier program in this process has noted of the descriptor.
    ///
    /// # Errors
    ///
    /// There is no such descriptor.
    pub fn left(fd: RawFd, identity: Identity) -> std::io::Result<Self> {
        let fd = crate::sys::inherit::inherited_fd(fd)?;
        Ok(Self { fd, identity })
    }

    /// What it was.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The descriptor, if it still is what it was.
    ///
    /// # Errors
    ///
    /// It isn't.
    pub fn take(self) -> Result<OwnedFd, SandboxError> {
        if Identity::of(&self.fd) == Ok(self.identity) {
            return Ok(self.fd);
        }
        let number = self.fd.as_raw_fd();
        // Whatever it is now, it isn't this process's to close.
        std::mem::forget(self.fd);
        Err(SandboxError::Replaced(number))
    }
}

/// What the first serving process has left of the host for, and every later one goes back to.
#[derive(Debug)]
pub struct SandboxRefs {
    /// What is shared.
    pub root: FdIdentity,
    /// The mount namespace, with `--sandbox namespace`.
    pub mounts: Option<FdIdentity>,
}

/// What a later serving process takes of it.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) root: OwnedFd,
    pub(super) mounts: Option<OwnedFd>,
}

/// Whom the serving process is, by its ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
    /// User and group in the user namespace, if there is one.
    pub inside: Option<(u32, u32)>,
    /// There are other ids than the server's own.
    pub change: bool,
}

/// What an earlier program in this process has left.
#[derive(Debug)]
pub struct Past {
    /// Whom the serving process is; the process is in its user namespace already.
    pub ids: Ids,
    /// Where it is.
    pub sandbox_refs: SandboxRefs,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The serving process serves, since then ([`now`]).
    Serving(Duration),
    /// It has ended. There is none now.
    Ended(Ending),
    /// Somebody wants the program to be replaced, and this came with it.
    Upgrade(Option<Queued>),
}

/// The serving process.
#[derive(Debug)]
struct Child {
    pid: Pid,
    /// Never closed here, as are the other descriptors that were made for it: the number may be
    /// another's by then. The next process closes what it has no use for.
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
    /// Gets ready to make serving processes: from here on signals are held. `keep` are the
    /// descriptors that each of them gets; what this process has beyond these and standard
    /// error is closed.
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
        process::hold_signals().map_err(SandboxError::Fork)?;
        process::hold_supervisors_signals().map_err(SandboxError::Fork)?;
        let (ids, sandbox_refs) = match past {
            Some(past) => (past.ids, Some(past.sandbox_refs)),
            None => (enter_user_namespace(options)?, None),
        };
        let noted = |fd: &BorrowedFd<'_>| Ok((fd.as_raw_fd(), Identity::of(fd)?));
        let keep: Result<_, Errno> = keep.iter().map(noted).collect();
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

    /// Makes a serving process. Answers `Some` in it, and `None` in the guardian. `keep` is as
    /// it was in the beginning; `own` is what only the guardian uses, and the process leaves alone.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`]; in the serving process also that `keep` isn't what it was.
    pub fn start(
        &mut self,
        keep: &[BorrowedFd<'_>],
        own: &[RawFd],
    ) -> Result<Option<Inside>, SandboxError> {
        let this = rustix::process::getpid();
        let death_pipe = pidfd_open(this, PidfdFlags::empty()).map_err(SandboxError::Fork)?;
        let death_pipe = DeathPipe::of(death_pipe);
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (reports, reported) = pipe_with(flags).map_err(SandboxError::Fork)?;
        supervision::tell_by_signal(&reports).map_err(SandboxError::Fork)?;
        let own_pids = self.options.kind == Kind::Namespace;
        let made = supervision::clone_sharing_descriptors(own_pids);
        let made = made.map_err(|errno| match errno {
            Errno::PERM => SandboxError::Privilege(errno),
            errno => SandboxError::Fork(errno),
        })?;
        if let Fork::Parent(pid) = made {
            let reports = ManuallyDrop::new(reports);
            self.child = Some(Child { pid, reports });
            // The process has them.
            std::mem::forget((reported, death_pipe));
            return Ok(None);
        }
        let mut common: Vec<RawFd> = self.keep.iter().map(|(fd, _)| *fd).collect();
        common.extend([death_pipe.as_raw_fd(), reported.as_raw_fd()]);
        common.extend(own);
        // The guardian's end.
        common.push(reports.into_raw_fd());
        let taken = match self.sandbox_refs.take() {
            None => {
                crate::sys::inherit::close_all_but(&common).map_err(SandboxError::Descriptors)?;
                None
            }
            Some(sandbox_refs) => {
                for (fd, (number, identity)) in keep.iter().zip(&self.keep) {
                    if fd.as_raw_fd() != *number || Identity::of(fd) != Ok(*identity) {
                        return Err(SandboxError::Replaced(fd.as_raw_fd()));
                    }
                }
                let root = sandbox_refs.root.take()?;
                common.push(root.as_raw_fd());
                let mounts = sandbox_refs.mounts.map(FdIdentity::take).transpose()?;
                common.extend(mounts.as_ref().map(AsRawFd::as_raw_fd));
                Some(Taken { root, mounts })
            }
        };
        Ok(Some(Inside {
            options: self.options.clone(),
            ids: self.ids.inside,
            change_ids: self.ids.change,
            death_pipe,
            report: Some(reported),
            common,
            taken,
        }))
    }

    /// Waits for what happens next. What asks this process to end is passed on to the serving
    /// process.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn next_event(&mut self) -> std::io::Result<Event> {
        loop {
            if let Some(event) = self.look()? {
                return Ok(event);
            }
            if let Some(requested) = self.requested.take() {
                return Ok(requested);
            }
            // A signal that came since is still there, as all are held.
            match supervision::take_signal(&SUPERVISED, None)? {
                // The kernel delivers the lowest number first, so the report of a process that has
                // started to serve may be waiting too, and must be read first.
                Some(told) if told.signal == libc::SIGHUP => {
                    self.requested = Some(Event::Upgrade(told.queued));
                }
                Some(told) if matches!(told.signal, libc::SIGTERM | libc::SIGINT) => {
                    self.stopping = true;
                    self.signal(Signal::TERM)?;
                }
                _ => {}
            }
        }
    }

    /// As [`next_event`](Self::next_event), for as long as `patience` allows; signals but that of a child's end
    /// stay held.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn next_within(&mut self, patience: Duration) -> std::io::Result<Option<Event>> {
        let end = now() + patience;
        loop {
            if let Some(event) = self.look()? {
                return Ok(Some(event));
            }
            let Some(left) = end.checked_sub(now()) else {
                return Ok(None);
            };
            supervision::take_signal(&[libc::SIGCHLD, libc::SIGIO], Some(left))?;
        }
    }

    fn look(&mut self) -> std::io::Result<Option<Event>> {
        let Some(child) = &self.child else {
            return Ok(None);
        };
        if let Some(report) = Report::read(&child.reports) {
            self.note(report)?;
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

    /// Notes where the first serving process is, before anybody could have taken it over.
    fn note(&mut self, report: Report) -> std::io::Result<()> {
        if self.sandbox_refs.is_some() {
            return Ok(());
        }
        let noted =
            |fd| Ok::<_, std::io::Error>(FdIdentity::new(crate::sys::inherit::inherited_fd(fd)?)?);
        let root = noted(report.root)?;
        let mounts = report.mounts.map(noted).transpose()?;
        self.sandbox_refs = Some(SandboxRefs { root, mounts });
        Ok(())
    }

    /// Whether somebody wants the server to end.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn is_to_stop(&mut self) -> std::io::Result<bool> {
        let asked = [libc::SIGTERM, libc::SIGINT];
        self.stopping |= supervision::take_signal(&asked, Some(Duration::ZERO))?.is_some();
        Ok(self.stopping)
    }

    /// Whether there is a serving process.
    #[must_use]
    pub fn has_child(&self) -> bool {
        self.child.is_some()
    }

    /// Asks the serving process to give back all requests and to end, leaving everything open.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn drain(&self) -> std::io::Result<()> {
        self.signal(Signal::HUP)
    }

    /// Ends the serving process at once.
    ///
    /// # Errors
    ///
    /// Whatever a seccomp filter of the launcher says.
    pub fn kill(&self) -> std::io::Result<()> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> std::io::Result<()> {
        let Some(child) = &self.child else {
            return Ok(());
        };
        match rustix::process::kill_process(child.pid, signal) {
            // It has ended, and its SIGCHLD is under way.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whom the serving process is.
    #[must_use]
    pub fn ids(&self) -> Ids {
        self.ids
    }

    /// Where it is, once the first one has served.
    #[must_use]
    pub fn sandbox_refs(&self) -> Option<&SandboxRefs> {
        self.sandbox_refs.as_ref()
    }
}

/// The user namespace, where one is needed: the processes to come have their PID namespaces by
/// being made.
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

/// The time by which pauses are measured, the same in each process.
#[must_use]
pub fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What a serving process tells its guardian once it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    root: RawFd,
    mounts: Option<RawFd>,
    since: Duration,
}

impl Report {
    const LEN: usize = 16;

    fn bytes(self) -> [u8; Self::LEN] {
        let nanoseconds = u64::try_from(self.since.as_nanos()).unwrap_or(u64::MAX);
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.root.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.mounts.unwrap_or(-1).to_le_bytes());
        bytes[8..].copy_from_slice(&nanoseconds.to_le_bytes());
        bytes
    }

    fn read(pipe: &OwnedFd) -> Option<Self> {
        let mut bytes = [0; Self::LEN];
        if rustix::io::read(pipe, &mut bytes) != Ok(Self::LEN) {
            return None;
        }
        let [r0, r1, r2, r3, m0, m1, m2, m3, since @ ..] = bytes;
        Some(Self {
            root: RawFd::from_le_bytes([r0, r1, r2, r3]),
            mounts: Some(RawFd::from_le_bytes([m0, m1, m2, m3])).filter(|fd| *fd >= 0),
            since: Duration::from_nanos(u64::from_le_bytes(since)),
        })
    }
}

/// By which the serving process tells its guardian, if it is supervised, that it serves.
#[derive(Debug, Default)]
pub struct Serving {
    pub(super) pipe: Option<OwnedFd>,
    pub(super) root: RawFd,
    pub(super) mounts: Option<OwnedFd>,
}

impl Serving {
    /// Tells it.
    pub fn tell(&self) {
        let Some(pipe) = &self.pipe else { return };
        let report = Report {
            root: self.root,
            mounts: self.mounts.as_ref().map(AsRawFd::as_raw_fd),
            since: now(),
        };
        if let Err(error) = rustix::io::write(pipe, &report.bytes()) {
            log::warn!("telling the guardian that the process serves: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_arrives_as_it_was_sent() {
        let (reports, pipe) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        assert_eq!(Report::read(&reports), None);
        for mounts in [None, Some(9)] {
            let sent = Report {
                root: 7,
                mounts,
                since: now(),
            };
            rustix::io::write(&pipe, &sent.bytes()).unwrap();
            assert_eq!(Report::read(&reports), Some(sent));
        }
    }

    #[test]
    fn what_was_replaced_is_noticed() {
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        assert!(FdIdentity::new(open("/dev/null")).unwrap().take().is_ok());
        let mut noted = FdIdentity::new(open("/dev/null")).unwrap();
        rustix::io::dup2(open("/dev/zero"), &mut noted.fd).unwrap();
        assert!(matches!(noted.take(), Err(SandboxError::Replaced(_))));
    }
}
