//! What a request asks for, as a number.
//!
//! The invariant: an [`Opcode`] is always one the protocol has; 0, 7, 19 and whatever else a
//! guest may think up has no value here.

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
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
                match self {
                    $(Self::$name => $number,)*
                }
            }
        }
    };
}

opcodes! {
    /// Find a name in a directory.
    Lookup = 1,
    /// Give back lookups of one node; has no reply.
    Forget = 2,
    /// Read attributes.
    Getattr = 3,
    /// Change attributes.
    Setattr = 4,
    /// Read a symbolic link.
    Readlink = 5,
    /// Make a symbolic link.
    Symlink = 6,
    /// Make a file, FIFO, socket or device node.
    Mknod = 8,
    /// Make a directory.
    Mkdir = 9,
    /// Remove a name.
    Unlink = 10,
    /// Remove a directory.
    Rmdir = 11,
    /// Rename.
    Rename = 12,
    /// Make a hard link.
    Link = 13,
    /// Open a file.
    Open = 14,
    /// Read data.
    Read = 15,
    /// Write data.
    Write = 16,
    /// Statistics of the file system.
    Statfs = 17,
    /// Close a file for good.
    Release = 18,
    /// Write a file back to disk.
    Fsync = 20,
    /// Set an extended attribute.
    Setxattr = 21,
    /// Read an extended attribute.
    Getxattr = 22,
    /// List the extended attributes.
    Listxattr = 23,
    /// Remove an extended attribute.
    Removexattr = 24,
    /// A descriptor is closed.
    Flush = 25,
    /// Begin a session.
    Init = 26,
    /// Open a directory.
    Opendir = 27,
    /// Read directory entries.
    Readdir = 28,
    /// Close a directory for good.
    Releasedir = 29,
    /// Write a directory back to disk.
    Fsyncdir = 30,
    /// Test for a lock.
    Getlk = 31,
    /// Take or give up a lock.
    Setlk = 32,
    /// Take a lock, waiting for it.
    Setlkw = 33,
    /// Test permissions.
    Access = 34,
    /// Make and open a file.
    Create = 35,
    /// Stop waiting for an earlier request.
    Interrupt = 36,
    /// Map a block to the device.
    Bmap = 37,
    /// End the session.
    Destroy = 38,
    /// Device control.
    Ioctl = 39,
    /// Poll for events.
    Poll = 40,
    /// Data the server asked for by a notification.
    NotifyReply = 41,
    /// Give back lookups of many nodes; has no reply.
    BatchForget = 42,
    /// Allocate or free space.
    Fallocate = 43,
    /// Read directory entries with attributes.
    Readdirplus = 44,
    /// Rename with flags.
    Rename2 = 45,
    /// Find data or a hole.
    Lseek = 46,
    /// Copy between files.
    CopyFileRange = 47,
    /// Map a part of a file into the DAX window.
    Setupmapping = 48,
    /// Remove mappings from the DAX window.
    Removemapping = 49,
    /// Write the whole file system back to disk.
    Syncfs = 50,
    /// Make a file without a name.
    Tmpfile = 51,
    /// Read attributes as `statx` has them.
    Statx = 52,
    /// Copy between files, with a result of 64 bits.
    CopyFileRange64 = 53,
}

impl Opcode {
    /// Whether the guest expects no reply, not even an error.
    #[must_use]
    pub const fn has_no_reply(self) -> bool {
        matches!(self, Self::Forget | Self::BatchForget)
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
    fn numbers_the_protocol_lacks_are_no_opcode() {
        for number in [0, 7, 19, 54, 4096, 1_048_576, 436_207_616, u32::MAX] {
            assert_eq!(Opcode::from_number(number), None);
        }
    }
}
