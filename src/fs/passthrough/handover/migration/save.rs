//! The source's side: describes how each inode can be found.
//!
//! Nothing changes here, except that descriptors are opened and closed as usual. The invariant: in
//! the snapshot an inode comes after the directory that its path starts from.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FileType, StatxFlags};
use rustix::io::Errno;

use super::content::content_of;
use super::locks::{flock_of, locks_of};
use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::inode_table::{IDENTITY, Identity, Inode, ReopenMethod, stat_fd};
use crate::fs::passthrough::options::{MigrationMode, MigrationOptions};
use crate::fs::{MoveError, NodeId};
use crate::migration::stream::{self, Find, MAX_CONTENT, Open, Root, Snapshot};
use crate::sys::file_handle::FileHandle;

/// The open flags that are kept when a file is opened again.
pub(super) const REOPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_DIRECT
    | libc::O_NOATIME
    | libc::O_SYNC
    | libc::O_DSYNC;

/// How long the search for names may delay the guest.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(20);

/// Describes a session for another server.
pub(super) struct Saver<'a> {
    pub(super) fds: &'a Descriptors,
    pub(super) options: &'a MigrationOptions,
    /// The guest doesn't say which files it has open.
    pub(super) no_open: bool,
}

impl Saver<'_> {
    pub(super) fn snapshot(&self) -> Result<Snapshot, MoveError> {
        let mut snapshot = Snapshot {
            generation: self.fds.inodes().table().generation(),
            next_node: self.fds.inodes().table().nodes_given_out(),
            next_handle: self.fds.inodes().table().handles_given_out(),
            root: self.describe_root(),
            ..Snapshot::default()
        };
        let mut in_use = HashSet::new();
        self.fds.files().handles().each(|fields, lock, _| {
            in_use.insert(NodeId(fields.node));
            snapshot.opens.push(Open {
                handle: fields.handle,
                node: fields.node,
                flags: fields.flags & REOPEN_FLAGS.cast_unsigned(),
                directory: fields.directory,
                flock: flock_of(lock),
            });
        });
        self.fds.files().record_locks().each(|fields, ranges, _| {
            in_use.insert(NodeId(fields.node));
            snapshot.locks.push(locks_of(fields, &ranges));
        });
        let mut left = MAX_CONTENT;
        let mut unnamed = Vec::new();
        for inode in parents_first(self.fds.inodes().all()) {
            let used = in_use.contains(&inode.node());
            let described = self.describe(&inode, used, &mut left);
            if described.find == Find::Lost {
                unnamed.push(inode);
            }
            snapshot.inodes.push(described);
        }
        self.search_unnamed(&unnamed, &mut snapshot);
        Ok(snapshot)
    }

    /// Searches for the names of inodes that have a name, but no known one.
    fn search_unnamed(&self, unnamed: &[Arc<Inode>], snapshot: &mut Snapshot) {
        if unnamed.is_empty() || self.options.mode != MigrationMode::FindPaths {
            return;
        }
        let mut paths = self.fds.search(unnamed, SEARCH_TIMEOUT);
        for inode in &mut snapshot.inodes {
            if let Some(path) = paths.remove(&NodeId(inode.node)) {
                inode.find = Find::Path {
                    from: NodeId::ROOT.0,
                    path,
                    verify: self.options.verify_handles,
                };
            } else if inode.find == Find::Lost {
                log::warn!("migration: can't migrate inode {}", inode.node);
            }
        }
    }

    fn describe_root(&self) -> Root {
        let Some(root) = self.fds.inodes().any(NodeId::ROOT) else {
            return Root::default();
        };
        let fd = self.fds.fd(&root);
        let birth = fd.as_ref().ok().and_then(|fd| {
            let stat = stat_fd(fd, IDENTITY).ok()?;
            Identity::of(&stat).birth
        });
        let handle = fd.ok().and_then(|fd| FileHandle::of(fd).ok());
        Root {
            handle: handle.map_or_else(Vec::new, |handle| handle.bytes().to_vec()),
            number: root.key().number,
            birth,
        }
    }

    fn describe(&self, inode: &Arc<Inode>, in_use: bool, left: &mut u64) -> stream::Inode {
        let mut handle = Vec::new();
        let find = match self.find_for_destination(inode, in_use, left, &mut handle) {
            Ok(find) => find,
            Err(Errno::STALE) if !in_use => Find::Gone,
            Err(error) => {
                log::debug!("migration: inode {}: {error}", inode.node().0);
                Find::Lost
            }
        };
        stream::Inode {
            node: inode.node().0,
            lookups: inode.lookups(),
            kind: inode.kind().as_raw_mode(),
            number: inode.key().number,
            birth: inode.birth(),
            handle,
            find,
        }
    }

    fn find_for_destination(
        &self,
        inode: &Arc<Inode>,
        in_use: bool,
        left: &mut u64,
        handle: &mut Vec<u8>,
    ) -> Result<Find, Errno> {
        let options = self.options;
        if options.mode == MigrationMode::FileHandles && self.is_on_shared(inode) {
            *handle = self.handle_of(inode)?;
            return Ok(Find::Handle);
        }
        if options.verify_handles {
            *handle = self.handle_of(inode)?;
        }
        let found = |from: NodeId, path| Find::Path {
            from: from.0,
            path,
            verify: options.verify_handles,
        };
        let link = match &inode.reopen_method() {
            ReopenMethod::Name(link) => Some((link.parent, link.name.to_bytes().to_vec())),
            ReopenMethod::None
            | ReopenMethod::Handle { .. }
            | ReopenMethod::Open(_)
            | ReopenMethod::Removed => None,
        };
        // There are few parents and open files, and if they are lost, others are lost with them.
        let confirm = options.confirm_paths || in_use || inode.has_children();
        if let Some((parent, name)) = link
            && (!confirm || self.fds.path_leads_to(parent, &name, inode))
        {
            return Ok(found(parent, name));
        }
        let (path, links) = {
            let fd = self.fds.fd(inode)?;
            let links = stat_fd(&fd, StatxFlags::NLINK)?.stx_nlink;
            (self.fds.path_of(fd.as_fd()), links)
        };
        if let Ok(path) = path
            && self.fds.path_leads_to(NodeId::ROOT, &path, inode)
        {
            return Ok(found(NodeId::ROOT, path));
        }
        if links > 0 {
            return Err(Errno::NOENT);
        }
        if !self.may_be_in_use(inode, in_use) {
            return Ok(Find::Gone);
        }
        *handle = self.handle_of(inode).unwrap_or_default();
        content_of(self.fds, inode, left).map(Find::Nameless)
    }

    /// Whether the guest may be using an inode that has no name. It reports open files unless
    /// `--no-open` is negotiated, and never reports working directories.
    fn may_be_in_use(&self, inode: &Inode, open: bool) -> bool {
        match inode.kind() {
            FileType::Directory => true,
            FileType::RegularFile => open || self.no_open,
            _ => false,
        }
    }

    /// Whether the inode is in the mount of the shared directory, where file handles can be opened.
    fn is_on_shared(&self, inode: &Inode) -> bool {
        let root = self.fds.inodes().any(NodeId::ROOT);
        root.is_some_and(|root| root.key().mount == inode.key().mount)
    }

    fn handle_of(&self, inode: &Inode) -> Result<Vec<u8>, Errno> {
        if let ReopenMethod::Handle { handle, .. } = &inode.reopen_method() {
            return Ok(handle.bytes().to_vec());
        }
        let handle = FileHandle::of(self.fds.fd(inode)?)?;
        Ok(handle.bytes().to_vec())
    }
}

/// The inodes, each after the parent that its link names.
fn parents_first(inodes: Vec<Arc<Inode>>) -> Vec<Arc<Inode>> {
    let parent = |inode: &Inode| match &inode.reopen_method() {
        ReopenMethod::Name(link) => Some(link.parent),
        _ => None,
    };
    let mut waiting: std::collections::HashMap<NodeId, Vec<Arc<Inode>>> =
        std::collections::HashMap::new();
    let here: HashSet<NodeId> = inodes.iter().map(|inode| inode.node()).collect();
    let mut ready = Vec::new();
    for inode in inodes {
        match parent(&inode).filter(|parent| here.contains(parent)) {
            Some(parent) => waiting.entry(parent).or_default().push(inode),
            None => ready.push(inode),
        }
    }
    let mut ordered = Vec::new();
    while let Some(inode) = ready.pop() {
        ready.extend(waiting.remove(&inode.node()).unwrap_or_default());
        ordered.push(inode);
    }
    // A cycle of outdated names. These are found in another way, or not at all.
    ordered.extend(waiting.into_values().flatten());
    ordered
}
