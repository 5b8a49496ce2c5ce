//! Extended attributes.
//!
//! There are no system calls for the extended attributes of an `O_PATH` descriptor.
//! `/proc/self/fd/N` leads to the exact inode, even if that is a symbolic link, a device or a file
//! without a name. Its path is `"N"`, as `/proc/self/fd` is the working directory of a prepared
//! thread. The invariant: no path other than such a number is used, and only on a prepared thread.

use std::borrow::Cow;
use std::ffi::CStr;

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, Mode, XattrFlags};
use rustix::io::Errno;

use super::Passthrough;
use super::acl;
use super::attributes::PERMISSIONS;
use crate::fs::{Caller, NodeId, Result};

/// The size limit of a value and of a list of names (`XATTR_SIZE_MAX` and `XATTR_LIST_MAX`, uapi
/// `linux/limits.h`).
const LONGEST: usize = 65536;

/// The prefix of attributes that only privileged users may see.
const TRUSTED: &[u8] = b"trusted.";

impl Passthrough {
    /// Calls `set`. If that succeeds, clears the set-group-ID bit of the file at `path`, as
    /// `setfacl(1)` does for a user who isn't in the file's group.
    fn without_set_group_id(&self, path: &CStr, set: impl FnOnce() -> Result<()>) -> Result<()> {
        set()?;
        let stat = rustix::fs::statat(&self.proc_fds, path, AtFlags::empty())?;
        let mode = stat.st_mode & PERMISSIONS;
        if mode & 0o2000 == 0 {
            return Ok(());
        }
        let mode = Mode::from_raw_mode(mode & !0o2000);
        rustix::fs::chmodat(&self.proc_fds, path, mode, AtFlags::empty())
    }

    /// Calls `act` with a path that leads to the inode.
    pub(super) fn with_path<T>(
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
        if !self.options.xattr {
            return Err(Errno::OPNOTSUPP);
        }
        self.prepare()?;
        let inode = self.inode(node)?;
        let fd = self.fd(&inode)?;
        if let Some(caller) = changing {
            self.confirm_unless_open(caller, &fd)?;
        }
        act(fd.proc_name().as_c_str())
    }

    /// The name on the host for the guest's `name`.
    pub(super) fn host_name<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>> {
        match &self.options.xattr_map {
            Some(map) => map.to_host(name),
            None => Ok(Cow::Borrowed(name)),
        }
    }

    fn id_maps(&self) -> acl::Maps<'_> {
        acl::Maps {
            users: &self.options.users,
            groups: &self.options.groups,
        }
    }

    pub(super) fn set_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        self.with_path_for(Some(caller), node, |path| {
            let on_host = self.host_name(name)?;
            let value = self.id_maps().to_host(name, value)?;
            let set = || rustix::fs::setxattr(path, &*on_host, &value, flags);
            if caller.kill_set_id && name == acl::ACCESS {
                // The flag says that the caller isn't in the file's group.
                return self.without_set_group_id(path, set);
            }
            set()
        })
    }

    pub(super) fn attribute(&self, node: NodeId, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        self.with_path(node, |path| {
            let on_host = self.host_name(name)?;
            let mut value = read(limit, |value| {
                rustix::fs::getxattr(path, &*on_host, spare_capacity(value))
            })?;
            self.id_maps().to_guest(name, &mut value)?;
            Ok(value)
        })
    }

    pub(super) fn attribute_len(&self, node: NodeId, name: &CStr) -> Result<usize> {
        self.with_path(node, |path| {
            rustix::fs::getxattr_query(path, &*self.host_name(name)?)
        })
    }

    /// LISTXATTR. `trusted.` attributes are not listed to ordinary users, as on a local file
    /// system. The guest's kernel doesn't filter them, and it reports at most the caller's user id.
    /// If the id is unknown, they are listed, so that copies made by a privileged user don't lose
    /// them. The guest's kernel decides in any case whether they can be read.
    pub(super) fn attribute_names(
        &self,
        caller: &Caller,
        node: NodeId,
        limit: usize,
    ) -> Result<Vec<u8>> {
        if is_listed_all(caller) {
            return self.all_attribute_names(node, limit);
        }
        let all = self.all_attribute_names(node, LONGEST)?;
        let names = all.split_inclusive(|byte| *byte == 0);
        let names: Vec<u8> = names
            .filter(|name| !name.starts_with(TRUSTED))
            .flatten()
            .copied()
            .collect();
        if names.len() > limit {
            return Err(Errno::RANGE);
        }
        Ok(names)
    }

    fn all_attribute_names(&self, node: NodeId, limit: usize) -> Result<Vec<u8>> {
        let list = |path: &CStr, limit| {
            read(limit, |names| {
                rustix::fs::listxattr(path, spare_capacity(names))
            })
        };
        self.with_path(node, |path| match &self.options.xattr_map {
            None => list(path, limit),
            Some(map) => {
                let names = map.list_for_guest(&list(path, LONGEST)?);
                if names.len() > limit {
                    return Err(Errno::RANGE);
                }
                Ok(names)
            }
        })
    }

    pub(super) fn attribute_names_len(&self, caller: &Caller, node: NodeId) -> Result<usize> {
        if !is_listed_all(caller) || self.options.xattr_map.is_some() {
            let names = self.attribute_names(caller, node, LONGEST);
            return names.map(|names| names.len());
        }
        self.with_path(node, |path| rustix::fs::listxattr_query(path))
    }

    pub(super) fn remove_attribute(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
    ) -> Result<()> {
        self.with_path_for(Some(caller), node, |path| {
            rustix::fs::removexattr(path, &*self.host_name(name)?)
        })
    }
}

fn is_listed_all(caller: &Caller) -> bool {
    caller.uid.is_none_or(|uid| uid == 0)
}

/// Reads at most `limit` bytes. For the kernel a limit of 0 asks for the length; here it is a limit
/// like any other.
fn read(limit: usize, fill: impl FnOnce(&mut Vec<u8>) -> Result<usize>) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(limit.clamp(1, LONGEST));
    fill(&mut bytes)?;
    if bytes.len() > limit {
        return Err(Errno::RANGE);
    }
    Ok(bytes)
}
