//! Open files and directories.
//!
//! The handle of a file is the layer's own with the layer's index in its upper bits. A file that was
//! opened in a lower layer and copied up afterwards is opened again in the upper layer when its
//! handle is next used, so that it shows what is written from then on. The invariant: each handle
//! counts as one reference of its node.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::Overlay;
use super::copy_up::CopyUp;
use super::layer::SERVER;
use super::listing::Listing;
use super::node::{Node, Real};
use super::open_files::{Current, InLayer, Open, OpenFiles};
use crate::fs::{Caller, Handle, HandleKind, NodeId, OpenFile, Opened, Result};

/// Bits of a handle above the layer's own.
pub(super) const TAG_BITS: u32 = 8;
pub(super) const LAYER_SHIFT: u32 = 64 - TAG_BITS;
/// In place of a layer's index: the handle is that of a directory.
const DIRECTORY: u64 = 0xff;
/// How many layers handles can name.
pub(super) const MAX_LAYERS: usize = 254;

/// What a guest has open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    pub(super) files: OpenFiles,
    directories: RwLock<HashMap<u64, Arc<OpenDirectory>>>,
    next: AtomicU64,
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

/// The handle of the directory with this number.
pub(super) fn of_directory(number: u64) -> Handle {
    tagged(DIRECTORY, Handle(number))
}

/// The number of a directory, if the handle is that of one.
pub(super) fn directory_number(handle: Handle) -> Option<u64> {
    let (tag, Handle(number)) = untagged(handle);
    (tag == DIRECTORY).then_some(number)
}

impl Handles {
    pub(super) fn lock_directories(&self) -> RwLockReadGuard<'_, HashMap<u64, Arc<OpenDirectory>>> {
        let directories = self.directories.read();
        directories.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset(&self) {
        self.directories
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        self.files.clear();
    }

    fn add_directory(&self, directory: OpenDirectory) -> Handle {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.directories
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(number, Arc::new(directory));
        of_directory(number)
    }

    pub(super) fn directory(&self, node: NodeId, handle: Handle) -> Result<Arc<OpenDirectory>> {
        let number = directory_number(handle).ok_or(Errno::BADF)?;
        let directories = self.lock_directories();
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
    /// What the guest gets for a file that a layer has opened as `real`, which is behind `node`.
    pub(super) fn opened(&self, node: &Arc<Node>, real: Real, opened: Opened) -> Opened {
        self.nodes.count(node);
        let layer = u64::try_from(real.layer).unwrap_or(DIRECTORY);
        let handle = tagged(layer, opened.handle);
        let open = Open {
            node: Arc::clone(node),
            first: self.in_layer(real, opened.handle),
            reopened: None,
        };
        self.handles.files.add(handle, open);
        Opened { handle, ..opened }
    }

    /// What a layer has open, and the host's file behind that.
    fn in_layer(&self, real: Real, handle: Handle) -> InLayer {
        let layer = self.layer(real);
        let host = |file| match file {
            Ok(OpenFile::Host(file)) => Some(file),
            // Asked for by each request.
            Ok(OpenFile::Object(_)) | Err(_) => None,
        };
        let file = host(layer.file(real.node, handle, HandleKind::File));
        let file_to_change = file
            .as_ref()
            .filter(|_| self.is_upper(real))
            .and_then(|_| host(layer.file_to_change(real.node, handle)));
        InLayer {
            real,
            handle,
            file,
            file_to_change,
        }
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
        Ok(self.opened(node, top, opened))
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
        let node = match self.handles.files.current(node, handle)? {
            Current::Open(real, handle) => return Ok((real, handle)),
            Current::CopiedUp(node) => node,
        };
        let top = node.top();
        let flags = OFlags::RDONLY.bits();
        let opened = self.layer(top).open(&SERVER, top.node, flags)?;
        let reopened = self.in_layer(top, opened.handle);
        if self.handles.files.set_reopened(handle, reopened) {
            return Ok((top, opened.handle));
        }
        self.layer(top).release(top.node, opened.handle)?;
        match self.handles.files.current(node.id, handle)? {
            Current::Open(real, handle) => Ok((real, handle)),
            Current::CopiedUp(_) => Err(Errno::BADF),
        }
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

    /// The host's file behind a handle for a READ, or whatever the layer has.
    pub(super) fn open_file(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        if let Some(file) = self.handles.files.host_file(node, handle) {
            return Ok(OpenFile::Host(file));
        }
        self.with_file(node, handle, |fs, node, handle| {
            fs.file(node, handle, HandleKind::File)
        })
    }

    /// As [`open_file`](Self::open_file), for a WRITE.
    pub(super) fn open_file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        if let Some(file) = self.handles.files.host_file_to_change(node, handle) {
            return Ok(OpenFile::Host(file));
        }
        self.with_file(node, handle, |fs, node, handle| {
            fs.file_to_change(node, handle)
        })
    }

    pub(super) fn release_file(&self, node: NodeId, handle: Handle) -> Result<()> {
        let Open {
            node,
            first,
            reopened,
        } = self.handles.files.remove(node, handle)?;
        let mut released = Ok(());
        for open in [Some(first), reopened.map(|open| *open)]
            .into_iter()
            .flatten()
        {
            let (real, handle) = (open.real, open.handle);
            // So that the layer has the last reference, and decides where the file is closed.
            drop(open);
            released = released.and(self.layer(real).release(real.node, handle));
        }
        self.drop_refs(&node, 1);
        released
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
