//! The path of a mount point.
//!
//! The invariant: it is absolute, and each of its components is a name that a guest can look up.

use std::ffi::{CStr, CString, OsStr};
use std::fmt;
use std::os::unix::ffi::OsStrExt;

/// The longest name of a directory entry, bytes.
const NAME_MAX: usize = 255;

/// Where a file system is mounted, seen from the root of the guest's mount: `/` or `/a/b`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MountPoint(Vec<CString>);

/// The error of a path that can't be a mount point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} can't be a mount point: it has to be an absolute path without `.` and `..`, with names \
     of at most {NAME_MAX} bytes"
)]
pub struct MountPointError(String);

impl MountPoint {
    /// Parses an absolute path. Repeated and trailing slashes mean nothing.
    ///
    /// # Errors
    ///
    /// The path isn't absolute, or a component can't be the name of a directory.
    pub fn parse(path: &OsStr) -> Result<Self, MountPointError> {
        let wrong = || MountPointError(path.display().to_string());
        let relative = path.as_bytes().strip_prefix(b"/").ok_or_else(wrong)?;
        let mut names = Vec::new();
        for name in relative.split(|byte| *byte == b'/') {
            match name {
                b"" => {}
                b"." | b".." => return Err(wrong()),
                name if name.len() > NAME_MAX => return Err(wrong()),
                name => names.push(CString::new(name).map_err(|_nul| wrong())?),
            }
        }
        Ok(Self(names))
    }

    /// The names from the root down; none for the root itself.
    pub fn names(&self) -> impl Iterator<Item = &CStr> {
        self.0.iter().map(CString::as_c_str)
    }

    /// Whether it is the root of the guest's mount.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for MountPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_root() {
            return f.write_str("/");
        }
        self.names()
            .try_for_each(|name| write!(f, "/{}", OsStr::from_bytes(name.to_bytes()).display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Result<MountPoint, MountPointError> {
        MountPoint::parse(OsStr::new(path))
    }

    #[test]
    fn slashes_that_mean_nothing_are_dropped() {
        for (path, shown) in [("/", "/"), ("//", "/"), ("/a", "/a"), ("//a//b/", "/a/b")] {
            assert_eq!(parse(path).unwrap().to_string(), shown, "{path}");
        }
        assert!(parse("/").unwrap().is_root());
        assert_eq!(parse("/a/").unwrap(), parse("/a").unwrap());
    }

    #[test]
    fn path_that_no_guest_can_walk_is_refused() {
        let long = format!("/{}", "x".repeat(256));
        for path in ["", "a", "a/b", "/..", "/a/../b", "/./a", "/a\0b", &long] {
            assert!(parse(path).is_err(), "{path:?}");
        }
        assert!(parse(&long[..256]).is_ok());
    }
}
