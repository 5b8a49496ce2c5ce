//! The destination's side: finds each inode and opens each file again.
//!
//! The identity of the shared directory shows whether source and destination share one file system.
//! Only then does a missing name mean that somebody has removed it, and only then can inode numbers
//! be compared. The invariant: a node id leads to the inode that the source described, or to none.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, Statx};
use rustix::io::Errno;

use super::content::recreate_nameless;
use super::locks::record_of;
use super::save::REOPEN_FLAGS;
use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::descriptors::regular_file;
use crate::fs::passthrough::inode_table::component;
use crate::fs::passthrough::inode_table::{
    IDENTITY, Identity, InodeFd, Key, Mount, ParentLink, ReopenMethod, digest_at, stat_fd,
};
use crate::fs::passthrough::options::{MigrationMode, MigrationOptions, OnMigrationError};
use crate::fs::{MoveError, NodeId};
use crate::io::File;
use crate::migration::stream::{Find, Inode, Open, Snapshot};
use crate::state::HandleFields;
use crate::sys::file_handle::FileHandle;

/// Node ids and handles start at 1, and no server gets this far.
const LAST_NUMBER: u64 = 1 << 62;

/// What is known about the migration as a whole.
struct LoadContext {
    /// Both sides share one file system.
    shared: bool,
    /// Nodes that are open or locked.
    in_use: HashSet<u64>,
}

/// An inode that was found.
struct Found {
    /// `None` if the reopen method is sufficient until the inode is needed.
    fd: Option<OwnedFd>,
    stat: Statx,
    method: ReopenMethod,
}

impl Found {
    fn open(fd: OwnedFd, method: ReopenMethod) -> Result<Self, Errno> {
        let stat = stat_fd(&fd, IDENTITY)?;
        let fd = Some(fd);
        Ok(Self { fd, stat, method })
    }

    fn identity(&self) -> Identity {
        Identity::of(&self.stat)
    }

    /// Whether it has the number and birth time of the description.
    fn is(&self, inode: &Inode) -> bool {
        let identity = self.identity();
        (identity.key.number, identity.birth) == (inode.number, inode.birth)
    }
}

/// Finds what another server has described.
pub(super) struct Loader<'a> {
    pub(super) fds: &'a Descriptors,
    pub(super) options: &'a MigrationOptions,
}

impl Loader<'_> {
    pub(super) fn load(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        let opens = snapshot.opens.iter().map(|open| open.node);
        let locked = snapshot.locks.iter().map(|locks| locks.node);
        let context = LoadContext {
            shared: self.is_shared_with(snapshot),
            in_use: opens.chain(locked).collect(),
        };
        self.check_limits(snapshot)?;
        if snapshot.generation != 0 {
            self.fds
                .inodes()
                .table()
                .set_generation(snapshot.generation);
        }
        self.fds.inodes().skip_to_node(snapshot.next_node);
        self.fds
            .files()
            .handles()
            .skip_to_handle(snapshot.next_handle);
        let mut lost = 0_usize;
        for inode in &snapshot.inodes {
            match self.find_inode(inode, &context) {
                Ok(Some(found)) => self.import(inode, found)?,
                Ok(None) => self.import_lost(inode),
                Err(source) => {
                    let error = MoveError::Inode {
                        node: inode.node,
                        how: inode.find.to_string(),
                        source,
                    };
                    self.count_loss(error, &mut lost)?;
                    self.import_lost(inode);
                }
            }
        }
        for open in &snapshot.opens {
            if let Err(source) = self.open_as(open) {
                let error = MoveError::Open {
                    node: open.node,
                    flags: open.flags,
                    source,
                };
                self.count_loss(error, &mut lost)?;
            }
        }
        self.import_locks(snapshot, &mut lost)?;
        log::info!(
            "migration: {} inodes, {} open files, {} lock owners; {lost} of them lost; {}",
            snapshot.inodes.len(),
            snapshot.opens.len(),
            snapshot.locks.len(),
            if context.shared {
                "the same file system"
            } else {
                "another file system"
            }
        );
        Ok(())
    }

    /// Checks that the snapshot is within this server's limits.
    fn check_limits(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        let limits = [
            ("inodes", snapshot.inodes.len(), self.fds.limits().inodes),
            (
                "open files and lock owners",
                snapshot.opens.len().saturating_add(snapshot.locks.len()),
                self.fds.limits().handles,
            ),
        ];
        for (what, have, max) in limits {
            if have > max {
                return Err(MoveError::TooMany {
                    what,
                    have,
                    most: max,
                });
            }
        }
        if snapshot.next_node.max(snapshot.next_handle) > LAST_NUMBER {
            return Err(MoveError::Numbers);
        }
        Ok(())
    }

    /// Fails, or counts and logs the loss, as the option `on_error` says.
    pub(super) fn count_loss(&self, error: MoveError, lost: &mut usize) -> Result<(), MoveError> {
        if self.options.on_error == OnMigrationError::Abort {
            return Err(error);
        }
        *lost += 1;
        if *lost <= 16 || lost.is_power_of_two() {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let source = source.unwrap_or_default();
            log::warn!("migration: {error}: {source}; the guest will get errors");
        }
        Ok(())
    }

    /// Whether the source shares this very directory.
    fn is_shared_with(&self, snapshot: &Snapshot) -> bool {
        let own = self.fds.inodes().any(NodeId::ROOT).and_then(|root| {
            let fd = self.fds.fd(&root).ok()?;
            let identity = Identity::of(&stat_fd(&fd, IDENTITY).ok()?);
            let handle = FileHandle::of(&fd)
                .map_or_else(|_none| Vec::new(), |handle| handle.bytes().to_vec());
            Some((handle, identity.key.number, identity.birth))
        });
        let root = &snapshot.root;
        let knows = !root.handle.is_empty() || root.birth.is_some();
        knows && own == Some((root.handle.clone(), root.number, root.birth))
    }

    /// Finds an inode. Returns `None` if it no longer exists and the guest doesn't need it.
    fn find_inode(&self, inode: &Inode, context: &LoadContext) -> Result<Option<Found>, Errno> {
        let found = match &inode.find {
            Find::Gone => return Ok(None),
            Find::Lost => Err(Errno::STALE),
            // In another file system the handle would open whatever inode has that number, and in
            // this one it could open a file outside the shared directory.
            Find::Handle if context.shared => self.by_handle(&inode.handle),
            Find::Handle => Err(Errno::STALE),
            Find::Path { from, path, verify } => {
                self.by_path(inode, (NodeId(*from), path), *verify, context)
            }
            // The handle can be opened while the source has the file open.
            Find::Nameless(nameless) => match self.by_handle(&inode.handle) {
                Ok(found) if context.shared && found.is(inode) => Ok(found),
                _ => {
                    let kind = FileType::from_raw_mode(inode.kind);
                    let made = recreate_nameless(self.fds, kind, nameless);
                    made.and_then(|fd| Found::open(fd, ReopenMethod::None))
                }
            },
        };
        match found {
            Ok(found) if found.identity().kind.as_raw_mode() == inode.kind => Ok(Some(found)),
            Ok(_) => missing(Errno::STALE, inode, context),
            Err(error) => missing(error, inode, context),
        }
    }

    fn by_path(
        &self,
        inode: &Inode,
        (from, path): (NodeId, &[u8]),
        verify: bool,
        context: &LoadContext,
    ) -> Result<Found, Errno> {
        let parent = self.fds.inodes().any(from).ok_or(Errno::STALE)?;
        let parent = self.fds.fd(&parent)?;
        let link = (!path.contains(&b'/'))
            .then(|| CString::new(path).map_err(|_nul| Errno::INVAL))
            .transpose()?
            .map(|name| ParentLink {
                parent: from,
                name: name.into_boxed_c_str(),
                digest: 0,
            });
        let in_use = context.in_use.contains(&inode.node);
        let found = match link {
            // This is the most frequent case: an inode with a name that the guest isn't using.
            Some(link) if !verify && !in_use && self.fds.reopen_policy().keeps_opened_fds() => {
                self.by_name(&parent, link)?
            }
            link => {
                // Without a link, the name is recorded when a lookup sees it.
                let method = link.map_or(ReopenMethod::None, ReopenMethod::Name);
                Found::open(self.fds.follow(parent.as_fd(), path)?, method)?
            }
        };
        if verify
            && let Some(fd) = &found.fd
            && FileHandle::of(fd)?.bytes() != inode.handle
        {
            return Err(Errno::STALE);
        }
        if context.shared && !found.is(inode) {
            return Err(Errno::STALE);
        }
        Ok(found)
    }

    /// An inode that can be opened by its name later, provided it can be identified then.
    fn by_name(&self, parent: &InodeFd<'_>, mut link: ParentLink) -> Result<Found, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let name = component(&link.name)?;
        let stat = rustix::fs::statx(parent, name, flags, IDENTITY)?;
        let identity = Identity::of(&stat);
        let digest = if identity.is_settled() {
            Some(0)
        } else {
            let digest = identity.birth.map(|_| digest_at(parent, name));
            digest.and_then(Result::ok)
        };
        let Some(digest) = digest else {
            let fd = self.fds.follow(parent.as_fd(), name.to_bytes())?;
            return Found::open(fd, ReopenMethod::Name(link));
        };
        link.digest = digest;
        let method = ReopenMethod::Name(link);
        Ok(Found {
            fd: None,
            stat,
            method,
        })
    }

    fn by_handle(&self, bytes: &[u8]) -> Result<Found, Errno> {
        // A handle can name any file of the file system, so it is accepted only if the operator
        // allows it.
        if self.options.mode != MigrationMode::FileHandles {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = FileHandle::from_bytes(bytes).ok_or(Errno::STALE)?;
        let mount: Arc<Mount> = self
            .fds
            .reopen_policy()
            .shared_mount()
            .ok_or(Errno::OPNOTSUPP)?;
        let fd = self
            .fds
            .with_room(|| mount.open(&handle, OFlags::PATH | OFlags::NOFOLLOW))?;
        Found::open(fd, ReopenMethod::Handle { mount, handle })
    }

    /// Adds a found inode under the guest's node id.
    fn import(&self, inode: &Inode, found: Found) -> Result<(), MoveError> {
        let node = NodeId(inode.node);
        let fail = |source| MoveError::Inode {
            node: inode.node,
            how: inode.find.to_string(),
            source,
        };
        let identity = found.identity();
        let by_policy = match &found.fd {
            Some(fd) => {
                let method = self.fds.reopen_policy().method_for_new(
                    fd.as_fd(),
                    &identity,
                    self.fds.proc_fds(),
                );
                method.map_err(fail)?
            }
            None => None,
        };
        let (fd, method) = match (by_policy, found.method) {
            // Without a name only the descriptor keeps it alive.
            _ if found.stat.stx_nlink == 0 => (found.fd, ReopenMethod::None),
            (Some(method), _) => (None, method),
            (None, method) => (found.fd, method),
        };
        let imported = self
            .fds
            .inodes()
            .import(node, inode.lookups, &identity, fd, method);
        if !imported {
            return Err(fail(Errno::EXIST));
        }
        if found.stat.stx_nlink == 0
            && let Some(inode) = self.fds.inodes().any(node)
        {
            self.fds.inodes().set_nameless(&inode, true);
        }
        self.fds.make_room();
        Ok(())
    }

    /// Adds a placeholder, for which the guest gets `ESTALE`.
    fn import_lost(&self, inode: &Inode) {
        let identity = Identity {
            // No inode has this key.
            key: Key {
                number: inode.node,
                device: u64::MAX,
                mount: u32::MAX.into(),
            },
            birth: None,
            kind: FileType::from_raw_mode(inode.kind),
        };
        let node = NodeId(inode.node);
        self.fds
            .inodes()
            .import(node, inode.lookups, &identity, None, ReopenMethod::None);
    }

    /// Opens a file or directory that the guest has open.
    fn open_as(&self, open: &Open) -> Result<(), Errno> {
        let node = NodeId(open.node);
        let inode = self.fds.inodes().any(node).ok_or(Errno::STALE)?;
        let file = if open.directory {
            File::from_fd(self.fds.open_directory(&inode)?)
        } else {
            if inode.kind() != FileType::RegularFile {
                return Err(Errno::STALE);
            }
            let flags = OFlags::from_bits_retain(open.flags & REOPEN_FLAGS.cast_unsigned());
            let flags = flags | OFlags::NOCTTY;
            let fd = match flags & OFlags::RWMODE {
                OFlags::RDONLY => self.fds.open_for_reading(&inode, flags)?,
                _ => {
                    self.fds.writable()?;
                    self.fds.open_appendable(&inode, flags, true)?
                }
            };
            regular_file(fd, flags)
        };
        let fields = HandleFields {
            handle: open.handle,
            node: open.node,
            directory: open.directory,
            flags: open.flags & REOPEN_FLAGS.cast_unsigned(),
            fd: file.as_fd().as_raw_fd(),
        };
        self.fds
            .files()
            .handles()
            .import(&fields, record_of(open.flock), file)
    }
}

/// Decides what it means that an inode was not found.
fn missing(error: Errno, inode: &Inode, context: &LoadContext) -> Result<Option<Found>, Errno> {
    let ended = matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::STALE);
    let missed = context.in_use.contains(&inode.node) || matches!(inode.find, Find::Lost);
    if ended && context.shared && !missed {
        // Somebody on the host has removed or replaced it.
        return Ok(None);
    }
    Err(error)
}
