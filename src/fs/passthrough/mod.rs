//! The passthrough file system: a directory of the host.
//!
//! Composition and options, and the operations too small for a file of their own. Inodes are
//! held within reach by `holds`, known to the guest by `inodes`, found by `lookup`; open
//! files are `handles`; `credentials` says who creates. The invariant: nothing is reached
//! but by a descriptor or a file handle that began at the shared directory, one name at a time.

mod attributes;
mod closed_fd_cache;
mod closing;
mod credentials;
mod current_request;
mod dir_seqcount;
mod directory;
mod error;
mod extended_ops;
mod fd_evictor;
mod forget;
mod handleless_open;
mod handles;
mod id_map;
mod inode;
mod inode_ref;
mod inodes;
mod limits;
mod locks;
mod lookup;
mod migration;
mod names;
mod opening;
mod options;
mod reopen;
mod replay;
mod restore;
mod retries;
mod revalidate;
mod security_labels;
mod sharing;
#[cfg(test)]
mod tests;
mod xattr;
mod xattr_map;

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

pub use self::error::PassthroughError;
pub use self::id_map::{IdMap, IdOverlap, IdRule, IdRuleError};
pub use self::inode_ref::InodeFileHandles;
pub use self::migration::{MigrationMode, MigrationOptions, OnMigrationError};
pub use self::options::{Cache, Options, raise_descriptor_limit, set_descriptor_limit};
pub use self::restore::{Past, Restored};
pub use self::security_labels::label_that_needs_privilege;
pub use self::xattr_map::{XattrMap, XattrMapError};

use self::closed_fd_cache::ClosedFdCache;
use self::closing::Closer;
use self::credentials::CredentialPolicy;
use self::directory::DirentCache;
use self::handleless_open::HandlelessFiles;
use self::handles::Handles;
use self::inode::Inode;
use self::inode_ref::{Holder, IDENTITY, Identity, stat_fd};
use self::inodes::Store;
use self::limits::Bounds;
use self::locks::Locks;
use self::opening::CurrentTerms;
use self::restore::{Begun, Records};
use self::revalidate::Paths;
use self::sharing::Sharing;
use super::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags, Label,
    LockOwner, Migrate, NegotiatedTerms, NewNode, NodeId, OpenFile, Opened, Replay, Result,
    Statistics, Timestamp, XattrFlags,
};
use crate::io::File;
use crate::state::Table;
use crate::sys;

/// A directory that is about to be shared.
#[derive(Debug)]
pub struct Shared {
    /// What is open on it, `O_PATH`.
    pub root: OwnedFd,
    /// What was `/proc/self/fd`, `O_PATH`, where there may be no `/proc` any more.
    pub proc_fds: OwnedFd,
    /// What messages call it.
    pub path: PathBuf,
}

/// A directory of the host, as a file system for a guest.
#[derive(Debug)]
pub struct Passthrough {
    options: Options,
    /// `/proc/self/fd`, `O_PATH`.
    proc_fds: OwnedFd,
    inodes: Store,
    holder: Holder,
    /// What the root was made for, if it is a directory for a single file.
    only: Option<OwnedFd>,
    handles: Handles,
    on_demand: HandlelessFiles,
    closed_fds: ClosedFdCache,
    closer: Closer,
    terms: CurrentTerms,
    bounds: Bounds,
    sharing: Sharing,
    /// DirentCache of directories that are kept.
    dirent_cache: DirentCache,
    locks: Locks,
    credential_policy: CredentialPolicy,
    /// Labels of SELinux are this host's business.
    selinux: bool,
    /// Locks were given up for another server to have them; see `moving`.
    locks_released: AtomicBool,
    /// The session is one that another process has begun.
    inherited: AtomicBool,
    /// What the guest holds, as it outlives this process.
    table: Arc<Table>,
    /// What is known of requests that another process had begun.
    begun: Begun,
    paths: Paths,
}

impl Passthrough {
    /// Shares `shared_dir`. To be called in the process that serves it, before that gives up
    /// its view of `/proc`; the server may change its root or its mounts afterwards.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn new(shared_dir: &Path, options: Options) -> std::result::Result<Self, PassthroughError> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc_fds = rustix::fs::open(c"/proc/self/fd", directory, Mode::empty())
            .map_err(|source| PassthroughError::OpenProc { source })?;
        let root = open_shared(shared_dir)?;
        let table = Table::in_memory(&options.limits(1)).map_err(PassthroughError::State)?;
        let place = Shared {
            root,
            proc_fds,
            path: shared_dir.to_path_buf(),
        };
        Self::of(place, options, &table, None).map(|(fs, _)| fs)
    }

    /// Shares `shared`, with what the guest holds in `table`: from its beginning, or going on from
    /// the `past`.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn of(
        shared: Shared,
        options: Options,
        table: &Arc<Table>,
        past: Option<&Past>,
    ) -> std::result::Result<(Self, Restored), PassthroughError> {
        let Shared {
            root,
            proc_fds,
            path,
        } = shared;
        // What is there and is not gone on from ends here.
        let records = Records::of(table).filter(|_| past.is_some());
        if records.is_some() {
            // A start that fails changes nothing.
            table.close();
        }
        let root = match (&records, past) {
            (Some(records), Some(past)) if past.inherited_fds => {
                restore::inherited_fds(records.root.descriptor(), &records.root).unwrap_or(root)
            }
            _ => root,
        };
        let identity = identity_of_shared(&root, &path)?;
        if identity.kind != FileType::Directory {
            return Err(PassthroughError::NotADirectory { path });
        }
        let of_share = |source| PassthroughError::StatShared {
            path: path.clone(),
            source,
        };
        let credential_policy = wear_for(&root).map_err(of_share)?;

        let bounds = Bounds::new(&options);
        let closed_fds = options.max_spare_files.min(bounds.most / 4);
        let closed_fds = ClosedFdCache::new(&root, &identity.key, closed_fds).map_err(of_share)?;
        let mode = options.inode_file_handles;
        let holder = Holder::new(mode, root.as_fd(), &identity, &proc_fds).map_err(|source| {
            PassthroughError::FileHandles {
                path: path.clone(),
                source,
            }
        })?;
        let (store, rest) = match records {
            None => {
                let store = Store::new(&identity, root, table, options.remember_inodes);
                (store.ok_or(PassthroughError::NoRoom)?, None)
            }
            Some(Records {
                root: record,
                others,
            }) => {
                let old = restore::key_of(&record);
                let root = Inode::root_again(record, &identity, root)
                    .ok_or(PassthroughError::AnotherShare { path })?;
                let store = Store::of(root, table, options.remember_inodes);
                (store, Some((old, others)))
            }
        };
        if table.generation() == 0 || rest.is_none() {
            table.set_generation(lookup::new_generation());
        }
        let mut fs = Self {
            options,
            proc_fds,
            // The root stays what it is whatever happens on the host, and is never let go of.
            inodes: store,
            holder,
            only: None,
            handles: Handles::new(table),
            on_demand: HandlelessFiles::new(bounds.most),
            closed_fds,
            closer: Closer::default(),
            terms: CurrentTerms::default(),
            bounds,
            sharing: Sharing::default(),
            dirent_cache: DirentCache::default(),
            locks: Locks::new(table),
            credential_policy,
            selinux: security_labels::host_has_selinux(),
            locks_released: AtomicBool::new(false),
            inherited: AtomicBool::new(rest.is_some()),
            table: Arc::clone(table),
            begun: Begun::default(),
            paths: Paths::new(),
        };
        table.reopen();
        let restored = match (rest, past) {
            (Some((old, records)), Some(past)) => fs.restore(records, old, past),
            _ => Restored::default(),
        };
        Ok((fs, restored))
    }

    /// The table of what the guest holds.
    #[must_use]
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Says that the root is a directory that was made for `file`, `O_PATH`, which is on another
    /// file system: to sync the root is to sync that.
    pub fn is_for(&mut self, file: OwnedFd) {
        self.only = Some(file);
    }

    /// How many inodes the guest has looked up and not forgotten, the root included, and how many
    /// are remembered beside them.
    #[must_use]
    pub fn known_inodes(&self) -> usize {
        self.inodes.len()
    }

    /// How many of those the guest has given back, and may find again by a file handle.
    #[must_use]
    pub fn remembered_inodes(&self) -> usize {
        self.inodes.remembered()
    }

    /// How many of those have a descriptor at this moment.
    #[must_use]
    pub fn inode_descriptors(&self) -> usize {
        self.inodes.descriptors()
    }

    /// How many files and directories the guest has open.
    #[must_use]
    pub fn open_handles(&self) -> usize {
        self.handles.len()
    }

    /// Prepares the calling thread, if it isn't.
    fn prepare(&self) -> Result<()> {
        credentials::prepare_thread(&self.proc_fds)
    }

    /// What handles of this run are told from those of another by.
    fn generation(&self) -> u64 {
        self.table().generation()
    }

    /// Ends all that belongs to a session of the guest but its inodes.
    fn end_session(&self) {
        self.locks_released.store(false, Ordering::Relaxed);
        self.locks.clear();
        self.handles.clear();
        self.on_demand.clear();
        self.closed_fds.clear();
        self.terms.set(&NegotiatedTerms::default());
    }

    /// Asked by each operation that changes something, before it does.
    fn writable(&self) -> Result<()> {
        if self.options.readonly {
            Err(Errno::ROFS)
        } else {
            Ok(())
        }
    }
}

/// Finds out whether `shared_dir`, a directory or a single file, is there and can be shared, before
/// somebody relies on it.
///
/// # Errors
///
/// See [`PassthroughError`].
pub fn check_shared(shared_dir: &Path) -> std::result::Result<(), PassthroughError> {
    let root = open_shared(shared_dir)?;
    identity_of_shared(&root, shared_dir).map(|_| ())
}

fn open_shared(shared_dir: &Path) -> std::result::Result<OwnedFd, PassthroughError> {
    let root = rustix::fs::open(shared_dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    root.map_err(|source| PassthroughError::OpenShared {
        path: shared_dir.to_path_buf(),
        source,
    })
}

fn identity_of_shared(
    root: &OwnedFd,
    shared_dir: &Path,
) -> std::result::Result<Identity, PassthroughError> {
    let path = shared_dir.to_path_buf();
    let identity = match stat_fd(root, IDENTITY) {
        Ok(stat) => Identity::of(&stat),
        Err(source) => return Err(PassthroughError::StatShared { path, source }),
    };
    match identity.kind {
        FileType::Directory | FileType::RegularFile => Ok(identity),
        _ => Err(PassthroughError::NeitherFileNorDirectory { path }),
    }
}

/// Whether credentials may stay on a thread between two requests for this file system: not
/// where another machine or process goes by them.
fn wear_for(root: &OwnedFd) -> Result<CredentialPolicy> {
    /// Types of uapi `linux/magic.h`: NFS, SMB, CIFS, SMB 2, FUSE (virtio-fs too), 9P, Ceph,
    /// AFS twice, Coda; and Lustre.
    const ELSEWHERE: [u32; 11] = [
        0x6969,
        0x517b,
        0xff53_4d42,
        0xfe53_4d42,
        0x6573_5546,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x6b41_4653,
        0x7375_7245,
        0x0bd0_0bd0,
    ];
    let kind = rustix::fs::fstatfs(root)?.f_type;
    let elsewhere = ELSEWHERE
        .iter()
        .any(|&magic| i64::from(magic) == kind & 0xffff_ffff);
    Ok(if elsewhere {
        CredentialPolicy::putting_back()
    } else {
        CredentialPolicy::staying()
    })
}

impl FileSystem for Passthrough {
    /// Gives the thread a working directory, a umask and file system ids of its own, which
    /// belong to this file system from now on: whoever changes them breaks it. A thread that
    /// was not prepared is prepared by its first request that needs it.
    fn prepare_thread(&self) -> std::io::Result<()> {
        Ok(self.prepare()?)
    }

    fn reset(&self) {
        self.end_session();
        self.inherited.store(false, Ordering::Relaxed);
        self.inodes.clear();
        self.table().clear_thread_journals();
    }

    fn unmounted(&self) {
        if self.outlives_session() {
            self.end_session();
            self.forget_all();
            self.table().clear_thread_journals();
        } else {
            self.reset();
        }
    }

    fn begin(&self, terms: &NegotiatedTerms) {
        self.terms.set(terms);
    }

    fn replay(&self) -> Option<&dyn Replay> {
        Some(self)
    }

    fn migrate(&self) -> Option<&dyn Migrate> {
        Some(self)
    }

    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.look_up_for(caller, parent, name)
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.find_self(node)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        self.find_parent(node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.forget_lookups(node, count);
        let kept = self.on_demand.count() > 0 || self.closed_fds.count() > 0;
        if kept && self.inodes.get(node).is_none() {
            self.close_kept(node);
        }
    }

    fn getattr(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        self.attributes_of(node, handle)
    }

    fn statx(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        self.attributes_with_birth(node, handle)
    }

    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        self.writable()?;
        self.change(caller, node, handle, changes)
    }

    fn readlink(&self, _: &Caller, node: NodeId) -> Result<Vec<u8>> {
        let inode = self.inode(node)?;
        if inode.kind() != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(self.fd(&inode)?, c"", Vec::new())?;
        Ok(target.into_bytes())
    }

    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry> {
        self.writable()?;
        self.labelled(label, Some((parent, name)), || {
            self.make_symlink(caller, parent, name, target)
        })
    }

    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        self.writable()?;
        self.labelled(new.label, Some((parent, name)), || {
            self.make_node(caller, parent, name, new)
        })
    }

    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry> {
        self.writable()?;
        self.labelled(new.label, Some((parent, name)), || {
            self.make_directory(caller, parent, name, new)
        })
    }

    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove(caller, parent, name, AtFlags::empty())
    }

    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove(caller, parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.writable()?;
        self.move_name(caller, from, to, flags)
    }

    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.writable()?;
        self.make_link(caller, node, parent, name)
    }

    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened> {
        if self.terms.no_open() {
            return Err(Errno::NOSYS);
        }
        self.open_file(caller, node, flags)
    }

    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.create_file(caller, parent, name, flags, new)
    }

    fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        self.writable()?;
        self.labelled(new.label, None, || {
            self.make_nameless(caller, parent, flags, new)
        })
    }

    /// Closes a duplicate, which makes network file systems say what went wrong so far.
    fn flush(&self, _: &Caller, node: NodeId, handle: Handle) -> Result<()> {
        if self.is_implicit(handle, HandleKind::File) {
            // What nobody has opened nobody closes, and the guest needn't ask again.
            return Err(Errno::NOSYS);
        }
        let file = self.handles.file(node, handle, HandleKind::File)?;
        let again = self.with_room(|| rustix::io::fcntl_dupfd_cloexec(&file, 0))?;
        sys::file::close(again)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        if self.is_implicit(handle, HandleKind::File) {
            return Ok(());
        }
        self.locks.released(node, handle);
        let released = self.handles.release(node, handle, HandleKind::File)?;
        self.unshare(node, &released.file);
        self.put_by(node, released);
        Ok(())
    }

    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.writable()?;
        self.kill_set_id_before_change(&self.file_of(node, handle, HandleKind::File, true)?)
    }

    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        self.closer.pending()
    }

    fn report_shortage(&self) {
        self.tell_of_shortage();
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile> {
        self.file_of(node, handle, kind, false).map(OpenFile::Host)
    }

    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.file_of(node, handle, HandleKind::File, true)
            .map(OpenFile::Host)
    }

    fn lock_file(&self, node: NodeId, handle: Handle, owner: LockOwner) -> Result<Arc<File>> {
        self.lock_file_of(node, handle, owner)
    }

    fn lock_file_if_any(&self, node: NodeId, owner: LockOwner) -> Option<Arc<File>> {
        self.locks.find(node, owner)
    }

    fn end_locks(&self, node: NodeId, owner: LockOwner) {
        self.locks.end(node, owner);
    }

    fn whole_file_system(&self, node: NodeId) -> Result<OpenFile> {
        self.whole(node).map(OpenFile::Host)
    }

    fn inode_flags(&self, node: NodeId, handle: Handle) -> Result<u32> {
        self.flags_of(node, handle)
    }

    fn set_inode_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        self.writable()?;
        self.change_flags(node, handle, flags)
    }

    fn extended_inode_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        self.extended_flags(node, handle)
    }

    fn set_extended_inode_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        self.writable()?;
        self.change_extended_flags(node, handle, flags)
    }

    fn statfs(&self, node: NodeId) -> Result<Statistics> {
        self.statistics(node)
    }

    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.writable()?;
        self.set_attribute(caller, node, name, value, flags)
    }

    fn getxattr(&self, _: &Caller, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        self.attribute(node, name, limit)
    }

    fn getxattr_len(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        self.attribute_len(node, name)
    }

    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        self.attribute_names(caller, node, limit)
    }

    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        self.attribute_names_len(caller, node)
    }

    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove_attribute(caller, node, name)
    }

    fn opendir(&self, _: &Caller, node: NodeId, _flags: u32) -> Result<Opened> {
        if self.terms.no_opendir() {
            return Err(Errno::NOSYS);
        }
        self.room_for_handle()?;
        let fd = self.open_directory(&*self.inode(node)?)?;
        self.opened(node, fd, OFlags::RDONLY, HandleKind::Directory)
    }

    fn readdir(
        &self,
        _: &Caller,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()> {
        self.read_entries(node, handle, offset, plus, sink)
    }

    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()> {
        if self.is_implicit(handle, HandleKind::Directory) {
            return Ok(());
        }
        self.handles
            .release(node, handle, HandleKind::Directory)
            .map(drop)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.may(caller, node, mask)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        let file = self.file_of(node, handle, HandleKind::File, false)?;
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&file, to)
    }
}
