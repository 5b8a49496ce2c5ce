//! The flags of inodes: IOCTL.
//!
//! The invariant: only flags that concern the file itself are passed on.

use rustix::fs::IFlags;
use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::Operations;
use crate::fs::{Handle, InodeFlags, NodeId, Result};
use crate::sys::inode_flags::{self, ExtendedFlags};

/// `FS_PROJINHERIT_FL`, of the plain flags: what is created in a directory belongs to its project.
const INHERIT: u32 = 0x2000_0000;
/// `FS_XFLAG_PROJINHERIT`, the same of the extended flags.
const EXTENDED_INHERIT: u32 = 0x200;

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
        // Without the flag, files would be created in a directory that the project isn't charged for.
        let before = rustix::fs::ioctl_getflags(&file)?.bits();
        let is_counted = || inode_flags::get(&file).is_ok_and(|flags| flags.project != 0);
        if (before ^ flags) & INHERIT != 0 && is_counted() {
            return Err(Errno::PERM);
        }
        rustix::fs::ioctl_setflags(file, IFlags::from_bits_retain(flags))
    }

    /// The host accounts a file to its project, so the guest may change neither the project nor
    /// whether what is created in a directory of a project belongs to it.
    pub(crate) fn change_extended_flags(
        &self,
        node: NodeId,
        handle: Handle,
        flags: &InodeFlags,
    ) -> Result<()> {
        let file = self.any_to_change(node, handle)?;
        let flags = ExtendedFlags::read_from_bytes(flags).or(Err(Errno::INVAL))?;
        let before = inode_flags::get(&file)?;
        let inherits_otherwise = (before.flags ^ flags.flags) & EXTENDED_INHERIT != 0;
        if before.project != flags.project || before.project != 0 && inherits_otherwise {
            return Err(Errno::PERM);
        }
        inode_flags::set(file, &flags)
    }
}
