//! Requests as plain data, decoded without I/O.
//!
//! [`decode()`] turns the bytes of a request into a [`Request`] or returns what is wrong with them.
//! It allocates nothing. It reads its input without copying, so the input must be a private copy;
//! [`bytes_wanted`] tells how many bytes to copy, which never include the payload of a WRITE. The
//! invariant: a decoded request has been checked: names are valid for a directory, offsets fit an
//! `i64`, nanoseconds are less than a second, and nodes are not 0.

mod arguments;
mod decode;
mod extensions;
mod fault;
#[cfg(test)]
mod tests;

use std::ffi::CStr;

use zerocopy::FromBytes;

pub(super) use decode::inaccessible;
pub use decode::{HEADER_LEN, bytes_wanted, decode, decode_as};
pub(crate) use fault::{DecodeError, Fault};

use super::abi::{ForgetOne, InitIn, RemovemappingOne, Row};
use crate::fs::{
    Caller, Changes, Handle, InodeFlags, Label, LockOwner, NewNode, NodeId, XattrFlags,
};
use crate::io::{Lock, RecordLock, WriteMode};

/// One request of a guest.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The guest's number for the request; the reply carries it.
    pub unique: u64,
    /// The opcode as sent, for counting.
    pub opcode: u32,
    /// The opcode's row in the table.
    pub row: &'static Row,
    /// The node that the operation is on; meaningless for the few operations without one.
    pub node: NodeId,
    /// The calling process.
    pub caller: Caller,
    /// The requested operation.
    pub operation: Operation<'a>,
}

/// The operation of a request. Names and values point into the bytes it was decoded from.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Begin a session. Fields that an older kernel doesn't send are 0.
    Init(InitIn),
    /// End the session.
    Destroy,
    /// Interrupt an earlier request.
    Interrupt {
        /// The number of that request.
        unique: u64,
    },
    /// Find a name in a directory.
    Lookup {
        /// The name.
        name: &'a CStr,
    },
    /// LOOKUP of `.`.
    LookupSelf,
    /// LOOKUP of `..`.
    LookupParent,
    /// Drop lookups.
    Forget {
        /// How many.
        count: u64,
    },
    /// Drop lookups of many nodes.
    BatchForget(Forgets<'a>),
    /// Read attributes.
    Getattr {
        /// Of this open file, if given.
        handle: Option<Handle>,
    },
    /// Read attributes in the form of `statx`.
    Statx {
        /// Of this open file, if given.
        handle: Option<Handle>,
    },
    /// Change attributes.
    Setattr {
        /// Of this open file, if given.
        handle: Option<Handle>,
        /// The changes.
        changes: Changes,
    },
    /// Read a symbolic link.
    Readlink,
    /// Create a symbolic link.
    Symlink {
        /// Its name.
        name: &'a CStr,
        /// Its target.
        target: &'a CStr,
        /// Its security label.
        label: Option<Label<'a>>,
    },
    /// Create a file, FIFO, socket or device node.
    Mknod {
        /// Its name.
        name: &'a CStr,
        /// The properties of the new inode.
        new: NewNode<'a>,
    },
    /// Create a directory.
    Mkdir {
        /// Its name.
        name: &'a CStr,
        /// The properties of the new inode.
        new: NewNode<'a>,
    },
    /// Remove a name.
    Unlink {
        /// The name.
        name: &'a CStr,
    },
    /// Remove a directory.
    Rmdir {
        /// Its name.
        name: &'a CStr,
    },
    /// RENAME and RENAME2.
    Rename {
        /// The old name, in the request's node.
        from: &'a CStr,
        /// The new directory and name.
        to: (NodeId, &'a CStr),
        /// Flags of `renameat2(2)`; 0 for RENAME.
        flags: u32,
    },
    /// Create a hard link in the request's node.
    Link {
        /// The existing node.
        node: NodeId,
        /// The new name.
        name: &'a CStr,
    },
    /// Open a file.
    Open {
        /// The flags of `open(2)` that a guest may use; see [`decode()`].
        flags: u32,
    },
    /// Open a directory.
    Opendir {
        /// As for [`Open`](Self::Open).
        flags: u32,
    },
    /// Create and open a file.
    Create {
        /// Its name.
        name: &'a CStr,
        /// As for [`Open`](Self::Open), and `O_EXCL`.
        flags: u32,
        /// The properties of the new inode.
        new: NewNode<'a>,
    },
    /// Create and open a file without a name.
    Tmpfile {
        /// As for [`Create`](Self::Create).
        flags: u32,
        /// The properties of the new inode.
        new: NewNode<'a>,
    },
    /// Sync the whole file system to disk.
    Syncfs,
    /// Device control that concerns inodes.
    Ioctl {
        /// The file or directory.
        handle: Handle,
        /// The requested operation.
        ioctl: Ioctl,
    },
    /// Read data.
    Read(Range),
    /// Write data, which follow the request.
    Write {
        /// The range to write.
        range: Range,
        /// The open flags of the file that affect a write.
        mode: WriteMode,
    },
    /// READDIR and READDIRPLUS.
    Readdir {
        /// The open directory, the offset to continue from, and the maximum size of the entries.
        range: Range,
        /// Whether each entry is returned with the result of its LOOKUP.
        plus: bool,
    },
    /// Statistics of the file system.
    Statfs,
    /// Release an open file.
    Release {
        /// The file.
        handle: Handle,
    },
    /// Release an open directory.
    Releasedir {
        /// The directory.
        handle: Handle,
    },
    /// A descriptor is closed.
    Flush {
        /// Of this file.
        handle: Handle,
        /// The owner that closes it, whose record locks are released.
        owner: LockOwner,
    },
    /// Find a conflicting lock.
    Getlk {
        /// The file.
        handle: Handle,
        /// The owner that wants the lock.
        owner: LockOwner,
        /// The lock; its kind is never [`LockKind::Unlock`](crate::io::LockKind::Unlock).
        lock: RecordLock,
    },
    /// SETLK and SETLKW.
    Setlk(Locking),
    /// FSYNC and FSYNCDIR.
    Fsync {
        /// The file or directory.
        handle: Handle,
        /// Whether syncing the data suffices.
        data_only: bool,
        /// Whether it is a directory.
        directory: bool,
    },
    /// Set an extended attribute.
    Setxattr {
        /// Its name.
        name: &'a CStr,
        /// Its value.
        value: &'a [u8],
        /// Whether the attribute must exist, or must not exist.
        flags: XattrFlags,
    },
    /// Read an extended attribute.
    Getxattr {
        /// Its name.
        name: &'a CStr,
        /// Maximum size of the reply, bytes; 0 requests the length.
        size: u32,
    },
    /// List the extended attributes.
    Listxattr {
        /// Maximum size of the reply, bytes; 0 requests the length.
        size: u32,
    },
    /// Remove an extended attribute.
    Removexattr {
        /// Its name.
        name: &'a CStr,
    },
    /// Test permissions.
    Access {
        /// `R_OK`, `W_OK` and `X_OK`.
        mask: u32,
    },
    /// Allocate or free space.
    Fallocate {
        /// The file.
        handle: Handle,
        /// Start offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The mode of `fallocate(2)`.
        mode: u32,
    },
    /// Find data or a hole.
    Lseek {
        /// The file.
        handle: Handle,
        /// Start offset.
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`.
        whence: u32,
    },
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    CopyFileRange(Copying),
    /// Map part of the request's node into the DAX window.
    Setupmapping(Mapping),
    /// Remove mappings from the DAX window.
    Removemapping(Ranges<'a>),
    /// An operation that is not supported, or not in the protocol.
    Unserved,
}

/// A range of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The file or directory.
    pub handle: Handle,
    /// Start offset.
    pub offset: u64,
    /// Bytes.
    pub size: u32,
}

/// A copy from one open file to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copying {
    /// The source file, of the request's node.
    pub from: Handle,
    /// Offset in the source.
    pub from_offset: u64,
    /// The target node.
    pub to_node: NodeId,
    /// The target file, of that node.
    pub to: Handle,
    /// Offset in the target.
    pub to_offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Whether the reply holds a 64-bit count.
    pub wide: bool,
}

/// A mapping in the DAX window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Offset in the file.
    pub file_offset: u64,
    /// Offset in the window.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether the guest is going to write to it.
    pub writable: bool,
}

/// The command of an IOCTL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ioctl {
    /// `FS_IOC_GETFLAGS`.
    GetFlags {
        /// Size of the flags that the guest expects: 4 or 8 bytes.
        size: usize,
    },
    /// `FS_IOC_SETFLAGS`.
    SetFlags(u32),
    /// `FS_IOC_FSGETXATTR`.
    GetExtended,
    /// `FS_IOC_FSSETXATTR`.
    SetExtended(InodeFlags),
    /// Anything else.
    Other,
}

/// A lock to acquire or release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locking {
    /// The file.
    pub handle: Handle,
    /// The owner; for a lock on the whole file, the open file itself owns it.
    pub owner: LockOwner,
    /// The lock.
    pub lock: Lock,
    /// Whether to wait for it.
    pub wait: bool,
}

/// The nodes of a BATCH_FORGET.
#[derive(Clone, Copy, Debug)]
pub struct Forgets<'a>(&'a [u8]);

impl<'a> Forgets<'a> {
    /// Each node and the number of lookups to drop. A node may be 0, or unknown.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> + 'a {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (one, behind) = ForgetOne::read_from_prefix(rest).ok()?;
            rest = behind;
            Some((NodeId(one.nodeid), one.nlookup))
        })
    }
}

/// The ranges of a REMOVEMAPPING.
#[derive(Clone, Copy, Debug)]
pub struct Ranges<'a>(&'a [u8]);

impl<'a> Ranges<'a> {
    /// Offset in the window, and length, of each.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + 'a {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (one, behind) = RemovemappingOne::read_from_prefix(rest).ok()?;
            rest = behind;
            Some((one.moffset, one.len))
        })
    }
}
