//! File systems: the trait that the FUSE dispatch serves, and the file systems behind it.
//!
//! [`FileSystem`] is FUSE and nothing else; [`Replay`] and [`Migrate`] are what a file system may offer
//! beyond. Metadata operations are plain calls; data (`read`, `write`, `fsync`, `fallocate`, copies) go
//! through the [`OpenFile`] that [`FileSystem::file`] returns, on the worker's runtime. The invariant: a
//! file system never sees a name that is empty, `.` or `..`, has a `/` or a NUL in it or is longer than
//! 255 bytes; the dispatch has refused it.

mod migrate;
mod open_file;
pub mod passthrough;
mod replay;

use std::ffi::CStr;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

pub use self::migrate::{Migrate, MoveError};
pub use self::open_file::{FileObject, ObjectFuture, OpenFile};
pub use self::replay::Replay;

use crate::io::File;

/// What an operation ends with: an answer, or an errno for the guest.
pub type Result<T> = std::result::Result<T, Errno>;

/// Names an inode towards the guest; given out by the file system, valid until forgotten as
/// often as it was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The shared directory itself (`FUSE_ROOT_ID`); never forgotten.
    pub const ROOT: Self = Self(1);
}

/// Names an open file or directory towards the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// Names a holder of record locks in the guest: a process, or an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner(pub u64);

/// Who asks: the process in the guest that a request is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Caller {
    /// File system user id, as the guest has it. `None` if the guest's kernel doesn't tell:
    /// with [`NegotiatedTerms::idmapped`] it tells only the owner of what is to be created.
    pub uid: Option<u32>,
    /// File system group id, likewise.
    pub gid: Option<u32>,
    /// Process id in the guest; 0 for the guest's kernel itself.
    pub pid: u32,
    /// It is not privileged to keep the set-user-ID and set-group-ID bits of a file that it
    /// changes (`CAP_FSETID`), says the guest's kernel, and the file system shall take them away.
    pub kill_set_id: bool,
    /// Where something is created: the directory's group, if the caller is in that beside its
    /// own, as the guest's kernel says.
    pub group: Option<u32>,
}

impl Caller {
    /// Whether the guest's kernel doesn't tell who it is.
    #[must_use]
    pub fn is_untold(&self) -> bool {
        self.uid.is_none() || self.gid.is_none()
    }
}

/// A security label: an extended attribute that a new inode has from its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// As the guest calls it; begins with `security.`.
    pub name: &'a CStr,
    /// What it says.
    pub value: &'a [u8],
}

/// A moment: seconds since 1970 (may be negative) and nanoseconds below 1,000,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00:00 UTC.
    pub seconds: i64,
    /// Nanoseconds of the second.
    pub nanoseconds: u32,
}

/// What `stat` tells of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Inode number on the host.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub accessed: Timestamp,
    /// Last change of the data.
    pub modified: Timestamp,
    /// Last change of the inode.
    pub changed: Timestamp,
    /// Type and permission bits, as in `st_mode`.
    pub mode: u32,
    /// Hard links.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node: `(major << 8 | minor)` in the kernel's 32-bit encoding.
    pub rdev: u32,
    /// Preferred size of an operation, bytes.
    pub block_size: u32,
}

/// An inode as LOOKUP and its relatives answer it. Each answer counts as one lookup.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The inode.
    pub node: NodeId,
    /// Tells a reused [`NodeId`] from its earlier meaning.
    pub generation: u64,
    /// Its attributes.
    pub attributes: Attributes,
    /// How long the guest may rely on the attributes.
    pub attribute_ttl: Duration,
    /// How long the guest may rely on the name.
    pub entry_ttl: Duration,
    /// It is a directory on another file system than its parent.
    pub submount: bool,
}

/// What SETATTR changes; `None` stays as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes; more than there are adds zeroes.
    pub size: Option<u64>,
    /// Last access.
    pub accessed: Option<NewTime>,
    /// Last change of the data.
    pub modified: Option<NewTime>,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    /// The host's time now.
    Now,
    /// This one.
    At(Timestamp),
}

/// What a new file, directory or node is made with.
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    /// Type and permission bits as the caller gave them, the umask not yet applied.
    pub mode: u32,
    /// The caller's umask. Where the parent has a default ACL it doesn't apply, as on any
    /// Linux file system.
    pub umask: u32,
    /// Device number, for device nodes.
    pub rdev: u32,
    /// What it is labelled with.
    pub label: Option<Label<'a>>,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// What the guest calls it from now on.
    pub handle: Handle,
    /// Keep what the guest has cached of the file (`FOPEN_KEEP_CACHE`).
    pub keep_cache: bool,
    /// The guest shall not cache the file (`FOPEN_DIRECT_IO`).
    pub direct_io: bool,
    /// The guest may cache the directory's entries (`FOPEN_CACHE_DIR`).
    pub cache_dir: bool,
}

/// What `statfs` tells of a file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Blocks in all, in units of `fragment_size`.
    pub blocks: u64,
    /// Blocks free.
    pub blocks_free: u64,
    /// Blocks free for an ordinary user.
    pub blocks_available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Inodes free.
    pub files_free: u64,
    /// Preferred size of an operation, bytes.
    pub block_size: u32,
    /// Unit of the block counts, bytes.
    pub fragment_size: u32,
    /// Longest name, bytes.
    pub name_length: u32,
}

/// One name in a directory, as READDIR gives it.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Inode number on the host.
    pub inode: u64,
    /// Where the next entry begins: the `offset` to go on reading from.
    pub next_offset: u64,
    /// `DT_*` of `readdir(3)`.
    pub kind: u8,
    /// The name; `.` and `..` included.
    pub name: &'a CStr,
}

/// Takes directory entries as long as there is room.
pub trait DirSink {
    /// Whether `name` still fits; asked before anything is looked up for it.
    fn has_room(&self, name: &CStr) -> bool;
    /// Adds one entry. For READDIRPLUS `entry` is what a LOOKUP of the name gave and counts as
    /// one; it is `None` for READDIR, for `.` and `..`, and for names that vanished meanwhile.
    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>);
}

/// What sort of thing a [`Handle`] is expected to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleKind {
    /// From [`FileSystem::open`] or [`FileSystem::create`].
    File,
    /// From [`FileSystem::opendir`].
    Directory,
}

/// Which of the set-xattr flags of `setxattr(2)` hold.
pub type XattrFlags = rustix::fs::XattrFlags;

/// What FSGETXATTR reads and FSSETXATTR sets: `struct fsxattr`, byte for byte.
pub type InodeFlags = [u8; 28];

/// What was agreed on with the guest's kernel, as far as a file system has to go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NegotiatedTerms {
    /// The guest collects writes: it reads files that it has opened for writing only, and knows
    /// the end of a file better than the host.
    pub collects_writes: bool,
    /// Files may be used without OPEN; the handle then is 0, and there is no RELEASE.
    pub no_open: bool,
    /// Directories may be, likewise.
    pub no_opendir: bool,
    /// The guest may mount with other owners than ours (idmapped mounts). The ids of a caller then
    /// come with creating requests alone, and are those that the new inode is to have: user 0 among
    /// them need not be privileged in the guest, nor another user unprivileged.
    pub idmapped: bool,
}

/// A file system as FUSE sees it.
///
/// All methods may be called from several threads at once. Errors are errnos for the guest:
/// `ENOENT` for a name that is not there, `ESTALE` for a node that can't be found any more,
/// `EBADF` for an unknown handle.
pub trait FileSystem: std::fmt::Debug + Send + Sync + 'static {
    /// Called once on each thread that will call the other methods.
    ///
    /// # Errors
    ///
    /// The host refuses what the thread needs.
    fn prepare_thread(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Forgets everything that a session holds: every node but the root, every handle. Called
    /// when the device is reset, and when its VMM has gone.
    fn reset(&self);
    /// As [`reset`](Self::reset), when a guest says INIT or DESTROY. It is the same guest that comes
    /// back: LOOKUP of `.` and `..` may go on finding nodes that it had.
    fn unmounted(&self) {
        self.reset();
    }
    /// INIT is answered: what holds until [`reset`](Self::reset), and before it nothing does.
    fn begin(&self, _terms: &NegotiatedTerms) {}

    /// How another process can continue the session, if this file system supports it.
    fn replay(&self) -> Option<&dyn Replay> {
        None
    }

    /// How another server can continue the session, if this file system supports it.
    fn migrate(&self) -> Option<&dyn Migrate> {
        None
    }

    /// Whether metadata methods (all but the five named below) may block: wait for a network, another
    /// process, or a disk for long. They are then called on threads that may wait, and can't stop a
    /// worker or delay other requests.
    ///
    /// Never called on such a thread, and never allowed to block, are [`forget`](Self::forget),
    /// [`file`](Self::file), [`file_to_change`](Self::file_to_change), [`begin`](Self::begin) and the
    /// methods for locks. Data operations are asynchronous: see [`FileObject`].
    fn may_block(&self) -> bool {
        false
    }

    /// LOOKUP: finds `name` in `parent`.
    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry>;
    /// LOOKUP of `.`: the node itself, counted once more.
    fn lookup_self(&self, _node: NodeId) -> Result<Entry> {
        Err(Errno::NOSYS)
    }
    /// LOOKUP of `..`: the directory above, never one above the root.
    fn lookup_parent(&self, _node: NodeId) -> Result<Entry> {
        Err(Errno::NOSYS)
    }
    /// FORGET: the guest gives back `count` lookups.
    fn forget(&self, node: NodeId, count: u64);
    /// GETATTR, with how long the answer holds.
    fn getattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)>;
    /// STATX: as GETATTR, and when the inode was made, where that is known.
    fn statx(
        &self,
        _node: NodeId,
        _handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        Err(Errno::NOSYS)
    }
    /// SETATTR: answers the attributes after the change.
    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)>;
    /// READLINK: where a symbolic link points, without a NUL.
    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>>;
    /// SYMLINK: makes a link `name` that points to `target`.
    fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
        label: Option<Label<'_>>,
    ) -> Result<Entry>;
    /// MKNOD: a regular file, FIFO, socket or device node.
    fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry>;
    /// MKDIR.
    fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        new: &NewNode<'_>,
    ) -> Result<Entry>;
    /// UNLINK.
    fn unlink(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()>;
    /// RMDIR.
    fn rmdir(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<()>;
    /// RENAME and RENAME2; `flags` are those of `renameat2(2)`.
    fn rename(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()>;
    /// LINK: a second name for `node`.
    fn link(&self, caller: &Caller, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry>;
    /// OPEN; `flags` are those of `open(2)`, `O_CREAT` and `O_EXCL` never among them. `ENOSYS`
    /// says that it isn't needed, where that was agreed on.
    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
    /// CREATE: makes and opens a regular file; without `O_EXCL` in `flags` one that is already
    /// there is opened.
    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)>;
    /// TMPFILE: makes and opens a regular file on the file system of `parent`, without a name.
    fn tmpfile(
        &self,
        _caller: &Caller,
        _parent: NodeId,
        _flags: u32,
        _new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        Err(Errno::NOSYS)
    }
    /// A wait for what was given back and is still being closed, if there is any: the space of files
    /// without a name is free after it.
    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
    /// A request was refused with `ENFILE`, which may be worth a line in the log.
    fn report_shortage(&self) {}
    /// FLUSH: a descriptor of the guest is closed; errors of earlier writes come out here.
    fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()>;
    /// RELEASE: the last descriptor is closed; the handle ends.
    fn release(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// Takes the set-user-ID and set-group-ID bits from a file that is about to be written for a
    /// caller that may not keep them.
    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// The open file behind a handle: for READ, FSYNC, and to copy from.
    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile>;
    /// The same for changing it: for WRITE, FALLOCATE, and to copy to.
    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.file(node, handle, HandleKind::File)
    }
    /// For GETLK, SETLK and SETLKW: the host's file whose open file description holds the record
    /// locks of `owner` on an open file, and of nobody else. Whoever has it keeps it the
    /// owner's.
    fn lock_file(&self, _node: NodeId, _handle: Handle, _owner: LockOwner) -> Result<Arc<File>> {
        Err(Errno::NOSYS)
    }
    /// The same, if the owner has had locks there.
    fn lock_file_if_any(&self, _node: NodeId, _owner: LockOwner) -> Option<Arc<File>> {
        None
    }
    /// Gives up all record locks of `owner` on a file: FLUSH.
    fn end_locks(&self, _node: NodeId, _owner: LockOwner) {}
    /// For SYNCFS: any file of the file system that `node` is on.
    fn whole_file_system(&self, _node: NodeId) -> Result<OpenFile> {
        Err(Errno::NOSYS)
    }
    /// IOCTL `FS_IOC_GETFLAGS`.
    fn inode_flags(&self, _node: NodeId, _handle: Handle) -> Result<u32> {
        Err(Errno::NOTTY)
    }
    /// IOCTL `FS_IOC_SETFLAGS`.
    fn set_inode_flags(&self, _node: NodeId, _handle: Handle, _flags: u32) -> Result<()> {
        Err(Errno::NOTTY)
    }
    /// IOCTL `FS_IOC_FSGETXATTR`.
    fn extended_inode_flags(&self, _node: NodeId, _handle: Handle) -> Result<InodeFlags> {
        Err(Errno::NOTTY)
    }
    /// IOCTL `FS_IOC_FSSETXATTR`.
    fn set_extended_inode_flags(
        &self,
        _node: NodeId,
        _handle: Handle,
        _flags: &InodeFlags,
    ) -> Result<()> {
        Err(Errno::NOTTY)
    }
    /// STATFS.
    fn statfs(&self, node: NodeId) -> Result<Statistics>;
    /// SETXATTR.
    fn setxattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()>;
    /// GETXATTR: the value, at most `limit` bytes of it, else `ERANGE`.
    fn getxattr(&self, caller: &Caller, node: NodeId, name: &CStr, limit: usize)
    -> Result<Vec<u8>>;
    /// GETXATTR with size 0: how long the value is.
    fn getxattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize>;
    /// LISTXATTR: the names, each with its NUL, at most `limit` bytes in all, else `ERANGE`.
    fn listxattr(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>>;
    /// LISTXATTR with size 0: how long the list is.
    fn listxattr_len(&self, caller: &Caller, node: NodeId) -> Result<usize>;
    /// REMOVEXATTR.
    fn removexattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()>;
    /// OPENDIR.
    fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
    /// READDIR and, with `plus`, READDIRPLUS: entries from `offset` on, 0 being the start, until
    /// `sink` has no more room.
    fn readdir(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()>;
    /// RELEASEDIR: the handle ends.
    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// ACCESS: whether the caller may do what `mask` (`R_OK`, `W_OK`, `X_OK`) says.
    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()>;
    /// LSEEK with `SEEK_DATA` or `SEEK_HOLE`: the new offset.
    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64>;
}
