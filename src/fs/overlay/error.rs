//! Why an overlay can't be served.
//!
//! The invariant: each error names the path concerned and says what to do.

use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

/// Why an overlay can't be served.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// There is neither a lower layer nor an upper one.
    #[error("an overlay needs at least one layer")]
    NoLayers,
    /// The server can't see which directories of the layers hide others.
    #[error(
        "an overlay's layers are described by trusted.overlay attributes, which the server can't read \
         without CAP_SYS_ADMIN: start it as root with --modcaps=+sys_admin, or with xattr=user if the \
         layers have user.overlay attributes, as rootless containers' have"
    )]
    NotTrusted,
    /// More layers than handles can name.
    #[error("{count} layers are too many: at most {most} are possible")]
    TooManyLayers {
        /// How many there are.
        count: usize,
        /// How many are allowed.
        most: usize,
    },
    /// A directory can't be used.
    #[error("{what} {} of the overlay can't be used", path.display())]
    Directory {
        /// Which of the directories.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: Errno,
    },
    /// The upper and the work directory can't be renamed into each other.
    #[error(
        "the upper directory {} and the work directory {} must be on the same file system and in \
         the same mount of it, because finished copies are renamed from one to the other",
        upper.display(), work.display()
    )]
    DifferentMounts {
        /// The upper directory.
        upper: PathBuf,
        /// The work directory.
        work: PathBuf,
    },
    /// One directory is the other or lies within it.
    #[error(
        "{} lies within {}: layers, upper and work directory of an overlay must be separate",
        inner.display(), outer.display()
    )]
    Nested {
        /// The directory that lies within.
        inner: PathBuf,
        /// The directory around it.
        outer: PathBuf,
    },
    /// Another server has the work directory.
    #[error(
        "the work directory {} is in use by another server: give each overlay an upper and a work \
         directory of its own",
        path.display()
    )]
    InUse {
        /// The work directory.
        path: PathBuf,
    },
    /// The upper file system can't store what an overlay needs.
    #[error("the file system of the upper directory {} can't {act}; {advice}", path.display())]
    Unsupported {
        /// The upper directory.
        path: PathBuf,
        /// What was tried.
        act: &'static str,
        /// What to do.
        advice: &'static str,
        /// The host's error.
        #[source]
        source: Errno,
    },
}
