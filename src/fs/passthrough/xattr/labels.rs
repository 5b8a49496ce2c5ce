//! The security labels of new files, as far as the host sets them itself.
//!
//! If the host uses SELinux, and the label is SELinux's and keeps its name, the thread sets the
//! label of the next file it creates (`/proc/thread-self/attr/fscreate`), so the file never exists
//! without it. The invariant: a thread labels new files only as long as a [`LabelGuard`] exists.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::XattrMap;
use crate::fs::Result;

/// The extended attribute of SELinux labels.
pub(super) const SELINUX: &CStr = c"security.selinux";

/// Whether this host's kernel uses SELinux.
pub(super) fn host_has_selinux() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// The name that SELinux labels have on the host, if setting it needs `CAP_SYS_ADMIN` there.
#[must_use]
pub fn label_that_needs_privilege(map: Option<&XattrMap>) -> Option<String> {
    let name = match map {
        Some(map) => map.to_host(SELINUX).ok()?,
        None => Cow::Borrowed(SELINUX),
    };
    let privileged = [&b"security."[..], b"trusted."];
    let name = name.to_bytes();
    let is_privileged = privileged.iter().any(|prefix| name.starts_with(prefix));
    // SELinux itself decides about its own attribute.
    let decides = host_has_selinux() && name == SELINUX.to_bytes();
    (is_privileged && !decides).then(|| String::from_utf8_lossy(name).into_owned())
}

/// While it exists, new files of this thread get a label.
#[derive(Debug)]
#[must_use]
pub(crate) struct LabelGuard(OwnedFd);

impl LabelGuard {
    /// Labels the new files of this thread from now on.
    pub(super) fn begin(proc_fds: &OwnedFd, label: &[u8]) -> Result<Self> {
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let path = format!("../task/{thread}/attr/fscreate");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let attribute = rustix::fs::openat(proc_fds, path, flags, Mode::empty())?;
        rustix::io::write(&attribute, label)?;
        Ok(Self(attribute))
    }
}

impl Drop for LabelGuard {
    fn drop(&mut self) {
        // An empty line removes the label.
        if let Err(error) = rustix::io::pwrite(&self.0, b"\n", 0) {
            log::error!("can't stop labelling this thread's new files: {error}");
        }
    }
}
