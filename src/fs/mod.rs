//! File systems: the trait that the FUSE dispatch serves, and the file systems behind it.
//!
//! [`FileSystem`] has the FUSE operations only; [`Replay`] and [`Migrate`] are optional. Metadata
//! operations are plain calls; data (`read`, `write`, `fsync`, `fallocate`, copies) go through the
//! [`OpenFile`] that [`FileSystem::file`] returns, on the worker's runtime. The invariant: a file
//! system never sees a name that is empty, `.` or `..`, contains a `/` or a NUL, or is longer than
//! 255 bytes; the dispatch has rejected it.

pub mod fuse_backend;
mod inspect;
mod lowest;
mod migrate;
mod open_file;
pub mod overlay;
pub mod passthrough;
pub(crate) mod permissions;
#[cfg(feature = "nydus")]
pub mod rafs;
mod replay;
pub mod vfs;
pub mod waiting;

/// What [`Migrate`] sends to another server, and receives from one: a session of a guest.
pub mod session {
    pub use crate::migration::stream::{
        Agreement, Find, Flock, Inode, Locks, Nameless, Open, Range, Root, Snapshot, StreamError,
    };
}

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

pub use self::inspect::{Dropped, Inspect, KnownInode, OpenHandle, Page};
pub use self::migrate::{Migrate, MoveError};
pub use self::open_file::{FileObject, ObjectFuture, OpenFile};
pub use self::replay::Replay;
pub use crate::metrics::{MountUsage, Usage};

use crate::device::BackChannel;
use crate::io::File;

/// The result of an operation: a value, or an errno for the guest.
pub type Result<T> = std::result::Result<T, Errno>;

/// Identifies an inode to the guest. Assigned by the file system; valid until it has been forgotten
/// as often as it was looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The shared directory itself (`FUSE_ROOT_ID`); never forgotten.
    pub const ROOT: Self = Self(1);
}

/// Identifies an open file or directory to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// Identifies an owner of record locks in the guest: a process, or an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner(pub u64);

/// The process in the guest that a request is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Caller {
    /// File system user id in the guest. `None` if the guest's kernel doesn't send it: with
    /// [`NegotiatedTerms::idmapped`] it sends only the owner of a new inode.
    pub uid: Option<u32>,
    /// File system group id, likewise.
    pub gid: Option<u32>,
    /// Process id in the guest; 0 for the guest's kernel itself.
    pub pid: u32,
    /// The caller lacks `CAP_FSETID`, according to the guest's kernel, so the file system must
    /// clear the set-user-ID and set-group-ID bits of a file that this request changes.
    pub kill_set_id: bool,
    /// For creating requests: the parent directory's group, if the caller is a member of it besides
    /// its own group, according to the guest's kernel.
    pub group: Option<u32>,
}

impl Caller {
    /// Whether the guest's kernel left out the caller's ids.
    #[must_use]
    pub fn lacks_ids(&self) -> bool {
        self.uid.is_none() || self.gid.is_none()
    }
}

/// A security label: an extended attribute that an inode is created with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// Name in the guest; begins with `security.`.
    pub name: &'a CStr,
    /// Value.
    pub value: &'a [u8],
}

/// A point in time: seconds since 1970 (may be negative) and nanoseconds below 1,000,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Seconds since 1970-01-01 00:00:00 UTC.
    pub seconds: i64,
    /// Nanoseconds of the second.
    pub nanoseconds: u32,
}

/// The attributes of an inode, as `stat(2)` returns them.
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

/// An inode as LOOKUP and the creating requests return it. Each entry that is returned counts as
/// one lookup.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The inode.
    pub node: NodeId,
    /// Distinguishes a reused [`NodeId`] from its earlier use.
    pub generation: u64,
    /// Its attributes.
    pub attributes: Attributes,
    /// How long the guest may rely on the attributes.
    pub attribute_ttl: Duration,
    /// How long the guest may rely on the name.
    pub entry_ttl: Duration,
    /// Whether it is a directory on another file system than its parent.
    pub submount: bool,
}

/// What SETATTR changes; `None` leaves the attribute as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Bytes; a larger size than the current one appends zeros.
    pub size: Option<u64>,
    /// Last access.
    pub accessed: Option<NewTime>,
    /// Last change of the data.
    pub modified: Option<NewTime>,
}

impl Changes {
    /// Whether every attribute stays as it is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self {
            mode,
            uid,
            gid,
            size,
            accessed,
            modified,
        } = self;
        mode.or(*uid).or(*gid).is_none() && size.is_none() && accessed.or(*modified).is_none()
    }
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    /// The host's time now.
    Now,
    /// This point in time.
    At(Timestamp),
}

/// The properties of a new file, directory or device node.
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    /// Type and permission bits as the caller gave them, the umask not yet applied.
    pub mode: u32,
    /// The caller's umask. It doesn't apply if the parent has a default ACL, as on any Linux file
    /// system.
    pub umask: u32,
    /// Device number, for device nodes.
    pub rdev: u32,
    /// Security label.
    pub label: Option<Label<'a>>,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// The handle that the guest uses from now on.
    pub handle: Handle,
    /// The guest keeps what it has cached of the file (`FOPEN_KEEP_CACHE`).
    pub keep_cache: bool,
    /// The guest must not cache the file (`FOPEN_DIRECT_IO`).
    pub direct_io: bool,
    /// The guest may cache the directory's entries (`FOPEN_CACHE_DIR`).
    pub cache_dir: bool,
    /// The guest need not send FLUSH when a descriptor is closed (`FOPEN_NOFLUSH`): it would report
    /// nothing. Ignored if record locks are negotiated, as FLUSH releases them. Linux then doesn't
    /// write back on `close(2)` what was written to a mapping, but only when that is unmapped.
    pub no_flush: bool,
}

/// Usage and limits of a file system, as `statfs(2)` returns them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Total blocks, in units of `fragment_size`.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Free blocks for an ordinary user.
    pub blocks_available: u64,
    /// Total inodes.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Preferred size of an operation, bytes.
    pub block_size: u32,
    /// Unit of the block counts, bytes.
    pub fragment_size: u32,
    /// Longest name, bytes.
    pub name_length: u32,
}

/// One directory entry, as READDIR returns it.
#[derive(Clone, Copy, Debug)]
pub struct DirEntry<'a> {
    /// Inode number on the host.
    pub inode: u64,
    /// Offset at which reading continues after this entry.
    pub next_offset: u64,
    /// `DT_*` of `readdir(3)`.
    pub kind: u8,
    /// The name; may be `.` or `..`.
    pub name: &'a CStr,
}

/// Receives directory entries until it is full.
pub trait DirSink {
    /// About how many bytes are left, for file systems that fetch several entries at once.
    fn room(&self) -> usize {
        4096
    }
    /// Whether `name` still fits. Called before the name is looked up.
    fn has_room(&self, name: &CStr) -> bool;
    /// Adds one entry. For READDIRPLUS `entry` is the result of looking up the name and counts as
    /// one lookup; it is `None` for READDIR, for `.` and `..`, and for names that have vanished
    /// meanwhile.
    fn add(&mut self, dir_entry: DirEntry<'_>, entry: Option<&Entry>);
}

/// What kind of open file a [`Handle`] is expected to refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleKind {
    /// From [`FileSystem::open`] or [`FileSystem::create`].
    File,
    /// From [`FileSystem::opendir`].
    Directory,
}

/// The flags of `setxattr(2)`.
pub type XattrFlags = rustix::fs::XattrFlags;

/// The argument of FSGETXATTR and FSSETXATTR: `struct fsxattr`, byte for byte.
pub type InodeFlags = [u8; 28];

/// The part of the INIT negotiation that a file system depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NegotiatedTerms {
    /// The guest caches writes (writeback cache). It reads files that it has opened for writing
    /// only, and knows the end of a file better than the host does.
    pub collects_writes: bool,
    /// Files may be used without OPEN; the handle is then 0, and RELEASE is not sent.
    pub no_open: bool,
    /// Directories may be used without OPENDIR, likewise.
    pub no_opendir: bool,
    /// The guest may use idmapped mounts. Then only creating requests carry the caller's ids, and
    /// these are the ids that the new inode gets. User 0 among them need not be privileged in the
    /// guest, nor another user unprivileged.
    pub idmapped: bool,
    /// The file system clears set-ID bits when the guest asks for it; the guest's kernel doesn't.
    pub kills_set_id: bool,
    /// Record locks of the guest are sent to the file system.
    pub record_locks: bool,
    /// Locks of the guest on whole files (`flock(2)`) are sent to the file system.
    pub file_locks: bool,
}

/// A file system as FUSE sees it.
///
/// All methods may be called from several threads at once. Errors are errnos for the guest:
/// `ENOENT` for a name that doesn't exist, `ESTALE` for a node that can't be found any more,
/// `EBADF` for an unknown handle.
pub trait FileSystem: std::fmt::Debug + Send + Sync + 'static {
    /// Called on each thread that will call the other methods; calling it again does nothing.
    ///
    /// # Errors
    ///
    /// Fails if the host refuses a resource that the thread needs.
    fn prepare_thread(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Forgets everything that a session holds: every node but the root, every handle. Called when
    /// the device is reset, and when its VMM has disconnected.
    fn reset(&self);
    /// Like [`reset`](Self::reset), for a guest that sends INIT or DESTROY. The same guest may
    /// return, so LOOKUP of `.` and `..` may still find nodes that it had.
    fn unmounted(&self) {
        self.reset();
    }
    /// Called for INIT: which of the `terms` that the guest and the options allow this file system
    /// supports. The others are not negotiated.
    ///
    /// # Errors
    ///
    /// The file system can't be used. The guest's mount fails with this error.
    fn accept(&self, terms: &NegotiatedTerms) -> Result<NegotiatedTerms> {
        Ok(*terms)
    }
    /// Called when INIT has been negotiated. `terms` apply until [`reset`](Self::reset).
    fn begin(&self, _terms: &NegotiatedTerms) {}

    /// Hands over the way to send requests to the VMM. Called when a session begins, and when it is
    /// resumed after another process.
    fn connected(&self, _channel: &Arc<dyn BackChannel>) {}

    /// How much of the limited resources is in use. Called by threads that serve no requests.
    fn usage(&self) -> Usage {
        Usage::default()
    }

    /// The same for each file system that this one consists of, by the path that it is mounted at.
    fn usage_by_mount(&self) -> Vec<MountUsage> {
        Vec::new()
    }

    /// Support for another process to continue the session, if this file system has it.
    fn replay(&self) -> Option<&dyn Replay> {
        None
    }

    /// Support for another server to continue the session, if this file system has it.
    fn migrate(&self) -> Option<&dyn Migrate> {
        None
    }

    /// What an operator can see of this file system, if it lets anything be seen.
    fn inspect(&self) -> Option<&dyn Inspect> {
        None
    }

    /// Whether metadata methods (all but the five named below) may block: wait for a network,
    /// another process, or a disk for long. They are then called on threads that may wait, and
    /// can't stop a worker or delay other requests.
    ///
    /// Never called on such a thread, and therefore not allowed to block: [`forget`](Self::forget),
    /// [`file`](Self::file), [`file_to_change`](Self::file_to_change), [`begin`](Self::begin) and
    /// the methods for locks, but [`end_locks`](Self::end_locks). [`accept`](Self::accept) may, as
    /// nothing else is served meanwhile. Data operations are asynchronous: see [`FileObject`].
    fn may_block(&self) -> bool {
        false
    }

    /// Whether metadata methods may block for requests whose node, or parent, is `node`.
    fn may_block_at(&self, _node: NodeId) -> bool {
        self.may_block()
    }

    /// LOOKUP: finds `name` in `parent`.
    fn lookup(&self, caller: &Caller, parent: NodeId, name: &CStr) -> Result<Entry>;
    /// LOOKUP of `.`: the node itself. Counts as one more lookup of it.
    fn lookup_self(&self, _node: NodeId) -> Result<Entry> {
        Err(Errno::NOSYS)
    }
    /// LOOKUP of `..`: the parent directory, but never one above the root.
    fn lookup_parent(&self, _node: NodeId) -> Result<Entry> {
        Err(Errno::NOSYS)
    }
    /// FORGET: the guest drops `count` lookups.
    fn forget(&self, node: NodeId, count: u64);
    /// GETATTR; the duration is how long the guest may cache the attributes.
    fn getattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)>;
    /// STATX: like GETATTR, with the time the inode was created if that is known.
    fn statx(
        &self,
        _node: NodeId,
        _handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        Err(Errno::NOSYS)
    }
    /// SETATTR: returns the attributes after the change. If nothing is changed
    /// ([`Changes::is_empty`]) and [`Caller::kill_set_id`] is true, the set-ID bits are cleared.
    fn setattr(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)>;
    /// READLINK: the target of a symbolic link, without a NUL.
    fn readlink(&self, caller: &Caller, node: NodeId) -> Result<Vec<u8>>;
    /// SYMLINK: creates a link `name` that points to `target`.
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
    /// OPEN; `flags` are those of `open(2)` without `O_CREAT` and `O_EXCL`. `ENOSYS` means that the
    /// guest needs no OPEN, if that was negotiated.
    fn open(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
    /// CREATE: creates and opens a regular file. Without `O_EXCL` in `flags` an existing file is
    /// opened.
    fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        flags: u32,
        new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)>;
    /// TMPFILE: creates and opens a regular file without a name on the file system of `parent`.
    fn tmpfile(
        &self,
        _caller: &Caller,
        _parent: NodeId,
        _flags: u32,
        _new: &NewNode<'_>,
    ) -> Result<(Entry, Opened)> {
        Err(Errno::NOSYS)
    }
    /// Returns a blocking wait for files that the guest has released and that are still being
    /// closed, if there are any. The space of files without a name is free after it.
    fn pending_closes(&self) -> Option<Box<dyn FnOnce() + Send>> {
        None
    }
    /// Called when a request was refused with `ENFILE`, so that the file system may log it.
    fn report_shortage(&self) {}
    /// FLUSH: a descriptor in the guest is closed; returns the errors of earlier writes.
    fn flush(&self, caller: &Caller, node: NodeId, handle: Handle) -> Result<()>;
    /// FLUSH, by the owner of record locks, all of which it releases.
    fn flush_and_unlock(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        owner: LockOwner,
    ) -> Result<()> {
        self.end_locks(node, owner);
        self.flush(caller, node, handle)
    }
    /// RELEASE: the last descriptor is closed; the handle becomes invalid.
    fn release(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// Clears the set-user-ID and set-group-ID bits of a file that is about to be written by a
    /// caller that may not keep them.
    fn kill_set_id(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// The open file behind a handle: for READ, FSYNC, and to copy from.
    fn file(&self, node: NodeId, handle: Handle, kind: HandleKind) -> Result<OpenFile>;
    /// The open file behind a handle that is about to be changed: for WRITE, FALLOCATE, and to copy
    /// to.
    fn file_to_change(&self, node: NodeId, handle: Handle) -> Result<OpenFile> {
        self.file(node, handle, HandleKind::File)
    }
    /// For GETLK, SETLK and SETLKW: the host's file whose open file description holds the record
    /// locks of `owner`, and of nobody else, on an open file. The file stays the owner's as long as
    /// the `Arc` is held.
    fn lock_file(&self, _node: NodeId, _handle: Handle, _owner: LockOwner) -> Result<Arc<File>> {
        Err(Errno::NOSYS)
    }
    /// Like [`lock_file`](Self::lock_file), but `None` if the owner has had no locks on the file.
    fn lock_file_if_any(&self, _node: NodeId, _owner: LockOwner) -> Option<Arc<File>> {
        None
    }
    /// Releases all record locks of `owner` on a file. Called for FLUSH.
    fn end_locks(&self, _node: NodeId, _owner: LockOwner) {}
    /// Whether files can be mapped by the VMM: [`open_to_map`](Self::open_to_map) is there.
    fn maps_files(&self) -> bool {
        false
    }
    /// For SETUPMAPPING: opens a regular file anew, for reading or, if `writable`, for reading and
    /// writing, to be mapped by the VMM. The descriptor leaves the server, so it must give access to
    /// nothing else. Called on a thread that may block.
    fn open_to_map(&self, _node: NodeId, _writable: bool) -> Result<OwnedFd> {
        Err(Errno::NODEV)
    }
    /// For SYNCFS: a file on the file system that `node` is on.
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
    /// SETXATTR. A file system without extended attributes leaves these six methods as they are:
    /// `ENOSYS` makes the guest's kernel stop sending the request. It would otherwise ask for
    /// `security.capability` before each write.
    fn setxattr(
        &self,
        _caller: &Caller,
        _node: NodeId,
        _name: &CStr,
        _value: &[u8],
        _flags: XattrFlags,
    ) -> Result<()> {
        Err(Errno::NOSYS)
    }
    /// GETXATTR: the value, or `ERANGE` if it is longer than `limit` bytes.
    fn getxattr(
        &self,
        _caller: &Caller,
        _node: NodeId,
        _name: &CStr,
        _limit: usize,
    ) -> Result<Vec<u8>> {
        Err(Errno::NOSYS)
    }
    /// GETXATTR with size 0: the length of the value.
    fn getxattr_len(&self, _caller: &Caller, _node: NodeId, _name: &CStr) -> Result<usize> {
        Err(Errno::NOSYS)
    }
    /// LISTXATTR: the names, each with its NUL, or `ERANGE` if they take more than `limit` bytes.
    fn listxattr(&self, _caller: &Caller, _node: NodeId, _limit: usize) -> Result<Vec<u8>> {
        Err(Errno::NOSYS)
    }
    /// LISTXATTR with size 0: the length of the list.
    fn listxattr_len(&self, _caller: &Caller, _node: NodeId) -> Result<usize> {
        Err(Errno::NOSYS)
    }
    /// REMOVEXATTR.
    fn removexattr(&self, _caller: &Caller, _node: NodeId, _name: &CStr) -> Result<()> {
        Err(Errno::NOSYS)
    }
    /// OPENDIR.
    fn opendir(&self, caller: &Caller, node: NodeId, flags: u32) -> Result<Opened>;
    /// READDIR and, with `plus`, READDIRPLUS: passes entries from `offset` on (0 is the start) to
    /// `sink` until it is full.
    fn readdir(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Handle,
        offset: u64,
        plus: bool,
        sink: &mut dyn DirSink,
    ) -> Result<()>;
    /// RELEASEDIR: the handle becomes invalid.
    fn releasedir(&self, node: NodeId, handle: Handle) -> Result<()>;
    /// ACCESS: succeeds if the caller has the permissions in `mask` (`R_OK`, `W_OK`, `X_OK`).
    fn access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()>;
    /// LSEEK with `SEEK_DATA` or `SEEK_HOLE`: the new offset.
    fn lseek(&self, node: NodeId, handle: Handle, offset: u64, whence: u32) -> Result<u64>;
}
