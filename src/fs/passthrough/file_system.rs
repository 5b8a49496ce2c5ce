//! The FUSE operations of the passthrough: `impl FileSystem`.
//!
//! Each method checks what applies to the whole operation (read-only, negotiated terms) and calls
//! the method of `Passthrough` that does the work, in the file of its topic.
//!
//! The invariant: an operation that changes something first checks that the share is writable.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, SeekFrom};
use rustix::io::Errno;

use super::Passthrough;
use crate::fs::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags,
    Inspect, Label, LockOwner, Migrate, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened, Replay,
    Result, Statistics, Timestamp, Usage, XattrFlags,
};
use crate::io::File;
use crate::sys;

impl FileSystem for Passthrough {
    /// Gives the thread its own working directory, umask and file system ids. The passthrough owns
    /// these from now on, and nothing else may change them. A thread that was not prepared is
    /// prepared by the first request that needs it.
    fn prepare_thread(&self) -> std::io::Result<()> {
        Ok(self.ops.prepare()?)
    }

    fn reset(&self) {
        self.end_session();
        self.handover.reset();
        self.fds().inodes().clear();
        self.table().clear_thread_journals();
    }

    fn unmounted(&self) {
        // Not if this process resumed the session from another one: the next guest may be a
        // different one.
        let keeps_inodes = self.fds().inodes().keeps_forgotten() && !self.handover.is_inherited();
        if keeps_inodes {
            self.end_session();
            self.fds().forget_all();
            self.table().clear_thread_journals();
        } else {
            self.reset();
        }
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        self.ops.begin(terms);
    }

    fn usage(&self) -> Usage {
        self.fds().usage()
    }

    fn replay(&self) -> Option<&dyn Replay> {
        Some(self)
    }

    fn migrate(&self) -> Option<&dyn Migrate> {
        Some(self)
    }

    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.ops.look_up(caller, parent, name)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.ops.find_self(node)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        self.ops.find_parent(node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.fds().forget_lookups(node, count);
        if self.fds().files().has_idle() && self.fds().inodes().get(node).is_none() {
            self.fds().close_idle_files(node);
        }
    }

    fn getattr(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        self.ops.attributes_of(node, handle)
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        self.ops.attributes_with_birth(node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        self.fds().writable()?;
        self.ops.set_attributes(caller, node, handle, changes)
    }

    fn readlink(&self, _: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let inode = self.fds().inode(node)?;
        if inode.kind() != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(self.fds().fd(&inode)?, c"", Vec::new())?;
        Ok(target.into_bytes())
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        self.ops.create_node(caller, parent, name, label, || {
            self.ops.make_symlink(caller, parent, name, target)
        })
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        self.ops.create_node(caller, parent, name, new.label, || {
            self.ops.make_node(caller, parent, name, new)
        })
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        self.ops.create_node(caller, parent, name, new.label, || {
            self.ops.make_directory(caller, parent, name, new)
        })
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.fds().writable()?;
        let removed = self.ops.remove(caller, parent, name, AtFlags::empty());
        self.ops.unless_outdated(caller, &[parent], removed)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.fds().writable()?;
        let removed = self.ops.remove(caller, parent, name, AtFlags::REMOVEDIR);
        self.ops.unless_outdated(caller, &[parent], removed)
    }

    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.fds().writable()?;
        let moved = self.ops.rename(caller, from, to, flags);
        self.ops.unless_outdated(caller, &[from.0, to.0], moved)
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.fds().writable()?;
        let linked = self.ops.make_link(caller, node, parent, name);
        self.ops.unless_outdated(caller, &[parent], linked)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        if self.ops.terms().no_open() {
            return Err(Errno::NOSYS);
        }
        self.ops.open_file(caller, node, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let created = self.ops.create_file(caller, parent, name, flags, new);
        self.ops.unless_outdated(caller, &[parent], created)
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.fds().writable()?;
        let made = self.ops.labelled(new.label, None, || {
            self.ops.make_nameless(caller, parent, flags, new)
        });
        self.ops.unless_outdated(caller, &[parent], made)
    }

    /// Closes a duplicate of the descriptor, which makes network file systems report pending
    /// errors.
    fn flush(&self, _: &Caller, node: NodeId, handle: Handle) -> Result<()> {
        if self.ops.terms().is_implicit(handle, HandleKind::File) {
            // The guest never opened this file, so it doesn't close it. `ENOSYS` stops further
            // FLUSHes.
            return Err(Errno::NOSYS);
        }
        let file = self
            .fds()
            .files()
            .handles()
            .file(node, handle, HandleKind::File)?;
        let inode = self.fds().inode(node)?;
        if self.fds().is_local(&inode.key()) {
            // There is nothing to wait for, and no error that this would report.
            return Ok(());
        }
        let duplicate = self
            .fds()
            .with_room(|| rustix::io::fcntl_dupfd_cloexec(&file, 0))?;
        sys::file::close(duplicate)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        if self.ops.terms().is_implicit(handle, HandleKind::File) {
            return Ok(());
        }
        self.fds().files().record_locks().released(node, handle);
        let released = self
            .fds()
            .files()
            .handles()
            .release(node, handle, HandleKind::File)?;
        self.fds().unshare(node, &released.file);
        self.fds().cache_closed(node, released);
        Ok(())
    }

    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.fds().writable()?;
        self.ops.kill_set_id_before_change(&self.ops.file_of(
            node,
            handle,
            HandleKind::File,
            true,
        )?)
    }

    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.fds().files().closer().pending()
    }

    fn report_shortage(&self) {
        self.fds().warn_of_shortage();
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        self.ops
            .file_of(node, handle, kind, false)
            .map(OpenFile::Host)
    }

    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.ops
            .file_of(node, handle, HandleKind::File, true)
            .map(OpenFile::Host)
    }

    fn maps_files(&self) -> bool {
        true
    }

    fn open_to_map(&self, node: NodeId, writable: bool) -> Result<OwnedFd> {
        self.ops.open_to_map(node, writable)
    }

    fn lock_file(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Result<Arc<File>> {
        self.ops.lock_file_of(node, handle, owner)
    }

    fn lock_file_if_any(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        self.fds().files().record_locks().find(node, owner)
    }

    fn end_locks(&self, node: NodeId, owner: LockOwner) {
        self.fds().files().record_locks().end(node, owner);
    }

    fn whole_file_system(&self, node: NodeId) -> Result<OpenFile> {
        self.ops.file_system_file(node).map(OpenFile::Host)
    }

    fn inode_flags(&self, node: NodeId, handle: Handle) -> Result<u32> {
        self.ops.flags_of(node, handle)
    }

    fn set_inode_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        self.fds().writable()?;
        self.ops.change_flags(node, handle, flags)
    }

    fn extended_inode_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        self.ops.extended_flags(node, handle)
    }

    fn set_extended_inode_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        self.fds().writable()?;
        self.ops.change_extended_flags(node, handle, flags)
    }

    fn statfs(&self, node: NodeId) -> Result<Statistics> {
        self.ops.statistics(node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.fds().writable()?;
        self.ops.set_xattr(caller, node, name, value, flags)
    }

    fn getxattr(&self, _: &Caller, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        self.ops.xattr(node, name, limit)
    }

    fn getxattr_len(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        self.ops.xattr_len(node, name)
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        self.ops.xattr_names(caller, node, limit)
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        self.ops.xattr_names_len(caller, node)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.fds().writable()?;
        self.ops.remove_xattr(caller, node, name)
    }

    fn opendir(&self, _: &Caller, node: NodeId, _flags: u32) -> Result<Opened> {
        if self.ops.terms().no_opendir() {
            return Err(Errno::NOSYS);
        }
        self.fds().room_for_handle()?;
        let fd = self.fds().open_directory(&*self.fds().inode(node)?)?;
        self.ops.opened_directory(node, fd)
    }

    fn readdir(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        self.ops.read_entries(node, handle, offset, plus, sink)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        if self.ops.terms().is_implicit(handle, HandleKind::Directory) {
            return Ok(());
        }
        self.fds()
            .files()
            .handles()
            .release(node, handle, HandleKind::Directory)
            .map(drop)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.ops.check_access(caller, node, mask)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        let file = self.ops.file_of(node, handle, HandleKind::File, false)?;
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&file, to)
    }
}
