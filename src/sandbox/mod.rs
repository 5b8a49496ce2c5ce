//! What keeps the server in: namespaces, root, ids, capabilities, Landlock, seccomp.
//!
//! The steps, and the order in which the server takes them (`docs/sandbox.md` has the reasons):
//! [`begin`] splits the process in two; the guardian stays outside, and [`Inside`] takes what
//! remains: [`enter`](Inside::enter) leaves the host's file systems and what isn't needed of the
//! server's privileges, and [`Filter::install`] leaves all system calls but those that are made.
//! The invariant: what was asked for holds, or there is an error; nothing weaker takes its place.

pub mod exec;
mod filter;
mod guardian;
mod id_map;
mod mounts;
mod paths;
mod privileges;
mod supervisor;
mod syscall_allowlist;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

pub use self::filter::{Filter, FilterError, Seccomp};
pub use self::guardian::{Ending, Guardian};
pub use self::id_map::{IdRange, IdRangeError};
pub use self::privileges::{CapabilityChanges, UnknownCapability};

pub use self::supervisor::{
    Event, FdIdentity, Identity, Ids, Past, SandboxRefs, Serving, Supervisor, now,
};

use self::guardian::DeathPipe;
use self::id_map::Maps;
use self::mounts::View;
use self::supervisor::Taken;
use crate::sys::process::{self, Fork};

/// How the server is kept to the shared directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// By namespaces of its own, in which there is nothing but that directory.
    #[default]
    Namespace,
    /// By `chroot(2)`.
    Chroot,
    /// By nothing of the kind: somebody else has seen to it.
    None,
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How the server is kept to the shared directory.
    pub kind: Kind,
    /// What becomes of a system call that the server doesn't make.
    pub seccomp: Seccomp,
    /// The user ids of the namespace and those that they are on the host.
    pub users: Vec<IdRange>,
    /// The group ids.
    pub groups: Vec<IdRange>,
    /// Capabilities to be kept beyond those that are needed, and to be dropped of these.
    pub capabilities: CapabilityChanges,
}

/// What the server is going to do, as far as it decides what has to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Nothing is changed in the shared directory.
    pub readonly: bool,
    /// Files are reached by file handle.
    pub file_handles: bool,
}

/// Why the server can't be kept in as asked for; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No second process.
    #[error("making the process that serves")]
    Fork(#[source] Errno),
    /// The namespaces that take a privilege.
    #[error(
        "--sandbox namespace: can't make namespaces without CAP_SYS_ADMIN, which this process \
         lacks (in a container): give it that capability, or start the server with --sandbox \
         chroot, which takes CAP_SYS_CHROOT, or --sandbox none, which takes nothing"
    )]
    Privilege(#[source] Errno),
    /// A user namespace.
    #[error(
        "--sandbox namespace: can't make a user namespace: allow them (sysctls \
         user.max_user_namespaces, kernel.unprivileged_userns_clone, \
         kernel.apparmor_restrict_unprivileged_userns; the seccomp profile of a container), start \
         the server as root, or with --sandbox none"
    )]
    UserNamespace(#[source] Errno),
    /// The maps of ids.
    #[error("mapping the ids of the user namespace")]
    Map(#[from] id_map::MapError),
    /// Maps without a namespace to have them.
    #[error("--uid-map and --gid-map need --sandbox namespace")]
    MapsWithoutNamespace,
    /// The directory can't be had there.
    #[error("can't open the shared directory {path}")]
    Share {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// The server's user has no way into the directory.
    #[error(
        "the user that the server runs as ({user}) can't enter the shared directory {path}: give it \
         the permission to search it (chmod o+x, setfacl -m u:{user}:x), or start the server as a user \
         that has it"
    )]
    NoEntry {
        /// Which directory.
        path: PathBuf,
        /// Whom the host takes the server for.
        user: u32,
    },
    /// A step of leaving the host's mounts.
    #[error("--sandbox {kind}: {act}; --sandbox {other} does without")]
    Mounts {
        /// The kind of sandbox.
        kind: &'static str,
        /// What was being done.
        act: &'static str,
        /// What doesn't do it.
        other: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// A single file, where no directory can be made for it.
    #[error(
        "{0} is a single file, which is shared in a directory of its own that only --sandbox \
         namespace can make: take that, or share a directory with a hard link to the file in it"
    )]
    NotADirectory(PathBuf),
    /// Taking on ids of the namespace.
    #[error("taking on an id of the user namespace")]
    Ids(#[source] Errno),
    /// Dropping capabilities.
    #[error("dropping capabilities")]
    Capabilities(#[source] Errno),
    /// Descriptors that others left.
    #[error("closing the descriptors that the launcher has left open")]
    Descriptors(#[source] std::io::Error),
    /// A descriptor that isn't what it was.
    #[error(
        "descriptor {0} is not what it was when the server began: the process that served has \
         replaced it"
    )]
    Replaced(RawFd),
    /// A step of going back to where the earlier process was.
    #[error("going back to the mounts of the process that served before: {act}")]
    Back {
        /// What was being done.
        act: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// Landlock is there and refuses.
    #[error("restricting the server to the shared directory with Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Which of the two processes this has become.
#[derive(Debug)]
pub enum ForkResult {
    /// The one that the launcher has started, which waits for the other one to end.
    Outside(Guardian),
    /// The one that serves.
    Inside(Inside),
}

/// The process that serves, before it has left anything.
#[derive(Debug)]
pub struct Inside {
    options: Options,
    /// User and group that it is in its user namespace, if there is one.
    ids: Option<(u32, u32)>,
    /// There are other ids than the server's own.
    change_ids: bool,
    death_pipe: DeathPipe,
    /// To tell the guardian by, if it is a supervisor.
    report: Option<OwnedFd>,
    /// The numbers of what both processes have.
    common: Vec<RawFd>,
    /// Where an earlier process has served, if one has.
    taken: Option<Taken>,
}

/// What the server has of the host once it is in.
#[derive(Debug)]
pub struct Place {
    /// What is shared, `O_PATH`.
    pub root: OwnedFd,
    /// The single file, `O_PATH`, that the root was made for, where it was.
    pub file: Option<OwnedFd>,
    /// `/proc/self/fd`, `O_PATH`, without a way up from there where that can be had.
    pub proc_fds: OwnedFd,
    /// Whether files can be opened by file handle there.
    pub file_handles: bool,
    /// Whether the server has `CAP_SYS_ADMIN` on the host, by which attributes are set that are kept
    /// from others.
    pub may_label: bool,
    /// To be told once the server serves.
    pub serving: Serving,
    /// The numbers of all descriptors that the process has, but those that an earlier one has left
    /// and that are not its own for long: see [`close_all_but`].
    pub descriptors: Vec<RawFd>,
}

/// Splits the process in two. Of descriptors beyond standard error the one that serves keeps
/// those of `keep` alone. Signals that end a server are held in both until [`release_signals`].
///
/// To be called while the process has one thread, and owns no descriptor but those.
///
/// # Errors
///
/// See [`SandboxError`]; no second process is left then.
pub fn begin(options: &Options, keep: &[BorrowedFd<'_>]) -> Result<ForkResult, SandboxError> {
    let maps = Maps::wanted(options)?;
    process::hold_signals().map_err(SandboxError::Fork)?;
    // What is forked from here on is in the PID namespace.
    let ids = maps.as_ref().map(Maps::own_ids);
    if let Some(maps) = &maps {
        id_map::enter_user_namespace(maps, true)?;
    } else if options.kind == Kind::Namespace {
        process::unshare_namespaces(UnshareFlags::NEWPID).map_err(SandboxError::Privilege)?;
    }
    let (death_pipe, hand) = guardian::death_pipe().map_err(SandboxError::Fork)?;
    match process::fork().map_err(SandboxError::Fork)? {
        Fork::Parent(child) => Ok(ForkResult::Outside(Guardian::new(child, hand))),
        Fork::Child => {
            drop(hand);
            let mut numbers: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
            numbers.push(death_pipe.as_raw_fd());
            crate::sys::inherit::close_all_but(&numbers).map_err(SandboxError::Descriptors)?;
            Ok(ForkResult::Inside(Inside {
                options: options.clone(),
                ids,
                change_ids: maps.is_none_or(|maps| !maps.is_single()),
                death_pipe,
                report: None,
                common: numbers,
                taken: None,
            }))
        }
    }
}

impl Inside {
    /// Whether an earlier process has served.
    #[must_use]
    pub fn is_again(&self) -> bool {
        self.taken.is_some()
    }

    /// Whether another process goes on should this one be killed.
    #[must_use]
    pub fn is_supervised(&self) -> bool {
        self.report.is_some()
    }

    /// Leaves everything of the host but `share`, and all privileges that `needs` doesn't name.
    /// The process ends from now on if its guardian does.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`].
    pub fn enter(self, share: &Path, needs: Needs) -> Result<Place, SandboxError> {
        let kind = self.options.kind;
        let again = self.taken.is_some();
        let View {
            root,
            proc_fds,
            mounts,
            file,
        } = match (self.taken, kind) {
            (Some(taken), Kind::Namespace) => mounts::namespace_again(taken)?,
            (Some(taken), Kind::Chroot) => mounts::chroot_again(taken)?,
            (Some(taken), Kind::None) => mounts::none_again(taken)?,
            (None, Kind::Namespace) => mounts::namespace(share, needs.readonly)?,
            (None, Kind::Chroot) => mounts::chroot(share, needs.readonly)?,
            (None, Kind::None) => mounts::none(share, needs.readonly)?,
        };
        let supervised = self.report.is_some();
        if let Some((uid, gid)) = self.ids {
            privileges::take_ids(uid, gid).map_err(SandboxError::Ids)?;
        }
        let changes = &self.options.capabilities;
        let kept = privileges::drop_capabilities(needs, self.change_ids, changes)
            .map_err(SandboxError::Capabilities)?;
        self.death_pipe.fasten().map_err(SandboxError::Fork)?;
        // A file that was opened by its handle needs not be connected to a directory, and
        // Landlock refuses what isn't.
        if kept.file_handles && self.ids.is_none() {
            log::info!("Landlock: not used, as files may be reached by file handle");
        } else {
            paths::restrict_to(&root)?;
        }
        let mut descriptors = self.common;
        descriptors.push(root.as_raw_fd());
        let root = if again {
            // What goes on from a table finds the one that has been there in it, and takes it over.
            let another = root.try_clone().map_err(SandboxError::Descriptors)?;
            std::mem::forget(root);
            another
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
        Ok(Place {
            root,
            file,
            proc_fds,
            file_handles: kept.file_handles,
            may_label: kept.admin && self.ids.is_none(),
            serving,
            descriptors,
        })
    }
}

/// Closes whatever an earlier process has left open, but `keep` and standard input, output and error.
///
/// # Errors
///
/// Before Linux 5.9: the descriptors can't be listed.
pub fn close_all_but(keep: &[RawFd]) -> std::io::Result<()> {
    crate::sys::inherit::close_all_but(keep)
}

/// Takes over a descriptor that an earlier program in this process has left open.
///
/// # Errors
///
/// It isn't open.
pub fn left_open(fd: RawFd) -> std::io::Result<OwnedFd> {
    crate::sys::inherit::inherited_fd(fd)
}

/// Ends the process at once, leaving all open that an other one goes on with.
pub fn leave(code: u8) -> ! {
    process::exit_now(code.into())
}

/// Undoes what the process has inherited of its launcher beside descriptors and limits: what it makes is
/// its own user's alone, whatever the umask was, and no signal is blocked or ignored that matters here. With
/// `supervises`, signals stay blocked that a supervisor goes by: an earlier program in this process may
/// have left some pending. To be called first.
///
/// # Errors
///
/// Whatever a seccomp filter of the launcher says.
pub fn reset_inherited(supervises: bool) -> std::io::Result<()> {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    Ok(process::reset_signals(supervises)?)
}

/// Lets `SIGHUP` come, by which a supervisor asks for all requests to be given back.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub fn release_hangup() -> std::io::Result<()> {
    Ok(process::release_hangup()?)
}

/// Lets the signals come that [`begin`] has held.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub fn release_signals() -> std::io::Result<()> {
    Ok(process::release_signals()?)
}

/// What this room does is done, and so is all else that the start needs: gives back the memory of
/// the program's code.
pub fn forget_set_up() {
    crate::sys::text_pages::give_back();
}
