//! Reads directories: READDIR and READDIRPLUS.
//!
//! An open directory has one stream of entries, which is read from the host in large buffers. A
//! request that continues at the end of the last one uses the rest of the buffer. Any other request
//! seeks to its offset, which is the host's own cookie. The invariant: the stream moves past an
//! entry only after the entry was added to the reply.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

use rustix::fs::SeekFrom;

use crate::fs::passthrough::Passthrough;
use crate::fs::passthrough::descriptors::limits::MAX_DIRENT_BUFFERS;
use crate::fs::passthrough::inode_table::inode::Inode;
use crate::fs::passthrough::inode_table::inode_fd::Directory;
use crate::fs::{DirEntry, DirSink, Entry, Handle, NodeId, Result};
use crate::io::File;
use crate::sys;

/// How many bytes of entries are read from the host at once: about a thousand names, and what the
/// largest READDIR of current kernels takes in one or two requests.
const BUFFER_LEN: usize = 64 * 1024;

/// The read position of a directory.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    /// Raw entries from the host. Allocated by the first read and freed at the end of the
    /// directory.
    buffer: Vec<u8>,
    /// Where the next entry starts in `buffer`.
    at: usize,
    /// The cookie of that entry.
    offset: u64,
    /// Held while the buffer is kept from one request to the next.
    slot: Option<CacheSlot>,
}

/// The permission to keep a buffer.
#[derive(Debug)]
struct CacheSlot(DirentCache);

/// The number of buffers that are kept.
pub(crate) type DirentCache = Arc<AtomicUsize>;

impl CacheSlot {
    /// Returns `None` if `MAX_DIRENT_BUFFERS` are kept already.
    fn acquire(cached: &DirentCache) -> Option<Self> {
        // Relaxed, as it is only a counter.
        let slot = cached.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            (count < MAX_DIRENT_BUFFERS).then_some(count + 1)
        });
        slot.is_ok().then(|| Self(Arc::clone(cached)))
    }
}

impl Drop for CacheSlot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Stream {
    /// Makes the entry at `offset` the next one.
    fn seek(&mut self, directory: &File, offset: u64) -> Result<()> {
        // Offset 0 is a rewind, which promises the current entries. A stream that hasn't read
        // anything is at the start already.
        let rewind = offset == 0 && self.at != 0;
        if offset == self.offset && !rewind {
            return Ok(());
        }
        self.buffer.clear();
        rustix::fs::seek(directory, SeekFrom::Start(offset))?;
        self.at = 0;
        self.offset = offset;
        Ok(())
    }

    /// Reads more entries if the buffer is used up. Returns whether there is an entry.
    fn fill(&mut self, directory: &File) -> Result<bool> {
        if self.at < self.buffer.len() {
            return Ok(true);
        }
        self.at = 0;
        self.buffer.resize(BUFFER_LEN, 0);
        let read = sys::file::read_directory(directory, &mut self.buffer);
        self.buffer.truncate(*read.as_ref().unwrap_or(&0));
        if self.buffer.is_empty() {
            self.drop_buffer();
        }
        read.map(|read| read > 0)
    }

    /// Called at the end of a request. Keeps the rest of the buffer if a slot is free.
    fn finish_request(&mut self, directory: &File, cached: &DirentCache) {
        if self.at >= self.buffer.len() {
            self.drop_buffer();
        } else if self.slot.is_none() {
            self.slot = CacheSlot::acquire(cached);
            // Without the buffer, the host is read from here again. A directory that can't seek
            // there fails at the next read.
            if self.slot.is_none()
                && rustix::fs::seek(directory, SeekFrom::Start(self.offset)).is_ok()
            {
                self.drop_buffer();
            }
        }
    }

    fn drop_buffer(&mut self) {
        self.buffer = Vec::new();
        self.at = 0;
        self.slot = None;
    }

    fn peek(&self) -> Option<Raw<'_>> {
        Raw::parse(self.buffer.get(self.at..)?)
    }

    fn advance(&mut self, len: usize, next_offset: u64) {
        self.at += len;
        self.offset = next_offset;
    }
}

/// A `struct linux_dirent64`.
struct Raw<'a> {
    inode: u64,
    next_offset: u64,
    /// The distance to the next entry, in bytes.
    len: usize,
    kind: u8,
    name: &'a CStr,
}

impl<'a> Raw<'a> {
    /// Parses the first entry of `bytes`. Returns `None` if it is incomplete.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (inode, rest) = bytes.split_first_chunk()?;
        let (next_offset, rest) = rest.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let (&kind, _) = rest.split_first()?;
        let len = usize::from(u16::from_ne_bytes(*len));
        let name = bytes.get(NAME_AT..len)?;
        Some(Self {
            inode: u64::from_ne_bytes(*inode),
            next_offset: u64::from_ne_bytes(*next_offset),
            len,
            kind,
            name: CStr::from_bytes_until_nul(name).ok()?,
        })
    }
}

/// The offset of the name in an entry: after two words, the length and the type.
const NAME_AT: usize = 19;

impl Passthrough {
    pub(crate) fn read_entries(
        &self,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let (directory, stream) = self.directory_of(node, handle)?;
        let inode = self.inodes.get(node);
        let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.seek(&directory, offset)?;
        let entries = (&directory, node, plus);
        let result = self.read_stream(&mut stream, entries, inode.as_deref(), sink);
        stream.finish_request(&directory, &self.dirent_cache);
        result
    }

    fn read_stream(
        &self,
        stream: &mut Stream,
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
                Some(inode) if plus && !own => self.look_up(Open(inode, directory), &raw),
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
    fn look_up(&self, directory: Open<'_>, raw: &Raw<'_>) -> Option<Entry> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(name: &[u8], len: u16) -> Vec<u8> {
        let mut bytes = 42u64.to_ne_bytes().to_vec();
        bytes.extend(7u64.to_ne_bytes());
        bytes.extend(len.to_ne_bytes());
        bytes.push(libc::DT_REG);
        bytes.extend(name);
        bytes.resize(bytes.len().max(len.into()), 0);
        bytes
    }

    #[test]
    fn an_entry_is_taken_apart() {
        let bytes = [raw(b"name\0", 24), raw(b"next\0", 24)].concat();
        let entry = Raw::parse(&bytes).unwrap();
        assert_eq!((entry.inode, entry.next_offset), (42, 7));
        assert_eq!((entry.len, entry.kind), (24, libc::DT_REG));
        assert_eq!(entry.name, c"name");
        assert_eq!(Raw::parse(&bytes[entry.len..]).unwrap().name, c"next");
    }

    #[test]
    fn half_an_entry_is_none() {
        let bytes = raw(b"name\0", 24);
        for end in 0..bytes.len() {
            assert!(Raw::parse(&bytes[..end]).is_none(), "{end}");
        }
        assert!(Raw::parse(&raw(b"name", 10)).is_none());
        assert!(Raw::parse(&raw(b"abcde", 24)).is_none());
    }
}
