//! IOCTL: passes on the few commands that only read or set flags of the inode.
//!
//! A command is recognised by its number and size; any other is `ENOTTY`, as for a file that
//! doesn't know the command. The invariant: nothing of an unknown command reaches the host.

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::Session;
use crate::fs::{FileSystem, Handle, NodeId, Result};
use crate::fuse::abi::IoctlOut;
use crate::fuse::reply::Answer;
use crate::fuse::request::Ioctl;

impl<F: FileSystem + ?Sized> Session<F> {
    pub(super) fn ioctl(
        &self,
        node: NodeId,
        handle: Handle,
        ioctl: Ioctl,
        room: usize,
    ) -> Result<Answer> {
        let fs = &*self.fs;
        let mut bytes = IoctlOut::default().as_bytes().to_vec();
        match ioctl {
            Ioctl::GetFlags { size } => {
                bytes.extend(fs.inode_flags(node, handle)?.to_ne_bytes());
                // Its number encodes a long, but every file system uses an int.
                bytes.resize(size_of::<IoctlOut>().saturating_add(size), 0);
            }
            Ioctl::SetFlags(flags) => fs.set_inode_flags(node, handle, flags)?,
            Ioctl::GetExtended => bytes.extend(fs.extended_inode_flags(node, handle)?),
            Ioctl::SetExtended(flags) => fs.set_extended_inode_flags(node, handle, &flags)?,
            Ioctl::Other => return Err(Errno::NOTTY),
        }
        if bytes.len() > room {
            return Err(Errno::INVAL);
        }
        Ok(Answer::Bytes(bytes))
    }
}
