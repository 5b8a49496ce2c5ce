//! Why an image can't be served.

use std::io;
use std::path::PathBuf;

/// Why an image can't be served; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum RafsError {
    /// The bootstrap can't be copied into the cache directory, from where it is used.
    #[error("can't copy the bootstrap {} to the cache directory {}", bootstrap.display(), cache.display())]
    Copy {
        /// The image's metadata.
        bootstrap: PathBuf,
        /// The cache directory.
        cache: PathBuf,
        /// The error of the host.
        source: io::Error,
    },
    /// The bootstrap is damaged, or no bootstrap at all.
    #[error(
        "{} is damaged or not the metadata (bootstrap) of a RAFS image of version 5 or 6: get the \
         image again, or make it again",
        path.display()
    )]
    Bootstrap {
        /// The image's metadata.
        path: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
    /// A blob can't be opened, or its cache can't be made.
    #[error(
        "can't use the image's blobs in {} with the cache in {}: every blob must be there, under its \
         id, and readable; a cache that is damaged can be removed",
        blobs.display(),
        cache.display()
    )]
    Blobs {
        /// The directory of the blobs.
        blobs: PathBuf,
        /// The cache directory.
        cache: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// No thread can be started for the prefetch.
    #[error("starting the prefetch")]
    Prefetch(#[source] io::Error),
}
