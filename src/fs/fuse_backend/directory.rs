//! One READDIR or READDIRPLUS: passes the entries of a file system on to the guest's reply.
//!
//! File systems of fuse-backend-rs count the lookup of an entry before they know whether it fits,
//! and differ in what they do with one that doesn't: the passthrough takes the lookup back, the
//! overlay doesn't. So they are asked for less than the reply holds, and told that entries are as
//! large as they would then be, and each entry fits. The invariant: a lookup is counted for the
//! guest if it gets the entry; one of `.` or `..`, which its kernel ignores, is taken back.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{DirEntry as BackendDirEntry, Entry as BackendEntry};
use rustix::io::Errno;

use super::Backend;
use super::core::Core;
use crate::fs::{DirEntry, DirSink};

/// Bytes that the longest entry of READDIRPLUS takes in the reply: `fuse_direntplus` with a name of
/// 255 bytes.
const LARGEST: usize = 152 + 256;

/// How many times as long as an entry of `getdents64(2)` one of READDIRPLUS is at most: for a name
/// of a few bytes, 160 bytes instead of 24.
const RATIO: usize = 7;

/// The longest entry of `getdents64(2)`, which must fit for anything to be read at all.
const LARGEST_DIRENT: usize = 280;

/// A reply that is being filled.
pub(super) struct Page<'a, F> {
    core: &'a Arc<Core<F>>,
    sink: &'a mut dyn DirSink,
    name: Vec<u8>,
    /// How much larger entries are said to be.
    scale: usize,
}

impl<'a, F: Backend> Page<'a, F> {
    pub(super) fn new(core: &'a Arc<Core<F>>, sink: &'a mut dyn DirSink) -> Self {
        Self {
            core,
            sink,
            name: Vec::new(),
            scale: 1,
        }
    }

    /// The size to read names with.
    pub(super) fn size_for_names(&mut self) -> u32 {
        self.scale = 1;
        u32::try_from(self.sink.room()).unwrap_or(u32::MAX)
    }

    /// The size to read entries with, so that each fits.
    pub(super) fn size_for_entries(&mut self) -> u32 {
        self.scale = RATIO;
        let size = self.sink.room().saturating_sub(LARGEST) / RATIO;
        u32::try_from(size.max(LARGEST_DIRENT)).unwrap_or(u32::MAX)
    }

    /// Adds an entry, and the result of its lookup with READDIRPLUS. Returns its size, or 0 if it
    /// doesn't fit.
    pub(super) fn add(
        &mut self,
        dir_entry: &BackendDirEntry<'_>,
        entry: Option<&BackendEntry>,
    ) -> io::Result<usize> {
        self.name.clear();
        self.name.extend_from_slice(dir_entry.name);
        self.name.push(0);
        let Ok(name) = CStr::from_bytes_until_nul(&self.name) else {
            return Err(Errno::INVAL.into());
        };
        let before = self.sink.room();
        if !self.sink.has_room(name) {
            return Ok(0);
        }
        let is_dots = matches!(name.to_bytes(), b"." | b"..");
        let found = match entry {
            Some(entry) if is_dots => {
                self.core.tell_forgotten(entry.inode, 1);
                None
            }
            Some(entry) => self.core.found(entry).ok(),
            None => None,
        };
        let dir_entry = DirEntry {
            inode: dir_entry.ino,
            next_offset: dir_entry.offset,
            kind: u8::try_from(dir_entry.type_).unwrap_or(libc::DT_UNKNOWN),
            name,
        };
        self.sink.add(dir_entry, found.as_ref());
        let size = before.saturating_sub(self.sink.room());
        Ok(size.div_ceil(self.scale).max(1))
    }
}
