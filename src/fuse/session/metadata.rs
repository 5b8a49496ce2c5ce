//! Metadata operations: names, attributes, extended attributes, opening and closing.
//!
//! Each is one call of the file system and one reply. The invariant: nothing here waits for
//! anything but that call.

use std::ffi::CStr;
use std::time::Duration;

use rustix::io::Errno;

use super::Session;
use crate::fs::{Attributes, Caller, Entry, FileSystem, NodeId};
use crate::fuse::abi::{GetxattrOut, InitFlags, LseekOut};
use crate::fuse::directory::Records;
use crate::fuse::reply::{Answer, attr_out, entry_out, no_entry_out, statfs_out, statx_out};
use crate::fuse::request::{Operation, Range, Request};

/// Longest reply to READDIR, bytes.
const READDIR_MAX: usize = 1024 * 1024;
/// Longest value, and longest list of names, of extended attributes (`XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 64 * 1024;

impl<F: FileSystem + ?Sized> Session<F> {
    /// Serves `request`; the reply may have `room` bytes behind its header.
    pub(super) fn metadata(&self, request: &Request<'_>, room: usize) -> Result<Answer, Errno> {
        let fs = &*self.fs;
        let (caller, node) = (&request.caller, request.node);
        let done = |()| Answer::Done;
        let marks = self.dax_marks();
        let entry = |entry: Entry, name: &CStr| {
            self.warn_about_submounts(entry.submount);
            Answer::Entry(entry_out(&entry, marks.of_entry(&entry, name)))
        };
        let attributes = |(attributes, ttl): (Attributes, Duration)| {
            let dax = marks.of_attributes(node, &attributes);
            Answer::Attributes(attr_out(&(attributes, ttl), dax))
        };
        match request.operation {
            Operation::Lookup { name } => match fs.lookup(caller, node, name) {
                Err(Errno::NOENT) if !self.options.negative_ttl.is_zero() => {
                    Ok(Answer::Entry(no_entry_out(self.options.negative_ttl)))
                }
                found => found.map(|found| entry(found, name)),
            },
            Operation::LookupSelf => fs.lookup_self(node).map(|found| entry(found, c"")),
            Operation::LookupParent => fs.lookup_parent(node).map(|found| entry(found, c"")),
            Operation::Statx { handle } => fs
                .statx(node, handle)
                .map(|attributes| Answer::Statx(statx_out(&attributes))),
            Operation::Tmpfile { flags, new } => {
                let (entry, opened) = fs.tmpfile(caller, node, flags, &new)?;
                Ok(Answer::Created(
                    entry_out(&entry, marks.of_entry(&entry, c"")),
                    self.open_out(&opened),
                ))
            }
            Operation::Ioctl { handle, ioctl } => self.ioctl(node, handle, ioctl, room),
            Operation::Getattr { handle } => fs.getattr(caller, node, handle).map(attributes),
            Operation::Setattr { handle, changes } => {
                // With this flag, Linux drops the set-ID bits from the change that it makes before
                // a write, `fallocate` or copy by a caller that may not keep them. What is left
                // changes nothing.
                let kills = changes.is_empty() && self.has_agreed(InitFlags::HANDLE_KILLPRIV_V2);
                let caller = Caller {
                    kill_set_id: caller.kill_set_id || kills,
                    ..*caller
                };
                fs.setattr(&caller, node, handle, &changes).map(attributes)
            }
            Operation::Readlink => match fs.readlink(caller, node)? {
                target if target.len() > room => Err(Errno::NAMETOOLONG),
                target => Ok(Answer::Bytes(target)),
            },
            Operation::Symlink {
                name,
                target,
                label,
            } => fs
                .symlink(caller, node, name, target, label)
                .map(|made| entry(made, name)),
            Operation::Mknod { name, new } => fs
                .mknod(caller, node, name, &new)
                .map(|made| entry(made, name)),
            Operation::Mkdir { name, new } => fs
                .mkdir(caller, node, name, &new)
                .map(|made| entry(made, name)),
            Operation::Unlink { name } => fs.unlink(caller, node, name).map(done),
            Operation::Rmdir { name } => fs.rmdir(caller, node, name).map(done),
            Operation::Rename { from, to, flags } => {
                fs.rename(caller, (node, from), to, flags).map(done)
            }
            Operation::Link {
                node: existing,
                name,
            } => fs
                .link(caller, existing, node, name)
                .map(|made| entry(made, name)),
            Operation::Open { flags } => fs
                .open(caller, node, flags)
                .map(|opened| Answer::Opened(self.open_out(&opened))),
            Operation::Opendir { flags } => fs
                .opendir(caller, node, flags)
                .map(|opened| Answer::Opened(self.open_out(&opened))),
            Operation::Create { name, flags, new } => {
                let (entry, opened) = fs.create(caller, node, name, flags, &new)?;
                Ok(Answer::Created(
                    entry_out(&entry, marks.of_entry(&entry, name)),
                    self.open_out(&opened),
                ))
            }
            Operation::Flush { handle, owner } => {
                fs.flush_and_unlock(caller, node, handle, owner).map(done)
            }
            Operation::Release { handle } => fs.release(node, handle).map(done),
            Operation::Releasedir { handle } => fs.releasedir(node, handle).map(done),
            Operation::Statfs => fs
                .statfs(node)
                .map(|statistics| Answer::Statistics(statfs_out(&statistics))),
            Operation::Access { mask } => fs.access(caller, node, mask).map(done),
            Operation::Readdir { range, plus } => self.readdir(request, range, plus, room),
            Operation::Lseek {
                handle,
                offset,
                whence,
            } => fs
                .lseek(node, handle, offset, whence)
                .map(|offset| Answer::Offset(LseekOut { offset })),
            Operation::Setxattr { name, .. }
            | Operation::Removexattr { name }
            | Operation::Getxattr { name, .. }
                if self.hides(name) =>
            {
                Err(Errno::OPNOTSUPP)
            }
            Operation::Setxattr { name, value, flags } => {
                fs.setxattr(caller, node, name, value, flags).map(done)
            }
            Operation::Removexattr { name } => fs.removexattr(caller, node, name).map(done),
            Operation::Getxattr { size: 0, .. } | Operation::Listxattr { size: 0 }
                if room < size_of::<GetxattrOut>() =>
            {
                Err(Errno::INVAL)
            }
            Operation::Getxattr { name, size: 0 } => {
                fs.getxattr_len(caller, node, name).and_then(xattr_len)
            }
            Operation::Getxattr { name, size } => {
                let limit = limited(size, room, XATTR_MAX);
                within(fs.getxattr(caller, node, name, limit)?, limit)
            }
            Operation::Listxattr { size: 0 } if self.hides_acls() => {
                xattr_len(self.xattr_names(caller, node, XATTR_MAX)?.len())
            }
            Operation::Listxattr { size: 0 } => fs.listxattr_len(caller, node).and_then(xattr_len),
            Operation::Listxattr { size } => {
                let limit = limited(size, room, XATTR_MAX);
                within(self.xattr_names(caller, node, limit)?, limit)
            }
            // The opcode table dispatches none of these to this method.
            Operation::Init(_)
            | Operation::Destroy
            | Operation::Interrupt { .. }
            | Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Read(_)
            | Operation::Write { .. }
            | Operation::Fsync { .. }
            | Operation::Fallocate { .. }
            | Operation::CopyFileRange(_)
            | Operation::Setupmapping(_)
            | Operation::Removemapping(_)
            | Operation::Syncfs
            | Operation::Getlk { .. }
            | Operation::Setlk(_)
            | Operation::Unserved => Err(Errno::NOSYS),
        }
    }

    /// Whether the guest can't use the extended attribute of this name.
    fn hides(&self, name: &CStr) -> bool {
        self.hides_acls() && ACLS.contains(&name)
    }

    fn hides_acls(&self) -> bool {
        self.options.hide_acls && !self.has_agreed(InitFlags::POSIX_ACL)
    }

    /// The names of a node's extended attributes, each with its NUL.
    fn xattr_names(&self, caller: &Caller, node: NodeId, limit: usize) -> Result<Vec<u8>, Errno> {
        if !self.hides_acls() {
            return self.fs.listxattr(caller, node, limit);
        }
        let names = self.fs.listxattr(caller, node, XATTR_MAX)?;
        let names = names.split_inclusive(|byte| *byte == 0);
        let shown = names.filter(|name| ACLS.iter().all(|acl| acl.to_bytes_with_nul() != *name));
        Ok(shown.flatten().copied().collect())
    }

    fn readdir(
        &self,
        request: &Request<'_>,
        range: Range,
        plus: bool,
        room: usize,
    ) -> Result<Answer, Errno> {
        let Range {
            handle,
            offset,
            size,
        } = range;
        let mut records = Records::new(limited(size, room, READDIR_MAX), plus, self.dax_marks());
        let node: NodeId = request.node;
        let result = self
            .fs
            .readdir(&request.caller, node, handle, offset, plus, &mut records);
        self.warn_about_submounts(records.has_submounts());
        match result {
            // The lookups for the entries before the error are counted already, so the entries are
            // returned. The error occurs again when the guest continues reading.
            Err(errno) if records.is_empty() => Err(errno),
            _ if records.is_too_small() => Err(Errno::INVAL),
            _ => Ok(Answer::Bytes(records.into_bytes())),
        }
    }
}

/// The size that a guest asks for, limited by the reply's `room` and by `max`.
fn limited(size: u32, room: usize, max: usize) -> usize {
    usize::try_from(size)
        .unwrap_or(usize::MAX)
        .min(room)
        .min(max)
}

fn within(bytes: Vec<u8>, limit: usize) -> Result<Answer, Errno> {
    if bytes.len() > limit {
        Err(Errno::RANGE)
    } else {
        Ok(Answer::Bytes(bytes))
    }
}

/// Names of the extended attributes that hold POSIX ACLs.
const ACLS: [&CStr; 2] = [c"system.posix_acl_access", c"system.posix_acl_default"];

fn xattr_len(len: usize) -> Result<Answer, Errno> {
    let size = u32::try_from(len).map_err(|_huge| Errno::TOOBIG)?;
    Ok(Answer::XattrLen(GetxattrOut { size, padding: 0 }))
}
