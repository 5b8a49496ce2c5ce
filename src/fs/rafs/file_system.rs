//! The FUSE operations on an image.
//!
//! Node ids are inode numbers of the image, so nothing has to be remembered of what a guest has
//! looked up. The invariant: nothing is changed; every operation that would change something fails
//! with `EROFS`.

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use nydus_rafs::metadata::RafsInode;
use rustix::io::Errno;

use super::Rafs;
use super::guarded::guarded;
use super::image::damaged;
use crate::fs::{
    Attributes, Caller, Changes, DirEntry, DirSink, Entry, FileSystem, Handle, HandleKind, Inspect,
    Label, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened, Result, Statistics, Timestamp,
    XattrFlags,
};

/// How long a guest may rely on what never changes.
const TTL: Duration = Duration::from_secs(24 * 60 * 60);

impl Rafs {
    fn entry(&self, inode: &dyn RafsInode) -> Result<Entry> {
        let attributes = self.image().attributes(inode)?;
        Ok(Entry {
            node: self.image().node(attributes.inode),
            // Numbers are never used for another inode.
            generation: 0,
            attributes,
            attribute_ttl: TTL,
            entry_ttl: TTL,
            submount: false,
        })
    }

    fn opened(direct: bool) -> Opened {
        Opened {
            handle: Handle(0),
            keep_cache: true,
            direct_io: direct,
            cache_dir: true,
            no_flush: true,
        }
    }

    fn xattr(&self, node: NodeId, name: &CStr) -> Result<Vec<u8>> {
        if !self.xattr {
            return Err(Errno::NOSYS);
        }
        let inode = self.image().find(node)?;
        let name = OsStr::from_bytes(name.to_bytes());
        let value = guarded(|| inode.get_xattr(name));
        value.map_err(|error| damaged(&error))?.ok_or(Errno::NODATA)
    }

    fn xattr_names(&self, node: NodeId) -> Result<Vec<u8>> {
        if !self.xattr {
            return Err(Errno::NOSYS);
        }
        let inode = self.image().find(node)?;
        let names = guarded(|| inode.get_xattrs()).map_err(|error| damaged(&error))?;
        let mut list = Vec::new();
        for name in names {
            list.extend_from_slice(&name);
            list.push(0);
        }
        Ok(list)
    }
}

impl FileSystem for Rafs {
    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn reset(&self) {
        self.no_open.store(false, Ordering::Relaxed);
        self.no_opendir.store(false, Ordering::Relaxed);
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        self.no_open.store(terms.no_open, Ordering::Relaxed);
        self.no_opendir.store(terms.no_opendir, Ordering::Relaxed);
    }

    fn lookup(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let parent = self.image().find(parent)?;
        let child = self.image().child(&*parent, name.to_bytes())?;
        self.entry(&*self.image().inode(child)?)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.entry(&*self.image().find(node)?)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        let inode = self.image().find(node)?;
        if !inode.is_dir() {
            return Err(Errno::NOTDIR);
        }
        let parent = self.image().parent(inode.ino())?;
        self.entry(&*self.image().inode(parent)?)
    }

    fn forget(&self, _: NodeId, _: u64) {}

    fn getattr(
        &self,
        _: &Caller,
        node: NodeId,
        _: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        let inode = self.image().find(node)?;
        Ok((self.image().attributes(&*inode)?, TTL))
    }

    fn statx(
        &self,
        node: NodeId,
        _: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        let inode = self.image().find(node)?;
        Ok((self.image().attributes(&*inode)?, None, TTL))
    }

    fn setattr(
        &self,
        _: &Caller,
        _: NodeId,
        _: Option<Handle>,
        _: &Changes,
    ) -> Result<(Attributes, Duration)> {
        Err(Errno::ROFS)
    }

    fn readlink(&self, _: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let inode = self.image().find(node)?;
        if !inode.is_symlink() {
            return Err(Errno::INVAL);
        }
        let target = guarded(|| inode.get_symlink()).map_err(|error| damaged(&error))?;
        Ok(target.into_vec())
    }

    fn symlink(
        &self,
        _: &Caller,
        _: NodeId,
        _: &CStr,
        _: &CStr,
        _: Option<Label<'_>>,
    ) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn mknod(&self, _: &Caller, _: NodeId, _: &CStr, _: &NewNode<'_>) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn mkdir(&self, _: &Caller, _: NodeId, _: &CStr, _: &NewNode<'_>) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn unlink(&self, _: &Caller, _: NodeId, _: &CStr) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn rmdir(&self, _: &Caller, _: NodeId, _: &CStr) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn rename(&self, _: &Caller, _: (NodeId, &CStr), _: (NodeId, &CStr), _: u32) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn link(&self, _: &Caller, _: NodeId, _: NodeId, _: &CStr) -> Result<Entry> {
        Err(Errno::ROFS)
    }

    fn open(&self, _: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let inode = self.image().find(node)?;
        if flags & (libc::O_ACCMODE | libc::O_TRUNC).cast_unsigned() != 0 {
            return Err(Errno::ROFS);
        }
        self.files.get(inode.ino())?;
        if self.no_open.load(Ordering::Relaxed) {
            return Err(Errno::NOSYS);
        }
        Ok(Self::opened(false))
    }

    fn create(
        &self,
        _: &Caller,
        _: NodeId,
        _: &CStr,
        _: u32,
        _: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }

    fn tmpfile(&self, _: &Caller, _: NodeId, _: u32, _: &NewNode<'_>) -> Result<(Entry, Opened)> {
        Err(Errno::ROFS)
    }

    fn flush(&self, _: &Caller, _: NodeId, _: Handle) -> Result<()> {
        // There is nothing to flush, and a guest that is told so stops asking.
        Err(Errno::NOSYS)
    }

    fn release(&self, _: NodeId, _: Handle) -> Result<()> {
        Ok(())
    }

    fn kill_set_id(&self, _: NodeId, _: Handle) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn file(&self, node: NodeId, _: Handle, kind: HandleKind) -> Result<OpenFile> {
        let number = self.image().find(node)?.ino();
        match kind {
            HandleKind::File => Ok(OpenFile::Object(self.files.get(number)?)),
            HandleKind::Directory => Ok(OpenFile::Object(self.files.directory(number))),
        }
    }

    fn file_to_change(&self, _: NodeId, _: Handle) -> Result<OpenFile> {
        Err(Errno::ROFS)
    }

    fn whole_file_system(&self, _: NodeId) -> Result<OpenFile> {
        Ok(OpenFile::Object(self.files.directory(self.image().root())))
    }

    fn statfs(&self, _: NodeId) -> Result<Statistics> {
        let image = self.image();
        Ok(Statistics {
            blocks: image.bytes().div_ceil(4096),
            files: image.inode_count() as u64,
            block_size: 4096,
            fragment_size: 4096,
            name_length: 255,
            ..Statistics::default()
        })
    }

    fn setxattr(&self, _: &Caller, _: NodeId, _: &CStr, _: &[u8], _: XattrFlags) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn getxattr(&self, _: &Caller, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        let value = self.xattr(node, name)?;
        match value.len() <= limit {
            true => Ok(value),
            false => Err(Errno::RANGE),
        }
    }

    fn getxattr_len(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        Ok(self.xattr(node, name)?.len())
    }

    fn listxattr(&self, _: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        let list = self.xattr_names(node)?;
        match list.len() <= limit {
            true => Ok(list),
            false => Err(Errno::RANGE),
        }
    }

    fn listxattr_len(&self, _: &Caller, node: NodeId) -> Result<usize> {
        Ok(self.xattr_names(node)?.len())
    }

    fn removexattr(&self, _: &Caller, _: NodeId, _: &CStr) -> Result<()> {
        Err(Errno::ROFS)
    }

    fn opendir(&self, _: &Caller, node: NodeId, _: u32) -> Result<Opened> {
        if !self.image().find(node)?.is_dir() {
            return Err(Errno::NOTDIR);
        }
        if self.no_opendir.load(Ordering::Relaxed) {
            return Err(Errno::NOSYS);
        }
        Ok(Self::opened(false))
    }

    fn readdir(
        &self,
        _: &Caller,
        node: NodeId,
        _: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let directory = self.image().find(node)?;
        let mut failed = None;
        self.image().children(&*directory, offset, &mut |child| {
            // The walk at the start has found no NUL in any name.
            let Ok(name) = CString::new(child.name.into_vec()) else {
                return true;
            };
            if !sink.has_room(&name) {
                return false;
            }
            let is_dot = matches!(name.to_bytes(), b"." | b"..");
            let entry = match plus && !is_dot {
                true => self
                    .image()
                    .inode(child.inode)
                    .and_then(|inode| self.entry(&*inode)),
                false => Err(Errno::NOENT),
            };
            if let Err(error) = entry
                && plus
                && !is_dot
            {
                failed = Some(error);
                return false;
            }
            let dir_entry = DirEntry {
                inode: child.inode,
                next_offset: child.next_offset,
                kind: child.kind,
                name: &name,
            };
            sink.add(dir_entry, entry.as_ref().ok());
            true
        })?;
        failed.map_or(Ok(()), Err)
    }

    fn releasedir(&self, _: NodeId, _: Handle) -> Result<()> {
        Ok(())
    }

    fn access(&self, _: &Caller, node: NodeId, mask: u32) -> Result<()> {
        let inode = self.image().find(node)?;
        // Devices and the like can be written to on a read-only file system.
        let is_stored = inode.is_dir() || inode.is_reg() || inode.is_symlink();
        match mask & libc::W_OK.cast_unsigned() != 0 && is_stored {
            true => Err(Errno::ROFS),
            false => Ok(()),
        }
    }

    fn lseek(&self, node: NodeId, _: Handle, offset: u64, whence: u32) -> Result<u64> {
        let size = self.image().find(node)?.size();
        if offset >= size {
            return Err(Errno::NXIO);
        }
        // An image has no holes.
        match whence.cast_signed() {
            libc::SEEK_DATA => Ok(offset),
            libc::SEEK_HOLE => Ok(size),
            _ => Err(Errno::INVAL),
        }
    }
}
