//! The passthrough file system: a directory of the host.
//!
//! Composition and options, and the operations too small for a file of their own. Inodes are
//! held within reach by `holds`, known to the guest by `inodes`, found by `lookup`; open
//! files are `handles`; `credentials` says who creates. The invariant: nothing is reached
//! but by a descriptor or a file handle that began at the shared directory, one name at a time.

mod attributes;
mod bounds;
mod changes;
mod clock;
mod credentials;
mod directory;
mod handles;
mod holds;
mod id_map;
mod inodes;
mod labels;
mod locks;
mod lookup;
mod more;
mod names;
mod on_demand;
mod opening;
mod reach;
#[cfg(test)]
mod tests;
mod xattr;
mod xattr_map;

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

pub use self::holds::InodeFileHandles;
pub use self::id_map::{IdMap, IdOverlap, IdRule, IdRuleError};
pub use self::xattr_map::{XattrMap, XattrMapError};

use self::credentials::Wear;
use self::directory::Pieces;
use self::handles::Handles;
use self::holds::{Holder, IDENTITY, Identity, stat_fd};
use self::inodes::Store;
use self::locks::Locks;
use self::on_demand::OnDemand;
use self::opening::AgreedTerms;
use super::{
    Attributes, Caller, Changes, DirSink, Entry, FileSystem, Handle, HandleKind, InodeFlags, Label,
    LockOwner, NewNode, NodeId, Opened, Result, Statistics, Terms, Timestamp, XattrFlags,
};
use crate::io::File;
use crate::sys;

/// Why a directory can't be shared.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The shared directory can't be opened.
    #[error("can't open the shared directory {}", path.display())]
    OpenShared {
        /// The directory.
        path: PathBuf,
        /// What the host says.
        source: Errno,
    },
    /// The shared directory has been opened, and can't be asked who it is.
    #[error("can't read the attributes of the shared directory {}", path.display())]
    StatShared {
        /// The directory.
        path: PathBuf,
        /// What the host says.
        source: Errno,
    },
    /// What is to be shared can't be.
    #[error("{} is neither a directory nor a regular file", path.display())]
    NeitherFileNorDirectory {
        /// What it is called.
        path: PathBuf,
    },
    /// A single file is shared in a directory that is made for it, and not by itself.
    #[error("{} is not a directory", path.display())]
    NotADirectory {
        /// What it is called.
        path: PathBuf,
    },
    /// There is no `/proc`, through which inodes are opened.
    #[error("can't open /proc/self/fd (is /proc mounted?)")]
    OpenProc {
        /// What the host says.
        source: Errno,
    },
    /// File handles are mandatory and don't work.
    #[error(
        "can't use file handles on {}: they need CAP_DAC_READ_SEARCH and a file system that \
         can be exported",
        path.display()
    )]
    FileHandles {
        /// The directory.
        path: PathBuf,
        /// What the host says.
        source: Errno,
    },
}

/// What the guest may keep of the files it has opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Nothing.
    Never,
    /// Names, attributes and lists of names; not the data of files.
    Metadata,
    /// Data until the file has changed, as its attributes tell.
    #[default]
    Auto,
    /// Everything, also across close and open.
    Always,
}

impl Cache {
    /// How long names and attributes hold.
    #[must_use]
    pub fn ttl(self) -> Duration {
        Duration::from_secs(match self {
            Self::Never => 0,
            Self::Auto => 1,
            Self::Metadata | Self::Always => 24 * 60 * 60,
        })
    }
}

/// How a directory is shared.
#[derive(Clone, Debug)]
pub struct Options {
    /// When inodes are held by file handle.
    pub inode_file_handles: InodeFileHandles,
    /// How many descriptors inodes and open files may have together before inodes that are not
    /// in use give up theirs; `None` for three quarters of what `RLIMIT_NOFILE` allows when the
    /// file system is made, which is also the most. See [`raise_descriptor_limit`].
    pub max_open_inodes: Option<usize>,
    /// How many inodes the guest may know at the same time, besides the root; beyond that what
    /// would make one known is `ENFILE`. The host's memory is what this is about.
    pub max_inodes: usize,
    /// How many files and directories it may have open, those included that locks need; beyond
    /// that opening is `ENFILE`, and locking `ENOLCK`. `None` for three quarters of what
    /// `RLIMIT_NOFILE` allows, which is also the most.
    pub max_handles: Option<usize>,
    /// What the guest may keep of open files and directories.
    pub cache: Cache,
    /// How long the guest may rely on attributes.
    pub attribute_ttl: Duration,
    /// How long the guest may rely on names.
    pub entry_ttl: Duration,
    /// How user ids are translated between guest and host.
    pub users: IdMap,
    /// How group ids are.
    pub groups: IdMap,
    /// Extended attributes are served; else they answer `EOPNOTSUPP`. On unless switched off:
    /// programs take their absence for data loss (`cp -a`, `rsync -X`, package managers).
    pub xattr: bool,
    /// Under which names.
    pub xattr_map: Option<XattrMap>,
    /// `O_DIRECT` of the guest is passed on to the host; else the host's cache stays in use.
    pub allow_direct_io: bool,
    /// `O_NOATIME` of the guest is passed on to the host, which may refuse it.
    pub preserve_noatime: bool,
    /// Whatever would change something is refused with `EROFS`.
    pub readonly: bool,
    /// Entries say where another file system begins.
    pub announce_submounts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            inode_file_handles: InodeFileHandles::default(),
            max_open_inodes: None,
            max_inodes: bounds::INODES,
            max_handles: None,
            cache: Cache::default(),
            attribute_ttl: Cache::default().ttl(),
            entry_ttl: Cache::default().ttl(),
            users: IdMap::default(),
            groups: IdMap::default(),
            xattr: true,
            xattr_map: None,
            allow_direct_io: false,
            preserve_noatime: false,
            readonly: false,
            announce_submounts: true,
        }
    }
}

/// Raises the limit of open descriptors (`RLIMIT_NOFILE`) as far as it goes without privilege,
/// and answers what it is then; `None` for no limit. For the server's start.
pub fn raise_descriptor_limit() -> Option<u64> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if raised.current == limit.current {
        return limit.current;
    }
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => raised.current,
        // Only a seccomp filter forbids this. What depends on the limit goes by what it is.
        Err(error) => {
            log::warn!("can't raise the limit of open descriptors to its maximum: {error}");
            limit.current
        }
    }
}

/// Sets the limit of open descriptors, and raises the hard limit too if need be.
///
/// # Errors
///
/// `EPERM`: the hard limit is lower, and the process has no privilege to raise it, or nobody has.
pub fn set_descriptor_limit(limit: u64) -> std::result::Result<(), Errno> {
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let wanted = Rlimit {
        current: Some(limit),
        maximum: maximum.map(|maximum| maximum.max(limit)),
    };
    rustix::process::setrlimit(Resource::Nofile, wanted)
}

/// Descriptors that inodes and open files may have unless the options say less; the others are
/// for queues, rings, sockets and operations that run.
fn most_descriptors() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    });
    limit / 4 * 3
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
    on_demand: OnDemand,
    terms: AgreedTerms,
    /// Descriptors that inodes and open files may have together.
    most: usize,
    /// How many of them the guest's open files may have.
    max_handles: usize,
    /// Pieces of directories that are kept.
    pieces: Pieces,
    locks: Locks,
    wear: Wear,
    /// Labels of SELinux are this host's business.
    selinux: bool,
    /// What handles of this run are told from those of another by.
    generation: u64,
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
        Self::of(root, proc_fds, shared_dir, options)
    }

    /// Shares what `root` is open on, `O_PATH`, where there may be no `/proc` any more: `proc_fds`
    /// is what was `/proc/self/fd`. `shared_dir` is what messages call it.
    ///
    /// # Errors
    ///
    /// See [`PassthroughError`].
    pub fn of(
        root: OwnedFd,
        proc_fds: OwnedFd,
        shared_dir: &Path,
        options: Options,
    ) -> std::result::Result<Self, PassthroughError> {
        let path = || shared_dir.to_path_buf();
        let identity = identity_of_shared(&root, shared_dir)?;
        if identity.kind != FileType::Directory {
            return Err(PassthroughError::NotADirectory { path: path() });
        }
        let wear = wear_for(&root).map_err(|source| PassthroughError::StatShared {
            path: path(),
            source,
        })?;

        let most = most_descriptors();
        let max_handles = options.max_handles.unwrap_or(most).min(most);
        let most = options.max_open_inodes.unwrap_or(most).min(most);
        let mode = options.inode_file_handles;
        let holder = Holder::new(mode, root.as_fd(), &identity, &proc_fds).map_err(|source| {
            PassthroughError::FileHandles {
                path: path(),
                source,
            }
        })?;
        Ok(Self {
            options,
            proc_fds,
            // The root stays what it is whatever happens on the host, and is never let go of.
            inodes: Store::new(&identity, root),
            holder,
            only: None,
            handles: Handles::new(),
            on_demand: OnDemand::new(most),
            terms: AgreedTerms::default(),
            most,
            max_handles,
            pieces: Pieces::default(),
            locks: Locks::default(),
            wear,
            selinux: labels::host_has_selinux(),
            generation: lookup::new_generation(),
        })
    }

    /// Says that the root is a directory that was made for `file`, `O_PATH`, which is on another
    /// file system: to sync the root is to sync that.
    pub fn is_for(&mut self, file: OwnedFd) {
        self.only = Some(file);
    }

    /// How many inodes the guest has looked up and not forgotten, the root included.
    #[must_use]
    pub fn known_inodes(&self) -> usize {
        self.inodes.len()
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
fn wear_for(root: &OwnedFd) -> Result<Wear> {
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
        Wear::putting_back()
    } else {
        Wear::staying()
    })
}

/// Narrows what the host tells; what is beyond is the largest there is.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl FileSystem for Passthrough {
    /// Gives the thread a working directory, a umask and file system ids of its own, which
    /// belong to this file system from now on: whoever changes them breaks it. A thread that
    /// was not prepared is prepared by its first request that needs it.
    fn prepare_thread(&self) -> std::io::Result<()> {
        Ok(self.prepare()?)
    }

    fn reset(&self) {
        self.locks.clear();
        self.handles.clear();
        self.on_demand.clear();
        self.terms.set(&Terms::default());
        self.inodes.clear();
    }

    fn begin(&self, terms: &Terms) {
        self.terms.set(terms);
    }

    fn lookup(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<Entry> {
        let parent = self.inode(parent)?;
        let entry = self.find(self.fd(&parent)?, name)?;
        Ok(self.announced(parent.key(), entry))
    }

    fn lookup_self(&self, node: NodeId) -> Result<Entry> {
        self.find_self(node)
    }

    fn lookup_parent(&self, node: NodeId) -> Result<Entry> {
        self.find_parent(node)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
        if self.on_demand.count() > 0 && self.inodes.get(node).is_none() {
            self.on_demand.forget(node);
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

    fn unlink(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Caller, parent: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove(parent, name, AtFlags::REMOVEDIR)
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

    fn link(&self, _: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.writable()?;
        self.make_link(node, parent, name)
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
        if self.is_untold(handle, HandleKind::File) {
            // What nobody has opened nobody closes, and the guest needn't ask again.
            return Err(Errno::NOSYS);
        }
        let file = self.handles.file(node, handle, HandleKind::File)?;
        let again = self.with_room(|| rustix::io::fcntl_dupfd_cloexec(&file, 0))?;
        sys::file::close(again)
    }

    fn release(&self, node: NodeId, handle: Handle) -> Result<()> {
        if self.is_untold(handle, HandleKind::File) {
            return Ok(());
        }
        self.locks.released(node, handle);
        self.handles.release(node, handle, HandleKind::File)
    }

    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()> {
        self.writable()?;
        self.kill_set_id_of_open(&self.file_to_change(node, handle)?)
    }

    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<File> {
        self.file_of(node, handle, kind, false)
    }

    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<File> {
        self.file_of(node, handle, HandleKind::File, true)
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

    fn whole_file_system(&self, node: NodeId) -> Result<File> {
        self.whole(node)
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
        let inode = self.inode(node)?;
        let stat = rustix::fs::fstatvfs(self.fd(&inode)?)?;
        Ok(Statistics {
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            block_size: narrow(stat.f_bsize),
            fragment_size: narrow(stat.f_frsize),
            name_length: narrow(stat.f_namemax),
        })
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

    fn removexattr(&self, _: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.writable()?;
        self.remove_attribute(node, name)
    }

    fn opendir(&self, _: &Caller, node: NodeId, _flags: u32) -> Result<Opened> {
        if self.terms.no_opendir() {
            return Err(Errno::NOSYS);
        }
        self.room_for_handle()?;
        let fd = self.open_directory(&*self.inode(node)?)?;
        Ok(self.opened(node, File::from_fd(fd), HandleKind::Directory))
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
        if self.is_untold(handle, HandleKind::Directory) {
            return Ok(());
        }
        self.handles.release(node, handle, HandleKind::Directory)
    }

    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        self.may(caller, node, mask)
    }

    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64> {
        let file = self.file(node, handle, HandleKind::File)?;
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(&file, to)
    }
}
