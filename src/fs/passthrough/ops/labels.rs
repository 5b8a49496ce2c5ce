//! Sets the security labels of new files (`--security-label`).
//!
//! If the host uses SELinux, and the label is SELinux's and keeps its name, the thread sets the
//! label of the next file it creates (`/proc/thread-self/attr/fscreate`), so the file never exists
//! without it. Otherwise the label is an extended attribute like any other, set after the creation.
//! The invariant: a file that could not be labelled as the guest asked is removed before the guest
//! gets a reply, and no existing file is labelled.

use std::borrow::Cow;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::fs::passthrough::inode_table::identity::{IDENTITY, Identity};
use crate::fs::passthrough::{Passthrough, XattrMap};
use crate::fs::{Entry, HandleKind, Label, NodeId, Opened, Result};

/// The extended attribute of SELinux labels.
const SELINUX: &CStr = c"security.selinux";

/// Whether this host's kernel uses SELinux.
pub(crate) fn host_has_selinux() -> bool {
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

/// The result of a creation.
pub(crate) trait Created {
    fn entry(&self) -> &Entry;
    fn opened(&self) -> Option<&Opened> {
        None
    }
}

impl Created for Entry {
    fn entry(&self) -> &Entry {
        self
    }
}

impl Created for (Entry, Opened) {
    fn entry(&self) -> &Entry {
        &self.0
    }

    fn opened(&self) -> Option<&Opened> {
        Some(&self.1)
    }
}

/// While it exists, new files of this thread get a label.
struct Labelling(OwnedFd);

impl Labelling {
    fn begin(proc_fds: &OwnedFd, label: &[u8]) -> Result<Self> {
        let thread = rustix::thread::gettid().as_raw_nonzero();
        let path = format!("../task/{thread}/attr/fscreate");
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let attribute = rustix::fs::openat(proc_fds, path, flags, Mode::empty())?;
        rustix::io::write(&attribute, label)?;
        Ok(Self(attribute))
    }
}

impl Drop for Labelling {
    fn drop(&mut self) {
        // An empty line removes the label.
        if let Err(error) = rustix::io::pwrite(&self.0, b"\n", 0) {
            log::error!("can't stop labelling this thread's new files: {error}");
        }
    }
}

impl Passthrough {
    /// Calls `make`, which creates a file, as `name` in `parent` if it has a name, and labels the
    /// file.
    pub(crate) fn labelled<M: Created>(
        &self,
        label: Option<Label<'_>>,
        link: Option<(NodeId, &CStr)>,
        make: impl FnOnce() -> Result<M>,
    ) -> Result<M> {
        let Some(Label { name, value }) = label else {
            return make();
        };
        let on_host = self.host_name(name)?;
        if self.selinux && *on_host == *SELINUX {
            let _labelling = Labelling::begin(&self.proc_fds, value)?;
            return make();
        }
        let created = make()?;
        let node = created.entry().node;
        let set = |path: &CStr| rustix::fs::setxattr(path, &*on_host, value, XattrFlags::empty());
        match self.with_path(node, set) {
            Ok(()) => Ok(created),
            Err(error) => {
                self.undo_create(&created, link);
                Err(error)
            }
        }
    }

    /// Undoes a creation.
    fn undo_create(&self, created: &impl Created, link: Option<(NodeId, &CStr)>) {
        let entry = created.entry();
        if let Some((parent, name)) = link
            && let Err(error) = self.remove_created(entry, parent, name)
        {
            log::warn!("can't remove a new file that could not be labelled: {error}");
        }
        if let Some(opened) = created.opened()
            && self.explicit(Some(opened.handle)).is_some()
        {
            let _unknown = self
                .handles
                .release(entry.node, opened.handle, HandleKind::File);
        }
        self.forget_lookups(entry.node, 1);
        drop(self.handleless.forget(entry.node));
    }

    /// Removes `name`, unless it belongs to another file now.
    fn remove_created(&self, entry: &Entry, parent: NodeId, name: &CStr) -> Result<()> {
        let created = self.inode(entry.node)?;
        let directory = self.inode(parent)?;
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let there = rustix::fs::statx(self.fd(&directory)?, name, flags, IDENTITY)?;
        if Identity::of(&there).key != created.key() {
            return Err(Errno::STALE);
        }
        let flags = match created.kind() {
            FileType::Directory => AtFlags::REMOVEDIR,
            _ => AtFlags::empty(),
        };
        self.remove_name(&self.fd(&directory)?, name, flags)
    }
}
