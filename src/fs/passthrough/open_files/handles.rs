//! The open files and directories, by the handle that the guest has for them.
//!
//! A handle is a number that is never reused, so a released handle is unknown instead of being
//! another file. The invariant: a handle gives access only to the inode it was opened for; with
//! another node id it is `EBADF`.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustc_hash::FxHashMap;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::dir_stream::DirStream;
use crate::fs::lowest::Lowest;
use crate::fs::passthrough::current_request;
use crate::fs::{Handle, HandleKind, NodeId, Result};
use crate::io::File;
use crate::state::{HandleFields, HandleRecord, Table};

/// One open file or directory.
#[derive(Debug)]
struct Open {
    /// The state that outlives this process. It is dropped before the file is closed.
    record: HandleRecord,
    node: NodeId,
    file: File,
    /// The read position of a directory.
    stream: Option<Arc<Mutex<DirStream>>>,
}

impl Open {
    fn kind(&self) -> HandleKind {
        match self.stream {
            None => HandleKind::File,
            Some(_) => HandleKind::Directory,
        }
    }
}

/// What a released handle stood for.
#[derive(Debug)]
pub(crate) struct Released {
    pub(crate) file: File,
    /// The flags that it was opened with.
    pub(crate) flags: OFlags,
    /// Whether the whole file is locked through it.
    pub(crate) locked: bool,
}

/// Enough for a handful of workers to collide rarely.
const SHARDS: u64 = 32;

type Shard = RwLock<FxHashMap<u64, Open>>;

/// All that the guest has open.
#[derive(Debug)]
pub(crate) struct Handles {
    shards: Box<[Shard]>,
    table: Arc<Table>,
    /// The next handle, and how many are left before the table must be asked for more. 64 bits
    /// don't run out. 0 means "open without a handle".
    next: Mutex<(u64, u64)>,
    /// The number of handles, approximate while handles are added or removed. It orders nothing and
    /// is used for limits.
    count: AtomicUsize,
}

impl Handles {
    pub(crate) fn new(table: &Arc<Table>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            table: Arc::clone(table),
            next: Mutex::new((0, 0)),
            count: AtomicUsize::new(0),
        }
    }

    fn next_handle(&self) -> u64 {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        if next.1 == 0 {
            *next = self.table.more_handles();
        }
        let handle = next.0;
        *next = (handle + 1, next.1 - 1);
        handle
    }

    /// Adds `file`, which was opened with `flags`.
    ///
    /// # Errors
    ///
    /// `ENFILE` if the table has no room.
    pub(crate) fn add(
        &self,
        node: NodeId,
        file: File,
        flags: OFlags,
        kind: HandleKind,
    ) -> Result<Handle> {
        let fields = HandleFields {
            handle: self.next_handle(),
            node: node.0,
            directory: kind == HandleKind::Directory,
            flags: flags.bits(),
            fd: file.as_fd().as_raw_fd(),
        };
        let record = self.table.new_handle(&fields, current_request::unique());
        Ok(self.put(record.ok_or(Errno::NFILE)?, file))
    }

    /// Adds a file that has a record.
    pub(crate) fn put(&self, record: HandleRecord, file: File) -> Handle {
        let fields = record.fields();
        let open = Open {
            record,
            node: NodeId(fields.node),
            file,
            stream: fields.directory.then(Arc::default),
        };
        // Before another thread can release it.
        self.count.fetch_add(1, Ordering::Relaxed);
        self.shard(fields.handle)
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(fields.handle, open);
        Handle(fields.handle)
    }

    /// Records the lock on the whole file that a handle holds. `kind` is a number that only the
    /// caller interprets.
    pub(crate) fn note_lock(&self, node: NodeId, handle: Handle, kind: u64) {
        let recorded = self.with(node, handle, HandleKind::File, |open| {
            open.record.set_lock(kind);
            Ok(())
        });
        if recorded.is_err() {
            log::debug!(
                "a lock of handle {} is not recorded: the handle has been released",
                handle.0
            );
        }
    }

    pub(crate) fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<File> {
        self.with(node, handle, kind, |open| Ok(open.file.clone()))
    }

    /// The file behind a handle of either kind.
    pub(crate) fn any(&self, node: NodeId, handle: Handle) -> Result<File> {
        self.file(node, handle, HandleKind::File)
            .or_else(|_| self.file(node, handle, HandleKind::Directory))
    }

    pub(crate) fn directory(
        &self,
        node: NodeId,
        handle: Handle,
    ) -> Result<(File, Arc<Mutex<DirStream>>)> {
        self.with(node, handle, HandleKind::Directory, |open| {
            let stream = open.stream.as_ref().ok_or(Errno::BADF)?;
            Ok((open.file.clone(), Arc::clone(stream)))
        })
    }

    /// Removes a handle. The file stays open while a request uses it.
    pub(crate) fn release(
        &self,
        node: NodeId,
        handle: Handle,
        kind: HandleKind,
    ) -> Result<Released> {
        let released = {
            let mut shard = self
                .shard(handle.0)
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let matches = |open: &Open| open.node == node && open.kind() == kind;
            if !shard.get(&handle.0).is_some_and(matches) {
                return Err(Errno::BADF);
            }
            let released = shard.remove(&handle.0).ok_or(Errno::BADF)?;
            if shard.capacity() > 64 && shard.len() < shard.capacity() / 4 {
                shard.shrink_to_fit();
            }
            released
        };
        self.count.fetch_sub(1, Ordering::Relaxed);
        // Closing can take long, so it happens outside the lock.
        let Open { record, file, .. } = released;
        Ok(Released {
            file,
            flags: OFlags::from_bits_retain(record.fields().flags),
            locked: record.lock() != 0,
        })
    }

    /// Whether the guest has `node` open. Scans all handles.
    pub(crate) fn has(&self, node: NodeId) -> bool {
        self.shards.iter().any(|shard| {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            shard.values().any(|open| open.node == node)
        })
    }

    /// Calls `each` with all handles and their locks on the whole file.
    pub(crate) fn each(&self, mut each: impl FnMut(&HandleFields, u64, &File)) {
        for shard in &self.shards {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            for open in shard.values() {
                each(&open.record.fields(), open.record.lock(), &open.file);
            }
        }
    }

    /// The `limit` lowest handles from `from` on, and the next one.
    pub(crate) fn from(&self, from: u64, limit: usize) -> (Vec<(HandleFields, File)>, Option<u64>) {
        let mut lowest = Lowest::new(limit);
        for shard in &self.shards {
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            let handles = shard.keys().copied().filter(|handle| *handle >= from);
            handles.for_each(|handle| lowest.add(handle));
        }
        let (handles, next) = lowest.take();
        let open = handles.into_iter().filter_map(|handle| {
            let shard = self.shard(handle);
            let shard = shard.read().unwrap_or_else(PoisonError::into_inner);
            let open = shard.get(&handle)?;
            Some((open.record.fields(), open.file.clone()))
        });
        (open.collect(), next)
    }

    /// Ensures that handles below `handle` are not handed out any more.
    pub(crate) fn skip_to_handle(&self, handle: u64) {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.table.skip_to_handle(handle);
        *next = (0, 0);
    }

    /// Adds a handle that another server handed out, open as `file`. `lock` is its lock on the
    /// whole file.
    ///
    /// # Errors
    ///
    /// `EEXIST` if the handle is taken or was never handed out; `ENFILE` if the table has no room.
    pub(crate) fn import(&self, fields: &HandleFields, lock: u64, file: File) -> Result<()> {
        let taken = self
            .shard(fields.handle)
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(&fields.handle);
        if taken || fields.handle == 0 || fields.handle >= self.table.handles_given_out() {
            return Err(Errno::EXIST);
        }
        let record = self.table.new_handle(fields, 0).ok_or(Errno::NFILE)?;
        record.set_lock(lock);
        self.put(record, file);
        Ok(())
    }

    pub(crate) fn clear(&self) {
        for shard in &self.shards {
            let released = {
                let mut shard = shard.write().unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *shard)
            };
            self.count.fetch_sub(released.len(), Ordering::Relaxed);
            drop(released);
        }
    }

    /// The number of descriptors that handles have.
    pub(crate) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(crate) fn len(&self) -> usize {
        let len = |shard: &Shard| shard.read().unwrap_or_else(PoisonError::into_inner).len();
        self.shards.iter().map(len).sum()
    }

    fn with<T>(
        &self,
        node: NodeId,
        handle: Handle,
        kind: HandleKind,
        read: impl FnOnce(&Open) -> Result<T>,
    ) -> Result<T> {
        let shard = self
            .shard(handle.0)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        match shard.get(&handle.0) {
            Some(open) if open.node == node && open.kind() == kind => read(open),
            _ => Err(Errno::BADF),
        }
    }

    fn shard(&self, handle: u64) -> &Shard {
        &self.shards[usize::try_from(handle % SHARDS).unwrap_or_default()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Limits;

    const NODE: NodeId = NodeId(7);

    fn null() -> File {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn handles() -> (Handles, Handle, Handle) {
        let limits = Limits {
            inodes: 0,
            handles: 10,
            queues: 1,
        };
        let handles = Handles::new(&Table::in_memory(&limits).unwrap());
        let file = add(&handles, HandleKind::File);
        let directory = add(&handles, HandleKind::Directory);
        (handles, file, directory)
    }

    fn add(handles: &Handles, kind: HandleKind) -> Handle {
        handles.add(NODE, null(), OFlags::RDONLY, kind).unwrap()
    }

    #[test]
    fn handle_of_another_inode_or_kind_is_refused() {
        let (handles, file, directory) = handles();
        assert!(handles.file(NODE, file, HandleKind::File).is_ok());
        assert!(handles.any(NODE, directory).is_ok());
        let other = NodeId(8);
        let refused = [
            handles.file(other, file, HandleKind::File).err(),
            handles.file(NODE, file, HandleKind::Directory).err(),
            handles.file(NODE, directory, HandleKind::File).err(),
            handles.directory(NODE, file).err(),
            handles.any(other, file).err(),
            handles.release(other, file, HandleKind::File).err(),
            handles.release(NODE, file, HandleKind::Directory).err(),
        ];
        assert_eq!(refused, [Some(Errno::BADF); 7]);
        assert_eq!(handles.len(), 2);
    }

    #[test]
    fn released_handle_is_never_reused() {
        let (handles, file, _) = handles();
        handles.release(NODE, file, HandleKind::File).unwrap();
        assert_eq!(
            handles.release(NODE, file, HandleKind::File).err(),
            Some(Errno::BADF)
        );
        assert_ne!(add(&handles, HandleKind::File), file);
    }

    #[test]
    fn clear_removes_all_handles() {
        let (handles, file, _) = handles();
        handles.clear();
        assert_eq!(handles.len(), 0);
        assert!(handles.file(NODE, file, HandleKind::File).is_err());
    }
}
