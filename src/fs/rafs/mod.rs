//! A container image in the RAFS format of the Nydus project (versions 5 and 6), read-only.
//!
//! An image is a bootstrap, which has the metadata, and blobs, which have the data in chunks,
//! compressed. The crates `nydus-rafs` and `nydus-storage` read both; this room serves what they
//! find, and owns the open files and the prefetch. The invariant: a guest gets bytes that match the
//! digests of the image, or an error.

mod error;
mod file;
mod file_system;
mod guarded;
mod image;
mod inspect;
mod prefetch;
mod store;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nydus_api::{
    BackendConfigV2, CacheConfigV2, ConfigV2, FileCacheConfig, LocalFsConfig, RafsConfigV2,
};
use nydus_storage::device::BlobFeatures;

pub use self::error::RafsError;
pub use self::prefetch::Prefetch;

use self::file::RafsFile;
use self::image::Image;
use self::prefetch::Prefetcher;
use self::store::Store;

/// Where an image is.
#[derive(Clone, Debug)]
pub struct Places {
    /// The metadata.
    pub bootstrap: PathBuf,
    /// The directory that has the blobs, each under its id.
    pub blobs: PathBuf,
    /// A writable directory for what has been read of the blobs. Servers of the same image may share
    /// it.
    pub cache: PathBuf,
}

/// Where an image is, and how it is served.
#[derive(Clone, Debug)]
pub struct RafsOptions {
    /// Where this process finds it.
    pub reached: Places,
    /// Where it is on the host, for messages.
    pub named: Places,
    /// What is read before a guest asks for it.
    pub prefetch: Prefetch,
}

/// An image as a file system.
#[derive(Debug)]
pub struct Rafs {
    files: Arc<Files>,
    /// Whether there are extended attributes.
    xattr: bool,
    /// Files and directories may be used without OPEN and OPENDIR.
    no_open: AtomicBool,
    no_opendir: AtomicBool,
    /// Ends before what it reads from.
    _prefetcher: Option<Prefetcher>,
}

/// The metadata and the data.
#[derive(Debug)]
struct Contents {
    image: Image,
    store: Store,
}

/// The files that have been opened. As nothing changes, a file needs no handle and is kept.
#[derive(Debug)]
struct Files {
    contents: Arc<Contents>,
    opened: Mutex<HashMap<u64, Arc<RafsFile>>>,
}

impl Rafs {
    /// Opens an image, checks its metadata, and starts the prefetch.
    ///
    /// # Errors
    ///
    /// See [`RafsError`].
    pub fn open(options: &RafsOptions) -> Result<Self, RafsError> {
        let RafsOptions {
            reached,
            named,
            prefetch,
        } = options;
        let config = Arc::new(config(reached));
        let image = Image::load(reached, named, &config)?;
        let blobs = image.blobs();
        let store =
            Store::open(&config, &blobs, &reached.cache).map_err(|source| RafsError::Blobs {
                blobs: named.blobs.clone(),
                cache: named.cache.clone(),
                source,
            })?;
        log::info!(
            "RAFS version {} image {}: {} inodes, {} MiB of files, {} blobs",
            image.version(),
            named.bootstrap.display(),
            image.inode_count(),
            image.bytes() >> 20,
            blobs.len()
        );
        if image.version() == 6 && !image.has_chunk_table() {
            let has_digests = |features| blobs.iter().all(|blob| blob.has_feature(features));
            if !has_digests(BlobFeatures::INLINED_CHUNK_DIGEST) {
                log::warn!(
                    "the image has no digests of its chunks: a damaged blob may go unnoticed"
                );
            }
        }
        let contents = Arc::new(Contents { image, store });
        let files = Arc::new(Files {
            contents: Arc::clone(&contents),
            opened: Mutex::default(),
        });
        let reader = Arc::clone(&files);
        let prefetcher = Prefetcher::start(&contents, *prefetch, move |inode| reader.get(inode))
            .map_err(RafsError::Prefetch)?;
        let xattr = contents.image.has_xattrs();
        Ok(Self {
            files,
            xattr,
            no_open: AtomicBool::new(false),
            no_opendir: AtomicBool::new(false),
            _prefetcher: prefetcher,
        })
    }

    /// The image without extended attributes.
    #[must_use]
    pub fn without_xattrs(self) -> Self {
        Self {
            xattr: false,
            ..self
        }
    }

    fn image(&self) -> &Image {
        &self.files.contents.image
    }
}

impl Files {
    /// The open file of an inode.
    fn get(&self, number: u64) -> crate::fs::Result<Arc<RafsFile>> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = opened.get(&number) {
            return Ok(Arc::clone(file));
        }
        let inode = self.contents.image.inode(number)?;
        if !inode.is_reg() {
            return Err(rustix::io::Errno::INVAL);
        }
        let file = Arc::new(RafsFile::new(&self.contents, number, inode.size()));
        opened.insert(number, Arc::clone(&file));
        Ok(file)
    }
}

impl Files {
    /// A directory, for FSYNCDIR.
    fn directory(&self, number: u64) -> Arc<RafsFile> {
        Arc::new(RafsFile::new(&self.contents, number, 0))
    }
}

/// The configuration of the crates. Each image has an id of its own, because they share what has
/// the same configuration.
fn config(places: &Places) -> ConfigV2 {
    static IMAGES: AtomicU64 = AtomicU64::new(0);
    let text = |path: &PathBuf| path.to_string_lossy().into_owned();
    let mut config = ConfigV2::new(&format!(
        "ringfsd-{}",
        IMAGES.fetch_add(1, Ordering::Relaxed)
    ));
    config.backend = Some(BackendConfigV2 {
        backend_type: "localfs".to_owned(),
        localfs: Some(LocalFsConfig {
            dir: text(&places.blobs),
            ..LocalFsConfig::default()
        }),
        ..BackendConfigV2::default()
    });
    config.cache = Some(CacheConfigV2 {
        cache_type: "filecache".to_owned(),
        cache_validate: true,
        file_cache: Some(FileCacheConfig {
            work_dir: text(&places.cache),
            ..FileCacheConfig::default()
        }),
        ..CacheConfigV2::default()
    });
    config.rafs = Some(RafsConfigV2 {
        mode: "direct".to_owned(),
        user_io_batch_size: 1 << 20,
        enable_xattr: true,
        ..RafsConfigV2::default()
    });
    config
}
