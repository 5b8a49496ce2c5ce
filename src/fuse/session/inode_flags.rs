//! IOCTL: the few that are safe to pass on, as they read or set flags of the inode alone.
//!
//! Which they are is told by number and size, and everything else is `ENOTTY`, as it is to a
//! file that doesn't know the call. The invariant: nothing of an unknown call reaches the host.

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
                // Its number says that it is a long; every file system makes it an int.
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
