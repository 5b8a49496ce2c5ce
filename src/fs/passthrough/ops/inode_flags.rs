//! The flags of inodes: IOCTL.
//!
//! The invariant: only flags that concern the file itself are passed on.

use rustix::fs::IFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::Operations;
use crate::fs::{Handle, InodeFlags, NodeId, Result};
use crate::sys::inode_flags::{self, ExtendedFlags};

impl Operations {
    pub(crate) fn flags_of(&self, node: NodeId, handle: Handle) -> Result<u32> {
        let file = self.any_of(node, handle)?;
        Ok(rustix::fs::ioctl_getflags(file)?.bits())
    }

    pub(crate) fn extended_flags(&self, node: NodeId, handle: Handle) -> Result<InodeFlags> {
        let flags = inode_flags::get(self.any_of(node, handle)?)?;
        let mut bytes = InodeFlags::default();
        bytes.copy_from_slice(flags.as_bytes());
        Ok(bytes)
    }

    pub(crate) fn change_flags(&self, node: NodeId, handle: Handle, flags: u32) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        rustix::fs::ioctl_setflags(file, IFlags::from_bits_retain(flags))
    }

    /// The host accounts a file to its project, so the guest may not change the project.
    pub(crate) fn change_extended_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        let flags = ExtendedFlags::read_from_bytes(flags).or(Err(Errno::INVAL))?;
        if inode_flags::get(&file)?.project != flags.project {
            return Err(Errno::PERM);
        }
        inode_flags::set(file, &flags)
    }
}
