//! Open files and directories.
//!
//! The handle of a file is the layer's own with the layer's index in its upper bits, so reading and
//! writing need no table. A file that was opened in a lower layer and copied up afterwards is opened
//! again in the upper layer when its handle is next used, so that it shows what is written from then
//! on. The invariant: each handle counts as one reference of its node.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Overlay;
use super::copy_up::CopyUp;
use super::layer::SERVER;
use super::listing::Listing;
use super::node::{Node, Real};
use crate::fs::{Caller, Handle, HandleKind, NodeId, OpenFile, Opened, Result};

const LAYER_SHIFT: u32 = 56;
/// In place of a layer's index: the handle is that of a directory.
const DIRECTORY: u64 = 0xff;
/// How many layers handles can name.
pub(super) const MAX_LAYERS: usize = 254;

/// What a guest has open, as far as the layers don't know it themselves.
#[derive(Debug, Default)]
pub(super) struct Handles {
    directories: RwLock<HashMap<u64, Arc<OpenDirectory>>>,
    next: AtomicU64,
    /// The upper layer's handles for handles of copied-up files, by the latter.
    reopened: Mutex<HashMap<u64, Handle>>,
    /// How many there are, to know without the lock that there is none.
    reopened_count: AtomicUsize,
}

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDirectory {
    pub(super) node: Arc<Node>,
    /// What it was opened in: the topmost layer at that time.
    pub(super) real: Real,
    pub(super) handle: Handle,
    /// The entries of all layers, if it is read that way.
    pub(super) listing: Mutex<Option<Arc<Listing>>>,
}

fn tagged(layer: u64, handle: Handle) -> Handle {
    Handle(handle.0 | layer << LAYER_SHIFT)
}

/// The tag and the layer's handle.
fn untagged(handle: Handle) -> (u64, Handle) {
    let mask = (1 << LAYER_SHIFT) - 1;
    (handle.0 >> LAYER_SHIFT, Handle(handle.0 & mask))
}

impl Handles {
    pub(super) fn reset(&self) {
        self.directories
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.reopened().clear();
        self.reopened_count.store(0, Ordering::Relaxed);
    }

    fn reopened(&self) -> MutexGuard<'_, HashMap<u64, Handle>> {
        self.reopened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_directory(&self, directory: OpenDirectory) -> Handle {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.directories
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(number, Arc::new(directory));
        tagged(DIRECTORY, Handle(number))
    }

    pub(super) fn directory(&self, node: NodeId, handle: Handle) -> Result<Arc<OpenDirectory>> {
        let (DIRECTORY, Handle(number)) = untagged(handle) else {
            return Err(Errno::BADF);
        };
        let directories = self.directories.read();
        let directories = directories.unwrap_or_else(PoisonError::into_inner);
        let directory = directories.get(&number).filter(|open| open.node.id == node);
        directory.cloned().ok_or(Errno::BADF)
    }

    fn remove_directory(&self, node: NodeId, handle: Handle) -> Result<Arc<OpenDirectory>> {
        let directory = self.directory(node, handle)?;
        let mut directories = self
            .directories
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        directories
            .remove(&untagged(handle).1.0)
            .ok_or(Errno::BADF)?;
        Ok(directory)
    }

    /// The handle in the topmost layer for a request about attributes, if it is open there.
    pub(super) fn for_attributes(&self, node: &Node, top: Real, handle: Handle) -> Option<Handle> {
        let (tag, real) = untagged(handle);
        let is_top = usize::try_from(tag).is_ok_and(|layer| layer == top.layer);
        (!node.is_dir && is_top).then_some(real)
    }
}

impl Overlay {
    /// What the guest gets for a file that `layer` has opened for `node`.
    pub(super) fn opened(&self, node: &Arc<Node>, layer: usize, opened: Opened) -> Opened {
        self.nodes.count(node);
        let handle = tagged(u64::try_from(layer).unwrap_or(DIRECTORY), opened.handle);
        Opened { handle, ..opened }
    }

    pub(super) fn open_node(
        &self,
        caller: &Caller,
        node: &Arc<Node>,
        flags: u32,
    ) -> Result<Opened> {
        let flags = OFlags::from_bits_retain(flags);
        let truncates = flags.contains(OFlags::TRUNC);
        if truncates || flags & OFlags::RWMODE != OFlags::RDONLY {
            self.copy_up(
                node,
                if truncates {
                    CopyUp::Truncated
                } else {
                    CopyUp::Whole
                },
            )?;
        }
        let top = node.top();
        if !self.is_upper(top) {
            self.refuse_metacopy(node, top)?;
        }
        let opened = self.layer(top).open(caller, top.node, flags.bits())?;
        Ok(self.opened(node, top.layer, opened))
    }

    /// Refuses a file of which the layer has only the metadata. Its data have no blocks there.
    pub(super) fn refuse_metacopy(&self, node: &Node, real: Real) -> Result<()> {
        let (attributes, _) = self.layer(real).getattr(&SERVER, real.node, None)?;
        if attributes.blocks != 0 || attributes.size == 0 {
            return Ok(());
        }
        let name = self.options.xattr_prefix.metacopy();
        if self.layers[real.layer].xattr(real.node, name)?.is_none() {
            return Ok(());
        }
        log::warn!(
            "overlay: a layer has a file without its data (metacopy), node {}, which can't be read",
            node.id.0
        );
        Err(Errno::IO)
    }

    /// The inode and handle of a layer for the guest's `handle` of `node`.
    fn resolve(&self, node: NodeId, handle: Handle) -> Result<(Real, Handle)> {
        let node = self.nodes.get(node)?;
        let (tag, real) = untagged(handle);
        let top = node.top();
        if usize::try_from(tag).is_ok_and(|layer| layer == top.layer) {
            return Ok((top, real));
        }
        let (origin, _) = node.origin().ok_or(Errno::BADF)?;
        if tag != u64::try_from(origin.layer).unwrap_or(DIRECTORY) {
            return Err(Errno::BADF);
        }
        let mut reopened = self.handles.reopened();
        if let Some(upper) = reopened.get(&handle.0) {
            return Ok((top, *upper));
        }
        // Refuses handles that the guest has invented.
        self.layer(origin)
            .file(origin.node, real, HandleKind::File)?;
        let flags = OFlags::RDONLY.bits();
        let opened = self.layer(top).open(&SERVER, top.node, flags)?;
        reopened.insert(handle.0, opened.handle);
        self.handles.reopened_count.fetch_add(1, Ordering::Relaxed);
        Ok((top, opened.handle))
    }

    /// Calls `act` with the layer's inode and handle of an open file.
    pub(super) fn with_file<T>(
        &self,
        node: NodeId,
        handle: Handle,
        act: impl FnOnce(&dyn crate::fs::FileSystem, NodeId, Handle) -> Result<T>,
    ) -> Result<T> {
        let (real, handle) = self.resolve(node, handle)?;
        act(self.layer(real), real.node, handle)
    }

    pub(super) fn release_file(&self, node: NodeId, handle: Handle) -> Result<()> {
        let node = self.nodes.get(node)?;
        let (tag, real_handle) = untagged(handle);
        let top = node.top();
        let opened_in = if usize::try_from(tag).is_ok_and(|layer| layer == top.layer) {
            top
        } else {
            let origin = node.origin().map(|(origin, _)| origin);
            origin
                .filter(|origin| u64::try_from(origin.layer).is_ok_and(|layer| layer == tag))
                .ok_or(Errno::BADF)?
        };
        let layer = self.layer(opened_in);
        layer.release(opened_in.node, real_handle)?;
        if opened_in != top && self.handles.reopened_count.load(Ordering::Relaxed) != 0 {
            let reopened = self.handles.reopened().remove(&handle.0);
            if let Some(upper) = reopened {
                self.handles.reopened_count.fetch_sub(1, Ordering::Relaxed);
                self.layer(top).release(top.node, upper)?;
            }
        }
        self.drop_refs(&node, 1);
        Ok(())
    }

    pub(super) fn open_directory(
        &self,
        caller: &Caller,
        node: NodeId,
        flags: u32,
    ) -> Result<Opened> {
        let node = self.nodes.get(node)?;
        let real = node.top();
        let opened = self.layer(real).opendir(caller, real.node, flags)?;
        self.nodes.count(&node);
        let handle = self.handles.add_directory(OpenDirectory {
            node,
            real,
            handle: opened.handle,
            listing: Mutex::default(),
        });
        Ok(Opened { handle, ..opened })
    }

    pub(super) fn release_directory(&self, node: NodeId, handle: Handle) -> Result<()> {
        let open = self.handles.remove_directory(node, handle)?;
        let released = self
            .layer(open.real)
            .releasedir(open.real.node, open.handle);
        self.drop_refs(&open.node, 1);
        released
    }

    /// The open directory to be synced: the upper layer's, as no other one changes.
    pub(super) fn directory_file(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        let open = self.handles.directory(node, handle)?;
        let top = open.node.top();
        if top == open.real {
            let kind = HandleKind::Directory;
            return self.layer(top).file(top.node, open.handle, kind);
        }
        // Copied up since it was opened. The file stays open as long as it is used.
        let opened = self.layer(top).opendir(&SERVER, top.node, 0)?;
        let file = self
            .layer(top)
            .file(top.node, opened.handle, HandleKind::Directory);
        self.layer(top).releasedir(top.node, opened.handle)?;
        file
    }

    /// Calls `act` with the layer's inode and a handle of it, for a request that may come on a file
    /// or a directory.
    pub(super) fn with_any<T>(
        &self,
        node: NodeId,
        handle: Handle,
        act: impl FnOnce(&dyn crate::fs::FileSystem, NodeId, Handle) -> Result<T>,
    ) -> Result<T> {
        if untagged(handle).0 != DIRECTORY {
            return self.with_file(node, handle, act);
        }
        let open = self.handles.directory(node, handle)?;
        let top = open.node.top();
        let layer = self.layer(top);
        if top == open.real {
            return act(layer, top.node, open.handle);
        }
        let opened = layer.opendir(&SERVER, top.node, 0)?;
        let result = act(layer, top.node, opened.handle);
        layer.releasedir(top.node, opened.handle)?;
        result
    }
}
