//! The FUSE operations of an adapter: `impl FileSystem`.
//!
//! Each is one call of the file system, with its arguments translated. The invariant: an entry that
//! doesn't reach the guest isn't counted for it.

use std::ffi::CStr;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID};
use fuse_backend_rs::api::filesystem::{
    DirEntry as BackendDirEntry, Entry as BackendEntry, FsOptions, GetxattrReply, IoctlData,
    ListxattrReply, SetattrValid,
};
use rustix::io::Errno;

use super::convert;
use super::directory::Page;
use super::handles::Open;
use super::open_object::OpenObject;
use super::{Adapter, Backend};
use crate::fs::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags, Label,
    LockOwner, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened, Result, Statistics, XattrFlags,
};

/// Set-user-ID and set-group-ID.
const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// Commands of IOCTL: numbers of `linux/fs.h`.
mod ioctls {
    pub(super) const GET_FLAGS: u32 = 0x8008_6601;
    pub(super) const SET_FLAGS: u32 = 0x4008_6602;
    pub(super) const GET_EXTENDED: u32 = 0x801c_581f;
    pub(super) const SET_EXTENDED: u32 = 0x401c_5820;
}

impl<F: Backend> Adapter<F> {
    /// The permission bits for a new inode: without the umask, unless the file system applies it.
    fn mode(&self, new: &NewNode<'_>) -> u32 {
        if self.core.wants(FsOptions::DONT_MASK) {
            new.mode
        } else {
            new.mode & !(new.umask & 0o777)
        }
    }

    /// The handle for an opened file.
    fn add(
        &self,
        caller: &Caller,
        (node, kind): (NodeId, HandleKind),
        handle: Option<F::Handle>,
        flags: u32,
    ) -> Result<Handle> {
        // A guest that needs no OPEN sends no RELEASE.
        if handle.is_none() && self.core.needs_no_open(kind) {
            return Ok(Handle(0));
        }
        let context = self.core.context(caller)?;
        let handle = handle.map(Into::into);
        let open = Open::new((node, kind), handle, flags, context);
        Ok(self.core.handles().add(open))
    }

    /// Calls the file system's ioctl `command` with `data`; returns `out` bytes.
    fn ioctl(
        &self,
        (node, handle): (NodeId, Handle),
        command: u32,
        data: Option<&[u8]>,
        out: u32,
    ) -> Result<Vec<u8>> {
        let open = self.core.handles().get(node, handle, None)?;
        self.core.call(|fs| {
            let (inode, handle) = (self.core.inode(node), F::Handle::from(open.handle));
            let data = IoctlData { result: 0, data };
            let answer = fs.ioctl(&open.context, inode, handle, 0, command, data, out)?;
            Ok(answer.data.unwrap_or_default().to_vec())
        })
    }

    /// Sets the security label of what was just created, or removes it again.
    fn labelled(
        &self,
        caller: &Caller,
        (parent, name): (NodeId, &CStr),
        entry: Entry,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        let Some(label) = label else {
            return Ok(entry);
        };
        let set = self.setxattr(
            caller,
            entry.node,
            label.name,
            label.value,
            XattrFlags::empty(),
        );
        let Err(errno) = set else {
            return Ok(entry);
        };
        // What fails here leaves an inode without a label, which the guest isn't told of.
        let _ = match entry.attributes.mode & libc::S_IFMT {
            libc::S_IFDIR => self.rmdir(caller, parent, name),
            _ => self.unlink(caller, parent, name),
        };
        self.core.forget(entry.node, 1);
        Err(errno)
    }
}

impl<F: Backend> FileSystem for Adapter<F> {
    fn reset(&self) {
        self.core.end();
    }

    fn accept(&self, terms: &NegotiatedTerms) -> Result<NegotiatedTerms> {
        self.core.init(terms)
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        // Unless `accept` has done it.
        if !self.core.has_begun_with(terms)
            && let Err(errno) = self.core.init(terms)
        {
            log::error!("the file system can't be used: {errno}");
        }
    }

    fn may_block(&self) -> bool {
        self.core.options().may_block
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let entry = self.core.call_for(caller, |fs, context| {
            fs.lookup(context, self.core.inode(parent), name)
        })?;
        self.core.found(&entry)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.lookup_dots(node, c".")
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        // None above the root.
        if node == NodeId::ROOT {
            return self.lookup_self(node);
        }
        self.lookup_dots(node, c"..")
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.core.forget(node, count);
    }

    fn getattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        let handle = self.core.handle_if_any(node, handle)?;
        let (stat, ttl) = self.core.call_for(caller, |fs, context| {
            fs.getattr(context, self.core.inode(node), handle)
        })?;
        Ok((convert::attributes(&stat), ttl))
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        if changes.is_empty() && caller.kill_set_id {
            self.clear_set_id(caller, node)?;
            return self.getattr(caller, node, handle);
        }
        let handle = self.core.handle_if_any(node, handle)?;
        let (stat, mut valid) = convert::changes(changes);
        valid.set(SetattrValid::KILL_SUIDGID, caller.kill_set_id);
        let (stat, ttl) = self.core.call_for(caller, |fs, context| {
            fs.setattr(context, self.core.inode(node), stat, handle, valid)
        })?;
        Ok((convert::attributes(&stat), ttl))
    }

    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        self.core.call_for(caller, |fs, context| {
            fs.readlink(context, self.core.inode(node))
        })
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        let entry = self.core.call_for(caller, |fs, context| {
            fs.symlink(context, target, self.core.inode(parent), name)
        })?;
        self.labelled(caller, (parent, name), self.core.found(&entry)?, label)
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let entry = self.core.call_for(caller, |fs, context| {
            let parent = self.core.inode(parent);
            fs.mknod(context, parent, name, self.mode(new), new.rdev, new.umask)
        })?;
        self.labelled(caller, (parent, name), self.core.found(&entry)?, new.label)
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let entry = self.core.call_for(caller, |fs, context| {
            let parent = self.core.inode(parent);
            fs.mkdir(context, parent, name, self.mode(new), new.umask)
        })?;
        self.labelled(caller, (parent, name), self.core.found(&entry)?, new.label)
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            fs.unlink(context, self.core.inode(parent), name)
        })
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            fs.rmdir(context, self.core.inode(parent), name)
        })
    }

    fn rename(
        &self,
        caller: &Caller,
        (from, name): (NodeId, &CStr),
        (to, new_name): (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            let (from, to) = (self.core.inode(from), self.core.inode(to));
            fs.rename(context, from, name, to, new_name, flags)
        })
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        let entry = self.core.call_for(caller, |fs, context| {
            fs.link(
                context,
                self.core.inode(node),
                self.core.inode(parent),
                name,
            )
        })?;
        self.core.found(&entry)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let (handle, options, _) = self.core.call_for(caller, |fs, context| {
            fs.open(context, self.core.inode(node), flags, kill_flag(caller))
        })?;
        let handle = self.add(caller, (node, HandleKind::File), handle, flags)?;
        Ok(convert::opened(handle, options))
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let arguments = CreateIn {
            flags: flags | libc::O_CREAT.cast_unsigned(),
            mode: self.mode(new),
            umask: new.umask,
            fuse_flags: kill_flag(caller),
        };
        let (entry, handle, options, _) = self.core.call_for(caller, |fs, context| {
            fs.create(context, self.core.inode(parent), name, arguments)
        })?;
        let entry = self.core.found(&entry)?;
        let handle = self.add(caller, (entry.node, HandleKind::File), handle, flags)?;
        let labelled = self.labelled(caller, (parent, name), entry, new.label);
        if labelled.is_err() {
            // The guest isn't told of the handle.
            let _ = self.release(entry.node, handle);
        }
        let entry = labelled?;
        Ok((entry, convert::opened(handle, options)))
    }

    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.core.forgets().pending()
    }

    fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()> {
        self.flush_and_unlock(caller, node, handle, LockOwner(0))
    }

    fn flush_and_unlock(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
    ) -> Result<()> {
        let open = self.core.opened(node, handle, HandleKind::File)?;
        self.core.call_for(caller, |fs, context| {
            let (inode, handle) = (self.core.inode(node), F::Handle::from(open.handle));
            fs.flush(context, inode, handle, owner.0)
        })
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        let handles = self.core.handles();
        let open = handles.remove(node, handle, HandleKind::File)?;
        self.core.release(&open)
    }

    fn kill_set_id(&self, node: NodeId, _: Handle) -> Result<()> {
        let kernel = Caller {
            uid: Some(0),
            gid: Some(0),
            ..Caller::default()
        };
        self.clear_set_id(&kernel, node)
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        let open = self.core.opened(node, handle, kind)?;
        let object = OpenObject::new(Arc::clone(&self.core), open);
        Ok(OpenFile::Object(Arc::new(object)))
    }

    fn inode_flags(&self, node: NodeId, handle: Handle) -> Result<u32> {
        let bytes = self.ioctl((node, handle), ioctls::GET_FLAGS, None, 8)?;
        let flags = bytes.first_chunk().ok_or(Errno::IO)?;
        Ok(u32::from_ne_bytes(*flags))
    }

    fn set_inode_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        let bytes = u64::from(flags).to_ne_bytes();
        self.ioctl((node, handle), ioctls::SET_FLAGS, Some(&bytes), 0)
            .map(drop)
    }

    fn extended_inode_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        let bytes = self.ioctl((node, handle), ioctls::GET_EXTENDED, None, 28)?;
        bytes.first_chunk().copied().ok_or(Errno::IO)
    }

    fn set_extended_inode_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        self.ioctl((node, handle), ioctls::SET_EXTENDED, Some(flags), 0)
            .map(drop)
    }

    fn statfs(&self, node: NodeId) -> Result<Statistics> {
        let context = self.core.kernel()?;
        let stat = self
            .core
            .call(|fs| fs.statfs(&context, self.core.inode(node)))?;
        Ok(convert::statistics(&stat))
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            fs.setxattr(context, self.core.inode(node), name, value, flags.bits())
        })
    }

    fn getxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        limit: usize,
    ) -> Result<Vec<u8>> {
        let size = reply_size(limit)?;
        let reply = self.core.call_for(caller, |fs, context| {
            fs.getxattr(context, self.core.inode(node), name, size)
        })?;
        match reply {
            GetxattrReply::Value(value) => Ok(value),
            GetxattrReply::Count(_) => Err(Errno::IO),
        }
    }

    fn getxattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        let reply = self.core.call_for(caller, |fs, context| {
            fs.getxattr(context, self.core.inode(node), name, 0)
        })?;
        Ok(match reply {
            GetxattrReply::Value(value) => value.len(),
            GetxattrReply::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
        })
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        let size = reply_size(limit)?;
        let reply = self.core.call_for(caller, |fs, context| {
            fs.listxattr(context, self.core.inode(node), size)
        })?;
        match reply {
            ListxattrReply::Names(names) => Ok(names),
            ListxattrReply::Count(_) => Err(Errno::IO),
        }
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        let reply = self.core.call_for(caller, |fs, context| {
            fs.listxattr(context, self.core.inode(node), 0)
        })?;
        Ok(match reply {
            ListxattrReply::Names(names) => names.len(),
            ListxattrReply::Count(count) => usize::try_from(count).unwrap_or(usize::MAX),
        })
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            fs.removexattr(context, self.core.inode(node), name)
        })
    }

    fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let (handle, options) = self.core.call_for(caller, |fs, context| {
            fs.opendir(context, self.core.inode(node), flags)
        })?;
        let handle = self.add(caller, (node, HandleKind::Directory), handle, flags)?;
        Ok(convert::opened(handle, options))
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
        let open = self.core.opened(node, handle, HandleKind::Directory)?;
        let mut page = Page::new(&self.core, sink);
        if plus {
            let size = page.size_for_entries();
            let read = self.core.call_for(caller, |fs, context| {
                let (inode, handle) = (self.core.inode(node), F::Handle::from(open.handle));
                let mut add = |dir_entry: BackendDirEntry<'_>, entry: BackendEntry| {
                    page.add(&dir_entry, Some(&entry))
                };
                fs.readdirplus(context, inode, handle, size, offset, &mut add)
            });
            // One that has only READDIR is read by that; the guest looks the names up.
            if read != Err(Errno::NOSYS) {
                return read;
            }
        }
        let size = page.size_for_names();
        self.core.call_for(caller, |fs, context| {
            let (inode, handle) = (self.core.inode(node), F::Handle::from(open.handle));
            let mut add = |dir_entry: BackendDirEntry<'_>| page.add(&dir_entry, None);
            fs.readdir(context, inode, handle, size, offset, &mut add)
        })
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        let handles = self.core.handles();
        let open = handles.remove(node, handle, HandleKind::Directory)?;
        self.core.release(&open)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.core.call_for(caller, |fs, context| {
            fs.access(context, self.core.inode(node), mask)
        })
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        let open = self.core.opened(node, handle, HandleKind::File)?;
        self.core.call(|fs| {
            let (inode, handle) = (self.core.inode(node), F::Handle::from(open.handle));
            fs.lseek(&open.context, inode, handle, offset, whence)
        })
    }
}

impl<F: Backend> Adapter<F> {
    /// LOOKUP of `.` and `..`, if the file system finds nodes that way.
    fn lookup_dots(&self, node: NodeId, name: &CStr) -> Result<Entry> {
        if !self.core.wants(FsOptions::EXPORT_SUPPORT) {
            return Err(Errno::NOSYS);
        }
        let context = self.core.kernel()?;
        let entry = self
            .core
            .call(|fs| fs.lookup(&context, self.core.inode(node), name))?;
        self.core.found(&entry)
    }

    fn clear_set_id(&self, caller: &Caller, node: NodeId) -> Result<()> {
        let (attributes, _) = self.getattr(caller, node, None)?;
        let mode = attributes.mode;
        let mut cleared = mode & !libc::S_ISUID;
        // Without the group's execute bit it stands for mandatory locking.
        if mode & libc::S_IXGRP != 0 {
            cleared &= !libc::S_ISGID;
        }
        if mode & SET_ID == cleared & SET_ID || mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let caller = Caller {
            kill_set_id: false,
            ..*caller
        };
        let changes = Changes {
            mode: Some(cleared & 0o7777),
            ..Changes::default()
        };
        self.setattr(&caller, node, None, &changes).map(drop)
    }
}

/// The flag of OPEN and CREATE that says whether the set-ID bits are to be cleared.
fn kill_flag(caller: &Caller) -> u32 {
    if caller.kill_set_id {
        FOPEN_IN_KILL_SUIDGID
    } else {
        0
    }
}

/// The size of a reply that may have `limit` bytes. A size of 0 would ask for the length.
fn reply_size(limit: usize) -> Result<u32> {
    match u32::try_from(limit).unwrap_or(u32::MAX) {
        0 => Err(Errno::RANGE),
        size => Ok(size),
    }
}
