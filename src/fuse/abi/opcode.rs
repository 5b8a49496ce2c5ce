//! The table of opcodes: for each its number, the limit of its arguments, the size of its reply,
//! the effect of a replay, and its handler.
//!
//! Decoding, dispatch and replay read it. The invariant: an [`Opcode`] exists in the protocol and
//! has a complete row; numbers such as 0, 7 and 19, or any other that a guest may send, have no
//! value here.

use super::structures::{
    AttrOut, CopyFileRangeOut, EntryOut, InitOut, LkOut, LseekOut, OpenOut, StatfsOut, StatxOut,
    WriteOut,
};

/// The kind of a request's arguments, which limits their length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Ignored.
    Ignored,
    /// One structure, or none.
    Structure,
    /// A structure and names of directory entries.
    Names,
    /// As [`Names`](Self::Names) and, for a new inode, a symbolic link's target, a security label
    /// and a group.
    NamesAndExtensions,
    /// A structure and the name of an extended attribute.
    XattrName,
    /// As [`XattrName`](Self::XattrName), and the attribute's value.
    XattrValue,
    /// Nodes to forget.
    Forgets,
    /// Ranges of the DAX window.
    Ranges,
    /// The structure of WRITE; the data are not decoded.
    Write,
}

/// The effect of replaying a request that a previous process began and did not answer.
///
/// Lookup counts and handles don't matter here: the state table tells which belong to the previous
/// process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayClass {
    /// The same as executing it once.
    Idempotent,
    /// A different one; the guard determines whether the request took effect.
    Guarded(Guard),
    /// It is never replayed: it has no effect that outlives the process, or it ends the session.
    Never,
}

/// How to determine whether a request took effect.
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
    /// The attribute did not exist when the request began.
    NewXattr,
    /// The attribute existed when the request began.
    XattrRemoval,
    /// The handle is no longer valid.
    Release,
    /// The previous process recorded which lookups it dropped.
    Forget,
    /// The previous process recorded the file's end.
    Append,
}

/// The handler of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// INIT and DESTROY, while no other request is served.
    Session,
    /// Drops lookups; has no reply.
    Forget,
    /// Stops a waiting request; has no reply.
    Interrupt,
    /// One call of the file system and one reply.
    Metadata,
    /// An operation on an open file that may become a future.
    Data,
    /// A lock, if locks were negotiated.
    Lock,
    /// A mapping in the DAX window, if there is one.
    Mapping,
    /// None: `ENOSYS`.
    Unserved,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The kind of its arguments.
    pub arguments: Arguments,
    /// Bytes that a reply needs behind its header in any case. Operations that request a number of
    /// bytes reply with less if necessary, so they need none.
    pub reply: usize,
    /// The effect of a replay.
    pub replay: ReplayClass,
    /// Its handler.
    pub handler: Handler,
}

/// The row for opcodes that are not in the protocol.
pub(crate) const UNKNOWN: Row = Row {
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
        /// The operation of a request (`enum fuse_opcode`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Opcode {
            $($(#[$doc])* $name = $number,)*
        }

        impl Opcode {
            /// All opcodes, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The opcode with this number, if there is one.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// Its number in a request.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// Its row in the table.
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
    /// Drop lookups of one node; has no reply.
    Forget = 2: Structure, [], Guarded(Guard::Forget), Forget;
    /// Read attributes.
    Getattr = 3: Structure, [AttrOut], Idempotent, Metadata;
    /// Change attributes.
    Setattr = 4: Structure, [AttrOut], Idempotent, Metadata;
    /// Read a symbolic link.
    Readlink = 5: Structure, [], Idempotent, Metadata;
    /// Create a symbolic link.
    Symlink = 6: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Create a file, FIFO, socket or device node.
    Mknod = 8: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Create a directory.
    Mkdir = 9: NamesAndExtensions, [EntryOut], Guarded(Guard::NewInode), Metadata;
    /// Remove a name.
    Unlink = 10: Names, [], Guarded(Guard::Removal), Metadata;
    /// Remove a directory.
    Rmdir = 11: Names, [], Guarded(Guard::Removal), Metadata;
    /// Rename.
    Rename = 12: Names, [], Guarded(Guard::Rename), Metadata;
    /// Create a hard link.
    Link = 13: Names, [EntryOut], Guarded(Guard::NewLink), Metadata;
    /// Open a file.
    Open = 14: Structure, [OpenOut], Idempotent, Metadata;
    /// Read data.
    Read = 15: Structure, [], Idempotent, Data;
    /// Write data.
    Write = 16: Write, [WriteOut], Guarded(Guard::Append), Data;
    /// Statistics of the file system.
    Statfs = 17: Structure, [StatfsOut], Idempotent, Metadata;
    /// Release an open file.
    Release = 18: Structure, [], Guarded(Guard::Release), Metadata;
    /// Sync a file to disk.
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
    /// Release an open directory.
    Releasedir = 29: Structure, [], Guarded(Guard::Release), Metadata;
    /// Sync a directory to disk.
    Fsyncdir = 30: Structure, [], Idempotent, Data;
    /// Test for a lock.
    Getlk = 31: Structure, [LkOut], Idempotent, Lock;
    /// Acquire or release a lock.
    Setlk = 32: Structure, [], Idempotent, Lock;
    /// Acquire a lock, waiting for it.
    Setlkw = 33: Structure, [], Idempotent, Lock;
    /// Test permissions.
    Access = 34: Structure, [], Idempotent, Metadata;
    /// Create and open a file.
    Create = 35: NamesAndExtensions, [EntryOut, OpenOut], Guarded(Guard::NewInode), Metadata;
    /// Interrupt an earlier request.
    Interrupt = 36: Structure, [], Never, Interrupt;
    /// Map a block to the device.
    Bmap = 37: Structure, [], Never, Unserved;
    /// End the session.
    Destroy = 38: Structure, [], Never, Session;
    /// Device control.
    Ioctl = 39: Structure, [], Idempotent, Metadata;
    /// Poll for events.
    Poll = 40: Structure, [], Never, Unserved;
    /// Data that the server requested by a notification.
    NotifyReply = 41: Structure, [], Never, Unserved;
    /// Drop lookups of many nodes; has no reply.
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
    /// Map a range of a file into the DAX window.
    Setupmapping = 48: Structure, [], Idempotent, Mapping;
    /// Remove mappings from the DAX window.
    Removemapping = 49: Ranges, [], Idempotent, Mapping;
    /// Sync the whole file system to disk.
    Syncfs = 50: Structure, [], Idempotent, Data;
    /// Create a file without a name.
    Tmpfile = 51: NamesAndExtensions, [EntryOut, OpenOut], Idempotent, Metadata;
    /// Read attributes in the form of `statx`.
    Statx = 52: Structure, [StatxOut], Idempotent, Metadata;
    /// Copy between files, with a 64-bit result.
    CopyFileRange64 = 53: Structure, [CopyFileRangeOut], Idempotent, Data;
}

impl Opcode {
    /// The name of the opcode with this number, if there is one: in lower case, its words separated by
    /// underscores.
    #[must_use]
    pub fn name_of(number: u32) -> Option<String> {
        let name = format!("{:?}", Self::from_number(number)?);
        let mut words = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !words.is_empty() {
                words.push('_');
            }
            words.extend(letter.to_lowercase());
        }
        Some(words)
    }

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
    fn names_are_words_in_lower_case() {
        assert_eq!(Opcode::name_of(47).unwrap(), "copy_file_range");
        assert_eq!(Opcode::name_of(3).unwrap(), "getattr");
        assert_eq!(Opcode::name_of(7), None);
    }

    #[test]
    fn request_without_reply_needs_no_room() {
        for &opcode in Opcode::ALL {
            let row = opcode.row();
            assert!(!opcode.has_no_reply() || row.reply == 0, "{opcode:?}");
        }
        assert_eq!(Opcode::Create.row().reply, 128 + 16);
    }

    #[test]
    fn unknown_number_is_no_opcode() {
        for number in [0, 7, 19, 54, 4096, 1_048_576, 436_207_616, u32::MAX] {
            assert_eq!(Opcode::from_number(number), None);
        }
    }
}
