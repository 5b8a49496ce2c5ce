//! How an inode without a descriptor is opened: by a file handle, by a name, or through an open
//! file.
//!
//! A descriptor pins the inode, but the number of descriptors is limited. A file handle costs a few
//! bytes; opening it needs `CAP_DAC_READ_SEARCH`, and it goes stale when the inode is deleted. A
//! name needs nothing, and works until a host process removes or renames it. The invariant: opening
//! by a method yields the inode that the method was recorded for, never another one that took over
//! its name or number.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::fs::{NodeId, Result};
use crate::io::File;
use crate::sys::file_handle::FileHandle;

/// A mount in which file handles can be opened.
#[derive(Debug)]
pub(crate) struct Mount {
    /// Any file or directory in the mount, opened for reading: the kernel doesn't accept `O_PATH`
    /// here. `None` only in tests.
    anchor: Option<OwnedFd>,
    /// The number of anchors. It orders nothing and is used for limits.
    anchors: Arc<AtomicUsize>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.anchors.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Mount {
    /// A mount with this `anchor`, which `anchors` counts.
    pub(crate) fn new(anchor: OwnedFd, anchors: &Arc<AtomicUsize>) -> Self {
        anchors.fetch_add(1, Ordering::Relaxed);
        Self {
            anchor: Some(anchor),
            anchors: Arc::clone(anchors),
        }
    }

    pub(crate) fn open(&self, handle: &FileHandle, flags: OFlags) -> Result<OwnedFd> {
        handle.open(self.anchor.as_ref().ok_or(Errno::STALE)?, flags)
    }

    /// A mount for tests, in which nothing can be opened.
    #[cfg(test)]
    pub(crate) fn nowhere() -> Arc<Self> {
        let anchors = Arc::new(AtomicUsize::new(1));
        Arc::new(Self {
            anchor: None,
            anchors,
        })
    }
}

/// How an inode is opened when it has no descriptor.
#[derive(Debug)]
pub(crate) enum ReopenMethod {
    /// It can't be opened: its descriptor is kept until the guest forgets it.
    None,
    /// By a file handle.
    Handle {
        mount: Arc<Mount>,
        handle: FileHandle,
    },
    /// By the name that it had when it was last seen.
    Name(ParentLink),
    /// By a file that the guest has open.
    Open(File),
    /// It is no longer in the table and gets no descriptor any more.
    Removed,
}

/// The name under which an inode was last seen. The parent is referred to by its node id, so it can
/// be renamed without changing its children. The table keeps it while it has children.
#[derive(Clone, Debug)]
pub(crate) struct ParentLink {
    pub(crate) parent: NodeId,
    pub(crate) name: Box<CStr>,
    /// Tells the inode from a later one if number and birth time can't; 0 if they can. See
    /// [`digest_of`].
    pub(crate) digest: u64,
}

/// A digest of the file handle, never 0. Reading a handle needs no privilege, and the handle
/// includes the generation of the inode.
pub(crate) fn digest_of(fd: impl AsFd) -> Result<u64> {
    FileHandle::of(fd).map(|handle| digest(&handle))
}

/// As [`digest_of`], for `name` in `directory`.
pub(crate) fn digest_at(directory: impl AsFd, name: &CStr) -> Result<u64> {
    FileHandle::at(directory, name).map(|handle| digest(&handle))
}

/// The state table stores this value, so it must not depend on the version of a crate.
fn digest(handle: &FileHandle) -> u64 {
    let bytes = handle.bytes();
    let length = (bytes.len() as u64).to_le_bytes();
    let digest = length.iter().chain(bytes).fold(0, |digest: u64, byte| {
        let product = (digest ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ product >> 32
    });
    digest.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_of_file_handle_is_the_same_in_every_version() {
        let bytes: Vec<u8> = (1..=16).collect();
        let handle = FileHandle::from_bytes(&bytes).unwrap();
        assert_eq!(digest(&handle), 13_940_510_430_640_886_229);
    }
}
