//! Which file a descriptor refers to, recorded while the descriptor could be trusted.
//!
//! A compromised serving process may have put any file at any number of a shared descriptor table.
//! The invariant: a recorded descriptor is handed out only if it still refers to the same file.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::fs::{AtFlags, StatxFlags};
use rustix::io::Errno;

use super::SandboxError;

/// Which file a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
    kind: u16,
    /// The mount through which it was opened.
    mount: u64,
}

impl Identity {
    /// The identity of the file that is open at `fd`.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub(crate) fn of(fd: impl AsFd) -> Result<Self, Errno> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?;
        let has_mount = stat.stx_mask & StatxFlags::MNT_ID.bits() != 0;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            kind: stat.stx_mode & 0o170_000,
            mount: if has_mount { stat.stx_mnt_id } else { 0 },
        })
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            device: (major, minor),
            inode,
            kind,
            mount,
        } = self;
        write!(f, "{major}:{minor}:{inode}:{kind}:{mount}")
    }
}

impl std::str::FromStr for Identity {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split(':');
        let mut part = || parts.next().unwrap_or("");
        Ok(Self {
            device: (part().parse()?, part().parse()?),
            inode: part().parse()?,
            kind: part().parse()?,
            mount: part().parse()?,
        })
    }
}

/// A descriptor and the identity that its file had when it was recorded.
#[derive(Debug)]
pub(crate) struct FdIdentity {
    /// The descriptor.
    pub fd: OwnedFd,
    identity: Identity,
}

impl FdIdentity {
    /// Records which file `fd` refers to now.
    ///
    /// # Errors
    ///
    /// Those of `statx(2)`.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self, Errno> {
        let identity = Identity::of(&fd)?;
        Ok(Self { fd, identity })
    }

    /// Takes over a descriptor whose identity an earlier program in this process has recorded.
    ///
    /// # Errors
    ///
    /// The descriptor isn't open.
    pub(crate) fn inherited(fd: RawFd, identity: Identity) -> std::io::Result<Self> {
        let fd = crate::sys::inherit::inherited_fd(fd)?;
        Ok(Self { fd, identity })
    }

    /// The recorded identity.
    #[must_use]
    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// Returns the descriptor if it still refers to the recorded file.
    ///
    /// # Errors
    ///
    /// The descriptor refers to another file.
    pub(crate) fn take(self) -> Result<OwnedFd, SandboxError> {
        if Identity::of(&self.fd) == Ok(self.identity) {
            return Ok(self.fd);
        }
        let number = self.fd.as_raw_fd();
        // This process doesn't own what is open there now.
        std::mem::forget(self.fd);
        Err(SandboxError::Replaced(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_file_is_refused() {
        let open = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        assert!(FdIdentity::new(open("/dev/null")).unwrap().take().is_ok());
        let mut recorded = FdIdentity::new(open("/dev/null")).unwrap();
        rustix::io::dup2(open("/dev/zero"), &mut recorded.fd).unwrap();
        assert!(matches!(recorded.take(), Err(SandboxError::Replaced(_))));
    }
}
