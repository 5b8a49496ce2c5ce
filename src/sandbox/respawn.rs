//! Makes serving processes, one after the other, that share this process's descriptors.
//!
//! The two share one descriptor table (`clone(2)` with `CLONE_FILES`). Whatever the serving process
//! has open stays open under its number when it is killed, and the next one uses it. When one is
//! made is decided elsewhere.
//!
//! The invariant: a compromised serving process may have put any file at any descriptor number. So
//! the guardian uses no descriptor that was open while one served. The next serving process, as
//! long as it has privileges, uses only descriptors whose identity was recorded before the first
//! one served. The records are in memory, which is not shared.

use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::fd_identity::{FdIdentity, Identity};
use super::guardian::DeathPipe;
use super::id_map::{self, Maps};
use super::report::Report;
use super::{Kind, Options, SandboxError, ServingProcess};
use crate::sys::process::{self, Fork};
use crate::sys::supervision;

/// The root and the mount namespace of the first serving process, which every later one enters.
#[derive(Debug)]
pub(crate) struct SandboxRefs {
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
pub(crate) struct Ids {
    /// User and group in the user namespace, if there is one.
    pub inside: Option<(u32, u32)>,
    /// Whether there are ids beside the server's own.
    pub change: bool,
}

/// What an earlier program in this process has passed on.
#[derive(Debug)]
pub(crate) struct InheritedSandbox {
    /// The ids of the serving process. This process is in its user namespace already.
    pub ids: Ids,
    /// The root and the mount namespace of the serving process.
    pub sandbox_refs: SandboxRefs,
}

/// Which of the two processes this is after a fork.
#[derive(Debug)]
pub(crate) enum Respawned {
    /// The guardian.
    Guardian {
        /// The serving process.
        child: Pid,
        /// The pipe on which the serving process reports.
        reports: OwnedFd,
    },
    /// The serving process.
    Serving(ServingProcess),
}

/// What all serving processes of one guardian have in common.
#[derive(Debug)]
pub(crate) struct Respawn {
    options: Options,
    ids: Ids,
    keep: Vec<(RawFd, Identity)>,
    sandbox_refs: Option<SandboxRefs>,
}

impl Respawn {
    /// Prepares to make serving processes; from here on signals are blocked. `keep` are the
    /// descriptors that each serving process gets. All others but standard error are closed.
    ///
    /// To be called while the process has one thread.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`].
    pub(crate) fn begin(
        options: &Options,
        keep: &[BorrowedFd<'_>],
        past: Option<InheritedSandbox>,
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
        })
    }

    /// Makes a serving process. `keep` is the same as for [`begin`](Self::begin). `own` are
    /// descriptors that only the guardian uses, and that the serving process neither uses nor
    /// closes.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`]; in the serving process also if a descriptor of `keep` was replaced.
    pub(crate) fn fork(
        &mut self,
        keep: &[BorrowedFd<'_>],
        own: &[RawFd],
    ) -> Result<Respawned, SandboxError> {
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
        if let Fork::Parent(child) = fork {
            // The serving process owns them.
            std::mem::forget((report, death_pipe));
            return Ok(Respawned::Guardian { child, reports });
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
        Ok(Respawned::Serving(ServingProcess {
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

    /// Records the root and the mount namespace of the first serving process, which has reported
    /// them before a guest can have compromised it.
    pub(crate) fn record_refs(&mut self, report: Report) -> std::io::Result<()> {
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

    /// The ids of the serving process.
    #[must_use]
    pub(crate) fn ids(&self) -> Ids {
        self.ids
    }

    /// The root and the mount namespace of the serving process, once the first one has served.
    #[must_use]
    pub(crate) fn sandbox_refs(&self) -> Option<&SandboxRefs> {
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
