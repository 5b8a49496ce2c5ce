//! A file system with one directory, for tests.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::sync::Mutex;
use std::time::Duration;

use rustix::io::Errno;

use crate::fs::{
    Attributes, Caller, Changes, DirEntry, DirSink, Entry, FileSystem, Handle, HandleKind, Label,
    NewNode, NodeId, OpenFile, Opened, Result, Statistics, Timestamp, XattrFlags,
};
use crate::io::File;

/// The handle of the only file.
pub(in crate::fuse) const HANDLE: Handle = Handle(7);

/// A file system with one directory. All names are the same file in memory, which is open once as
/// [`HANDLE`]. It counts lookups and opens.
#[derive(Debug)]
pub(in crate::fuse) struct OneDirectory {
    state: Mutex<State>,
    file: File,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<CString, u64>,
    xattrs: BTreeMap<CString, Vec<u8>>,
    lookups: BTreeMap<u64, u64>,
    opened: u64,
    resets: u64,
    calls: Vec<String>,
}

impl Default for OneDirectory {
    fn default() -> Self {
        let fd = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        Self {
            state: Mutex::default(),
            file: File::from_fd(fd),
        }
    }
}

impl OneDirectory {
    /// Lookups of `node` that were not dropped.
    pub(in crate::fuse) fn lookups(&self, node: u64) -> u64 {
        self.state
            .lock()
            .unwrap()
            .lookups
            .get(&node)
            .copied()
            .unwrap_or(0)
    }

    /// Handles that were not released.
    pub(in crate::fuse) fn opened(&self) -> u64 {
        self.state.lock().unwrap().opened
    }

    pub(in crate::fuse) fn resets(&self) -> u64 {
        self.state.lock().unwrap().resets
    }

    /// The calls since the last time, as text.
    pub(in crate::fuse) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().calls)
    }

    pub(in crate::fuse) fn backing_file(&self) -> &File {
        &self.file
    }

    /// Creates a name.
    pub(in crate::fuse) fn put(&self, name: &CStr) {
        let mut state = self.state.lock().unwrap();
        let node = 100 + state.names.len() as u64;
        state.names.entry(name.to_owned()).or_insert(node);
    }

    fn note(&self, call: String) {
        self.state.lock().unwrap().calls.push(call);
    }

    fn make(&self, name: &CStr) -> Result<Entry> {
        if self.state.lock().unwrap().names.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.put(name);
        self.find(name)
    }

    fn find(&self, name: &CStr) -> Result<Entry> {
        let mut state = self.state.lock().unwrap();
        let node = *state.names.get(name).ok_or(Errno::NOENT)?;
        *state.lookups.entry(node).or_default() += 1;
        Ok(Entry {
            node: NodeId(node),
            generation: 3,
            attributes: attributes(node),
            attribute_ttl: Duration::from_millis(1500),
            entry_ttl: Duration::from_nanos(250),
            submount: false,
        })
    }

    fn open_one(&self) -> Opened {
        self.state.lock().unwrap().opened += 1;
        Opened {
            handle: HANDLE,
            keep_cache: true,
            direct_io: false,
            cache_dir: true,
            no_flush: true,
        }
    }

    fn close_one(&self) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.opened = state.opened.checked_sub(1).ok_or(Errno::BADF)?;
        Ok(())
    }
}

/// The attributes of `node`: each field another number.
pub(in crate::fuse) fn attributes(node: u64) -> Attributes {
    let time = |seconds| Timestamp {
        seconds,
        nanoseconds: 999_999_999,
    };
    Attributes {
        inode: node,
        size: 2,
        blocks: 3,
        accessed: time(-4),
        modified: time(5),
        changed: time(6),
        mode: 0o100_644,
        links: 7,
        uid: 8,
        gid: 9,
        rdev: 10,
        block_size: 4096,
    }
}

impl FileSystem for OneDirectory {
    fn reset(&self) {
        let mut state = self.state.lock().unwrap();
        state.resets += 1;
        state.lookups.clear();
        state.opened = 0;
    }

    fn lookup(&self, _: &Caller, _: NodeId, name: &CStr) -> Result<Entry> {
        self.find(name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        let mut state = self.state.lock().unwrap();
        if let Some(lookups) = state.lookups.get_mut(&node.0) {
            *lookups = lookups.saturating_sub(count);
        }
    }

    fn getattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        self.note(format!("getattr {caller:?} {handle:?}"));
        Ok((attributes(node.0), Duration::new(1, 5)))
    }

    fn setattr(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        self.note(format!("setattr {handle:?} {changes:?}"));
        Ok((attributes(node.0), Duration::ZERO))
    }

    fn readlink(&self, _: &Caller, _: NodeId) -> Result<Vec<u8>> {
        Ok(b"over/there".to_vec())
    }

    fn symlink(
        &self,
        _: &Caller,
        _: NodeId,
        name: &CStr,
        target: &CStr,
        _: Option<Label<'_>>,
    ) -> Result<Entry> {
        self.note(format!("symlink {name:?} -> {target:?}"));
        self.make(name)
    }

    fn mknod(&self, _: &Caller, _: NodeId, name: &CStr, new: &NewNode<'_>) -> Result<Entry> {
        self.note(format!("mknod {name:?} {new:?}"));
        self.make(name)
    }

    fn mkdir(&self, _: &Caller, _: NodeId, name: &CStr, new: &NewNode<'_>) -> Result<Entry> {
        self.note(format!("mkdir {name:?} {new:?}"));
        self.make(name)
    }

    fn unlink(&self, _: &Caller, _: NodeId, name: &CStr) -> Result<()> {
        self.state
            .lock()
            .unwrap()
            .names
            .remove(name)
            .map(drop)
            .ok_or(Errno::NOENT)
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.unlink(caller, parent, name)
    }

    fn rename(
        &self,
        _: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.note(format!("rename {from:?} {to:?} {flags}"));
        Ok(())
    }

    fn link(&self, _: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.note(format!("link {node:?} {parent:?} {name:?}"));
        self.make(name)
    }

    fn open(&self, _: &Caller, _: NodeId, flags: u32) -> Result<Opened> {
        self.note(format!("open {flags:#o}"));
        Ok(self.open_one())
    }

    fn create(
        &self,
        _: &Caller,
        _: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.note(format!("create {flags:#o} {new:?}"));
        Ok((self.make(name)?, self.open_one()))
    }

    fn flush(&self, _: &Caller, _: NodeId, handle: Handle) -> Result<()> {
        if handle == HANDLE {
            Ok(())
        } else {
            Err(Errno::BADF)
        }
    }

    fn release(&self, _: NodeId, _: Handle) -> Result<()> {
        self.close_one()
    }

    fn kill_set_id(&self, _: NodeId, _: Handle) -> Result<()> {
        self.note("kill_set_id".to_owned());
        Ok(())
    }

    fn file(&self, _: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        self.note(format!("file {kind:?}"));
        if handle == HANDLE {
            Ok(OpenFile::Host(self.file.clone()))
        } else {
            Err(Errno::BADF)
        }
    }

    fn statfs(&self, _: NodeId) -> Result<Statistics> {
        Ok(Statistics {
            blocks: 1,
            blocks_free: 2,
            name_length: 255,
            ..Statistics::default()
        })
    }

    fn setxattr(
        &self,
        _: &Caller,
        _: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        if flags.contains(XattrFlags::CREATE) && state.xattrs.contains_key(name) {
            return Err(Errno::EXIST);
        }
        state.xattrs.insert(name.to_owned(), value.to_vec());
        Ok(())
    }

    fn getxattr(&self, _: &Caller, _: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        let value = self
            .state
            .lock()
            .unwrap()
            .xattrs
            .get(name)
            .cloned()
            .ok_or(Errno::NODATA)?;
        if value.len() > limit {
            Err(Errno::RANGE)
        } else {
            Ok(value)
        }
    }

    fn getxattr_len(&self, _: &Caller, _: NodeId, name: &CStr) -> Result<usize> {
        self.state
            .lock()
            .unwrap()
            .xattrs
            .get(name)
            .map(Vec::len)
            .ok_or(Errno::NODATA)
    }

    /// Breaks the contract: ignores the limit.
    fn listxattr(&self, _: &Caller, _: NodeId, _: usize) -> Result<Vec<u8>> {
        let state = self.state.lock().unwrap();
        Ok(state
            .xattrs
            .keys()
            .flat_map(|name| name.to_bytes_with_nul().to_vec())
            .collect())
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        self.listxattr(caller, node, 0).map(|names| names.len())
    }

    fn removexattr(&self, _: &Caller, _: NodeId, name: &CStr) -> Result<()> {
        self.state
            .lock()
            .unwrap()
            .xattrs
            .remove(name)
            .map(drop)
            .ok_or(Errno::NODATA)
    }

    fn opendir(&self, _: &Caller, _: NodeId, flags: u32) -> Result<Opened> {
        self.note(format!("opendir {flags:#o}"));
        Ok(self.open_one())
    }

    /// Fails with EIO after the last name if one is called `bad`.
    fn readdir(
        &self,
        _: &Caller,
        _: NodeId,
        _: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let names: Vec<_> = self.state.lock().unwrap().names.keys().cloned().collect();
        for (next_offset, name) in (1..).zip(names).skip(usize::try_from(offset).unwrap()) {
            if !sink.has_room(&name) {
                return Ok(());
            }
            if name.to_bytes() == b"bad" {
                return Err(Errno::IO);
            }
            let entry = if plus { self.find(&name).ok() } else { None };
            let dir_entry = DirEntry {
                inode: 55,
                next_offset,
                kind: 8,
                name: &name,
            };
            sink.add(dir_entry, entry.as_ref());
        }
        Ok(())
    }

    fn releasedir(&self, _: NodeId, _: Handle) -> Result<()> {
        self.close_one()
    }

    fn access(&self, _: &Caller, _: NodeId, mask: u32) -> Result<()> {
        if mask & 2 == 0 {
            Ok(())
        } else {
            Err(Errno::ACCESS)
        }
    }

    fn lseek(&self, _: NodeId, _: Handle, offset: u64, _: u32) -> Result<u64> {
        Ok(offset + 1)
    }
}
