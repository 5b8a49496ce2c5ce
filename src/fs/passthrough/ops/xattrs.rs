//! Extended attributes: GETXATTR, SETXATTR, LISTXATTR, REMOVEXATTR.
//!
//! `/proc/self/fd/N` leads to the exact inode, even if that is a symbolic link, a device or a file
//! without a name. Its path is `"N"`, as `/proc/self/fd` is the working directory of a prepared
//! thread. The invariant: no path other than such a number is used, and only on a prepared thread.

use std::ffi::CStr;

use rustix::fs::{AtFlags, Mode, XattrFlags};

use super::Operations;
use super::attributes::PERMISSIONS;
use crate::fs::{Caller, NodeId, Result};

/// The ACL that controls access to the file itself.
const ACCESS_ACL: &CStr = c"system.posix_acl_access";

impl Operations {
    /// Calls `set`. If that succeeds, clears the set-group-ID bit of the file at `path`, as
    /// `setfacl(1)` does for a user who isn't in the file's group.
    fn without_set_group_id(&self, path: &CStr, set: impl FnOnce() -> Result<()>) -> Result<()> {
        set()?;
        let stat = rustix::fs::statat(self.fds.proc_fds(), path, AtFlags::empty())?;
        let mode = stat.st_mode & PERMISSIONS;
        if mode & 0o2000 == 0 {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(mode & !0o2000);
        rustix::fs::chmodat(self.fds.proc_fds(), path, mode, AtFlags::empty())
    }

    /// Calls `act` with a path that leads to the inode.
    pub(crate) fn with_path<T>(
        &self,
        node: NodeId,
        act: impl FnOnce(&CStr) -> Result<T>,
    ) -> Result<T> {
        self.with_path_for(None, node, act)
    }

    /// As [`with_path`](Self::with_path), for an `act` that changes the inode on behalf of a
    /// caller.
    fn with_path_for<T>(
        &self,
        changing: Option<&Caller>,
        node: NodeId,
        act: impl FnOnce(&CStr) -> Result<T>,
    ) -> Result<T> {
        self.xattrs.check_enabled()?;
        self.prepare()?;
        let inode = self.fds.inode(node)?;
        let fd = self.fds.fd(&inode)?;
        if let Some(caller) = changing {
            self.confirm_unless_open(caller, &fd)?;
        }
        act(fd.proc_name().as_c_str())
    }

    pub(crate) fn set_xattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.with_path_for(Some(caller), node, |path| {
            let set = || self.xattrs.set(path, name, value, flags);
            if caller.kill_set_id && name == ACCESS_ACL {
                // The flag says that the caller isn't in the file's group.
                return self.without_set_group_id(path, set);
            }
            set()
        })
    }

    pub(crate) fn xattr(&self, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        self.with_path(node, |path| self.xattrs.get(path, name, limit))
    }

    pub(crate) fn xattr_len(&self, node: NodeId, name: &CStr) -> Result<usize> {
        self.with_path(node, |path| self.xattrs.len(path, name))
    }

    /// LISTXATTR. `trusted.` attributes are not listed to ordinary users, as on a local file
    /// system. The guest's kernel doesn't filter them, and it reports at most the caller's user id.
    /// If the id is unknown, they are listed, so that copies made by a privileged user don't lose
    /// them. The guest's kernel decides in any case whether they can be read.
    pub(crate) fn xattr_names(
        &self,
        caller: &Caller,
        node: NodeId,
        limit: usize,
    ) -> Result<Vec<u8>> {
        let privileged = may_be_privileged(caller);
        self.with_path(node, |path| self.xattrs.list(path, privileged, limit))
    }

    pub(crate) fn xattr_names_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        let privileged = may_be_privileged(caller);
        self.with_path(node, |path| self.xattrs.list_len(path, privileged))
    }

    pub(crate) fn remove_xattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        self.with_path_for(Some(caller), node, |path| self.xattrs.remove(path, name))
    }
}

fn may_be_privileged(caller: &Caller) -> bool {
    caller.uid.is_none_or(|uid| uid == 0)
}
