//! The FUSE operations of the overlay: `impl FileSystem`.
//!
//! The invariant: an operation that changes something first copies up what it changes.

use std::ffi::CStr;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Overlay;
use super::copy_up::CopyUp;
use crate::device::BackChannel;
use crate::fs::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags,
    Inspect, Label, LockOwner, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened, Result,
    Statistics, Timestamp, Usage, XattrFlags,
};
use crate::io::File;

impl FileSystem for Overlay {
    fn prepare_thread(&self) -> std::io::Result<()> {
        self.layers
            .iter()
            .try_for_each(|layer| layer.fs.prepare_thread())
    }

    fn reset(&self) {
        self.nodes.reset(None);
        self.handles.reset();
        if let Some(upper) = &self.upper {
            *upper
                .work_node
                .write()
                .unwrap_or_else(PoisonError::into_inner) = None;
        }
        for layer in &self.layers {
            layer.fs.reset();
        }
        if let Err((path, error)) = self.attach() {
            let path = path.display();
            log::error!(
                "overlay: {path} can't be reached any more, so the guest gets ESTALE: {error}"
            );
        }
    }

    /// Without OPEN nothing would say that a file must be copied up, and which layer has it.
    fn accept(&self, terms: &NegotiatedTerms) -> Result<NegotiatedTerms> {
        let terms = NegotiatedTerms {
            no_open: false,
            no_opendir: false,
            ..*terms
        };
        self.layers
            .iter()
            .try_fold(terms, |terms, layer| layer.fs.accept(&terms))
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        for layer in &self.layers {
            layer.fs.begin(terms);
        }
    }

    fn connected(&self, channel: &Arc<dyn BackChannel>) {
        for layer in &self.layers {
            layer.fs.connected(channel);
        }
    }

    fn usage(&self) -> Usage {
        self.in_use()
    }

    fn inspect(&self) -> Option<&dyn Inspect> {
        Some(self)
    }

    fn may_block(&self) -> bool {
        self.layers.iter().any(|layer| layer.fs.may_block())
    }

    fn lookup(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let parent = self.nodes.get(parent)?;
        self.find(&parent, name).map(|(_, entry)| entry)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        let node = self.nodes.get(node)?;
        let entry = self.entry_of(&node)?;
        self.nodes.count(&node);
        Ok(entry)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        let node = self.nodes.get(node)?;
        let parent = node.location().map_or(node, |at| at.parent);
        let entry = self.entry_of(&parent)?;
        self.nodes.count(&parent);
        Ok(entry)
    }

    fn forget(&self, node: NodeId, count: u64) {
        if let Ok(node) = self.nodes.get(node) {
            self.drop_refs(&node, count);
        }
    }

    fn getattr(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        self.attributes(&*self.nodes.get(node)?, handle)
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        self.attributes_with_birth(node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        self.set_attributes(caller, node, handle, changes)
    }

    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let top = self.nodes.get(node)?.top();
        self.layer(top).readlink(caller, top.node)
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        let (fs, _) = self.upper()?;
        self.make_node(parent, name, false, &|parent, name| {
            fs.symlink(caller, parent, name, target, label)
        })
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        self.make_special(caller, parent, name, new)
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let (fs, _) = self.upper()?;
        self.make_node(parent, name, true, &|parent, name| {
            fs.mkdir(caller, parent, name, new)
        })
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.remove(caller, parent, name, false)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.remove(caller, parent, name, true)
    }

    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.rename_node(caller, from, to, flags)
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.make_link(caller, node, parent, name)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        self.open_node(caller, &self.nodes.get(node)?, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, flags, new)
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.make_nameless(caller, parent, flags, new)
    }

    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        let pending: Vec<_> = self
            .layers
            .iter()
            .filter_map(|layer| layer.fs.pending_closes())
            .collect();
        if pending.is_empty() {
            return None;
        }
        Some(Box::new(move || {
            pending.into_iter().for_each(|wait| wait());
        }))
    }

    fn report_shortage(&self) {
        for layer in &self.layers {
            layer.fs.report_shortage();
        }
    }

    fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()> {
        let flushed = self.with_file(node, handle, |fs, node, handle| {
            fs.flush(caller, node, handle)
        });
        match flushed {
            // The guest's kernel would flush no file of the other layers either.
            Err(Errno::NOSYS) => Ok(()),
            flushed => flushed,
        }
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.release_file(node, handle)
    }

    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.with_file(node, handle, |fs, node, handle| {
            fs.kill_set_id(node, handle)
        })
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        match kind {
            HandleKind::File => self.open_file(node, handle),
            HandleKind::Directory => self.directory_file(node, handle),
        }
    }

    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.open_file_to_change(node, handle)
    }

    fn lock_file(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Result<Arc<File>> {
        self.with_file(node, handle, |fs, node, handle| {
            fs.lock_file(node, handle, owner)
        })
    }

    fn lock_file_if_any(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        let all = self.nodes.get(node).ok()?.all();
        all.into_iter()
            .find_map(|real| self.layer(real).lock_file_if_any(real.node, owner))
    }

    fn end_locks(&self, node: NodeId, owner: LockOwner) {
        if let Ok(node) = self.nodes.get(node) {
            for real in node.all() {
                self.layer(real).end_locks(real.node, owner);
            }
        }
    }

    fn whole_file_system(&self, node: NodeId) -> Result<OpenFile> {
        let top = match &self.upper {
            Some(_) => self.nodes.get(NodeId::ROOT)?.top(),
            None => self.nodes.get(node)?.top(),
        };
        self.layer(top).whole_file_system(top.node)
    }

    fn inode_flags(&self, node: NodeId, handle: Handle) -> Result<u32> {
        self.with_any(node, handle, |fs, node, handle| {
            fs.inode_flags(node, handle)
        })
    }

    fn set_inode_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        self.copy_up(&self.nodes.get(node)?, CopyUp::Whole)?;
        self.with_any(node, handle, |fs, node, handle| {
            fs.set_inode_flags(node, handle, flags)
        })
    }

    fn extended_inode_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        self.with_any(node, handle, |fs, node, handle| {
            fs.extended_inode_flags(node, handle)
        })
    }

    fn set_extended_inode_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        self.copy_up(&self.nodes.get(node)?, CopyUp::Whole)?;
        self.with_any(node, handle, |fs, node, handle| {
            fs.set_extended_inode_flags(node, handle, flags)
        })
    }

    fn statfs(&self, _: NodeId) -> Result<Statistics> {
        let root = self.nodes.get(NodeId::ROOT)?.top();
        self.layer(root).statfs(root.node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.check_xattrs()?;
        self.set_xattr(caller, node, name, value, flags)
    }

    fn getxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        limit: usize,
    ) -> Result<Vec<u8>> {
        self.check_xattrs()?;
        self.xattr_value(caller, node, name, limit)
    }

    fn getxattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        self.check_xattrs()?;
        self.xattr_len(caller, node, name)
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        self.check_xattrs()?;
        self.xattr_names(caller, node, limit)
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        self.check_xattrs()?;
        let names = self.xattr_names(caller, node, usize::MAX)?;
        Ok(names.len())
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.check_xattrs()?;
        self.remove_xattr(caller, node, name)
    }

    fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let flags = OFlags::from_bits_retain(flags).difference(OFlags::TRUNC);
        self.open_directory(caller, node, flags.bits())
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
        self.read_entries(caller, (node, handle), offset, plus, sink)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.release_directory(node, handle)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.check_access(caller, node, mask)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        self.with_file(node, handle, |fs, node, handle| {
            fs.lseek(node, handle, offset, whence)
        })
    }
}
