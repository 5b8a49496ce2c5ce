//! The sandbox of the serving process: namespaces, root, ids, capabilities, Landlock, seccomp.
//!
//! The server takes three steps (`docs/sandbox.md` has the reasons for the order). [`begin`] splits
//! the process in two; the guardian stays outside. In the serving process,
//! [`ServingProcess::enter`] gives up the host's file systems and the privileges that aren't needed.
//! [`Filter::install`] then forbids the system calls that the server doesn't make. The invariant:
//! the options are enforced as given, or there is an error; nothing weaker takes their place.

mod fd_identity;
mod filter;
mod guardian;
mod id_map;
mod mounts;
mod paths;
mod privileges;
mod report;
mod respawn;
mod syscall_allowlist;
mod trees;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

pub(crate) use self::fd_identity::{FdIdentity, Identity};
pub use self::filter::{Filter, FilterError, Seccomp};
pub use self::guardian::Ending;
pub(crate) use self::guardian::{Change, Guardian};
pub(crate) use self::id_map::IdRange;
pub use self::id_map::MapError;
pub(crate) use self::mounts::detached;
pub(crate) use self::privileges::{CapabilityChanges, UnknownCapability};
pub use self::report::Serving;
pub(crate) use self::report::now;
pub(crate) use self::respawn::{Ids, InheritedSandbox, Respawn, Respawned, SandboxRefs};
pub(crate) use self::trees::Reached;
pub use self::trees::Tree;

pub(crate) use self::privileges::keep_over_exec;
pub(crate) use self::report::Report;

use self::guardian::DeathPipe;
use self::id_map::Maps;
use self::mounts::View;
use self::paths::Allowed;
use self::respawn::OpenRefs;
use crate::sys::process::{self, Fork};

/// How the server is confined to the shared directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// By its own namespaces, which contain that directory and nothing else.
    #[default]
    Namespace,
    /// By `chroot(2)`.
    Chroot,
    /// By neither: the launcher has its own sandbox around the server.
    None,
}

/// The sandbox's options.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How the server is confined to the shared directory.
    pub kind: Kind,
    /// What happens on a system call that the server doesn't make.
    pub seccomp: Seccomp,
    /// The map of user ids of the namespace to user ids of the host.
    pub users: Vec<IdRange>,
    /// The map of group ids.
    pub groups: Vec<IdRange>,
    /// Capabilities to keep in addition to those that are needed, and capabilities to drop.
    pub capabilities: CapabilityChanges,
    /// The serving process reports to its guardian that it serves, also without a supervisor.
    pub reports: bool,
}

/// What the server will do, as far as it decides which privileges it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// It changes nothing in the shared directory.
    pub readonly: bool,
    /// It opens files by file handle.
    pub file_handles: bool,
    /// It gets descriptors of other directories while it serves.
    pub more_directories: bool,
}

/// What the server reaches on the host.
#[derive(Clone, Debug)]
pub enum Reach {
    /// One directory, or a single file, which becomes the root.
    Share(PathBuf),
    /// Several directories and files. The root contains them and nothing else.
    Trees(Vec<Tree>),
}

/// Why the sandbox can't be set up; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The second process can't be made.
    #[error("making the serving process")]
    Fork(#[source] Errno),
    /// Making namespaces needs a privilege.
    #[error(
        "--sandbox namespace: can't make namespaces without CAP_SYS_ADMIN, which this process \
         lacks (in a container): give it that capability, or start the server with --sandbox \
         chroot, which needs CAP_SYS_CHROOT, or --sandbox none, which needs nothing"
    )]
    Privilege(#[source] Errno),
    /// The user namespace can't be made.
    #[error(
        "--sandbox namespace: can't make a user namespace: allow them (sysctls \
         user.max_user_namespaces, kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns; the seccomp profile of a container), start \
         the server as root, or with --sandbox none"
    )]
    UserNamespace(#[source] Errno),
    /// The id maps can't be written.
    #[error("mapping the ids of the user namespace")]
    Map(#[from] MapError),
    /// Id maps are given, but there is no namespace that they apply to.
    #[error("--uid-map and --gid-map need --sandbox namespace")]
    MapsWithoutNamespace,
    /// The shared directory can't be opened.
    #[error("can't open the shared directory {path}")]
    Share {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The server's user may not search the shared directory.
    #[error(
        "the user that the server runs as ({user}) can't enter the shared directory {path}: give it \
         the permission to search it (chmod o+x, setfacl -m u:{user}:x), or start the server as a user \
         that has it"
    )]
    NoEntry {
        /// Which directory.
        path: PathBuf,
        /// The server's user id on the host.
        user: u32,
    },
    /// A step of leaving the host's mounts has failed.
    #[error("--sandbox {kind}: {step}; --sandbox {other} does without")]
    Mounts {
        /// The kind of sandbox.
        kind: &'static str,
        /// The step that failed.
        step: &'static str,
        /// A kind of sandbox that doesn't need the step.
        other: &'static str,
        /// The error of the step.
        #[source]
        source: Errno,
    },
    /// The share is a single file, and no directory can be made for it.
    #[error(
        "{0} is a single file, which is shared in a directory of its own that only --sandbox \
         namespace can make: use that, or share a directory with a hard link to the file in it"
    )]
    NotADirectory(PathBuf),
    /// Several directories can't be confined to by `chroot`.
    #[error(
        "--sandbox chroot: a root directory can't be made of several directories without mounts; \
         use --sandbox namespace, or none"
    )]
    ChrootOfSeveral,
    /// Directories that have to be on one mount have only the host's root in common.
    #[error(
        "the directories {0:?} have only / in common, and the server would see all that is in it: \
         put them into one directory"
    )]
    NothingInCommon(Vec<PathBuf>),
    /// The ids of the user namespace can't be set.
    #[error("setting the ids of the user namespace")]
    Ids(#[source] Errno),
    /// Capabilities can't be dropped.
    #[error("dropping capabilities")]
    Capabilities(#[source] Errno),
    /// Inherited descriptors can't be closed.
    #[error("closing the descriptors that the launcher has left open")]
    Descriptors(#[source] std::io::Error),
    /// A descriptor refers to another file than the recorded one.
    #[error(
        "descriptor {0} is not the file that it was when the server started: the serving \
         process has replaced it"
    )]
    Replaced(RawFd),
    /// The mounts of an earlier serving process can't be entered.
    #[error("entering the mounts of the previous serving process: {step}")]
    Reenter {
        /// The step that failed.
        step: &'static str,
        /// The error of the step.
        #[source]
        source: Errno,
    },
    /// The kernel has Landlock, and refuses the ruleset.
    #[error("restricting the server to the shared directory with Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Which of the two processes this is.
#[derive(Debug)]
pub enum ForkResult {
    /// The process that the launcher has started, which waits for the serving process to end.
    Guardian(Guardian),
    /// The serving process.
    Serving(ServingProcess),
}

/// The serving process, before it is confined.
#[derive(Debug)]
pub struct ServingProcess {
    options: Options,
    /// The user and group ids of the process in its user namespace, if it has one.
    ids: Option<(u32, u32)>,
    /// Whether there are ids beside the server's own.
    change_ids: bool,
    death_pipe: DeathPipe,
    /// The pipe on which the process reports that it serves.
    report: Option<OwnedFd>,
    /// Whether another process takes over if this one is killed.
    supervised: bool,
    /// The numbers of the descriptors that both processes have.
    shared: Vec<RawFd>,
    /// The root and the mounts of an earlier serving process, if there was one.
    previous: Option<OpenRefs>,
}

/// What a confined server can reach of the host.
#[derive(Debug)]
pub struct HostAccess {
    /// The shared directory, `O_PATH`; with [`Reach::Trees`] the root.
    pub root: OwnedFd,
    /// The shared file, `O_PATH`, if the share is a single file and the root was made for it.
    pub file: Option<OwnedFd>,
    /// The paths of each of the [`Reach::Trees`].
    pub trees: Vec<Vec<Reached>>,
    /// `/proc/self/fd`, `O_PATH`; if possible as a mount of its own, from which `..` leads nowhere.
    pub proc_fds: OwnedFd,
    /// Whether files can be opened by file handle.
    pub file_handles: bool,
    /// Whether the process is in a user namespace of its own.
    pub in_user_namespace: bool,
    /// Whether the server has `CAP_SYS_ADMIN` on the host, which setting `security.*` and
    /// `trusted.*` attributes needs.
    pub may_label: bool,
    /// To report on once the server serves.
    pub serving: Serving,
    /// The numbers of all descriptors that the process needs. Those of an earlier serving process
    /// that the table of state doesn't name are to be closed: see `close_all_but`.
    pub descriptors: Vec<RawFd>,
}

/// Splits the process in two. The serving process keeps the descriptors of `keep` and the standard
/// three, and closes all others. Signals that end a server are blocked in both processes until
/// `release_signals`.
///
/// To be called while the process has one thread, and owns no other descriptors.
///
/// # Errors
///
/// See `SandboxError`; there is no second process then.
pub fn begin(options: &Options, keep: &[BorrowedFd<'_>]) -> Result<ForkResult, SandboxError> {
    let maps = Maps::wanted(options)?;
    process::block_signals().map_err(SandboxError::Fork)?;
    // Processes that are forked from here on are in the PID namespace.
    let ids = maps.as_ref().map(Maps::own_ids);
    if let Some(maps) = &maps {
        id_map::enter_user_namespace(maps, true)?;
    } else if options.kind == Kind::Namespace {
        process::unshare_namespaces(UnshareFlags::NEWPID).map_err(SandboxError::Privilege)?;
    }
    let (death_pipe, write_end) = guardian::death_pipe().map_err(SandboxError::Fork)?;
    let (reports, report) = if options.reports {
        let (reports, report) = guardian::report_pipe().map_err(SandboxError::Fork)?;
        (Some(reports), Some(report))
    } else {
        (None, None)
    };
    match process::fork().map_err(SandboxError::Fork)? {
        Fork::Parent(child) => Ok(ForkResult::Guardian(Guardian::new(
            child, write_end, reports,
        ))),
        Fork::Child => {
            drop((write_end, reports));
            let mut numbers: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
            numbers.push(death_pipe.as_raw_fd());
            numbers.extend(report.as_ref().map(AsRawFd::as_raw_fd));
            crate::sys::inherit::close_all_but(&numbers).map_err(SandboxError::Descriptors)?;
            Ok(ForkResult::Serving(ServingProcess {
                options: options.clone(),
                ids,
                change_ids: maps.is_none_or(|maps| !maps.is_single()),
                death_pipe,
                report,
                supervised: false,
                shared: numbers,
                previous: None,
            }))
        }
    }
}

impl ServingProcess {
    /// Whether there was an earlier serving process.
    #[must_use]
    pub fn is_restarted(&self) -> bool {
        self.previous.is_some()
    }

    /// Whether another process takes over if this one is killed.
    #[must_use]
    pub fn is_supervised(&self) -> bool {
        self.supervised
    }

    /// Confines the process to `reach` and drops all privileges that `needs` doesn't name. From
    /// here on the process ends if its guardian does.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`].
    pub fn enter(self, reach: &Reach, needs: Needs) -> Result<HostAccess, SandboxError> {
        let kind = self.options.kind;
        let again = self.previous.is_some();
        let alone = |view| (view, Vec::new());
        let (view, trees) = match (self.previous, kind, reach) {
            (Some(previous), Kind::Namespace, _) => alone(mounts::reenter_namespace(previous)?),
            (Some(previous), Kind::Chroot, _) => alone(mounts::reenter_chroot(previous)?),
            (Some(previous), Kind::None, _) => alone(mounts::reenter_none(previous)?),
            (None, Kind::Namespace, Reach::Share(share)) => {
                alone(mounts::namespace(share, needs.readonly)?)
            }
            (None, Kind::Chroot, Reach::Share(share)) => {
                alone(mounts::chroot(share, needs.readonly)?)
            }
            (None, Kind::None, Reach::Share(share)) => alone(mounts::none(share, needs.readonly)?),
            (None, Kind::Namespace, Reach::Trees(trees)) => trees::namespace(trees)?,
            (None, Kind::Chroot, Reach::Trees(_)) => return Err(SandboxError::ChrootOfSeveral),
            (None, Kind::None, Reach::Trees(trees)) => trees::none(trees)?,
        };
        let View {
            root,
            proc_fds,
            mounts,
            file,
        } = view;
        let supervised = self.supervised;
        if let Some((uid, gid)) = self.ids {
            privileges::set_ids(uid, gid).map_err(SandboxError::Ids)?;
        }
        let changes = &self.options.capabilities;
        let retained = privileges::drop_capabilities(needs, self.change_ids, changes)
            .map_err(SandboxError::Capabilities)?;
        self.death_pipe.arm().map_err(SandboxError::Fork)?;
        // A file that was opened by its handle may have no known directory above it, and Landlock
        // refuses such files.
        if retained.file_handles && self.ids.is_none() {
            log::info!("Landlock: not used, as files may be opened by file handle");
        } else if needs.more_directories {
            log::info!("Landlock: not used, as directories may be mounted by --control");
        } else {
            paths::restrict_to(&allowed(reach, &root, &trees))?;
        }
        let mut descriptors = self.shared;
        descriptors.push(root.as_raw_fd());
        let root = if again {
            // The table of state names the original descriptor, and the file system takes it over.
            let duplicate = root.try_clone().map_err(SandboxError::Descriptors)?;
            std::mem::forget(root);
            duplicate
        } else {
            root
        };
        let serving = Serving {
            pipe: self.report,
            root: root.as_raw_fd(),
            mounts: mounts.filter(|_| supervised),
        };
        descriptors.extend([root.as_raw_fd(), proc_fds.as_raw_fd()]);
        descriptors.extend(serving.mounts.as_ref().map(AsRawFd::as_raw_fd));
        descriptors.extend(trees.iter().flatten().map(|reached| reached.fd.as_raw_fd()));
        Ok(HostAccess {
            root,
            file,
            trees,
            proc_fds,
            file_handles: retained.file_handles,
            in_user_namespace: self.ids.is_some(),
            may_label: retained.admin && self.ids.is_none(),
            serving,
            descriptors,
        })
    }
}

/// What a server without a sandbox reaches.
#[derive(Debug)]
pub(crate) struct HostPaths {
    /// The shared directory, or the host's root.
    pub(crate) root: OwnedFd,
    /// `/proc/self/fd`, `O_PATH`.
    pub(crate) proc_fds: OwnedFd,
    /// The directories and files of a source that has several, in their order.
    pub(crate) trees: Vec<Vec<Reached>>,
}

/// Opens what a server without a sandbox reaches, in a process that stays as it is.
///
/// # Errors
///
/// It can't be opened.
pub(crate) fn reach(reach: &Reach) -> Result<HostPaths, SandboxError> {
    let (view, trees) = match reach {
        Reach::Share(share) => (mounts::none(share, false)?, Vec::new()),
        Reach::Trees(trees) => trees::none(trees)?,
    };
    Ok(HostPaths {
        root: view.root,
        proc_fds: view.proc_fds,
        trees,
    })
}

/// What Landlock lets the process open.
fn allowed<'a>(reach: &Reach, root: &'a OwnedFd, trees: &'a [Vec<Reached>]) -> Vec<Allowed<'a>> {
    let (fd, readonly) = (root.as_fd(), false);
    match reach {
        Reach::Share(_) => vec![Allowed { fd, readonly }],
        Reach::Trees(_) => {
            let all = trees.iter().flatten();
            all.map(|Reached { fd, readonly, .. }| Allowed {
                fd: fd.as_fd(),
                readonly: *readonly,
            })
            .collect()
        }
    }
}

/// Closes all descriptors that an earlier process has left open, except `keep` and standard input,
/// output and error.
///
/// # Errors
///
/// Before Linux 5.9: the descriptors can't be listed.
pub(crate) fn close_all_but(keep: &[RawFd]) -> std::io::Result<()> {
    crate::sys::inherit::close_all_but(keep)
}

/// Takes over a descriptor that an earlier program in this process has left open.
///
/// # Errors
///
/// It isn't open.
pub(crate) fn left_open(fd: RawFd) -> std::io::Result<OwnedFd> {
    crate::sys::inherit::inherited_fd(fd)
}

/// Ends the process at once and leaves everything open for the next one.
pub(crate) fn leave(code: u8) -> ! {
    process::exit_now(code.into())
}

/// Resets what the process has inherited from its launcher beside descriptors and limits: the
/// umask, so that only the server's user may use what the server creates, and signals that are
/// blocked or ignored. With `supervises`, a supervisor's signals stay blocked: an earlier program
/// in this process may have left some pending. To be called first.
///
/// # Errors
///
/// A seccomp filter of the launcher forbids a call.
pub fn reset_inherited(supervises: bool) -> std::io::Result<()> {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    Ok(process::reset_signals(supervises)?)
}

/// Unblocks `SIGHUP`, which a supervisor sends to make the serving process return all requests.
///
/// # Errors
///
/// A seccomp filter forbids the call.
pub(crate) fn release_hangup() -> std::io::Result<()> {
    Ok(process::unblock_hangup()?)
}

/// The signals that ask a server without a supervisor to end.
///
/// # Errors
///
/// A seccomp filter of the launcher forbids a call.
pub fn ending_signals() -> std::io::Result<Vec<i32>> {
    Ok(process::ending_signals()?)
}

/// Unblocks the signals that [`begin`] has blocked.
///
/// # Errors
///
/// A seccomp filter forbids the call.
pub(crate) fn release_signals() -> std::io::Result<()> {
    Ok(process::unblock_signals()?)
}

/// Releases the memory that the start has taken and that isn't needed again: most of the program's
/// code, and what was allocated and freed, such as options and their help.
pub(crate) fn forget_set_up() {
    crate::sys::text_pages::release();
    crate::sys::heap::release();
}
