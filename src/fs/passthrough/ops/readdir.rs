//! Reads directories: READDIR and READDIRPLUS.
//!
//! The invariant: the stream moves past an entry only after the entry was added to the reply.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::PoisonError;

use super::Operations;
use crate::fs::passthrough::inode_table::{Directory, Inode};
use crate::fs::passthrough::open_files::{DirStream, RawEntry};
use crate::fs::{DirEntry, DirSink, Entry, Handle, NodeId, Result};
use crate::io::File;

impl Operations {
    pub(crate) fn read_entries(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let (directory, stream) = self.directory_of(node, handle)?;
        let inode = self.fds.inodes().get(node);
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.seek(&directory, offset)?;
        let entries = (&directory, node, plus);
        let result = self.read_stream(&mut stream, entries, inode.as_deref(), sink);
        stream.finish_request(&directory, self.fds.files().dirent_cache());
        result
    }

    fn read_stream(
        &self,
        stream: &mut DirStream,
        (directory, node, plus): (&File, NodeId, bool),
        inode: Option<&Inode>,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let mut any_added = false;
        loop {
            match stream.fill(directory) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // The reply has entries already. If the error persists, the next request returns
                // it.
                Err(_) if any_added => return Ok(()),
                Err(error) => return Err(error),
            }
            let Some(raw) = stream.peek() else {
                return Err(rustix::io::Errno::IO);
            };
            if !sink.has_room(raw.name) {
                return Ok(());
            }
            let own = matches!(raw.name.to_bytes(), b"." | b"..");
            let entry = match inode {
                Some(inode) if plus && !own => self.entry_of_listed(Open(inode, directory), &raw),
                _ => None,
            };
            let root = inode.filter(|_| own && node == NodeId::ROOT);
            let listed = DirEntry {
                // The guest must not see the directory above the shared one.
                inode: root.map_or(raw.inode, |root| root.key().number),
                next_offset: raw.next_offset,
                kind: raw.kind,
                name: raw.name,
            };
            sink.add(listed, entry.as_ref());
            any_added = true;
            let (len, next_offset) = (raw.len, raw.next_offset);
            stream.advance(len, next_offset);
        }
    }

    /// The entry of a listed name. Returns `None` if the name is gone or can't be looked up: the
    /// guest then looks it up itself and gets the error in its place.
    fn entry_of_listed(&self, directory: Open<'_>, raw: &RawEntry<'_>) -> Option<Entry> {
        let key = directory.inode().key();
        let entry = self.find_listed(directory, raw.name).ok()?;
        Some(self.announced(&key, entry))
    }
}

/// A directory that the guest has open.
struct Open<'a>(&'a Inode, &'a File);

impl AsFd for Open<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }
}

impl Directory for Open<'_> {
    fn inode(&self) -> &Inode {
        self.0
    }
}
