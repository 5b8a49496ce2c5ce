//! The table of opcodes: for each its number, the limit of its arguments, the size of its reply, what
//! serving it again does, and who serves it.
//!
//! Decoding, dispatch and replay read it. The invariant: an [`Opcode`] is always one that the protocol
//! has, and has a whole row; 0, 7, 19 and whatever else a guest may think up has no value here.

use super::structures::{
    AttrOut, CopyFileRangeOut, EntryOut, InitOut, LkOut, LseekOut, OpenOut, StatfsOut, StatxOut,
    WriteOut,
};

/// What a request's arguments are, as far as it limits their length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Nothing that is looked at.
    Ignored,
    /// One structure, or none.
    Structure,
    /// A structure and names of directory entries.
    Names,
    /// The same and, for a new inode, a symbolic link's target, a security label and a group.
    NamesAndExtensions,
    /// A structure and the name of an extended attribute.
    XattrName,
    /// The same and its value.
    XattrValue,
    /// Nodes to forget.
    Forgets,
    /// The structure of WRITE; the data are not among what is decoded.
    Write,
}

/// What serving a request again does, if a previous process has begun it and not answered.
///
/// Lookup counts and handles don't matter here: the state table tells those of the previous process apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayClass {
    /// The same as serving it once.
    Idempotent,
    /// Something else; the guard finds out whether it took effect.
    Guarded(Guard),
    /// It is not served again from a journal: it has no effect that outlives the process, or ends the
    /// session.
    Never,
}

/// How it is found out whether a request took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// The new inode is younger than the request, and of its type.
    NewInode,
    /// The new name leads to the inode.
    NewLink,
    /// The name no longer leads to the inode that the previous process recorded.
    Removal,
    /// The inode that the previous process recorded has its new name.
    Rename,
    /// The attribute was not there when the request was begun.
    NewXattr,
    /// The attribute was there when the request was begun.
    XattrRemoval,
    /// The handle has ended.
    Release,
    /// The previous process recorded which lookups it has taken back.
    Forget,
    /// The previous process recorded where the file ended.
    Append,
}

/// Who serves a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// INIT and DESTROY, while no other request is served.
    Session,
    /// Takes lookups back; has no reply.
    Forget,
    /// Stops a waiting request; has no reply.
    Interrupt,
    /// One call of the file system and one answer.
    Metadata,
    /// An operation on an open file that may become a future.
    Data,
    /// A lock, where locks were negotiated.
    Lock,
    /// Nobody: `ENOSYS`.
    Unserved,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// What its arguments are.
    pub arguments: Arguments,
    /// Bytes that a reply needs behind its header whatever the answer. Operations that are asked for a
    /// number of bytes reply with less, so they need none.
    pub reply: usize,
    /// What serving it again does.
    pub replay: ReplayClass,
    /// Who serves it.
    pub handler: Handler,
}

/// The row of what the protocol doesn't have.
pub const UNKNOWN: Row = Row {
    arguments: Arguments::Ignored,
    reply: 0,
    replay: ReplayClass::Never,
    handler: Handler::Unserved,
};

macro_rules! opcodes {
    ($(
        $(#[$doc:meta])*
        $name:ident = $number:literal: $arguments:ident, [$($reply:ty),*],
        $replay:ident $(($guard:expr))?, $handler:ident;
    )*) => {
        /// What a request asks for (`enum fuse_opcode`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Opcode {
            $($(#[$doc])* $name = $number,)*
        }

        impl Opcode {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The opcode with this number, if there is one.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The number a request carries for it.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// Its row.
            #[must_use]
            pub const fn row(self) -> &'static Row {
                match self {
                    $(Self::$name => const { &Row {
                        arguments: Arguments::$arguments,
                        reply: 0 $(+ size_of::<$reply>())*,
                        replay: ReplayClass::$replay $(($guard))?,
                        handler: Handler::$handler,
                    } },)*
                }
            }
        }
    };
}

opcodes! {
    /// Find a name in a directory.
    Lookup = 1: Names, [EntryOut], Idempotent, Metadata;
    /// Give back lookups of one node; has no reply.
    Forget = 2: Structure, [], Guarded(Guard::Forget), Forget;
    /// Read attributes.
    Getattr = 3: Structure, [AttrOut], Idempotent, Metadata;
    /// Change attributes.
    Setattr = 4: Structure, [AttrOut], Idempotent, Metadata;
    /// Read a symbolic link.
    Readlink = 5: Structure, [], Idempotent, Metadata;
    /// Make a symbolic link.
    Symlink = 6: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Make a file, FIFO, socket or device node.
    Mknod = 8: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Make a directory.
    Mkdir = 9: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Remove a name.
    Unlink = 10: Names, [], Guarded(Guard::Removal), Metadata;
    /// Remove a directory.
    Rmdir = 11: Names, [], Guarded(Guard::Removal), Metadata;
    /// Rename.
    Rename = 12: Names, [], Guarded(Guard::Rename), Metadata;
    /// Make a hard link.
    Link = 13: Names, [EntryOut], Guarded(Guard::NewLink), Metadata;
    /// Open a file.
    Open = 14: Structure, [OpenOut], Idempotent, Metadata;
    /// Read data.
    Read = 15: Structure, [], Idempotent, Data;
    /// Write data.
    Write = 16: Write, [WriteOut], Guarded(Guard::Append), Data;
    /// Statistics of the file system.
    Statfs = 17: Structure, [StatfsOut], Idempotent, Metadata;
    /// Close a file for good.
    Release = 18: Structure, [], Guarded(Guard::Release), Metadata;
    /// Write a file back to disk.
    Fsync = 20: Structure, [], Idempotent, Data;
    /// Set an extended attribute.
    Setxattr = 21: XattrValue, [], Guarded(Guard::NewXattr), Metadata;
    /// Read an extended attribute.
    Getxattr = 22: XattrName, [], Idempotent, Metadata;
    /// List the extended attributes.
    Listxattr = 23: Structure, [], Idempotent, Metadata;
    /// Remove an extended attribute.
    Removexattr = 24: XattrName, [], Guarded(Guard::XattrRemoval), Metadata;
    /// A descriptor is closed.
    Flush = 25: Structure, [], Idempotent, Metadata;
    /// Begin a session.
    Init = 26: Structure, [InitOut], Never, Session;
    /// Open a directory.
    Opendir = 27: Structure, [OpenOut], Idempotent, Metadata;
    /// Read directory entries.
    Readdir = 28: Structure, [], Idempotent, Metadata;
    /// Close a directory for good.
    Releasedir = 29: Structure, [], Guarded(Guard::Release), Metadata;
    /// Write a directory back to disk.
    Fsyncdir = 30: Structure, [], Idempotent, Data;
    /// Test for a lock.
    Getlk = 31: Structure, [LkOut], Idempotent, Lock;
    /// Take or give up a lock.
    Setlk = 32: Structure, [], Idempotent, Lock;
    /// Take a lock, waiting for it.
    Setlkw = 33: Structure, [], Idempotent, Lock;
    /// Test permissions.
    Access = 34: Structure, [], Idempotent, Metadata;
    /// Make and open a file.
    Create = 35: NamesAndExtensions, [EntryOut, OpenOut], Guarded(Guard::NewInode), Metadata;
    /// Stop waiting for an earlier request.
    Interrupt = 36: Structure, [], Never, Interrupt;
    /// Map a block to the device.
    Bmap = 37: Structure, [], Never, Unserved;
    /// End the session.
    Destroy = 38: Structure, [], Never, Session;
    /// Device control.
    Ioctl = 39: Structure, [], Idempotent, Metadata;
    /// Poll for events.
    Poll = 40: Structure, [], Never, Unserved;
    /// Data the server asked for by a notification.
    NotifyReply = 41: Structure, [], Never, Unserved;
    /// Give back lookups of many nodes; has no reply.
    BatchForget = 42: Forgets, [], Guarded(Guard::Forget), Forget;
    /// Allocate or free space.
    Fallocate = 43: Structure, [], Idempotent, Data;
    /// Read directory entries with attributes.
    Readdirplus = 44: Structure, [], Idempotent, Metadata;
    /// Rename with flags.
    Rename2 = 45: Names, [], Guarded(Guard::Rename), Metadata;
    /// Find data or a hole.
    Lseek = 46: Structure, [LseekOut], Idempotent, Metadata;
    /// Copy between files.
    CopyFileRange = 47: Structure, [CopyFileRangeOut], Idempotent, Data;
    /// Map a part of a file into the DAX window.
    Setupmapping = 48: Structure, [], Never, Unserved;
    /// Remove mappings from the DAX window.
    Removemapping = 49: Structure, [], Never, Unserved;
    /// Write the whole file system back to disk.
    Syncfs = 50: Structure, [], Idempotent, Data;
    /// Make a file without a name.
    Tmpfile = 51: NamesAndExtensions, [EntryOut, OpenOut], Idempotent, Metadata;
    /// Read attributes as `statx` has them.
    Statx = 52: Structure, [StatxOut], Idempotent, Metadata;
    /// Copy between files, with a result of 64 bits.
    CopyFileRange64 = 53: Structure, [CopyFileRangeOut], Idempotent, Data;
}

impl Opcode {
    /// Whether the guest expects no reply, not even an error.
    #[must_use]
    pub const fn has_no_reply(self) -> bool {
        matches!(self.row().handler, Handler::Forget)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_opcode_is_found_by_its_number() {
        for &opcode in Opcode::ALL {
            assert_eq!(Opcode::from_number(opcode.number()), Some(opcode));
        }
        assert_eq!(Opcode::ALL.len(), 51);
    }

    #[test]
    fn what_has_no_reply_needs_no_room() {
        for &opcode in Opcode::ALL {
            let row = opcode.row();
            assert!(!opcode.has_no_reply() || row.reply == 0, "{opcode:?}");
        }
        assert_eq!(Opcode::Create.row().reply, 128 + 16);
    }

    #[test]
    fn numbers_the_protocol_lacks_are_no_opcode() {
        for number in [0, 7, 19, 54, 4096, 1_048_576, 436_207_616, u32::MAX] {
            assert_eq!(Opcode::from_number(number), None);
        }
    }
}
