//! How much one guest may hold: inodes, open files, locks.
//!
//! Each costs the host memory or a descriptor, and a guest's kernel that goes wild, or is told
//! to, would take all there is. The invariant: what is over a bound is refused before anything
//! takes effect. Threads that ask at the same moment may go over by one each.

use rustix::io::Errno;

use super::Passthrough;
use crate::fs::Result;

/// Inodes that a guest may know unless the options say otherwise. One costs the server 200 to
/// 400 bytes, and the guest, whose kernel has an inode and a name for it, about four times that.
pub(super) const INODES: usize = 1 << 24;

/// Pieces of directories that are kept from one READDIR to the next, each of 64 KiB; a further
/// directory is read on at the place where it stopped, which costs a call more.
pub(super) const PIECES: usize = 1024;

impl Passthrough {
    /// Asked before the guest gets to know a further inode. What it has given back makes room.
    pub(super) fn room_for_inode(&self) -> Result<()> {
        while self.inodes.known() > self.options.max_inodes {
            if !self.inodes.let_oldest_go() {
                return Err(Errno::NFILE);
            }
        }
        self.inodes.room_in_table();
        Ok(())
    }

    /// Asked before a further file or directory is opened for the guest.
    pub(super) fn room_for_handle(&self) -> Result<()> {
        if self.handles.count().saturating_add(self.locks.count()) >= self.max_handles {
            return Err(Errno::NFILE);
        }
        Ok(())
    }
}
