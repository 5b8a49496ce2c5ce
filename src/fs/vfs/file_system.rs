//! The FUSE operations: `impl FileSystem`.
//!
//! Each finds the file system that a node id belongs to, and calls its method with the node id that is
//! known there. The invariant: an error that would make the guest's kernel stop sending a request to
//! all file systems (`ENOSYS`) is returned only where all of them would return it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::Vfs;
use super::attributes::{BLOCK, TTL, attributes_of};
use super::entries::{at, parent_to_create, parent_to_remove, translated};
use super::readdir::Listing;
use super::sync::Directory;
use super::table::Target;
use crate::device::BackChannel;
use crate::fs::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags,
    Inspect, Label, LockOwner, MountUsage, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened,
    Result, Statistics, Timestamp, Usage, XattrFlags,
};
use crate::io::File;

/// The longest name of a directory entry, bytes.
const NAME_MAX: u32 = 255;

/// The permission to write, in the mask of ACCESS.
const W_OK: u32 = 2;

/// `SEEK_DATA` and `SEEK_HOLE` of `lseek(2)`.
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

/// Replaces `ENOSYS`, which would apply to all file systems, by `errno`.
fn instead<T>(result: Result<T>, errno: Errno) -> Result<T> {
    match result {
        Err(Errno::NOSYS) => Err(errno),
        result => result,
    }
}

impl Vfs {
    /// The result of an operation on extended attributes. If none are served at all, the guest's
    /// kernel is told so by `ENOSYS`.
    fn of_xattr<T>(&self, result: Result<T>) -> Result<T> {
        match self.options.xattr {
            true => instead(result, Errno::OPNOTSUPP),
            false => result,
        }
    }

    /// An operation on the extended attributes of a node. A directory that only leads to mount points
    /// has none: `without` is the result there.
    fn xattr<T>(
        &self,
        node: NodeId,
        without: Result<T>,
        act: impl FnOnce(&dyn FileSystem, NodeId) -> Result<T>,
    ) -> Result<T> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) if self.options.xattr => without,
            Target::Point(_) => Err(Errno::NOSYS),
            Target::Node(at) => self.of_xattr(act(&**at.fs, at.node)),
        }
    }

    fn terms(&self) -> NegotiatedTerms {
        self.changes().terms.unwrap_or_default()
    }

    /// The result of FLUSH. With `--no-open` all file systems return `ENOSYS`, and only then it may
    /// reach the guest.
    fn flushed(&self, result: Result<()>) -> Result<()> {
        match result {
            Err(Errno::NOSYS) if !self.terms().no_open => Ok(()),
            result => result,
        }
    }

    fn for_all(&self, act: impl Fn(&dyn FileSystem)) {
        self.shards.get().all().for_each(|mount| act(&*mount.fs));
    }

    fn end_session(&self, act: impl Fn(&dyn FileSystem)) {
        self.changes().terms = None;
        let table = self.shards.get();
        table.all().for_each(|mount| act(&*mount.fs));
        for number in table.points.numbers() {
            if let Some(point) = table.points.get(number) {
                point.stand_for(None);
            }
        }
    }
}

impl FileSystem for Vfs {
    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn usage(&self) -> Usage {
        self.in_use()
    }

    fn usage_by_mount(&self) -> Vec<MountUsage> {
        self.in_use_by_mount()
    }

    fn prepare_thread(&self) -> std::io::Result<()> {
        self.prepare_for(&self.shards.get())
    }

    fn reset(&self) {
        self.end_session(|fs| fs.reset());
    }

    fn unmounted(&self) {
        self.end_session(|fs| fs.unmounted());
    }

    /// What all file systems support.
    fn accept(&self, terms: &NegotiatedTerms) -> Result<NegotiatedTerms> {
        let table = self.shards.get();
        let mut accepted = *terms;
        // Those that were asked first may have accepted more; `begin` tells them.
        for mount in table.all() {
            accepted = mount.fs.accept(&accepted)?;
        }
        Ok(accepted)
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        let mut changes = self.changes();
        changes.terms = Some(*terms);
        changes.table.all().for_each(|mount| mount.fs.begin(terms));
    }

    fn connected(&self, channel: &Arc<dyn BackChannel>) {
        let mut changes = self.changes();
        changes.channel = Some(Arc::clone(channel));
        let all = changes.table.all();
        all.for_each(|mount| mount.fs.connected(channel));
    }

    fn may_block(&self) -> bool {
        self.may_block.load(Ordering::Relaxed)
    }

    fn may_block_at(&self, node: NodeId) -> bool {
        if !self.may_block() {
            return false;
        }
        let table = self.shards.get();
        match table.resolve(node) {
            // What is mounted above or below may be looked up.
            Ok(Target::Point(_)) => true,
            Ok(Target::Node(at)) if at.node == NodeId::ROOT => true,
            Ok(Target::Node(at)) if table.point_at(&at).is_some() => true,
            Ok(Target::Node(at)) => at.fs.may_block_at(at.node),
            Err(_) => false,
        }
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.find(&*self.table()?, caller, parent, name)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.find_self(&*self.table()?, node)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        self.find_parent(&*self.table()?, node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        let table = self.shards.get();
        // Nothing counts lookups of directories that lead to mount points, nor of roots.
        if let Ok(Target::Node(at)) = table.resolve(node)
            && at.node != NodeId::ROOT
        {
            at.fs.forget(at.node, count);
        }
    }

    fn getattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(point) => Ok((attributes_of(point, self.made), TTL)),
            Target::Node(at) => at.fs.getattr(caller, at.node, handle),
        }
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        let table = self.table()?;
        let at = match table.resolve(node)? {
            Target::Point(point) => {
                return Ok((attributes_of(point, self.made), Some(self.made), TTL));
            }
            Target::Node(at) => at,
        };
        match at.fs.statx(at.node, handle) {
            Err(Errno::NOSYS) => {
                let (attributes, ttl) = at.fs.getattr(&Caller::default(), at.node, handle)?;
                Ok((attributes, None, ttl))
            }
            result => result,
        }
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        let table = self.table()?;
        let at = at(&table, node, Errno::ROFS)?;
        at.fs.setattr(caller, at.node, handle, changes)
    }

    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let table = self.table()?;
        let at = at(&table, node, Errno::INVAL)?;
        at.fs.readlink(caller, at.node)
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        let table = self.table()?;
        let at = parent_to_create(&table, parent, name)?;
        let entry = at.fs.symlink(caller, at.node, name, target, label)?;
        translated(&table, &at, entry)
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let table = self.table()?;
        let at = parent_to_create(&table, parent, name)?;
        let entry = at.fs.mknod(caller, at.node, name, new)?;
        translated(&table, &at, entry)
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let table = self.table()?;
        let at = parent_to_create(&table, parent, name)?;
        let entry = at.fs.mkdir(caller, at.node, name, new)?;
        translated(&table, &at, entry)
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        let table = self.table()?;
        let at = parent_to_remove(&table, parent, name)?;
        at.fs.unlink(caller, at.node, name)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        let table = self.table()?;
        let at = parent_to_remove(&table, parent, name)?;
        at.fs.rmdir(caller, at.node, name)
    }

    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        let table = self.table()?;
        let source = parent_to_remove(&table, from.0, from.1)?;
        let target = match parent_to_create(&table, to.0, to.1) {
            // A mount point can't be replaced.
            Err(Errno::EXIST) => return Err(Errno::BUSY),
            Err(Errno::ROFS) => return Err(Errno::XDEV),
            target => target?,
        };
        if source.mount != target.mount {
            return Err(Errno::XDEV);
        }
        let (from, to) = ((source.node, from.1), (target.node, to.1));
        instead(source.fs.rename(caller, from, to, flags), Errno::INVAL)
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        let table = self.table()?;
        let inode = at(&table, node, Errno::PERM)?;
        let target = match parent_to_create(&table, parent, name) {
            Err(Errno::ROFS) => return Err(Errno::XDEV),
            target => target?,
        };
        if inode.mount != target.mount {
            return Err(Errno::XDEV);
        }
        let linked = inode.fs.link(caller, inode.node, target.node, name);
        translated(&table, &inode, instead(linked, Errno::PERM)?)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let table = self.table()?;
        let at = at(&table, node, Errno::ISDIR)?;
        at.fs.open(caller, at.node, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let table = self.table()?;
        let at = parent_to_create(&table, parent, name)?;
        let created = at.fs.create(caller, at.node, name, flags, new);
        let (entry, opened) = instead(created, Errno::ROFS)?;
        Ok((translated(&table, &at, entry)?, opened))
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let table = self.table()?;
        let at = at(&table, parent, Errno::ROFS)?;
        let made = at.fs.tmpfile(caller, at.node, flags, new);
        let (entry, opened) = instead(made, Errno::OPNOTSUPP)?;
        Ok((translated(&table, &at, entry)?, opened))
    }

    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let table = self.shards.get();
        let mut all = table.all().filter_map(|mount| mount.fs.pending_closes());
        let first = all.next()?;
        let others: Vec<_> = all.collect();
        Some(Box::new(move || {
            first();
            others.into_iter().for_each(|wait| wait());
        }))
    }

    fn report_shortage(&self) {
        self.for_all(|fs| fs.report_shortage());
    }

    fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        self.flushed(at.fs.flush(caller, at.node, handle))
    }

    fn flush_and_unlock(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
    ) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        let flushed = at.fs.flush_and_unlock(caller, at.node, handle, owner);
        self.flushed(flushed)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        at.fs.release(at.node, handle)
    }

    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        at.fs.kill_set_id(at.node, handle)
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) if kind == HandleKind::Directory => Ok(Directory::default().open()),
            Target::Point(_) => Err(Errno::BADF),
            Target::Node(at) => at.fs.file(at.node, handle, kind),
        }
    }

    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        at.fs.file_to_change(at.node, handle)
    }

    fn lock_file(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Result<Arc<File>> {
        let table = self.table()?;
        let at = at(&table, node, Errno::BADF)?;
        at.fs.lock_file(at.node, handle, owner)
    }

    fn lock_file_if_any(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        let table = self.table().ok()?;
        let at = at(&table, node, Errno::BADF).ok()?;
        at.fs.lock_file_if_any(at.node, owner)
    }

    fn end_locks(&self, node: NodeId, owner: LockOwner) {
        let table = self.shards.get();
        if let Ok(at) = at(&table, node, Errno::BADF) {
            at.fs.end_locks(at.node, owner);
        }
    }

    /// That of the root is all file systems.
    fn whole_file_system(&self, node: NodeId) -> Result<OpenFile> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Node(at) if node != NodeId::ROOT => match at.fs.whole_file_system(at.node) {
                Err(Errno::NOSYS) => Ok(Directory::default().open()),
                file => file,
            },
            Target::Node(_) | Target::Point(_) => Ok(Directory::of_all(&table).open()),
        }
    }

    fn inode_flags(&self, node: NodeId, handle: Handle) -> Result<u32> {
        let table = self.table()?;
        let at = at(&table, node, Errno::NOTTY)?;
        at.fs.inode_flags(at.node, handle)
    }

    fn set_inode_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::NOTTY)?;
        at.fs.set_inode_flags(at.node, handle, flags)
    }

    fn extended_inode_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        let table = self.table()?;
        let at = at(&table, node, Errno::NOTTY)?;
        at.fs.extended_inode_flags(at.node, handle)
    }

    fn set_extended_inode_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        let table = self.table()?;
        let at = at(&table, node, Errno::NOTTY)?;
        at.fs.set_extended_inode_flags(at.node, handle, flags)
    }

    fn maps_files(&self) -> bool {
        self.shards.get().all().all(|mount| mount.fs.maps_files())
    }

    fn open_to_map(&self, node: NodeId, writable: bool) -> Result<OwnedFd> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) => Err(Errno::ISDIR),
            Target::Node(at) => at.fs.open_to_map(at.node, writable),
        }
    }

    fn statfs(&self, node: NodeId) -> Result<Statistics> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) => Ok(Statistics {
                block_size: BLOCK,
                fragment_size: BLOCK,
                name_length: NAME_MAX,
                ..Statistics::default()
            }),
            Target::Node(at) => at.fs.statfs(at.node),
        }
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.xattr(node, Err(Errno::ROFS), |fs, node| {
            fs.setxattr(caller, node, name, value, flags)
        })
    }

    fn getxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        limit: usize,
    ) -> Result<Vec<u8>> {
        self.xattr(node, Err(Errno::NODATA), |fs, node| {
            fs.getxattr(caller, node, name, limit)
        })
    }

    fn getxattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        self.xattr(node, Err(Errno::NODATA), |fs, node| {
            fs.getxattr_len(caller, node, name)
        })
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        self.xattr(node, Ok(Vec::new()), |fs, node| {
            fs.listxattr(caller, node, limit)
        })
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        self.xattr(node, Ok(0), |fs, node| fs.listxattr_len(caller, node))
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.xattr(node, Err(Errno::ROFS), |fs, node| {
            fs.removexattr(caller, node, name)
        })
    }

    fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) if self.terms().no_opendir => Err(Errno::NOSYS),
            Target::Point(_) => Ok(Opened {
                handle: Handle(0),
                keep_cache: false,
                direct_io: false,
                cache_dir: false,
                no_flush: false,
            }),
            Target::Node(at) => at.fs.opendir(caller, at.node, flags),
        }
    }

    fn readdir(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let listing = Listing {
            caller,
            node,
            handle,
            offset,
            plus,
        };
        self.list(&*self.table()?, listing, sink)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) => Ok(()),
            Target::Node(at) => at.fs.releasedir(at.node, handle),
        }
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        let table = self.table()?;
        match table.resolve(node)? {
            Target::Point(_) if mask & W_OK != 0 => Err(Errno::ROFS),
            Target::Point(_) => Ok(()),
            Target::Node(at) => match at.fs.access(caller, at.node, mask) {
                Err(Errno::NOSYS) => Ok(()),
                result => result,
            },
        }
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        let table = self.table()?;
        let at = at(&table, node, Errno::INVAL)?;
        match at.fs.lseek(at.node, handle, offset, whence) {
            Err(Errno::NOSYS) => {
                let caller = Caller::default();
                let (attributes, _) = at.fs.getattr(&caller, at.node, Some(handle))?;
                seek_without_holes(attributes.size, offset, whence)
            }
            result => result,
        }
    }
}

/// What `lseek(2)` finds in a file of `size` bytes that is all data.
fn seek_without_holes(size: u64, offset: u64, whence: u32) -> Result<u64> {
    match whence {
        SEEK_DATA | SEEK_HOLE if offset >= size => Err(Errno::NXIO),
        SEEK_DATA => Ok(offset),
        SEEK_HOLE => Ok(size),
        _ => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_without_holes_is_all_data_up_to_its_end() {
        let seek = |offset, whence| seek_without_holes(10, offset, whence);
        assert_eq!(seek(3, SEEK_DATA), Ok(3));
        assert_eq!(seek(3, SEEK_HOLE), Ok(10));
        assert_eq!(seek(10, SEEK_DATA), Err(Errno::NXIO));
        assert_eq!(seek(10, SEEK_HOLE), Err(Errno::NXIO));
        assert_eq!(seek(0, 0), Err(Errno::INVAL));
    }
}
