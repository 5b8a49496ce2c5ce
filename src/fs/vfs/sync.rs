//! SYNCFS of the root, which is that of all mounts.
//!
//! The invariant: every mount is synced, also after an error of another one.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::table::Table;
use crate::fs::{FileObject, NodeId, ObjectFuture, OpenFile};
use crate::io::{GuestBuffer, SyncKind, Transferred, WriteMode};

/// A directory without data of its own; as the whole file system, those of its mounts.
#[derive(Debug, Default)]
pub(super) struct Directory {
    mounts: Vec<OpenFile>,
}

impl Directory {
    /// The file systems that can be synced.
    pub(super) fn of_all(table: &Table) -> Self {
        let mounts = table
            .all()
            .filter_map(|mount| mount.fs.whole_file_system(NodeId::ROOT).ok());
        Self {
            mounts: mounts.collect(),
        }
    }

    /// As an open file.
    pub(super) fn open(self) -> OpenFile {
        OpenFile::Object(Arc::new(self))
    }
}

impl FileObject for Directory {
    fn read(self: Arc<Self>, buffer: GuestBuffer, _: u64) -> ObjectFuture<Transferred> {
        Box::pin(async { (Err(Errno::ISDIR.into()), buffer) })
    }

    fn write(
        self: Arc<Self>,
        _: WriteMode,
        buffer: GuestBuffer,
        _: u64,
    ) -> ObjectFuture<Transferred> {
        Box::pin(async { (Err(Errno::ISDIR.into()), buffer) })
    }

    fn sync(self: Arc<Self>, _: SyncKind) -> ObjectFuture<io::Result<()>> {
        Box::pin(async move {
            let mut result = Ok(());
            for mount in &self.mounts {
                let synced = mount.clone().sync_file_system().await;
                result = result.and(synced);
            }
            result
        })
    }
}
