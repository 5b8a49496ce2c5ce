//! What keeps the server in: namespaces, root, ids, capabilities, Landlock, seccomp.
//!
//! The steps, and the order in which the server takes them (`docs/sandbox.md` has the reasons):
//! [`begin`] splits the process in two; the guardian stays outside, and [`Inside`] takes what
//! remains: [`enter`](Inside::enter) leaves the host's file systems and what isn't needed of the
//! server's privileges, and [`Filter::install`] leaves all system calls but those that are made.
//! The invariant: what was asked for holds, or there is an error; nothing weaker takes its place.

mod calls;
mod filter;
mod guardian;
mod id_map;
mod mounts;
mod paths;
mod privileges;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::thread::UnshareFlags;

pub use self::filter::{Filter, FilterError, Seccomp};
pub use self::guardian::{Ending, Guardian};
pub use self::id_map::{IdRange, IdRangeError};
pub use self::privileges::{CapabilityChanges, UnknownCapability};

use self::guardian::Leash;
use self::id_map::Maps;
use self::mounts::View;
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
    /// Landlock is there and refuses.
    #[error("restricting the server to the shared directory with Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Which of the two processes this has become.
#[derive(Debug)]
pub enum Begun {
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
    leash: Leash,
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
}

/// Splits the process in two. Of descriptors beyond standard error the one that serves keeps
/// those of `keep` alone. Signals that end a server are held in both until [`release_signals`].
///
/// To be called while the process has one thread, and owns no descriptor but those.
///
/// # Errors
///
/// See [`SandboxError`]; no second process is left then.
pub fn begin(options: &Options, keep: &[BorrowedFd<'_>]) -> Result<Begun, SandboxError> {
    let mapped = !options.users.is_empty() || !options.groups.is_empty();
    if mapped && options.kind != Kind::Namespace {
        return Err(SandboxError::MapsWithoutNamespace);
    }
    process::hold_signals().map_err(SandboxError::Fork)?;
    let maps = (options.kind == Kind::Namespace && (mapped || privileges::is_ordinary_user()))
        .then(|| Maps::new(&options.users, &options.groups));
    // What is forked from here on is in the PID namespace.
    let ids = maps.as_ref().map(Maps::own_ids);
    if let Some(maps) = &maps {
        id_map::enter_user_namespace(maps)?;
    } else if options.kind == Kind::Namespace {
        process::unshare_namespaces(UnshareFlags::NEWPID).map_err(SandboxError::Privilege)?;
    }
    let (leash, hand) = guardian::leash().map_err(SandboxError::Fork)?;
    match process::fork().map_err(SandboxError::Fork)? {
        Fork::Parent(child) => Ok(Begun::Outside(Guardian::new(child, hand))),
        Fork::Child => {
            drop(hand);
            let mut numbers: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
            numbers.push(leash.as_raw_fd());
            crate::sys::inherit::close_all_but(&numbers).map_err(SandboxError::Descriptors)?;
            Ok(Begun::Inside(Inside {
                options: options.clone(),
                ids,
                change_ids: maps.is_none_or(|maps| !maps.is_single()),
                leash,
            }))
        }
    }
}

impl Inside {
    /// Leaves everything of the host but `share`, and all privileges that `needs` doesn't name.
    /// The process ends from now on if its guardian does.
    ///
    /// # Errors
    ///
    /// See [`SandboxError`].
    pub fn enter(&self, share: &Path, needs: Needs) -> Result<Place, SandboxError> {
        let View {
            root,
            proc_fds,
            file,
        } = match self.options.kind {
            Kind::Namespace => mounts::namespace(share, needs.readonly)?,
            Kind::Chroot => mounts::chroot(share, needs.readonly)?,
            Kind::None => mounts::none(share, needs.readonly)?,
        };
        if let Some((uid, gid)) = self.ids {
            privileges::take_ids(uid, gid).map_err(SandboxError::Ids)?;
        }
        let changes = &self.options.capabilities;
        let kept = privileges::drop_capabilities(needs, self.change_ids, changes)
            .map_err(SandboxError::Capabilities)?;
        self.leash.fasten().map_err(SandboxError::Fork)?;
        // A file that was opened by its handle needs not be connected to a directory, and
        // Landlock refuses what isn't.
        if kept.file_handles && self.ids.is_none() {
            log::info!("Landlock: not used, as files may be reached by file handle");
        } else {
            paths::restrict_to(&root)?;
        }
        Ok(Place {
            root,
            file,
            proc_fds,
            file_handles: kept.file_handles,
        })
    }
}

/// Lets the signals come that [`begin`] has held.
///
/// # Errors
///
/// Whatever a seccomp filter says.
pub fn release_signals() -> std::io::Result<()> {
    Ok(process::release_signals()?)
}
