//! The image's metadata: inodes, names and attributes, from the bootstrap.
//!
//! The bootstrap is copied before it is used, so that nothing changes it while it is mapped, and
//! its whole tree is checked once. The invariant: only inodes that this walk has found are looked
//! at afterwards, whatever number a guest asks for.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use nydus_api::ConfigV2;
use nydus_rafs::RafsIoReader;
use nydus_rafs::metadata::direct_v6::OndiskInodeWrapper;
use nydus_rafs::metadata::{RafsInode, RafsInodeExt, RafsInodeWalkAction, RafsSuper};
use nydus_storage::device::BlobInfo;
use nydus_utils::digest::RafsDigest;
use rustix::io::Errno;

use super::Places;
use super::error::RafsError;
use super::guarded::guarded;
use crate::fs::{Attributes, NodeId, Result, Timestamp};

/// The longest name and the longest target of a symbolic link (uapi `linux/limits.h`).
const NAME_MAX: usize = 255;
const PATH_MAX: u64 = 4096;

/// The tree of an image.
pub(super) struct Image {
    superblock: RafsSuper,
    /// The bootstrap, to read the table of files to prefetch.
    reader: Mutex<RafsIoReader>,
    root: u64,
    /// Numbers of all inodes, ascending.
    inodes: Box<[u64]>,
    /// Bytes of all regular files.
    bytes: u64,
    /// When the bootstrap was last changed.
    made: Timestamp,
}

/// One entry of a directory.
pub(super) struct Child {
    pub(super) name: OsString,
    pub(super) inode: u64,
    pub(super) kind: u8,
    /// Where reading continues.
    pub(super) next_offset: u64,
}

impl Image {
    /// Copies the bootstrap to the cache directory, loads the copy, and checks all of it.
    pub(super) fn load(
        reached: &Places,
        named: &Places,
        config: &Arc<ConfigV2>,
    ) -> std::result::Result<Self, RafsError> {
        let copy = Copy::of(reached, &named.bootstrap).map_err(|source| RafsError::Copy {
            bootstrap: named.bootstrap.clone(),
            cache: named.cache.clone(),
            source,
        })?;
        let damaged = |source| RafsError::Bootstrap {
            path: named.bootstrap.clone(),
            source,
        };
        guarded(|| Self::check(&copy, config)).map_err(damaged)
    }

    fn check(copy: &Copy, config: &Arc<ConfigV2>) -> io::Result<Self> {
        // A first look with every digest that metadata have: version 5 has one for each inode, and
        // that of the root covers them all.
        let mut validating = (**config).clone();
        if let Some(rafs) = &mut validating.rafs {
            rafs.validate = true;
        }
        let (superblock, _) = RafsSuper::load_from_file(&copy.path, validating.into(), false)?;
        if superblock.meta.is_v5() {
            superblock.get_inode(superblock.superblock.root_ino(), true)?;
        }
        drop(superblock);
        // The one to serve from doesn't validate them again with each lookup.
        let (superblock, reader) =
            RafsSuper::load_from_file(&copy.path, Arc::clone(config), false)?;
        let root = superblock.superblock.root_ino();
        let (inodes, bytes) = Walk::new(&superblock).all(root)?;
        Ok(Self {
            superblock,
            reader: Mutex::new(reader),
            root,
            inodes,
            bytes,
            made: copy.made,
        })
    }

    pub(super) fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn version(&self) -> u32 {
        if self.superblock.meta.is_v5() { 5 } else { 6 }
    }

    /// The digest that the bootstrap has of the chunk at `offset` in a file, if it has one.
    pub(super) fn chunk_digest(&self, inode: &dyn RafsInode, offset: u64) -> Option<RafsDigest> {
        // Version 5 has them in the chunks themselves.
        let inode = inode.as_any().downcast_ref::<OndiskInodeWrapper>()?;
        let index = offset.checked_div(u64::from(self.superblock.meta.chunk_size))?;
        let chunk = guarded(|| inode.get_chunk_info(u32::try_from(index).unwrap_or(u32::MAX)));
        let digest = *chunk.ok()?.chunk_id();
        (digest != RafsDigest::default()).then_some(digest)
    }

    /// Whether the bootstrap has the digests of all chunks.
    pub(super) fn has_chunk_table(&self) -> bool {
        self.superblock.meta.chunk_table_size > 0
    }

    pub(super) fn blobs(&self) -> Vec<Arc<BlobInfo>> {
        self.superblock.superblock.get_blob_infos()
    }

    pub(super) fn root(&self) -> u64 {
        self.root
    }

    /// The guest's number of an inode. The root of a version 6 image isn't inode 1.
    pub(super) fn node(&self, inode: u64) -> NodeId {
        match inode {
            inode if inode == self.root => NodeId::ROOT,
            inode if inode == NodeId::ROOT.0 => NodeId(self.root),
            inode => NodeId(inode),
        }
    }

    /// The inode that the guest means.
    pub(super) fn find(&self, node: NodeId) -> Result<Arc<dyn RafsInode>> {
        self.inode(self.node(node.0).0)
    }

    /// The inode of a number in the image.
    pub(super) fn inode(&self, number: u64) -> Result<Arc<dyn RafsInode>> {
        if self.inodes.binary_search(&number).is_err() {
            return Err(Errno::STALE);
        }
        guarded(|| self.superblock.get_inode(number, false)).map_err(|error| damaged(&error))
    }

    /// The inode of `name` in a directory.
    pub(super) fn child(&self, parent: &dyn RafsInode, name: &[u8]) -> Result<u64> {
        if !parent.is_dir() {
            return Err(Errno::NOTDIR);
        }
        // The walk has found every name that there is, in order: any error means that there is none.
        let child = guarded(|| parent.get_child_by_name(OsStr::from_bytes(name)));
        child
            .map(|child| child.ino())
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Errno::NOENT,
                _ => damaged(&error),
            })
    }

    /// The directory that a directory is in.
    pub(super) fn parent(&self, inode: u64) -> Result<u64> {
        if inode == self.root {
            return Ok(inode);
        }
        guarded(|| self.superblock.get_extended_inode(inode, false))
            .map(|inode| inode.parent())
            .map_err(|error| damaged(&error))
    }

    /// Calls `each` for the entries of a directory from `offset` on, until it returns false.
    pub(super) fn children(
        &self,
        directory: &dyn RafsInode,
        offset: u64,
        each: &mut dyn FnMut(Child) -> bool,
    ) -> Result<()> {
        if !directory.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let walked = guarded(|| {
            directory.walk_children_inodes(offset, &mut |child, name, inode, next_offset| {
                let kind = match child {
                    Some(child) => kind(&*child),
                    None => kind(&*self.superblock.get_inode(inode, false)?),
                };
                let child = Child {
                    name,
                    inode,
                    kind,
                    next_offset,
                };
                Ok(match each(child) {
                    true => RafsInodeWalkAction::Continue,
                    false => RafsInodeWalkAction::Break,
                })
            })
        });
        walked.map_err(|error| damaged(&error))
    }

    /// The attributes of an inode.
    pub(super) fn attributes(&self, inode: &dyn RafsInode) -> Result<Attributes> {
        let found = guarded(|| Ok(inode.get_attr())).map_err(|error| damaged(&error))?;
        let is_device = inode.is_blkdev() || inode.is_chrdev();
        let size = size(inode);
        let modified = match found.mtime == 0 && found.ino == self.root {
            // Builders record none for the root.
            true => self.made,
            false => Timestamp {
                seconds: found.mtime.cast_signed(),
                nanoseconds: found.mtimensec,
            },
        };
        // An image without owners is root's.
        let (uid, gid) = match self.superblock.meta.explicit_uidgid() {
            true => (found.uid, found.gid),
            false => (0, 0),
        };
        Ok(Attributes {
            inode: inode.ino(),
            size,
            blocks: size.div_ceil(512),
            accessed: modified,
            modified,
            changed: modified,
            mode: found.mode,
            links: found.nlink,
            uid,
            gid,
            rdev: if is_device { found.rdev } else { 0 },
            block_size: 4096,
        })
    }

    pub(super) fn has_xattrs(&self) -> bool {
        self.superblock.meta.has_xattr()
    }

    /// The inodes that the image names for prefetch.
    pub(super) fn named_for_prefetch(&self) -> io::Result<Vec<u64>> {
        let mut reader = self.reader.lock().unwrap_or_else(|e| e.into_inner());
        if self.superblock.meta.prefetch_table_entries == 0 {
            return Ok(Vec::new());
        }
        let named = guarded(|| self.superblock.get_prefetched_inos(&mut reader))?;
        // The table is filled up with zeros.
        let named = named.into_iter().map(u64::from).filter(|inode| *inode != 0);
        Ok(named.collect())
    }

    /// The regular files among `inodes`, and in the directories among them, each once.
    pub(super) fn files_below(&self, inodes: Vec<u64>) -> Result<Vec<u64>> {
        let (mut files, mut seen) = (Vec::new(), HashSet::new());
        let mut left = inodes;
        left.reverse();
        while let Some(number) = left.pop() {
            if !seen.insert(number) {
                continue;
            }
            let inode = self.inode(number)?;
            if inode.is_reg() {
                files.push(number);
            } else if inode.is_dir() {
                self.children(&*inode, 0, &mut |child| {
                    if !is_dot(&child.name) {
                        left.push(child.inode);
                    }
                    true
                })?;
            }
        }
        Ok(files)
    }

    /// Bytes of the regular files among `inodes`.
    pub(super) fn bytes_of(&self, files: &[u64]) -> u64 {
        let sizes = files.iter().filter_map(|file| self.inode(*file).ok());
        sizes.fold(0, |sum, inode| sum.saturating_add(inode.size()))
    }
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("version", &self.version())
            .field("inodes", &self.inodes.len())
            .finish_non_exhaustive()
    }
}

/// The bytes of a file, or of the target of a symbolic link.
fn size(inode: &dyn RafsInode) -> u64 {
    match inode.is_symlink() {
        true => u64::from(inode.get_symlink_size()),
        false => inode.size(),
    }
}

/// The `DT_*` of an inode.
fn kind(inode: &dyn RafsInode) -> u8 {
    // Both are taken from the bits of `st_mode`.
    ((inode.get_attr().mode >> 12) & 0xf) as u8
}

fn is_dot(name: &OsStr) -> bool {
    name == "." || name == ".."
}

/// What the metadata should never give after the check of the whole tree.
pub(super) fn damaged(error: &io::Error) -> Errno {
    log::error!("the image's metadata are inconsistent: {error}");
    Errno::IO
}

/// A private copy of the bootstrap: nobody else can change or truncate it while it is mapped. It is
/// removed once it is open.
struct Copy {
    path: PathBuf,
    /// When the original was last changed.
    made: Timestamp,
}

impl Copy {
    fn of(
        Places {
            bootstrap, cache, ..
        }: &Places,
        named: &Path,
    ) -> io::Result<Self> {
        static COPIES: AtomicU64 = AtomicU64::new(0);
        // Images of old converters name their blob by this file: by its name up to the first dot.
        let name = named.file_name().unwrap_or_default().as_bytes();
        let id = name.split(|byte| *byte == b'.').next().unwrap_or_default();
        let mut source = File::open(bootstrap)?;
        let changed = source.metadata()?;
        let made = Timestamp {
            seconds: changed.mtime(),
            nanoseconds: u32::try_from(changed.mtime_nsec()).unwrap_or(0),
        };
        loop {
            let number = COPIES.fetch_add(1, Ordering::Relaxed);
            let suffix = format!(".ringfsd-{}-{number}", std::process::id());
            let mut name = OsStr::from_bytes(id).to_os_string();
            name.push(suffix);
            let options = OpenOptions::new().write(true).create_new(true).to_owned();
            let copy = cache.join(name);
            match options.clone().mode(0o600).open(&copy) {
                Ok(mut target) => {
                    let copy = Self { path: copy, made };
                    io::copy(&mut source, &mut target)?;
                    return Ok(copy);
                }
                // Left by a process that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The check of a whole tree.
struct Walk<'a> {
    superblock: &'a RafsSuper,
    inodes: HashSet<u64>,
    directories: Vec<(u64, u64)>,
    bytes: u64,
}

impl<'a> Walk<'a> {
    fn new(superblock: &'a RafsSuper) -> Self {
        Self {
            superblock,
            inodes: HashSet::new(),
            directories: Vec::new(),
            bytes: 0,
        }
    }

    /// All inodes, ascending, and the bytes of all files.
    fn all(mut self, root: u64) -> io::Result<(Box<[u64]>, u64)> {
        let inode = self.superblock.get_inode(root, false)?;
        if !inode.is_dir() {
            return Err(invalid("the root is no directory"));
        }
        self.inodes.insert(root);
        self.directories.push((root, root));
        while let Some((number, parent)) = self.directories.pop() {
            self.directory(number, parent)?;
        }
        let mut inodes: Vec<u64> = self.inodes.into_iter().collect();
        inodes.sort_unstable();
        Ok((inodes.into(), self.bytes))
    }

    fn directory(&mut self, number: u64, parent: u64) -> io::Result<()> {
        let directory = self.superblock.get_inode(number, false)?;
        let mut last: Option<OsString> = None;
        let mut dots = 0;
        directory.walk_children_inodes(0, &mut |child, name, inode, _| {
            match name.as_bytes() {
                b"." if inode == number => dots += 1,
                b".." if inode == parent => dots += 1,
                b"." | b".." => return Err(invalid("a directory names another one as its own")),
                text if text.is_empty()
                    || text.len() > NAME_MAX
                    || text.iter().any(|byte| matches!(byte, b'/' | 0)) =>
                {
                    return Err(invalid("a name is invalid"));
                }
                // They are found by binary search.
                _ if last.as_ref().is_some_and(|last| *last >= name) => {
                    return Err(invalid("the names of a directory aren't in order"));
                }
                _ => self.child(child, number, inode)?,
            }
            if !is_dot(&name) {
                last = Some(name);
            }
            Ok(RafsInodeWalkAction::Continue)
        })?;
        match dots {
            2 => Ok(()),
            _ => Err(invalid(
                "a directory lacks the names of itself and its parent",
            )),
        }
    }

    fn child(
        &mut self,
        child: Option<Arc<dyn RafsInode>>,
        parent: u64,
        number: u64,
    ) -> io::Result<()> {
        let child = match child {
            Some(child) => {
                let meta = &self.superblock.meta;
                child.validate(meta.inodes_count, u64::from(meta.chunk_size))?;
                child
            }
            None => self.superblock.get_inode(number, false)?,
        };
        if child.ino() != number {
            return Err(invalid("an inode has another number than its name says"));
        }
        let first = self.inodes.insert(number);
        if child.is_dir() {
            if !first {
                return Err(invalid("a directory has two names"));
            }
            self.directories.push((number, parent));
        } else if child.is_symlink() {
            let target = child.get_symlink()?;
            if target.is_empty()
                || size(&*child) >= PATH_MAX
                || target.len() as u64 != size(&*child)
            {
                return Err(invalid("the target of a symbolic link is invalid"));
            }
        } else if child.is_reg() {
            if i64::try_from(child.size()).is_err() {
                return Err(invalid("a file is too long"));
            }
            if first {
                self.bytes = self.bytes.saturating_add(child.size());
            }
        } else if !(child.is_blkdev() || child.is_chrdev() || child.is_fifo() || child.is_sock()) {
            return Err(invalid("the kind of an inode is unknown"));
        }
        if first {
            for name in child.get_xattrs()? {
                child.get_xattr(OsStr::from_bytes(&name))?;
            }
        }
        Ok(())
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
