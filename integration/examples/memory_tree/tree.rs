//! A file system whose files are in memory: what a file system has to do that is no host directory.
//!
//! All names and inodes are behind one lock. The invariant: an inode stays as long as it has a name or
//! the guest knows it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ringfsd::fs::{
    Attributes, Caller, Changes, DirEntry, DirSink, Entry, FileSystem, Handle, HandleKind, Label,
    NewNode, NewTime, NodeId, OpenFile, Opened, Result, Statistics, Timestamp, XattrFlags,
};
use rustix::io::Errno;

use super::content::Content;

/// How long the guest may rely on what it is told: nobody else changes the tree.
const TTL: Duration = Duration::from_secs(3600);
/// Preferred size of an operation, bytes.
const BLOCK: u32 = 4096;

/// The tree.
#[derive(Debug)]
pub(crate) struct MemoryTree {
    may_block: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    inodes: HashMap<u64, Inode>,
    open: HashMap<u64, (NodeId, OpenKind)>,
    next_inode: u64,
    next_handle: u64,
}

#[derive(Clone, Debug)]
enum OpenKind {
    File(Arc<Content>),
    Directory,
}

#[derive(Debug)]
struct Inode {
    body: Body,
    parent: u64,
    mode: u32,
    rdev: u32,
    links: u32,
    lookups: u64,
    owner: (u32, u32),
    accessed: Timestamp,
    modified: Timestamp,
    changed: Timestamp,
    xattrs: BTreeMap<CString, Vec<u8>>,
}

#[derive(Debug)]
enum Body {
    Directory(BTreeMap<CString, u64>),
    File(Arc<Content>),
    Link(Vec<u8>),
    Other,
}

impl MemoryTree {
    /// An empty tree. With `may_block` its methods ask to be called where they may block.
    pub(crate) fn new(may_block: bool) -> Self {
        let mut root = Inode::new(Body::Directory(BTreeMap::new()), libc::S_IFDIR | 0o755, 0);
        root.links = 2;
        root.parent = NodeId::ROOT.0;
        Self {
            may_block,
            state: Mutex::new(State {
                inodes: HashMap::from([(NodeId::ROOT.0, root)]),
                open: HashMap::new(),
                next_inode: NodeId::ROOT.0 + 1,
                next_handle: 1,
            }),
        }
    }

    /// How many inodes there are, the root included.
    pub(crate) fn inodes(&self) -> usize {
        self.lock().inodes.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inode {
    fn new(body: Body, mode: u32, rdev: u32) -> Self {
        let now = now();
        Self {
            body,
            parent: 0,
            mode,
            rdev,
            links: 1,
            lookups: 0,
            owner: (0, 0),
            accessed: now,
            modified: now,
            changed: now,
            xattrs: BTreeMap::new(),
        }
    }

    fn names(&self) -> Result<&BTreeMap<CString, u64>> {
        match &self.body {
            Body::Directory(names) => Ok(names),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn names_mut(&mut self) -> Result<&mut BTreeMap<CString, u64>> {
        (self.modified, self.changed) = (now(), now());
        match &mut self.body {
            Body::Directory(names) => Ok(names),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    fn content(&self) -> Result<&Arc<Content>> {
        match &self.body {
            Body::File(content) => Ok(content),
            Body::Directory(_) => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    fn attributes(&self, number: u64) -> Attributes {
        let (size, written) = match &self.body {
            Body::File(content) => content.size_and_time(),
            Body::Link(target) => (target.len() as u64, None),
            Body::Directory(_) | Body::Other => (0, None),
        };
        let modified = written.unwrap_or(self.modified).max_with(self.modified);
        Attributes {
            inode: number,
            size,
            blocks: size.div_ceil(512),
            accessed: self.accessed,
            modified,
            changed: modified.max_with(self.changed),
            mode: self.mode,
            links: self.links,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: self.rdev,
            block_size: BLOCK,
        }
    }
}

/// The later of two times.
trait Later {
    fn max_with(self, other: Self) -> Self;
}

impl Later for Timestamp {
    fn max_with(self, other: Self) -> Self {
        if (self.seconds, self.nanoseconds) >= (other.seconds, other.nanoseconds) {
            self
        } else {
            other
        }
    }
}

/// The time now.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: since.subsec_nanos(),
    }
}

impl State {
    fn inode(&self, node: NodeId) -> Result<&Inode> {
        self.inodes.get(&node.0).ok_or(Errno::STALE)
    }

    fn inode_mut(&mut self, node: NodeId) -> Result<&mut Inode> {
        self.inodes.get_mut(&node.0).ok_or(Errno::STALE)
    }

    fn child(&self, parent: NodeId, name: &CStr) -> Result<NodeId> {
        let number = self.inode(parent)?.names()?.get(name);
        number.map(|number| NodeId(*number)).ok_or(Errno::NOENT)
    }

    /// The answer to a LOOKUP that finds `node`, counted.
    fn found(&mut self, node: NodeId) -> Result<Entry> {
        let inode = self.inode_mut(node)?;
        inode.lookups += 1;
        Ok(Entry {
            node,
            generation: 0,
            attributes: inode.attributes(node.0),
            attribute_ttl: TTL,
            entry_ttl: TTL,
            submount: false,
        })
    }

    fn add(
        &mut self,
        caller: &Caller,
        (parent, name): (NodeId, &CStr),
        body: Body,
        mode: u32,
        rdev: u32,
    ) -> Result<NodeId> {
        let above = self.inode(parent)?;
        if above.links == 0 {
            return Err(Errno::NOENT);
        }
        if above.names()?.contains_key(name) {
            return Err(Errno::EXIST);
        }
        let uid = caller.uid.ok_or(Errno::OVERFLOW)?;
        let gid = caller.gid.ok_or(Errno::OVERFLOW)?;
        let number = self.next_inode;
        let mut inode = Inode::new(body, mode, rdev);
        inode.owner = (uid, gid);
        if above.mode & libc::S_ISGID != 0 {
            inode.owner.1 = above.owner.1;
            if inode.is_directory() {
                inode.mode |= libc::S_ISGID;
            }
        }
        inode.parent = parent.0;
        let directory = inode.is_directory();
        if directory {
            inode.links = 2;
        }
        self.next_inode += 1;
        self.inodes.insert(number, inode);
        let above = self.inode_mut(parent)?;
        above.names_mut()?.insert(name.to_owned(), number);
        if directory {
            above.links += 1;
        }
        Ok(NodeId(number))
    }

    /// Takes a name away from its inode, which is a directory or not, as `directory` says.
    fn remove(&mut self, parent: NodeId, name: &CStr, directory: bool) -> Result<()> {
        let node = self.child(parent, name)?;
        let inode = self.inode_mut(node)?;
        match (&inode.body, directory) {
            (Body::Directory(names), true) if names.is_empty() => inode.links = 0,
            (Body::Directory(_), true) => return Err(Errno::NOTEMPTY),
            (Body::Directory(_), false) => return Err(Errno::ISDIR),
            (_, true) => return Err(Errno::NOTDIR),
            (_, false) => inode.links -= 1,
        }
        inode.changed = now();
        let above = self.inode_mut(parent)?;
        above.names_mut()?.remove(name);
        if directory {
            above.links -= 1;
        }
        self.drop_if_unused(node);
        Ok(())
    }

    fn drop_if_unused(&mut self, node: NodeId) {
        let unused = |inode: &Inode| inode.links == 0 && inode.lookups == 0;
        if self.inode(node).is_ok_and(unused) {
            self.inodes.remove(&node.0);
        }
    }

    fn open(&mut self, node: NodeId, kind: OpenKind) -> Opened {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, (node, kind));
        Opened {
            handle: Handle(handle),
            keep_cache: true,
            direct_io: false,
            cache_dir: true,
            no_flush: false,
        }
    }

    /// Whether `inside` is `directory` or lies below it.
    fn is_below(&self, inside: NodeId, directory: NodeId) -> bool {
        let mut at = inside;
        loop {
            if at == directory {
                return true;
            }
            match self.inode(at) {
                Ok(inode) if at != NodeId::ROOT => at = NodeId(inode.parent),
                _ => return false,
            }
        }
    }
}

impl FileSystem for MemoryTree {
    fn may_block(&self) -> bool {
        self.may_block
    }

    fn reset(&self) {
        let mut state = self.lock();
        state.open.clear();
        for inode in state.inodes.values_mut() {
            inode.lookups = 0;
        }
        state
            .inodes
            .retain(|number, inode| *number == NodeId::ROOT.0 || inode.links > 0);
    }

    fn lookup(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let mut state = self.lock();
        let node = state.child(parent, name)?;
        state.found(node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        let mut state = self.lock();
        if let Ok(inode) = state.inode_mut(node) {
            inode.lookups = inode.lookups.saturating_sub(count);
        }
        if node != NodeId::ROOT {
            state.drop_if_unused(node);
        }
    }

    fn getattr(
        &self,
        _: &Caller,
        node: NodeId,
        _: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        Ok((self.lock().inode(node)?.attributes(node.0), TTL))
    }

    fn setattr(
        &self,
        _: &Caller,
        node: NodeId,
        _: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        let mut state = self.lock();
        let inode = state.inode_mut(node)?;
        let time = |new| match new {
            NewTime::Now => now(),
            NewTime::At(at) => at,
        };
        if let Some(size) = changes.size {
            inode.content()?.truncate(size)?;
        }
        if let Some(mode) = changes.mode {
            inode.mode = inode.mode & libc::S_IFMT | mode;
        }
        inode.owner.0 = changes.uid.unwrap_or(inode.owner.0);
        inode.owner.1 = changes.gid.unwrap_or(inode.owner.1);
        inode.accessed = changes.accessed.map_or(inode.accessed, time);
        if let Some(modified) = changes.modified.map(time) {
            inode.modified = modified;
            if let Body::File(content) = &inode.body {
                content.set_time(modified);
            }
        }
        inode.changed = now();
        Ok((inode.attributes(node.0), TTL))
    }

    fn readlink(&self, _: &Caller, node: NodeId) -> Result<Vec<u8>> {
        match &self.lock().inode(node)?.body {
            Body::Link(target) => Ok(target.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        _: Option<Label<'_>>,
    ) -> Result<Entry> {
        let mut state = self.lock();
        let body = Body::Link(target.to_bytes().to_vec());
        let node = state.add(caller, (parent, name), body, libc::S_IFLNK | 0o777, 0)?;
        state.found(node)
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let (body, kind) = match new.mode & libc::S_IFMT {
            0 | libc::S_IFREG => (Body::File(Arc::default()), libc::S_IFREG),
            kind => (Body::Other, kind),
        };
        let mode = kind | new.mode & !libc::S_IFMT & !new.umask;
        let mut state = self.lock();
        let node = state.add(caller, (parent, name), body, mode, new.rdev)?;
        state.found(node)
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        let mode = libc::S_IFDIR | new.mode & 0o7777 & !new.umask;
        let mut state = self.lock();
        let body = Body::Directory(BTreeMap::new());
        let node = state.add(caller, (parent, name), body, mode, 0)?;
        state.found(node)
    }

    fn unlink(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.lock().remove(parent, name, false)
    }

    fn rmdir(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.lock().remove(parent, name, true)
    }

    fn rename(
        &self,
        _: &Caller,
        (from, old): (NodeId, &CStr),
        (to, new): (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        let mut state = self.lock();
        let node = state.child(from, old)?;
        let there = state.child(to, new).ok();
        let directory = state.inode(node)?.is_directory();
        match flags {
            0 => {}
            libc::RENAME_NOREPLACE if there.is_some() => return Err(Errno::EXIST),
            libc::RENAME_NOREPLACE => {}
            _ => return Err(Errno::INVAL),
        }
        if there == Some(node) {
            return Ok(());
        }
        if directory && state.is_below(to, node) {
            return Err(Errno::INVAL);
        }
        if let Some(there) = there {
            match (directory, state.inode(there)?.is_directory()) {
                (false, true) => return Err(Errno::ISDIR),
                (true, false) => return Err(Errno::NOTDIR),
                (_, directory) => state.remove(to, new, directory)?,
            }
        }
        state.inode_mut(from)?.names_mut()?.remove(old);
        state
            .inode_mut(to)?
            .names_mut()?
            .insert(new.to_owned(), node.0);
        let inode = state.inode_mut(node)?;
        inode.parent = to.0;
        inode.changed = now();
        if directory {
            state.inode_mut(from)?.links -= 1;
            state.inode_mut(to)?.links += 1;
        }
        Ok(())
    }

    fn link(&self, _: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        let mut state = self.lock();
        if state.inode(node)?.is_directory() {
            return Err(Errno::PERM);
        }
        let names = state.inode_mut(parent)?.names_mut()?;
        if names.contains_key(name) {
            return Err(Errno::EXIST);
        }
        names.insert(name.to_owned(), node.0);
        let inode = state.inode_mut(node)?;
        inode.links += 1;
        inode.changed = now();
        state.found(node)
    }

    fn open(&self, _: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        let mut state = self.lock();
        let content = Arc::clone(state.inode(node)?.content()?);
        if flags & libc::O_TRUNC.cast_unsigned() != 0 {
            content.truncate(0)?;
        }
        Ok(state.open(node, OpenKind::File(content)))
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        let mode = libc::S_IFREG | new.mode & 0o7777 & !new.umask;
        let mut state = self.lock();
        let body = Body::File(Arc::default());
        let node = match state.add(caller, (parent, name), body, mode, 0) {
            Err(Errno::EXIST) if flags & libc::O_EXCL.cast_unsigned() == 0 => {
                state.child(parent, name)?
            }
            added => added?,
        };
        let content = Arc::clone(state.inode(node)?.content()?);
        let opened = state.open(node, OpenKind::File(content));
        Ok((state.found(node)?, opened))
    }

    fn flush(&self, _: &Caller, _: NodeId, _: Handle) -> Result<()> {
        Ok(())
    }

    fn release(&self, _: NodeId, handle: Handle) -> Result<()> {
        let ended = self.lock().open.remove(&handle.0);
        ended.map(drop).ok_or(Errno::BADF)
    }

    fn kill_set_id(&self, node: NodeId, _: Handle) -> Result<()> {
        let mut state = self.lock();
        let inode = state.inode_mut(node)?;
        inode.mode &= !libc::S_ISUID;
        if inode.mode & libc::S_IXGRP != 0 {
            inode.mode &= !libc::S_ISGID;
        }
        Ok(())
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        match (self.lock().open.get(&handle.0), kind) {
            (Some((of, OpenKind::File(content))), HandleKind::File) if *of == node => {
                Ok(OpenFile::Object(Arc::clone(content) as _))
            }
            // FSYNCDIR: there is nothing to make durable.
            (Some((of, OpenKind::Directory)), HandleKind::Directory) if *of == node => {
                Ok(OpenFile::Object(Arc::<Content>::default()))
            }
            _ => Err(Errno::BADF),
        }
    }

    fn statfs(&self, _: NodeId) -> Result<Statistics> {
        Ok(Statistics {
            blocks: 1 << 20,
            blocks_free: 1 << 20,
            blocks_available: 1 << 20,
            files: 1 << 20,
            files_free: 1 << 20,
            block_size: BLOCK,
            fragment_size: BLOCK,
            name_length: 255,
        })
    }

    fn setxattr(
        &self,
        _: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let mut state = self.lock();
        let xattrs = &mut state.inode_mut(node)?.xattrs;
        match xattrs.contains_key(name) {
            true if flags.contains(XattrFlags::CREATE) => return Err(Errno::EXIST),
            false if flags.contains(XattrFlags::REPLACE) => return Err(Errno::NODATA),
            _ => xattrs.insert(name.to_owned(), value.to_vec()),
        };
        Ok(())
    }

    fn getxattr(&self, _: &Caller, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        let state = self.lock();
        let value = state.inode(node)?.xattrs.get(name).ok_or(Errno::NODATA)?;
        within(value.clone(), limit)
    }

    fn getxattr_len(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        let state = self.lock();
        let value = state.inode(node)?.xattrs.get(name).ok_or(Errno::NODATA)?;
        Ok(value.len())
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        let _ = caller;
        let state = self.lock();
        let names = state.inode(node)?.xattrs.keys();
        within(
            names
                .flat_map(|name| name.to_bytes_with_nul().to_vec())
                .collect(),
            limit,
        )
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        Ok(self.listxattr(caller, node, usize::MAX)?.len())
    }

    fn removexattr(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        let removed = self.lock().inode_mut(node)?.xattrs.remove(name);
        removed.map(drop).ok_or(Errno::NODATA)
    }

    fn opendir(&self, _: &Caller, node: NodeId, _: u32) -> Result<Opened> {
        let mut state = self.lock();
        state.inode(node)?.names()?;
        Ok(state.open(node, OpenKind::Directory))
    }

    fn readdir(
        &self,
        _: &Caller,
        node: NodeId,
        _: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        let mut state = self.lock();
        let inode = state.inode(node)?;
        let mut entries = vec![(c".".to_owned(), node.0), (c"..".to_owned(), inode.parent)];
        let names = inode.names()?;
        entries.extend(names.iter().map(|(name, number)| (name.clone(), *number)));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (next_offset, (name, number)) in (1..).zip(entries).skip(skip) {
            if !sink.has_room(&name) {
                break;
            }
            let kind = state.inode(NodeId(number)).map_or(0, |inode| inode.mode) >> 12;
            let dots = next_offset <= 2;
            let entry = match plus && !dots {
                true => Some(state.found(NodeId(number))?),
                false => None,
            };
            let dir_entry = DirEntry {
                inode: number,
                next_offset,
                kind: u8::try_from(kind & 0xf).unwrap_or_default(),
                name: &name,
            };
            sink.add(dir_entry, entry.as_ref());
        }
        Ok(())
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.release(node, handle)
    }

    fn access(&self, _: &Caller, node: NodeId, _: u32) -> Result<()> {
        self.lock().inode(node).map(drop)
    }

    fn lseek(&self, node: NodeId, _: Handle, offset: u64, whence: u32) -> Result<u64> {
        let size = self.lock().inode(node)?.attributes(node.0).size;
        match whence.cast_signed() {
            _ if offset >= size => Err(Errno::NXIO),
            libc::SEEK_DATA => Ok(offset),
            _ => Ok(size),
        }
    }
}

fn within(bytes: Vec<u8>, limit: usize) -> Result<Vec<u8>> {
    if bytes.len() > limit {
        Err(Errno::RANGE)
    } else {
        Ok(bytes)
    }
}
