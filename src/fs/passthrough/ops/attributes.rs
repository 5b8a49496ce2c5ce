//! Attributes: GETATTR, STATX, SETATTR, STATFS, ACCESS, and the conversion of the host's attributes
//! to the guest's.
//!
//! The invariant: a change applies to the inode that the guest named, even if that is a symbolic
//! link, has lost its name, or has been renamed.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::Operations;
use crate::fs::passthrough::inode_table::InodeFd;
use crate::fs::passthrough::inode_table::stat_fd;
use crate::fs::permissions;
use crate::fs::{
    Attributes, Caller, Changes, Handle, NewTime, NodeId, Result, Statistics, Timestamp,
};
use crate::io::File;
use crate::sys;

/// The permission bits of a mode, including the set-id and sticky bits.
pub(crate) const PERMISSIONS: u32 = 0o7777;

/// Converts the host's attributes, without mapping the owners.
fn attributes(stat: &Statx) -> Attributes {
    Attributes {
        inode: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        accessed: timestamp(stat.stx_atime),
        modified: timestamp(stat.stx_mtime),
        changed: timestamp(stat.stx_ctime),
        mode: u32::from(stat.stx_mode),
        links: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        block_size: stat.stx_blksize,
    }
}

pub(crate) fn timestamp(time: StatxTimestamp) -> Timestamp {
    Timestamp {
        seconds: time.tv_sec,
        nanoseconds: time.tv_nsec,
    }
}

/// The kernel's 32-bit encoding (`new_encode_dev`, `linux/kdev_t.h`): 12 bits of major between
/// the lower 8 and the upper 12 of minor.
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12
}

/// Splits a device number that [`encode_device`] made.
pub(crate) fn decode_device(device: u32) -> (u32, u32) {
    (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00)
}

/// Narrows a value of the host. A larger value becomes the maximum.
fn narrow(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

impl Operations {
    /// The host's attributes as the guest sees them, owners included.
    pub(crate) fn attributes(&self, stat: &Statx) -> Attributes {
        self.ids.attributes_for_guest(attributes(stat))
    }

    pub(crate) fn attributes_of(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        let stat = match self.terms.explicit(handle) {
            Some(handle) => stat_fd(
                self.fds.files().handles().any(node, handle)?,
                StatxFlags::BASIC_STATS,
            ),
            None => self.stat_inode(node, StatxFlags::BASIC_STATS),
        }?;
        Ok((self.attributes(&stat), self.options.attribute_ttl))
    }

    pub(crate) fn attributes_with_birth(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = match self.terms.explicit(handle) {
            Some(handle) => stat_fd(self.fds.files().handles().any(node, handle)?, mask),
            None => self.stat_inode(node, mask),
        }?;
        let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
        let born = known.then(|| timestamp(stat.stx_btime));
        Ok((self.attributes(&stat), born, self.options.attribute_ttl))
    }

    fn stat_inode(&self, node: NodeId, mask: StatxFlags) -> Result<Statx> {
        let inode = self.fds.inode(node)?;
        match self.fds.stat_by_name(&inode) {
            Some(stat) => Ok(stat),
            None => stat_fd(self.fds.fd(&inode)?, mask),
        }
    }

    /// STATFS of the file system that `node` is on.
    pub(crate) fn statistics(&self, node: NodeId) -> Result<Statistics> {
        let inode = self.fds.inode(node)?;
        let stat = rustix::fs::fstatvfs(self.fds.fd(&inode)?)?;
        Ok(Statistics {
            blocks: stat.f_blocks,
            blocks_free: stat.f_bfree,
            blocks_available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
            block_size: narrow(stat.f_bsize),
            fragment_size: narrow(stat.f_frsize),
            name_length: narrow(stat.f_namemax),
        })
    }

    /// Applies SETATTR. The owner comes first, as a change of owner clears set-id bits, which the
    /// mode may set again. The times come last, as a change of size sets them.
    pub(crate) fn set_attributes(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        let inode = self.fds.inode(node)?;
        let file = self
            .terms
            .explicit(handle)
            .map(|handle| self.fds.files().handles().any(node, handle))
            .transpose()?;
        let target = match &file {
            Some(file) => Target::Open(file),
            None => Target::Path(self.fd_to_change(caller, &inode)?),
        };
        if let Target::Path(fd) = &target {
            let implicit = handle.is_some();
            self.confirm_attributes(caller, fd, implicit, changes.size.is_some())?;
        }
        if changes.uid.is_some() || changes.gid.is_some() {
            let user = |id| self.ids.user_on_host(valid_id(id)?);
            let group = |id| self.ids.group_on_host(valid_id(id)?);
            let uid = changes.uid.map(user).transpose()?.map(Uid::from_raw);
            let gid = changes.gid.map(group).transpose()?.map(Gid::from_raw);
            match rustix::fs::chownat(&target, c"", uid, gid, AtFlags::EMPTY_PATH) {
                // The server's user namespace has no such id, so files can't be given to it.
                Err(Errno::INVAL) => return Err(Errno::PERM),
                done => done?,
            }
        }
        if let Some(mode) = changes.mode {
            self.change_mode(&target, inode.kind(), mode)?;
        }
        let writes = changes.is_empty() && inode.kind() == FileType::RegularFile;
        if caller.kill_set_id && (writes || changes.size.is_some()) {
            self.kill_set_id_of(&target, inode.kind())?;
        }
        if let Some(size) = changes.size {
            self.change_size(&target, inode.kind(), size)?;
        }
        if changes.accessed.is_some() || changes.modified.is_some() {
            let times = Timestamps {
                last_access: timespec(changes.accessed),
                last_modification: timespec(changes.modified),
            };
            rustix::fs::utimensat(&target, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let stat = stat_fd(&target, StatxFlags::BASIC_STATS)?;
        Ok((self.attributes(&stat), self.options.attribute_ttl))
    }

    fn change_mode(&self, target: &Target<'_>, kind: FileType, mode: u32) -> Result<()> {
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        match target {
            // Some kernels change the mode on some file systems, where it means nothing.
            _ if kind == FileType::Symlink => Err(Errno::OPNOTSUPP),
            Target::Open(file) => rustix::fs::fchmod(file, mode),
            Target::Path(fd) => {
                let name = fd.proc_name();
                rustix::fs::chmodat(self.fds.proc_fds(), name.as_c_str(), mode, AtFlags::empty())
            }
        }
    }

    /// Clears set-id bits of an open file as a write or a truncation by an ordinary user does. The
    /// set-group-ID bit is cleared only if the group may execute the file (`S_IXGRP`); without that
    /// bit it depends on whether the caller is in the group, which the guest doesn't tell.
    ///
    /// This is done before the change, so that nobody can execute the new content with the bits
    /// set. It sets the mode instead of dropping a capability, as the write may run in another
    /// thread.
    pub(crate) fn kill_set_id_of_open(&self, file: &File) -> Result<()> {
        self.kill_set_id_of(&Target::Open(file), FileType::RegularFile)
    }

    /// As [`kill_set_id_of_open`](Self::kill_set_id_of_open), before an operation that the host
    /// refuses if the file isn't open for writing. In that case no bit is cleared.
    pub(crate) fn kill_set_id_before_change(&self, file: &File) -> Result<()> {
        if rustix::fs::fcntl_getfl(file)? & OFlags::RWMODE == OFlags::RDONLY {
            return Ok(());
        }
        self.kill_set_id_of_open(file)
    }

    fn kill_set_id_of(&self, target: &Target<'_>, kind: FileType) -> Result<()> {
        let stat = stat_fd(target, StatxFlags::MODE)?;
        let mode = u32::from(stat.stx_mode) & PERMISSIONS;
        match without_set_id(mode) {
            same if same == mode => Ok(()),
            fewer => self.change_mode(target, kind, fewer),
        }
    }

    /// Truncates an open file to zero bytes. It need not be open for writing.
    pub(crate) fn truncate_to_zero(&self, file: &File) -> Result<()> {
        self.change_size(&Target::Open(file), FileType::RegularFile, 0)
    }

    fn change_size(&self, target: &Target<'_>, kind: FileType, size: u64) -> Result<()> {
        match kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if let Target::Open(file) = target {
            match rustix::fs::ftruncate(file, size) {
                // The file is open for reading only.
                Err(Errno::INVAL | Errno::BADF) => {}
                done => return done,
            }
        }
        // `"N"` is relative to `/proc/self/fd`, the working directory of prepared threads.
        self.prepare()?;
        let name = rustix::path::DecInt::from_fd(target);
        sys::file::truncate(name.as_c_str(), size)
    }

    /// ACCESS, by the mode bits. A guest sends it only if it is mounted without
    /// `default_permissions`. Its supplementary groups and ACLs are not known here.
    pub(crate) fn check_access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        let inode = self.fds.inode(node)?;
        let stat = stat_fd(self.fds.fd(&inode)?, StatxFlags::BASIC_STATS)?;
        if mask & 0o2 != 0 && matches!(inode.kind(), FileType::RegularFile | FileType::Directory) {
            self.fds.writable()?;
        }
        permissions::check(caller, &self.attributes(&stat), mask)
    }
}

/// A mode after a change by a caller that may not keep set-id bits.
fn without_set_id(mode: u32) -> u32 {
    let group = if mode & 0o010 == 0 { 0 } else { 0o2000 };
    mode & !(0o4000 | group)
}

/// What SETATTR works on.
enum Target<'a> {
    /// An open file: for system calls that take a descriptor.
    Open(&'a File),
    /// An `O_PATH` descriptor: for system calls with `AT_EMPTY_PATH`.
    Path(InodeFd<'a>),
}

impl AsFd for Target<'_> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Open(file) => file.as_fd(),
            Self::Path(fd) => fd.as_fd(),
        }
    }
}

/// The host takes -1 for "leave unchanged".
fn valid_id(id: u32) -> Result<u32> {
    if id == u32::MAX {
        Err(Errno::INVAL)
    } else {
        Ok(id)
    }
}

fn timespec(time: Option<NewTime>) -> Timespec {
    let (tv_sec, tv_nsec) = match time {
        None => (0, UTIME_OMIT),
        Some(NewTime::Now) => (0, UTIME_NOW),
        Some(NewTime::At(at)) => (at.seconds, at.nanoseconds.into()),
    };
    Timespec { tv_sec, tv_nsec }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_number_survives_encoding_and_decoding() {
        for (major, minor) in [(0, 0), (8, 1), (259, 70_000), (0xfff, 0xf_ffff)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
        assert_eq!(encode_device(8, 1), 0x801);
    }

    #[test]
    fn unset_time_is_omitted() {
        assert_eq!(timespec(None).tv_nsec, UTIME_OMIT);
        assert_eq!(timespec(Some(NewTime::Now)).tv_nsec, UTIME_NOW);
    }
}
