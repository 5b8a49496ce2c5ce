//! Why a directory can't be shared.

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
        /// What the host says.
        source: Errno,
    },
    /// The shared directory has been opened, and can't be asked who it is.
    #[error("can't read the attributes of the shared directory {}", path.display())]
    StatShared {
        /// The directory.
        path: PathBuf,
        /// What the host says.
        source: Errno,
    },
    /// What is to be shared can't be.
    #[error("{} is neither a directory nor a regular file", path.display())]
    NeitherFileNorDirectory {
        /// What it is called.
        path: PathBuf,
    },
    /// A single file is shared in a directory that is made for it, and not by itself.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// What it is called.
        path: PathBuf,
    },
    /// There is no `/proc`, through which inodes are opened.
    #[error("can't open /proc/self/fd (is /proc mounted?)")]
    OpenProc {
        /// What the host says.
        source: Errno,
    },
    /// The state that was to be gone on from is of something else.
    #[error(
        "the state is of another directory than {}: give the one that it was made for, or remove \
         the state file",
        path.display()
    )]
    AnotherShare {
        /// The directory.
        path: PathBuf,
    },
    /// There is no table of what the guest knows.
    #[error("making the table of what the guest knows")]
    State(#[source] StateError),
    /// There is no room in it.
    #[error("the table of what the guest knows has no room")]
    NoRoom,
    /// File handles are mandatory and don't work.
    #[error(
        "can't use file handles on {}: they need CAP_DAC_READ_SEARCH and a file system that \
         can be exported",
        path.display()
    )]
    FileHandles {
        /// The directory.
        path: PathBuf,
        /// What the host says.
        source: Errno,
    },
}
