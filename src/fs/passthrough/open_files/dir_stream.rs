//! The entries of an open directory, read from the host in large buffers.
//!
//! A request that continues at the end of the last one uses the rest of the buffer. Any other
//! request seeks to its offset, which is the host's own cookie. The invariant: the stream moves
//! past an entry only when the caller says so, after it has added the entry to the reply.

use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::SeekFrom;

use crate::fs::Result;
use crate::io::File;
use crate::sys;

/// The number of open directories that keep their entry buffer, 64 KiB each, from one READDIR to
/// the next. Beyond that a directory seeks back to its position, which costs one more call.
const MAX_DIRENT_BUFFERS: usize = 1024;

/// How many bytes of entries are read from the host at once: about a thousand names, and what the
/// largest READDIR of current kernels takes in one or two requests.
const BUFFER_LEN: usize = 64 * 1024;

/// The read position of a directory.
#[derive(Debug, Default)]
pub(crate) struct DirStream {
    /// RawEntry entries from the host. Allocated by the first read and freed at the end of the
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

impl DirStream {
    /// Makes the entry at `offset` the next one.
    pub(crate) fn seek(&mut self, directory: &File, offset: u64) -> Result<()> {
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
    pub(crate) fn fill(&mut self, directory: &File) -> Result<bool> {
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
    pub(crate) fn finish_request(&mut self, directory: &File, cached: &DirentCache) {
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

    /// The next entry. Returns `None` if the host returned an incomplete one.
    pub(crate) fn peek(&self) -> Option<RawEntry<'_>> {
        RawEntry::parse(self.buffer.get(self.at..)?)
    }

    /// Moves past an entry of this length.
    pub(crate) fn advance(&mut self, len: usize, next_offset: u64) {
        self.at += len;
        self.offset = next_offset;
    }
}

/// One entry: a `struct linux_dirent64`.
pub(crate) struct RawEntry<'a> {
    pub(crate) inode: u64,
    pub(crate) next_offset: u64,
    /// The distance to the next entry, in bytes.
    pub(crate) len: usize,
    pub(crate) kind: u8,
    pub(crate) name: &'a CStr,
}

impl<'a> RawEntry<'a> {
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
    fn complete_entry_is_parsed() {
        let bytes = [raw(b"name\0", 24), raw(b"next\0", 24)].concat();
        let entry = RawEntry::parse(&bytes).unwrap();
        assert_eq!((entry.inode, entry.next_offset), (42, 7));
        assert_eq!((entry.len, entry.kind), (24, libc::DT_REG));
        assert_eq!(entry.name, c"name");
        assert_eq!(RawEntry::parse(&bytes[entry.len..]).unwrap().name, c"next");
    }

    #[test]
    fn incomplete_entry_is_none() {
        let bytes = raw(b"name\0", 24);
        for end in 0..bytes.len() {
            assert!(RawEntry::parse(&bytes[..end]).is_none(), "{end}");
        }
        assert!(RawEntry::parse(&raw(b"name", 10)).is_none());
        assert!(RawEntry::parse(&raw(b"abcde", 24)).is_none());
    }
}
