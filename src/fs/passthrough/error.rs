//! The errors of sharing a directory.

use std::path::PathBuf;

use rustix::io::Errno;

use crate::state::StateError;

/// Why a directory can't be shared.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The shared directory can't be opened.
    #[error("can't open the shared directory {}", path.display())]
    OpenShared {
        /// The directory.
        path: PathBuf,
        /// The error of the host.
        source: Errno,
    },
    /// The shared directory was opened, but its attributes can't be read.
    #[error("can't read the attributes of the shared directory {}", path.display())]
    StatShared {
        /// The directory.
        path: PathBuf,
        /// The error of the host.
        source: Errno,
    },
    /// The path is neither a directory nor a regular file.
    #[error("{} is neither a directory nor a regular file", path.display())]
    NeitherFileNorDirectory {
        /// The path.
        path: PathBuf,
    },
    /// A file was passed where a directory is needed. A single file is shared through a directory
    /// made for it.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// `/proc`, which is needed to open inodes, is not available.
    #[error("can't open /proc/self/fd (is /proc mounted?)")]
    OpenProc {
        /// The error of the host.
        source: Errno,
    },
    /// The state to resume belongs to another directory.
    #[error(
        "the saved state belongs to another directory, not to {}: share the directory that it was \
         made for, or remove the state file",
        path.display()
    )]
    AnotherShare {
        /// The directory.
        path: PathBuf,
    },
    /// The table of the guest's state can't be created.
    #[error("can't create the table of the guest's state")]
    State(#[source] StateError),
    /// The table has no room for the root.
    #[error("the table of the guest's state has no room")]
    NoRoom,
    /// File handles are mandatory, but don't work.
    #[error(
        "can't use file handles on {}: they need CAP_DAC_READ_SEARCH and a file system that \
         can be exported",
        path.display()
    )]
    FileHandles {
        /// The directory.
        path: PathBuf,
        /// The error of the host.
        source: Errno,
    },
}
