//! Requests as plain data, decoded without I/O.
//!
//! [`decode()`] turns the bytes of a request into a [`Request`] or says what is wrong with them;
//! it allocates nothing and looks at each byte of its input as it is then, so the input has to
//! be a private copy. [`bytes_wanted`] tells how much of a request to copy. The payload of a
//! WRITE is never part of it. The invariant: what comes out has been checked; names fit into a
//! directory, offsets into an `i64`, nanoseconds into a second, and nodes are not 0.

mod arguments;
mod decode;
mod extensions;
mod fault;
#[cfg(test)]
mod tests;

use std::ffi::CStr;

use zerocopy::FromBytes;

pub use decode::{HEADER_LEN, bytes_wanted, decode, decode_as};
pub use fault::{DecodeError, Fault};

use super::abi::{ForgetOne, InitIn, Row};
use crate::fs::{
    Caller, Changes, Handle, InodeFlags, Label, LockOwner, NewNode, NodeId, XattrFlags,
};
use crate::io::{Lock, RecordLock, WriteMode};

/// One request of a guest.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What the guest calls this request; the reply carries it.
    pub unique: u64,
    /// The operation's number, for counting.
    pub opcode: u32,
    /// The opcode's row in the table.
    pub row: &'static Row,
    /// The node the operation is on; meaningless for the few that are on none.
    pub node: NodeId,
    /// Who asks.
    pub caller: Caller,
    /// What is asked for.
    pub operation: Operation<'a>,
}

/// What a request asks for. Names and values point into the bytes it was decoded from.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Begin a session. What an older kernel leaves out is 0.
    Init(InitIn),
    /// End the session.
    Destroy,
    /// Stop waiting for an earlier request.
    Interrupt {
        /// What that one is called.
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
    /// Give back lookups.
    Forget {
        /// How many.
        count: u64,
    },
    /// Give back lookups of many nodes.
    BatchForget(Forgets<'a>),
    /// Read attributes.
    Getattr {
        /// Of this open file, if it is given.
        handle: Option<Handle>,
    },
    /// Read attributes as `statx` has them.
    Statx {
        /// Of this open file, if it is given.
        handle: Option<Handle>,
    },
    /// Change attributes.
    Setattr {
        /// Of this open file, if it is given.
        handle: Option<Handle>,
        /// The changes.
        changes: Changes,
    },
    /// Read a symbolic link.
    Readlink,
    /// Make a symbolic link.
    Symlink {
        /// Its name.
        name: &'a CStr,
        /// Where it points.
        target: &'a CStr,
        /// What it is labelled with.
        label: Option<Label<'a>>,
    },
    /// Make a file, FIFO, socket or device node.
    Mknod {
        /// Its name.
        name: &'a CStr,
        /// What it is made with.
        new: NewNode<'a>,
    },
    /// Make a directory.
    Mkdir {
        /// Its name.
        name: &'a CStr,
        /// What it is made with.
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
        /// Those of `renameat2(2)`; 0 for RENAME.
        flags: u32,
    },
    /// Make a hard link in the request's node.
    Link {
        /// To this one.
        node: NodeId,
        /// The new name.
        name: &'a CStr,
    },
    /// Open a file.
    Open {
        /// Those of `open(2)` that a guest may give; see [`decode()`].
        flags: u32,
    },
    /// Open a directory.
    Opendir {
        /// As for [`Open`](Self::Open).
        flags: u32,
    },
    /// Make and open a file.
    Create {
        /// Its name.
        name: &'a CStr,
        /// As for [`Open`](Self::Open), and `O_EXCL`.
        flags: u32,
        /// What it is made with.
        new: NewNode<'a>,
    },
    /// Make and open a file without a name.
    Tmpfile {
        /// As for [`Create`](Self::Create).
        flags: u32,
        /// What it is made with.
        new: NewNode<'a>,
    },
    /// Write the whole file system back to disk.
    Syncfs,
    /// Device control, as far as it is about inodes.
    Ioctl {
        /// The file or directory.
        handle: Handle,
        /// What is asked for.
        ioctl: Ioctl,
    },
    /// Read data.
    Read(Range),
    /// Write data, which follow the request.
    Write {
        /// Where.
        range: Range,
        /// What the guest has opened the file for, as far as a write goes by it.
        mode: WriteMode,
    },
    /// READDIR and READDIRPLUS.
    Readdir {
        /// The open directory, where to go on in it, and how many bytes of entries to answer.
        range: Range,
        /// Whether each entry comes with what a LOOKUP would say.
        plus: bool,
    },
    /// Statistics of the file system.
    Statfs,
    /// Close a file for good.
    Release {
        /// The file.
        handle: Handle,
    },
    /// Close a directory for good.
    Releasedir {
        /// The directory.
        handle: Handle,
    },
    /// A descriptor is closed.
    Flush {
        /// Of this file.
        handle: Handle,
        /// Who closes it, and gives up its record locks thereby.
        owner: LockOwner,
    },
    /// Find a lock that is in the way.
    Getlk {
        /// The file.
        handle: Handle,
        /// Who wants the lock.
        owner: LockOwner,
        /// The lock, which is not one to be given up.
        lock: RecordLock,
    },
    /// SETLK and SETLKW.
    Setlk(Locking),
    /// FSYNC and FSYNCDIR.
    Fsync {
        /// The file or directory.
        handle: Handle,
        /// Whether data are enough.
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
        /// Whether it has to be there, or not to be there.
        flags: XattrFlags,
    },
    /// Read an extended attribute.
    Getxattr {
        /// Its name.
        name: &'a CStr,
        /// Bytes the guest has room for; 0 asks for the length.
        size: u32,
    },
    /// List the extended attributes.
    Listxattr {
        /// Bytes the guest has room for; 0 asks for the length.
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
        /// From here.
        offset: u64,
        /// Bytes.
        len: u64,
        /// That of `fallocate(2)`.
        mode: u32,
    },
    /// Find data or a hole.
    Lseek {
        /// The file.
        handle: Handle,
        /// From here.
        offset: u64,
        /// `SEEK_DATA` or `SEEK_HOLE`.
        whence: u32,
    },
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    CopyFileRange(Copying),
    /// An operation that is not served, or that the protocol doesn't have.
    Unserved,
}

/// A part of an open file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The file or directory.
    pub handle: Handle,
    /// Where the part begins.
    pub offset: u64,
    /// Bytes.
    pub size: u32,
}

/// A copy from one open file to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copying {
    /// Copy from this file of the request's node,
    pub from: Handle,
    /// from here,
    pub from_offset: u64,
    /// to this node,
    pub to_node: NodeId,
    /// as this open file of it,
    pub to: Handle,
    /// to there,
    pub to_offset: u64,
    /// this many bytes.
    pub len: u64,
    /// Whether the reply has room for a count of 64 bits.
    pub wide: bool,
}

/// What IOCTL asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ioctl {
    /// `FS_IOC_GETFLAGS`.
    GetFlags {
        /// Bytes that the guest wants of them: 4 or 8.
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

/// A lock to take or to give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locking {
    /// The file.
    pub handle: Handle,
    /// Who takes it; for a lock on the whole file, the open file itself does.
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
    /// Each node and how many lookups of it are given back. A node may be 0, or unknown.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> + 'a {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let (one, behind) = ForgetOne::read_from_prefix(rest).ok()?;
            rest = behind;
            Some((NodeId(one.nodeid), one.nlookup))
        })
    }
}
