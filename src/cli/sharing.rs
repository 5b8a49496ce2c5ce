//! Options of the heading Sharing: the directory, locks, and limits of what a guest may use.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgGroup, Args};

use super::seconds::seconds;
use super::sources;
use crate::config::{OverlaySource, Prefetch, Source};
use crate::fs::passthrough::InodeFileHandles;
use crate::fs::vfs::MountPoint;

/// The directory, and what the guest may do with it.
#[derive(Clone, Debug, Args)]
#[command(
    next_help_heading = "Sharing",
    group = ArgGroup::new("locks").args(["posix_locks", "flock"]).multiple(true)
)]
pub struct Sharing {
    /// Directory to share
    ///
    /// The guest can't reach anything outside of it. If DIR is a file, the guest sees a directory
    /// that contains only that file.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present_any = ["vfs", "overlay", "rafs"],
        conflicts_with_all = ["vfs", "overlay", "rafs"]
    )]
    pub shared_dir: Option<PathBuf>,

    /// Share something at a mount point; may be repeated
    ///
    /// The guest sees each SPEC at its MOUNTPOINT, an absolute path such as / or /a/b, and empty
    /// directories above it. SPEC is a directory, overlay:LAYERS with LAYERS as for --overlay, or
    /// rafs:BOOTSTRAP,blobs=DIR[,cache-dir=DIR][,prefetch=WHAT]. --state, --supervise and live
    /// migration don't work with this.
    #[arg(
        long,
        value_name = "MOUNTPOINT=SPEC",
        value_parser = OsStringValueParser::new().try_map(|text| sources::vfs_mount(&text)),
        conflicts_with_all = ["overlay", "rafs"]
    )]
    pub vfs: Vec<(MountPoint, Source)>,

    /// Share layers as one directory
    ///
    /// LAYERS is lower=A:B,upper=U,work=W: the read-only directories A, on top of B, and the
    /// directory U for all changes, which W, an empty directory on the same file system, helps to
    /// make. Without upper= and work= the guest can't change anything. A RAFS image can be the lowest
    /// layer: rafs=BOOTSTRAP,blobs=DIR and the other settings of one. A comma in a path is written
    /// twice, a colon as \\:. More settings are xattr=trusted (default; needs CAP_SYS_ADMIN) or
    /// xattr=user for the attributes that describe layers, redirect-dir=on to let directories of
    /// lower layers be renamed, and volatile. --state, --supervise and live migration don't work
    /// with this.
    #[arg(
        long,
        value_name = "LAYERS",
        value_parser = OsStringValueParser::new().try_map(|text| sources::overlay(&text))
    )]
    pub overlay: Option<OverlaySource>,

    /// Share a RAFS image (needs --blobs)
    ///
    /// BOOTSTRAP is the file that describes the image's tree. With --overlay the image is the lowest
    /// layer, and lower= may be left out. Only builds with the feature nydus have this. --state,
    /// --supervise and live migration don't work with it.
    #[arg(long, value_name = "BOOTSTRAP", requires = "blobs")]
    pub rafs: Option<PathBuf>,

    /// Directory of the image's data
    ///
    /// The directory has a file for each blob of --rafs, named for the blob's id.
    #[arg(long, value_name = "DIR", requires = "rafs")]
    pub blobs: Option<PathBuf>,

    /// Directory for decompressed data of the image
    ///
    /// What has been read of --rafs is kept there, also for later servers and other servers of the
    /// same image. It grows to the size of the image's files.
    ///
    /// [default: a temporary directory, which is removed when the server ends]
    #[arg(long, value_name = "DIR", requires = "rafs")]
    pub cache_dir: Option<PathBuf>,

    /// Read files of the image in advance: none, named or all
    ///
    /// - none: nothing
    /// - named: the files that the image names for it
    /// - all: these first, and then all others
    ///
    /// [default: named]
    #[arg(
        long,
        value_name = "WHAT",
        value_enum,
        requires = "rafs",
        default_value_t,
        hide_default_value = true,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub rafs_prefetch: Prefetch,

    /// Refuse all changes with EROFS
    ///
    /// The guest may mount with -o ro or without.
    #[arg(long)]
    pub readonly: bool,

    /// Tell the guest about mounts in the directory (default)
    ///
    /// Where another file system is mounted, the guest shows a mount of its own with its own
    /// device number. Programs rely on device and inode numbers to tell files apart. This is the
    /// default; --no-announce-submounts turns it off.
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,

    /// Show mounts in the directory as part of it
    ///
    /// Two different files may then have the same device and inode number in the guest.
    #[arg(long)]
    pub no_announce_submounts: bool,

    /// Use file handles: never, prefer or mandatory
    ///
    /// Inodes that the guest knows are kept by file handle instead of an
    /// open descriptor each. This needs CAP_DAC_READ_SEARCH.
    ///
    /// - never: not even when descriptors run short; names are used
    ///   then
    /// - prefer: wherever file handles work
    /// - mandatory: refuse to start if unavailable
    ///
    /// [default: never; prefer with --compat virtiofsd]
    #[arg(
        long,
        value_name = "WHEN",
        value_enum,
        ignore_case = true,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub inode_file_handles: Option<InodeFileHandles>,

    /// Keep O_NOATIME when the guest opens a file
    ///
    /// The host permits it only if the server owns the file or has CAP_FOWNER; otherwise the open
    /// fails with EPERM. Without this option the flag is dropped.
    #[arg(long)]
    pub preserve_noatime: bool,

    /// Take record locks (fcntl, lockf) on the host
    ///
    /// The guest's locks then conflict with those of the host's programs and of other guests.
    /// Without this option they hold within the guest only.
    #[arg(long)]
    pub posix_locks: bool,

    /// Take whole-file locks (flock) on the host
    ///
    /// This does for locks on whole files what --posix-locks does for record locks.
    #[arg(long)]
    pub flock: bool,

    /// How long to wait for a lock; 0 sets no limit
    ///
    /// At the limit the guest's system call fails with EAGAIN, and signals that came meanwhile take
    /// effect. Linux' virtio-fs driver sends no interrupts, so a program that waits for a lock
    /// can't be interrupted or killed before that. Needs --posix-locks or --flock.
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = seconds,
        default_value = "0",
        requires = "locks"
    )]
    pub lock_wait_limit: Duration,

    /// Maximum number of inodes the guest may know
    ///
    /// Beyond the limit, LOOKUP of a new inode and all operations that create one fail with ENFILE.
    /// An inode costs the server 200 to 400 bytes of memory and the guest's kernel about four times
    /// as much; in practice the guest's memory is the tighter limit.
    #[arg(long, value_name = "N", default_value = "16777216")]
    pub max_inodes: NonZeroUsize,

    /// Maximum number of files the guest may have open
    ///
    /// Directories, and the descriptors that its locks need, count too. Beyond the limit, opening
    /// fails with ENFILE and locking with ENOLCK.
    ///
    /// [default and maximum: three quarters of the limit of open files]
    #[arg(long, value_name = "N")]
    pub max_handles: Option<NonZeroUsize>,

    /// Maximum number of descriptors for inodes and files
    ///
    /// Beyond the limit, descriptors of inodes that are not in use are closed, and reopened when
    /// needed: by file handle with CAP_DAC_READ_SEARCH, else by name.
    ///
    /// [default and maximum: three quarters of the limit of open files]
    #[arg(long, value_name = "N")]
    pub max_open_inodes: Option<NonZeroUsize>,

    /// Limit of open files (RLIMIT_NOFILE)
    ///
    /// Each inode that the guest knows, and each file that it has open, needs a descriptor. A value
    /// above the hard limit needs CAP_SYS_RESOURCE. 0 keeps both limits as they are.
    ///
    /// [default: the hard limit; 1000000 if permitted with --compat virtiofsd]
    #[arg(long, value_name = "N")]
    pub rlimit_nofile: Option<u64>,

    /// Dropped inodes whose file handles stay valid
    ///
    /// When the guest's kernel drops an inode from its cache, the guest's file handles of it fail
    /// with ESTALE. With this option those of the N inodes dropped last stay valid: for a guest
    /// that exports the directory by NFS, or whose programs use open_by_handle_at(2).
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub remember_inodes: usize,
}
