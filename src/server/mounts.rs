//! Mounts and unmounts directories while a guest is served.
//!
//! A directory comes as a descriptor, as the server can't open anything outside of its sandbox. It
//! keeps the server in: the descriptor must be that of a mount of its own, from which `..` leads
//! nowhere. The invariant: what is mounted together has no more descriptors than the server.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use rustix::fs::{AtFlags, FileType, StatxAttributes, StatxFlags};
use rustix::io::Errno;

use super::error::ServerError;
use super::sources::Builder;
use crate::config::Source;
use crate::fs::vfs::{MountError, MountPoint, Vfs};
use crate::sandbox::Reached;

/// A file system that is mounted.
#[derive(Clone, Debug)]
pub(super) struct Mounted {
    pub(super) point: MountPoint,
    pub(super) source: String,
    pub(super) readonly: bool,
    /// It was mounted while the server ran.
    added: bool,
}

/// Why nothing is mounted.
#[derive(Debug, thiserror::Error)]
pub(super) enum AddError {
    /// The descriptor is that of something else.
    #[error("only directories can be mounted while the server runs")]
    NotADirectory,
    /// The descriptor would lead out of the sandbox.
    #[error(
        "the descriptor is not that of a mount of its own (open_tree(2) with OPEN_TREE_CLONE), so it \
         would lead out of the sandbox"
    )]
    Attached,
    /// The descriptor can't be looked at.
    #[error("looking at the directory")]
    Stat(#[source] Errno),
    /// There are as many as the server has descriptors for.
    #[error("{0} directories were added, and the server's descriptors are divided between no more")]
    TooMany(usize),
    /// The directory can't be shared.
    #[error(transparent)]
    Share(#[from] ServerError),
    /// It can't be mounted there.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The server is ending.
    #[error("the server is ending")]
    Ending,
}

/// What is mounted, and what it takes to mount more.
#[derive(Debug)]
pub(super) struct Mounts {
    vfs: Weak<Vfs>,
    builder: Builder,
    /// A descriptor could lead out of the sandbox.
    confined: bool,
    mounted: Vec<Mounted>,
    /// How many directories may be added.
    room: usize,
}

impl Mounts {
    /// For what `vfs` was built of; `builder` has built it, and `confined` says that there is a
    /// sandbox to be led out of.
    pub(super) fn new(
        vfs: &Arc<Vfs>,
        builder: Builder,
        mounts: &[(MountPoint, Source)],
        confined: bool,
    ) -> Self {
        let readonly = builder.options.readonly;
        let mounted = mounts.iter().map(|(point, source)| Mounted {
            point: point.clone(),
            source: source.to_string(),
            readonly,
            added: false,
        });
        Self {
            vfs: Arc::downgrade(vfs),
            room: builder.spare,
            builder,
            confined,
            mounted: mounted.collect(),
        }
    }

    /// What is mounted, in the order in which it was.
    pub(super) fn all(&self) -> &[Mounted] {
        &self.mounted
    }

    /// Mounts the directory that `fd` is open on. `source` is its path, for messages.
    pub(super) fn add(
        &mut self,
        point: MountPoint,
        fd: OwnedFd,
        source: String,
        readonly: bool,
    ) -> Result<(), AddError> {
        let added = self.mounted.iter().filter(|mounted| mounted.added);
        if added.count() >= self.room {
            return Err(AddError::TooMany(self.room));
        }
        check(&fd, self.confined)?;
        let vfs = self.vfs.upgrade().ok_or(AddError::Ending)?;
        let path = PathBuf::from(&source);
        let reached = Reached {
            fd,
            path: path.clone(),
            readonly,
        };
        let options = self.builder.options.clone();
        let readonly = readonly || options.readonly;
        let fs = self.builder.directory(&path, reached, options)?;
        vfs.mount(&point, Arc::new(fs))?;
        log::info!("mounted {source} at {point}");
        self.mounted.push(Mounted {
            point,
            source,
            readonly,
            added: true,
        });
        Ok(())
    }

    /// Unmounts what is mounted at `point`.
    pub(super) fn remove(&mut self, point: &MountPoint) -> Result<(), AddError> {
        let vfs = self.vfs.upgrade().ok_or(AddError::Ending)?;
        drop(vfs.unmount(point)?);
        self.mounted.retain(|mounted| mounted.point != *point);
        log::info!("unmounted {point}");
        Ok(())
    }
}

/// Checks that a descriptor is that of a directory, and leads no further.
fn check(fd: impl AsFd, confined: bool) -> Result<(), AddError> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE);
    let stat = stat.map_err(AddError::Stat)?;
    if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::Directory {
        return Err(AddError::NotADirectory);
    }
    let is_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    if confined && !is_root {
        return Err(AddError::Attached);
    }
    Ok(())
}
