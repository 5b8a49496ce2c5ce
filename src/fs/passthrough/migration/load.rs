//! At the destination: each inode is found, each file opened again.
//!
//! Whether source and destination share one file system is told by the shared directory itself: only
//! then does a name that is missing mean that somebody has taken it away, and do numbers of inodes
//! mean something. The invariant: a node id leads to the inode that it was described as, or to none.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, Statx};
use rustix::io::Errno;

use super::super::Passthrough;
use super::super::inode_ref::{
    IDENTITY, Identity, InodeFd, Key, Mount, ParentLink, ReopenMethod, print_at, stat_fd,
};
use super::super::lookup::component;
use super::super::opening::regular_file;
use super::locks::record_of;
use super::save::KEPT;
use super::{MigrationMode, OnMigrationError};
use crate::fs::{MoveError, NodeId};
use crate::io::File;
use crate::state::HandleFields;
use crate::state::stream::{Find, Inode, Open, Snapshot};
use crate::sys::file_handle::FileHandle;

/// Node ids and handles begin at 1; no server ever comes so far.
const LAST_NUMBER: u64 = 1 << 62;

/// What is known of the migration as a whole.
struct Circumstances {
    /// Both sides share one file system.
    shared: bool,
    /// Nodes that are open, or locked.
    in_use: HashSet<u64>,
}

/// An inode that was found.
struct Found {
    /// None where the way is enough until it is needed.
    fd: Option<OwnedFd>,
    stat: Statx,
    way: ReopenMethod,
}

impl Found {
    fn open(fd: OwnedFd, way: ReopenMethod) -> Result<Self, Errno> {
        let stat = stat_fd(&fd, IDENTITY)?;
        let fd = Some(fd);
        Ok(Self { fd, stat, way })
    }

    fn identity(&self) -> Identity {
        Identity::of(&self.stat)
    }

    /// Whether it has number and birth of what was described.
    fn is(&self, inode: &Inode) -> bool {
        let identity = self.identity();
        (identity.key.number, identity.birth) == (inode.number, inode.birth)
    }
}

impl Passthrough {
    pub(in super::super) fn load_snapshot(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        let opens = snapshot.opens.iter().map(|open| open.node);
        let locked = snapshot.locks.iter().map(|locks| locks.node);
        let circumstances = Circumstances {
            shared: self.is_shared_with(snapshot),
            in_use: opens.chain(locked).collect(),
        };
        self.check_bounds(snapshot)?;
        if snapshot.generation != 0 {
            self.table().set_generation(snapshot.generation);
        }
        self.inodes.skip_to_node(snapshot.next_node);
        self.handles.skip_to_handle(snapshot.next_handle);
        let mut lost = 0_usize;
        for inode in &snapshot.inodes {
            match self.find_again_as(inode, &circumstances) {
                Ok(Some(found)) => self.bring(inode, found)?,
                Ok(None) => self.bring_lost(inode),
                Err(source) => {
                    let error = MoveError::Inode {
                        node: inode.node,
                        how: inode.find.to_string(),
                        source,
                    };
                    self.tolerate(error, &mut lost)?;
                    self.bring_lost(inode);
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
                self.tolerate(error, &mut lost)?;
            }
        }
        self.bring_locks(snapshot, &mut lost)?;
        log::info!(
            "migration: {} inodes, {} open files, {} lock owners; {lost} of them lost; {}",
            snapshot.inodes.len(),
            snapshot.opens.len(),
            snapshot.locks.len(),
            if circumstances.shared {
                "the same file system"
            } else {
                "another file system"
            }
        );
        Ok(())
    }

    /// Whether there may be so much here.
    fn check_bounds(&self, snapshot: &Snapshot) -> Result<(), MoveError> {
        let bounds = [
            ("inodes", snapshot.inodes.len(), self.options.max_inodes),
            (
                "open files and lock owners",
                snapshot.opens.len().saturating_add(snapshot.locks.len()),
                self.bounds.handles,
            ),
        ];
        for (what, have, most) in bounds {
            if have > most {
                return Err(MoveError::TooMany { what, have, most });
            }
        }
        if snapshot.next_node.max(snapshot.next_handle) > LAST_NUMBER {
            return Err(MoveError::Numbers);
        }
        Ok(())
    }

    /// What becomes of a loss.
    pub(super) fn tolerate(&self, error: MoveError, lost: &mut usize) -> Result<(), MoveError> {
        if self.options.migration.on_error == OnMigrationError::Abort {
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

    /// Whether the source's shared directory is this one.
    fn is_shared_with(&self, snapshot: &Snapshot) -> bool {
        let own = self.inodes.any(NodeId::ROOT).and_then(|root| {
            let fd = self.fd(&root).ok()?;
            let identity = Identity::of(&stat_fd(&fd, IDENTITY).ok()?);
            let handle = FileHandle::of(&fd)
                .map_or_else(|_none| Vec::new(), |handle| handle.bytes().to_vec());
            Some((handle, identity.key.number, identity.birth))
        });
        let root = &snapshot.root;
        let knows = !root.handle.is_empty() || root.birth.is_some();
        knows && own == Some((root.handle.clone(), root.number, root.birth))
    }

    /// Finds an inode; `None` if it has ended, so that it is missed by nobody.
    fn find_again_as(
        &self,
        inode: &Inode,
        circumstances: &Circumstances,
    ) -> Result<Option<Found>, Errno> {
        let found = match &inode.find {
            Find::Gone => return Ok(None),
            Find::Lost => Err(Errno::STALE),
            // In another directory's file system it would lead to whatever has that number there; in
            // this one's, perhaps out of the directory that is shared.
            Find::Handle if circumstances.shared => self.by_bytes(&inode.handle),
            Find::Handle => Err(Errno::STALE),
            Find::Path { from, path, verify } => {
                self.by_path(inode, (NodeId(*from), path), *verify, circumstances)
            }
            // While the source has it open, its handle leads to it.
            Find::Nameless(nameless) => match self.by_bytes(&inode.handle) {
                Ok(found) if circumstances.shared && found.is(inode) => Ok(found),
                _ => {
                    let kind = FileType::from_raw_mode(inode.kind);
                    let made = self.make_again(kind, nameless);
                    made.and_then(|fd| Found::open(fd, ReopenMethod::None))
                }
            },
        };
        match found {
            Ok(found) if found.identity().kind.as_raw_mode() == inode.kind => Ok(Some(found)),
            Ok(_) => missing(Errno::STALE, inode, circumstances),
            Err(error) => missing(error, inode, circumstances),
        }
    }

    fn by_path(
        &self,
        inode: &Inode,
        (from, path): (NodeId, &[u8]),
        verify: bool,
        circumstances: &Circumstances,
    ) -> Result<Found, Errno> {
        let parent = self.inodes.any(from).ok_or(Errno::STALE)?;
        let parent = self.fd(&parent)?;
        let place = (!path.contains(&b'/'))
            .then(|| CString::new(path).map_err(|_nul| Errno::INVAL))
            .transpose()?
            .map(|name| ParentLink {
                parent: from,
                name: name.into_boxed_c_str(),
                print: 0,
            });
        let in_use = circumstances.in_use.contains(&inode.node);
        let found = match place {
            // The most there are: a name each, and nothing that the guest does with them now.
            Some(place) if !verify && !in_use && self.holder.keeps_opened() => {
                self.by_name(&parent, place)?
            }
            place => {
                // Without a place it will be learned when the name is seen.
                let way = place.map_or(ReopenMethod::None, ReopenMethod::Name);
                Found::open(self.follow(parent.as_fd(), path)?, way)?
            }
        };
        if verify
            && let Some(fd) = &found.fd
            && FileHandle::of(fd)?.bytes() != inode.handle
        {
            return Err(Errno::STALE);
        }
        if circumstances.shared && !found.is(inode) {
            return Err(Errno::STALE);
        }
        Ok(found)
    }

    /// What has a name that it will be found by when it is used, if that can be told then.
    fn by_name(&self, parent: &InodeFd<'_>, mut place: ParentLink) -> Result<Found, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        let name = component(&place.name)?;
        let stat = rustix::fs::statx(parent, name, flags, IDENTITY)?;
        let identity = Identity::of(&stat);
        let print = if identity.is_settled() {
            Some(0)
        } else {
            let print = identity.birth.map(|_| print_at(parent, name));
            print.and_then(Result::ok)
        };
        let Some(print) = print else {
            let fd = self.follow(parent.as_fd(), name.to_bytes())?;
            return Found::open(fd, ReopenMethod::Name(place));
        };
        place.print = print;
        let way = ReopenMethod::Name(place);
        Ok(Found {
            fd: None,
            stat,
            way,
        })
    }

    fn by_bytes(&self, bytes: &[u8]) -> Result<Found, Errno> {
        // Who can name a handle can name any file of the file system: only where the operator
        // wants that.
        if self.options.migration.mode != MigrationMode::FileHandles {
            return Err(Errno::OPNOTSUPP);
        }
        let handle = FileHandle::from_bytes(bytes).ok_or(Errno::STALE)?;
        let mount: Arc<Mount> = self.holder.shared_mount().ok_or(Errno::OPNOTSUPP)?;
        let fd = self.with_room(|| mount.open(&handle, OFlags::PATH | OFlags::NOFOLLOW))?;
        Found::open(fd, ReopenMethod::Handle { mount, handle })
    }

    /// Gives the guest's name to what was found.
    fn bring(&self, inode: &Inode, found: Found) -> Result<(), MoveError> {
        let node = NodeId(inode.node);
        let fail = |source| MoveError::Inode {
            node: inode.node,
            how: inode.find.to_string(),
            source,
        };
        let identity = found.identity();
        let held = match &found.fd {
            Some(fd) => {
                let way = self
                    .holder
                    .way_to_new(fd.as_fd(), &identity, &self.proc_fds);
                way.map_err(fail)?
            }
            None => None,
        };
        let (fd, way) = match (held, found.way) {
            // Without a name it may end any time, but for its descriptor.
            _ if found.stat.stx_nlink == 0 => (found.fd, ReopenMethod::None),
            (Some(way), _) => (None, way),
            (None, way) => (found.fd, way),
        };
        let brought = self.inodes.bring(node, inode.lookups, &identity, fd, way);
        if !brought {
            return Err(fail(Errno::EXIST));
        }
        if found.stat.stx_nlink == 0
            && let Some(inode) = self.inodes.any(node)
        {
            self.inodes.set_nameless(&inode, true);
        }
        self.make_room();
        Ok(())
    }

    /// The guest has it and gets `ESTALE`.
    fn bring_lost(&self, inode: &Inode) {
        let identity = Identity {
            // Nothing has this key.
            key: Key {
                number: inode.node,
                device: u64::MAX,
                mount: u32::MAX.into(),
            },
            birth: None,
            kind: FileType::from_raw_mode(inode.kind),
        };
        let node = NodeId(inode.node);
        self.inodes
            .bring(node, inode.lookups, &identity, None, ReopenMethod::None);
    }

    /// Opens what the guest has open.
    fn open_as(&self, open: &Open) -> Result<(), Errno> {
        let node = NodeId(open.node);
        let inode = self.inodes.any(node).ok_or(Errno::STALE)?;
        let file = if open.directory {
            File::from_fd(self.open_directory(&inode)?)
        } else {
            if inode.kind() != FileType::RegularFile {
                return Err(Errno::STALE);
            }
            let flags = OFlags::from_bits_retain(open.flags & KEPT.cast_unsigned());
            let flags = flags | OFlags::NOCTTY;
            let fd = match flags & OFlags::RWMODE {
                OFlags::RDONLY => self.open_for_reading(&inode, flags)?,
                _ => {
                    self.writable()?;
                    self.open_appendable(&inode, flags, true)?
                }
            };
            regular_file(fd, flags)
        };
        let fields = HandleFields {
            handle: open.handle,
            node: open.node,
            directory: open.directory,
            flags: open.flags & KEPT.cast_unsigned(),
            fd: file.as_fd().as_raw_fd(),
        };
        self.handles.bring(&fields, record_of(open.flock), file)
    }
}

/// What a failure to find an inode comes to.
fn missing(
    error: Errno,
    inode: &Inode,
    circumstances: &Circumstances,
) -> Result<Option<Found>, Errno> {
    let ended = matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::STALE);
    let missed = circumstances.in_use.contains(&inode.node) || matches!(inode.find, Find::Lost);
    if ended && circumstances.shared && !missed {
        // Somebody on the host has taken it away, or put another in its place.
        return Ok(None);
    }
    Err(error)
}
