//! The image's data: chunks, from the blobs by way of the cache.
//!
//! `nydus-storage` reads, decompresses and validates chunks, and writes them to the cache file of
//! their blob. Validating a chunk for each read of it would cost hundreds of times the read, so it is
//! done once. The invariant: a chunk is read from the cache file only after this process has
//! compared the chunk's bytes there with validated ones.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nydus_api::ConfigV2;
use nydus_rafs::metadata::RafsInode;
use nydus_storage::device::{
    BlobChunkInfo, BlobDevice, BlobFeatures, BlobInfo, BlobIoDesc, BlobIoVec,
};
use nydus_storage::factory::{BLOB_FACTORY, BlobFactory};
use nydus_storage::meta::BlobCompressionContextInfo;
use nydus_storage::{RAFS_MAX_CHUNK_SIZE, RAFS_MAX_CHUNKS_PER_BLOB};
use nydus_utils::digest::RafsDigest;
use rustix::io::Errno;

use super::guarded::guarded;
use super::image::Image;
use crate::io::Collector;

/// What is appended to a blob's id for its cache file.
const CACHE_SUFFIX: &str = ".blob.data";

/// How many validated chunks are kept in memory until the cache file has them, and how many bytes.
const RECENT: usize = 32;
const RECENT_BYTES: usize = 16 << 20;

/// Bytes of the longest chunk, twice, as one that can't be compressed may become longer.
const LONGEST_CHUNK: u64 = 2 * RAFS_MAX_CHUNK_SIZE;

/// Bytes of the longest table of chunks: more than the most chunks take.
const LONGEST_TABLE: u64 = 1 << 30;

/// How many damaged chunks are logged.
const REPORTED: usize = 1000;

/// The blobs of an image and their caches.
pub(super) struct Store {
    device: BlobDevice,
    blobs: Vec<Blob>,
    recent: Mutex<Recent>,
    fetching: Fetching,
    reported: Mutex<HashSet<Key>>,
}

/// One blob.
struct Blob {
    info: Arc<BlobInfo>,
    /// The cache file.
    file: File,
    /// The same file, for the engines.
    shared: crate::io::File,
    /// One bit for each chunk that the cache file is known to have.
    settled: Box<[AtomicU64]>,
}

/// Which chunk: blob and number in it.
type Key = (u32, u32);

/// Chunks that are being fetched.
#[derive(Default)]
struct Fetching {
    keys: Mutex<HashSet<Key>>,
    ended: Condvar,
}

/// A chunk is being fetched until this is dropped.
struct Fetch<'a> {
    fetching: &'a Fetching,
    key: Key,
}

impl Fetching {
    /// Begins to fetch a chunk; or waits until another thread has fetched it, and returns `None`.
    fn begin(&self, key: Key) -> Option<Fetch<'_>> {
        let mut keys = self.lock();
        if keys.insert(key) {
            return Some(Fetch {
                fetching: self,
                key,
            });
        }
        while keys.contains(&key) {
            let waited = self.ended.wait(keys);
            keys = waited.unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        self.fetching.lock().remove(&self.key);
        self.fetching.ended.notify_all();
    }
}

/// Validated chunks that the cache file may not have yet.
#[derive(Default)]
struct Recent {
    chunks: VecDeque<(Key, Arc<Vec<u8>>)>,
    bytes: usize,
}

/// Part of a file that is in one chunk.
pub(super) struct Piece {
    desc: BlobIoDesc,
}

/// Where a chunk is in the cache file of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CacheRange {
    /// Which blob.
    pub(super) blob: u32,
    /// Of the chunk's first byte.
    pub(super) offset: u64,
    /// Bytes in the chunk.
    pub(super) len: u32,
}

impl Piece {
    fn key(&self) -> Key {
        (self.desc.blob.blob_index(), self.desc.chunkinfo.id())
    }

    /// The digest that the blob has of the chunk, if it has one.
    fn digest(&self) -> Option<RafsDigest> {
        let digest = *self.desc.chunkinfo.chunk_id();
        (digest != RafsDigest::default()).then_some(digest)
    }

    /// Where the piece begins in its chunk.
    pub(super) fn offset(&self) -> u32 {
        self.desc.offset
    }

    /// Bytes.
    pub(super) fn len(&self) -> u32 {
        self.desc.size
    }

    /// Where the chunk is in the cache file.
    pub(super) fn cache_range(&self) -> CacheRange {
        CacheRange {
            blob: self.desc.blob.blob_index(),
            offset: self.desc.chunkinfo.uncompressed_offset(),
            len: self.desc.chunkinfo.uncompressed_size(),
        }
    }
}

impl Store {
    /// Opens the blobs that `config` says, and their caches in `cache`.
    pub(super) fn open(
        config: &Arc<ConfigV2>,
        blobs: &[Arc<BlobInfo>],
        cache: &Path,
    ) -> io::Result<Self> {
        for info in blobs {
            guarded(|| check_tables(config, info, cache))?;
        }
        let device = guarded(|| BlobDevice::new(config, blobs))?;
        let blobs = blobs
            .iter()
            .map(|info| {
                let name = info.blob_id() + CACHE_SUFFIX;
                let file = File::open(cache.join(name))?;
                let words = (info.chunk_count() as usize).div_ceil(64);
                Ok(Blob {
                    info: Arc::clone(info),
                    shared: crate::io::File::from_fd(file.try_clone()?.into()),
                    file,
                    settled: (0..words).map(|_| AtomicU64::new(0)).collect(),
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self {
            device,
            blobs,
            recent: Mutex::default(),
            fetching: Fetching::default(),
            reported: Mutex::default(),
        })
    }

    /// The pieces that make up `len` bytes of a file from `offset` on, which must be in the file.
    pub(super) fn pieces(
        &self,
        inode: &dyn RafsInode,
        offset: u64,
        len: usize,
    ) -> io::Result<Vec<Piece>> {
        guarded(|| {
            let mut pieces = Vec::new();
            let mut at = offset;
            for vector in inode.alloc_bio_vecs(&self.device, offset, len, true)? {
                for index in 0..vector.len() {
                    let Some(desc) = vector.blob_io_desc(index) else {
                        break;
                    };
                    let len = desc.chunkinfo.uncompressed_size();
                    let end = desc.offset.checked_add(desc.size);
                    if desc.size == 0 || end.is_none_or(|end| end > len) {
                        return Err(invalid("a chunk is shorter than the file says"));
                    }
                    if u64::from(len.max(desc.chunkinfo.compressed_size())) > LONGEST_CHUNK {
                        return Err(invalid("a chunk is longer than any can be"));
                    }
                    pieces.push(Piece { desc: desc.clone() });
                    at += u64::from(desc.size);
                }
            }
            match at - offset == len as u64 {
                true => Ok(pieces),
                false => Err(invalid("chunks are missing")),
            }
        })
    }

    /// The cache file of a blob.
    pub(super) fn file(&self, blob: u32) -> Option<&crate::io::File> {
        self.blobs.get(blob as usize).map(|blob| &blob.shared)
    }

    /// Whether the cache file is known to have the piece's chunk.
    pub(super) fn is_settled(&self, piece: &Piece) -> bool {
        self.bit(piece.key())
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Bytes of the piece, validated; `inode` is the file that it is a piece of, at `offset`.
    pub(super) fn read(
        &self,
        image: &Image,
        inode: &dyn RafsInode,
        piece: &Piece,
        offset: u64,
        each: &mut dyn FnMut(&[u8]),
    ) -> io::Result<()> {
        let (from, len) = (piece.offset() as usize, piece.len() as usize);
        let digest = || piece.digest().or_else(|| image.chunk_digest(inode, offset));
        let key = piece.key();
        let chunk = loop {
            if self.is_settled(piece) {
                let range = piece.cache_range();
                let mut bytes = vec![0; len];
                let blob = self.blob(range.blob)?;
                blob.file
                    .read_exact_at(&mut bytes, range.offset + from as u64)?;
                each(&bytes);
                return Ok(());
            }
            let kept = self.recent().find(key);
            if let Some(chunk) = kept {
                if self.settle(piece, &chunk) {
                    self.recent().remove(key);
                }
                break chunk;
            }
            // Several readers of a chunk fetch it once.
            let Some(_fetching) = self.fetching.begin(key) else {
                continue;
            };
            let fetched = self
                .fetch(piece, &digest)
                .inspect_err(|error| self.report(key, error))?;
            let chunk = Arc::new(fetched);
            if !self.settle(piece, &chunk) {
                self.recent().keep(key, &chunk);
            }
            break chunk;
        };
        let bytes = chunk.get(from..from + len);
        each(bytes.ok_or_else(|| invalid("a chunk is too short"))?);
        Ok(())
    }

    /// Reads and validates a chunk, by way of the cache.
    fn fetch(&self, piece: &Piece, digest: &dyn Fn() -> Option<RafsDigest>) -> io::Result<Vec<u8>> {
        let (blob, chunk) = (&piece.desc.blob, &piece.desc.chunkinfo);
        let len = chunk.uncompressed_size();
        let bytes = guarded(|| {
            let mut vector = BlobIoVec::new(Arc::clone(blob));
            vector.push(BlobIoDesc::new(
                Arc::clone(blob),
                chunk.clone(),
                0,
                len,
                true,
            ));
            let mut collector = Collector::new(len as usize);
            self.device.read_to(&mut collector, &mut vector)?;
            Ok(collector.into_bytes())
        })?;
        if bytes.len() != len as usize {
            return Err(invalid("the chunk is too short"));
        }
        // The storage crate may have compared no more than a checksum of 32 bits.
        match digest() {
            Some(digest) if RafsDigest::from_buf(&bytes, blob.digester()) != digest => {
                Err(invalid("the chunk's digest doesn't match"))
            }
            _ => Ok(bytes),
        }
    }

    /// Compares a validated chunk with the cache file, which gets it in the background.
    fn settle(&self, piece: &Piece, chunk: &[u8]) -> bool {
        let range = piece.cache_range();
        let Ok(blob) = self.blob(range.blob) else {
            return false;
        };
        let mut bytes = vec![0; chunk.len()];
        let cached = blob.file.read_exact_at(&mut bytes, range.offset);
        let settled = cached.is_ok() && bytes == chunk;
        if settled && let Some((word, bit)) = self.bit(piece.key()) {
            // Pairs with the load in `is_settled`.
            word.fetch_or(bit, Ordering::Release);
        }
        settled
    }

    fn blob(&self, index: u32) -> io::Result<&Blob> {
        let blob = self.blobs.get(index as usize);
        blob.ok_or_else(|| invalid("there is no such blob"))
    }

    fn bit(&self, (blob, chunk): Key) -> Option<(&AtomicU64, u64)> {
        let blob = self.blobs.get(blob as usize)?;
        let word = blob.settled.get(chunk as usize / 64)?;
        Some((word, 1 << (chunk % 64)))
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a chunk that can't be read, once.
    fn report(&self, key: Key, error: &io::Error) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= REPORTED || !reported.insert(key) {
            return;
        }
        let id = self
            .blobs
            .get(key.0 as usize)
            .map(|blob| blob.info.blob_id());
        log::error!(
            "chunk {} of blob {} can't be read, its files fail with EIO: {error}; if the blob is              whole, remove what the cache has of it",
            key.1,
            id.unwrap_or_default(),
        );
    }

    /// Logs that a cache file has lost bytes that it had.
    pub(super) fn report_cache(&self, blob: u32) {
        let id = self
            .blobs
            .get(blob as usize)
            .map(|blob| blob.info.blob_id());
        log::error!(
            "the cache file of blob {} is shorter than it was: restart the server with an empty cache",
            id.unwrap_or_default(),
        );
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // The crate keeps what it has opened for others that want the same.
        self.device = BlobDevice::default();
        BLOB_FACTORY.gc(None);
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("blobs", &self.blobs.len())
            .finish_non_exhaustive()
    }
}

impl Recent {
    fn find(&self, key: Key) -> Option<Arc<Vec<u8>>> {
        let found = self.chunks.iter().find(|(kept, _)| *kept == key);
        found.map(|(_, chunk)| Arc::clone(chunk))
    }

    fn keep(&mut self, key: Key, chunk: &Arc<Vec<u8>>) {
        if self.find(key).is_some() {
            return;
        }
        self.bytes += chunk.len();
        self.chunks.push_back((key, Arc::clone(chunk)));
        while self.chunks.len() > RECENT || self.bytes > RECENT_BYTES {
            let Some((_, oldest)) = self.chunks.pop_front() else {
                break;
            };
            self.bytes -= oldest.len();
        }
    }

    fn remove(&mut self, key: Key) {
        if let Some(at) = self.chunks.iter().position(|(kept, _)| *kept == key)
            && let Some((_, chunk)) = self.chunks.remove(at)
        {
            self.bytes -= chunk.len();
        }
    }
}

/// Loads a blob's tables of chunks once and drops them. The storage crate does the same in the
/// background, and waits for ever for what fails there in an unexpected way.
fn check_tables(config: &ConfigV2, info: &Arc<BlobInfo>, cache: &Path) -> io::Result<()> {
    if info.chunk_count() > RAFS_MAX_CHUNKS_PER_BLOB {
        return Err(invalid("a blob has more chunks than it can have"));
    }
    if !info.meta_ci_is_valid() && !info.has_feature(BlobFeatures::IS_CHUNKDICT_GENERATED) {
        return Ok(());
    }
    if info.features().is_tarfs() {
        return Ok(());
    }
    let id = info.blob_id();
    let backend = BlobFactory::new_backend(config.get_backend_config()?, &id)?;
    let table = match info.has_feature(BlobFeatures::SEPARATE) {
        true => info.get_blob_meta_id()?,
        false => id.clone(),
    };
    let other = |error| io::Error::other(format!("{error:?}"));
    let reader = backend.get_reader(&table).map_err(other)?;
    let size = reader.blob_size().map_err(other)?;
    if info.meta_ci_compressed_size() > size || info.meta_ci_uncompressed_size() > LONGEST_TABLE {
        return Err(invalid("the table of chunks is longer than it can be"));
    }
    let path = cache.join(&id).to_string_lossy().into_owned();
    BlobCompressionContextInfo::new(&path, info, Some(&reader), true).map(drop)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The errno that a guest gets if data can't be read.
pub(super) fn errno(_: &io::Error) -> io::Error {
    Errno::IO.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_is_fetched_by_one_thread_at_a_time() {
        let fetching = Fetching::default();
        let first = fetching.begin((0, 1)).unwrap();
        let other = fetching.begin((0, 2)).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| fetching.begin((0, 1)).is_none());
            drop(other);
            drop(first);
            // It was either too late to wait, or waited.
            let waited = waiting.join().unwrap();
            assert!(waited || fetching.lock().is_empty());
        });
        assert!(fetching.begin((0, 1)).is_some());
    }

    #[test]
    fn recent_chunks_are_limited_by_number_and_bytes() {
        let mut recent = Recent::default();
        for chunk in 0..100 {
            recent.keep((0, chunk), &Arc::new(vec![0; 1000]));
        }
        assert_eq!(recent.chunks.len(), RECENT);
        assert_eq!(recent.bytes, RECENT * 1000);
        assert!(recent.find((0, 99)).is_some());
        assert!(recent.find((0, 0)).is_none());
        recent.keep((1, 0), &Arc::new(vec![0; RECENT_BYTES]));
        assert_eq!(recent.chunks.len(), 1);
        recent.remove((1, 0));
        assert_eq!(recent.bytes, 0);
    }
}
