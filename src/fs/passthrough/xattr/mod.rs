//! Extended attributes: which names the guest sees, and the system calls.
//!
//! There are no system calls for the extended attributes of an `O_PATH` descriptor, so they take a
//! path that leads to the inode. The invariant: a name reaches the host or the guest only as the
//! rules of the [`XattrMap`] allow.

mod labels;
mod map;

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::buffer::spare_capacity;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

pub(crate) use self::labels::LabelGuard;
pub use self::labels::label_that_needs_privilege;
pub use self::map::{XattrMap, XattrMapError};

use crate::fs::Result;

/// The size limit of a value and of a list of names (`XATTR_SIZE_MAX` and `XATTR_LIST_MAX`, uapi
/// `linux/limits.h`).
const LONGEST: usize = 65536;

/// The prefix of attributes that only privileged users may see.
const TRUSTED: &[u8] = b"trusted.";

/// The extended attributes of a share.
#[derive(Debug)]
pub(crate) struct Xattrs {
    enabled: bool,
    map: Option<XattrMap>,
    /// The host uses SELinux, so it handles SELinux labels itself.
    selinux: bool,
}

impl Xattrs {
    pub(crate) fn new(enabled: bool, map: Option<XattrMap>) -> Self {
        Self {
            enabled,
            map,
            selinux: labels::host_has_selinux(),
        }
    }

    /// Fails with `EOPNOTSUPP` if extended attributes are not served.
    pub(crate) fn check_enabled(&self) -> Result<()> {
        if self.enabled {
            Ok(())
        } else {
            Err(Errno::OPNOTSUPP)
        }
    }

    /// The name on the host for the guest's `name`.
    pub(crate) fn host_name<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>> {
        match &self.map {
            Some(map) => map.to_host(name),
            None => Ok(Cow::Borrowed(name)),
        }
    }

    pub(crate) fn set(
        &self,
        path: &CStr,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        rustix::fs::setxattr(path, &*self.host_name(name)?, value, flags)
    }

    /// The value, or `ERANGE` if it is longer than `limit` bytes.
    pub(crate) fn get(&self, path: &CStr, name: &CStr, limit: usize) -> Result<Vec<u8>> {
        let name = self.host_name(name)?;
        read(limit, |value| {
            rustix::fs::getxattr(path, &*name, spare_capacity(value))
        })
    }

    /// The length of the value.
    pub(crate) fn len(&self, path: &CStr, name: &CStr) -> Result<usize> {
        rustix::fs::getxattr_query(path, &*self.host_name(name)?)
    }

    pub(crate) fn remove(&self, path: &CStr, name: &CStr) -> Result<()> {
        rustix::fs::removexattr(path, &*self.host_name(name)?)
    }

    /// The names, each with its NUL, or `ERANGE` if they are longer than `limit` bytes. Names that
    /// only privileged users may see are included if `privileged` is set.
    pub(crate) fn list(&self, path: &CStr, privileged: bool, limit: usize) -> Result<Vec<u8>> {
        if privileged {
            return self.list_all(path, limit);
        }
        let all = self.list_all(path, LONGEST)?;
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

    fn list_all(&self, path: &CStr, limit: usize) -> Result<Vec<u8>> {
        let list = |limit| {
            read(limit, |names| {
                rustix::fs::listxattr(path, spare_capacity(names))
            })
        };
        let Some(map) = &self.map else {
            return list(limit);
        };
        let names = map.list_for_guest(&list(LONGEST)?);
        if names.len() > limit {
            return Err(Errno::RANGE);
        }
        Ok(names)
    }

    /// The length of the list.
    pub(crate) fn list_len(&self, path: &CStr, privileged: bool) -> Result<usize> {
        if !privileged || self.map.is_some() {
            return self
                .list(path, privileged, LONGEST)
                .map(|names| names.len());
        }
        rustix::fs::listxattr_query(path)
    }

    /// If the host itself labels new files, lets it use the guest's label `name` with this `value`
    /// until the guard is dropped.
    pub(crate) fn label_new_files(
        &self,
        proc_fds: &OwnedFd,
        name: &CStr,
        value: &[u8],
    ) -> Result<Option<LabelGuard>> {
        let by_host = *self.host_name(name)? == *labels::SELINUX && self.selinux;
        by_host
            .then(|| LabelGuard::begin(proc_fds, value))
            .transpose()
    }
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
