//! The resolved configuration of a server. The invariant: an impossible setting has no
//! representation.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU64, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::device::Tag;
use crate::fs::overlay::XattrPrefix;
use crate::fs::passthrough;
use crate::fs::vfs::MountPoint;
use crate::fuse::SessionOptions;
use crate::io::Choice;
use crate::limits;
use crate::metrics::Address;
use crate::sandbox;

/// Where front ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// On a socket that the server creates.
    Path(PathBuf),
    /// On a listening socket inherited from the launcher.
    Inherited(RawFd),
}

/// What is served to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of the host, or a directory that contains a single file of the host.
    Directory(PathBuf),
    /// Several file systems, each at its mount point.
    Vfs(Vec<(MountPoint, Self)>),
    /// Layers seen as one file system.
    Overlay(OverlaySource),
    /// A RAFS image.
    Rafs(RafsSource),
}

/// Layers seen as one file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlaySource {
    /// The read-only layers, topmost first.
    pub lower: Vec<Source>,
    /// The directory that takes all changes. Without it the file system is read-only.
    pub upper: Option<PathBuf>,
    /// The directory in which changes are prepared, on the file system of `upper`.
    pub work: Option<PathBuf>,
    /// How the layers are described and changed.
    pub settings: OverlaySettings,
}

/// How the layers of an overlay are described and changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverlaySettings {
    /// The prefix of the extended attributes that describe layers.
    pub xattr_prefix: XattrPrefix,
    /// Directories of lower layers can be renamed.
    pub redirect_dirs: bool,
    /// Data that are copied to the upper layer need not survive a crash of the host.
    pub volatile: bool,
}

/// A RAFS image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RafsSource {
    /// The file that describes the image's tree.
    pub bootstrap: PathBuf,
    /// The directory that contains the image's data.
    pub blobs: PathBuf,
    /// The directory for data that have been decompressed; without it a temporary one.
    pub cache_dir: Option<PathBuf>,
    /// What is read before a guest asks for it.
    pub prefetch: Prefetch,
}

/// What is read of an image before a guest asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// The files that the image names for it.
    #[default]
    Named,
    /// All files, those that the image names first.
    All,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Vfs(mounts) => {
                for (number, (point, source)) in mounts.iter().enumerate() {
                    let separator = if number == 0 { "" } else { ", " };
                    write!(f, "{separator}{point}={source}")?;
                }
                Ok(())
            }
            Self::Overlay(OverlaySource { lower, upper, .. }) => {
                f.write_str("overlay:lower=")?;
                for (number, layer) in lower.iter().enumerate() {
                    let separator = if number == 0 { "" } else { ":" };
                    write!(f, "{separator}{layer}")?;
                }
                match upper {
                    Some(upper) => write!(f, ",upper={}", upper.display()),
                    None => Ok(()),
                }
            }
            Self::Rafs(image) => write!(f, "rafs:{}", image.bootstrap.display()),
        }
    }
}

impl Source {
    /// Whether an image is among what is served.
    #[must_use]
    pub fn has_image(&self) -> bool {
        match self {
            Self::Directory(_) => false,
            Self::Vfs(mounts) => mounts.iter().any(|(_, source)| source.has_image()),
            Self::Overlay(overlay) => overlay.lower.iter().any(Self::has_image),
            Self::Rafs(_) => true,
        }
    }

    /// The option that asks for it.
    #[must_use]
    pub fn option(&self) -> &'static str {
        match self {
            Self::Directory(_) => "--shared-dir",
            Self::Vfs(_) => "--vfs",
            Self::Overlay(_) => "--overlay",
            Self::Rafs(_) => "--rafs",
        }
    }

    /// Whether its files are files of the host, which a VMM can map.
    #[must_use]
    pub fn can_be_mapped(&self) -> bool {
        match self {
            Self::Directory(_) => true,
            Self::Vfs(mounts) => mounts.iter().all(|(_, source)| source.can_be_mapped()),
            Self::Overlay(_) | Self::Rafs(_) => false,
        }
    }
}

/// How many descriptors the server may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    /// As many as the hard limit permits.
    Most,
    /// As many as the inherited soft limit permits.
    Inherited,
    /// This many.
    Limit(u64),
    /// This many if permitted, and as many as the hard limit permits if it doesn't or permits more.
    AtLeast(u64),
}

/// How much space the shared directory may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceLimit {
    /// Bytes.
    pub bytes: NonZeroU64,
    /// Files and directories, itself included.
    pub inodes: Option<NonZeroU64>,
}

/// The configuration of a server.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front ends connect.
    pub listen: Listen,
    /// The group that may connect to a socket that the server creates, besides the server's user.
    pub socket_group: Option<String>,
    /// What guests see.
    pub source: Source,
    /// The tag in the configuration space, for front ends that read it there.
    pub tag: Option<Tag>,
    /// Request queues, without the high-priority queue.
    pub request_queues: NonZeroU16,
    /// Worker threads.
    pub workers: NonZeroUsize,
    /// The runtime of the workers.
    pub runtime: Choice,
    /// How long a worker polls its rings at most before it sleeps; zero disables polling.
    pub poll: Duration,
    /// The file that keeps the session's state across servers.
    pub state: Option<PathBuf>,
    /// The socket that the server is controlled by.
    pub control: Option<PathBuf>,
    /// The file that has the process id and is locked while the server runs.
    pub pid_file: Option<PathBuf>,
    /// Replace a file at the socket's path even if it isn't a socket.
    pub replaces_files: bool,
    /// Where the counters can be read.
    pub metrics: Option<Address>,
    /// Exit after the first session.
    pub once: bool,
    /// Restart the serving process if it is killed.
    pub supervise: bool,
    /// Map files by FS_MAP and FS_UNMAP under a VMM that hasn't accepted SHMEM.
    pub dax_fs_map: bool,
    /// The limit of open descriptors.
    pub descriptors: Descriptors,
    /// How much the guest may ask for.
    pub limits: limits::Settings,
    /// How much the guest may store.
    pub space: Option<SpaceLimit>,
    /// The sandbox of the server.
    pub sandbox: sandbox::Options,
    /// What guests may do with the directory.
    pub share: Share,
}

/// What guests may do with the directory: the options of the two rooms that implement it.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// Options of the file system.
    pub file_system: passthrough::Options,
    /// Options of the FUSE session.
    pub session: SessionOptions,
}

impl Config {
    /// The default of the longest busy poll, in microseconds. Programs wait longer between two
    /// requests than a benchmark does: `tar x`, `git status` and the like took 0.87 of the time that
    /// they take with 50, and with 200 hardly less.
    pub const DEFAULT_POLL_US: u32 = 100;

    /// What an operator knows the share by: the tag, else the directory or what else is served.
    #[must_use]
    pub fn name(&self) -> String {
        let source = || match &self.source {
            Source::Directory(path) => path.display().to_string(),
            Source::Vfs(_) | Source::Overlay(_) | Source::Rafs(_) => match &self.listen {
                Listen::Path(path) => path.display().to_string(),
                Listen::Inherited(_) => self.source.option().trim_start_matches('-').to_owned(),
            },
        };
        self.tag.as_ref().map_or_else(source, ToString::to_string)
    }

    /// One worker for each processor, up to four: a single guest rarely keeps more busy, and each
    /// costs its ring's memory.
    #[must_use]
    pub fn default_workers() -> NonZeroUsize {
        const MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);
        std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cpus| cpus.min(MAX))
    }
}
