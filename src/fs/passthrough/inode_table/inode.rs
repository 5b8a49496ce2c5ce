//! One inode in the table: its identity, its descriptor, how to reopen it, and its record.
//!
//! The invariant: the record describes the current state, or the state before the step in progress;
//! it names a descriptor only while that descriptor is open.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;

use super::identity::{Identity, Key, is_old};
use super::reopen_method::{Mount, ParentLink, ReopenMethod};
use crate::fs::NodeId;
use crate::fs::passthrough::current_request;
use crate::io::File;
use crate::state::{InodeFields, InodeRecord, Table};
use crate::sys::fd_slot::Slot;
use crate::sys::file_handle::FileHandle;

/// An inode in the table.
#[derive(Debug)]
pub(crate) struct Inode {
    /// The state that outlives this process: the identity; the lookup count, which changes only
    /// under the shard's lock, which also orders it; and the name, file handle and descriptor
    /// number, which change under the `ref_kind` lock. It is dropped before the descriptor.
    pub(crate) record: InodeRecord,
    /// The descriptor, while the inode has one. Filled and emptied under the `ref_kind` lock.
    pub(crate) slot: Slot,
    ref_kind: Mutex<RefKind>,
    /// The number of inodes whose parent link names this one. Changes under the shard's lock.
    pub(crate) children: AtomicU32,
    /// Whether a later inode with the same number is sure to have a later birth time. See
    /// [`Self::settle`].
    settled: AtomicBool,
    /// Whether the guest has forgotten this inode and the table keeps it. Changes under the shard's
    /// lock.
    forgotten: AtomicBool,
    /// How often it was used by its name instead of a descriptor, up to 255.
    uses_by_name: AtomicU8,
}

/// Which [`ReopenMethod`] an inode has. The record stores the details.
#[derive(Debug)]
pub(crate) enum RefKind {
    Nothing,
    Handle(Arc<Mount>),
    /// A file that the guest has open: the inode has no name and no descriptor of its own.
    Open(File),
    Name,
    Removed,
}

const NO_BIRTH: i64 = i64::MIN;

impl Inode {
    /// Returns `None` if the table is full.
    pub(crate) fn new(
        table: &Arc<Table>,
        identity: &Identity,
        node: NodeId,
        fd: Option<OwnedFd>,
        method: ReopenMethod,
    ) -> Option<Self> {
        let fields = InodeFields {
            node: node.0,
            number: identity.key.number,
            device: identity.key.device,
            mount: identity.key.mount,
            birth: birth_of(identity),
            sort: identity.kind.as_raw_mode(),
            lookups: 1,
        };
        let record = table.new_inode(&fields, current_request::unique())?;
        if let Some(fd) = &fd {
            record.set_descriptor(Some(fd.as_raw_fd()));
        }
        let inode = Self::recorded(record, fd, RefKind::Nothing);
        inode.set_reopen_method(&mut inode.ref_kind(), method);
        inode
            .settled
            .store(identity.is_settled(), Ordering::Relaxed);
        Some(inode)
    }

    /// Restores the root from its record, open as `fd`. Returns `None` if `fd` is a different
    /// inode.
    pub(crate) fn restore_root(
        record: InodeRecord,
        identity: &Identity,
        fd: OwnedFd,
    ) -> Option<Self> {
        if (record.number(), record.birth()) != (identity.key.number, birth_of(identity)) {
            return None;
        }
        record.set_location(identity.key.device, identity.key.mount);
        record.set_descriptor(Some(fd.as_raw_fd()));
        let root = Self::recorded(record, Some(fd), RefKind::Nothing);
        root.set_settled(root.birth().is_some_and(is_old));
        Some(root)
    }

    /// Creates an inode from an existing record.
    pub(crate) fn recorded(record: InodeRecord, fd: Option<OwnedFd>, ref_kind: RefKind) -> Self {
        Self {
            record,
            slot: fd.map_or_else(Slot::empty, Slot::full),
            ref_kind: Mutex::new(ref_kind),
            children: AtomicU32::new(0),
            settled: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
            uses_by_name: AtomicU8::new(0),
        }
    }

    /// Locks the reopen method. Hold the lock briefly: lookups of this inode wait for it.
    pub(crate) fn ref_kind(&self) -> MutexGuard<'_, RefKind> {
        self.ref_kind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to open the inode if it has no descriptor.
    pub(crate) fn reopen_method(&self) -> ReopenMethod {
        match &*self.ref_kind() {
            RefKind::Nothing => ReopenMethod::None,
            RefKind::Removed => ReopenMethod::Removed,
            RefKind::Open(file) => ReopenMethod::Open(file.clone()),
            ref_kind @ RefKind::Name => self
                .parent_link(ref_kind)
                .map_or(ReopenMethod::None, ReopenMethod::Name),
            RefKind::Handle(mount) => {
                let handle = self.record.handle();
                match handle.and_then(|bytes| FileHandle::from_bytes(&bytes)) {
                    Some(handle) => ReopenMethod::Handle {
                        mount: Arc::clone(mount),
                        handle,
                    },
                    None => ReopenMethod::None,
                }
            }
        }
    }

    /// The parent and name by which the inode is reopened, if it is reopened by name.
    fn parent_link(&self, ref_kind: &RefKind) -> Option<ParentLink> {
        if !matches!(ref_kind, RefKind::Name) {
            return None;
        }
        let name = self.record.name()?;
        Some(ParentLink {
            parent: NodeId(name.parent),
            name: CString::new(name.bytes).ok()?.into(),
            digest: name.print,
        })
    }

    /// The parent and the name, if the inode is reopened by name.
    pub(crate) fn link(&self) -> Option<(NodeId, Box<CStr>)> {
        let link = self.parent_link(&self.ref_kind())?;
        Some((link.parent, link.name))
    }

    /// Whether the inode is reopened by `name` in `parent`.
    pub(crate) fn is_linked_as(&self, ref_kind: &RefKind, parent: NodeId, name: &CStr) -> bool {
        matches!(ref_kind, RefKind::Name) && self.record.goes_by(parent.0, name.to_bytes())
    }

    /// Sets the reopen method. Returns the parent of the previous name, if there was one.
    pub(crate) fn set_reopen_method(
        &self,
        ref_kind: &mut RefKind,
        method: ReopenMethod,
    ) -> Option<NodeId> {
        let old_parent = self.parent_of_kind(ref_kind);
        *ref_kind = match method {
            ReopenMethod::None => {
                self.record.end_name();
                RefKind::Nothing
            }
            ReopenMethod::Removed => RefKind::Removed,
            ReopenMethod::Open(file) => {
                self.record.end_name();
                RefKind::Open(file)
            }
            ReopenMethod::Name(link) => {
                let name = link.name.to_bytes();
                if self.record.set_name(link.parent.0, name, link.digest) {
                    RefKind::Name
                } else {
                    RefKind::Nothing
                }
            }
            ReopenMethod::Handle { mount, handle } => {
                self.record.end_name();
                if self.record.set_handle(handle.bytes()) {
                    RefKind::Handle(mount)
                } else {
                    RefKind::Nothing
                }
            }
        };
        old_parent
    }

    /// The digest that goes with the name, if the inode is reopened by name.
    pub(crate) fn digest(&self, ref_kind: &RefKind) -> Option<u64> {
        matches!(ref_kind, RefKind::Name).then(|| self.record.print())?
    }

    /// Sets the digest that goes with the name.
    pub(crate) fn set_digest(&self, ref_kind: &mut RefKind, digest: u64) {
        if let Some(link) = self
            .parent_link(ref_kind)
            .filter(|link| link.digest != digest)
        {
            self.set_reopen_method(ref_kind, ReopenMethod::Name(ParentLink { digest, ..link }));
        }
    }

    /// The parent directory, if the inode is reopened by name.
    pub(crate) fn parent_of_kind(&self, ref_kind: &RefKind) -> Option<NodeId> {
        let parent = matches!(ref_kind, RefKind::Name).then(|| self.record.parent());
        parent.flatten().map(NodeId)
    }

    pub(crate) fn lookups(&self) -> u64 {
        self.record.lookups()
    }

    /// Whether the parent links of other inodes name this one.
    pub(crate) fn has_children(&self) -> bool {
        self.children.load(Ordering::Relaxed) > 0
    }

    /// The birth time in nanoseconds since 1970, if known.
    pub(crate) fn birth(&self) -> Option<i64> {
        Some(self.record.birth()).filter(|birth| *birth != NO_BIRTH)
    }

    /// The record that outlives this process.
    pub(crate) fn record(&self) -> &InodeRecord {
        &self.record
    }

    pub(crate) fn node(&self) -> NodeId {
        NodeId(self.record.node())
    }

    pub(crate) fn key(&self) -> Key {
        Key {
            number: self.record.number(),
            device: self.record.device(),
            mount: self.record.mount(),
        }
    }

    /// Drops the record and returns the descriptor.
    pub(crate) fn into_descriptor(self) -> Option<OwnedFd> {
        let Self { record, slot, .. } = self;
        drop(record);
        slot.into_inner()
    }

    /// The slot of the descriptor.
    pub(crate) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Whether anything still needs the inode. Call it under the shard's lock.
    pub(crate) fn is_in_use(&self) -> bool {
        self.node() == NodeId::ROOT
            || self.lookups() > 0
            || self.children.load(Ordering::Relaxed) > 0
            || self.is_forgotten()
    }

    /// Whether the guest has forgotten the inode and can still find it by its node id.
    #[inline]
    pub(crate) fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
    }

    pub(crate) fn set_forgotten(&self, forgotten: bool) {
        self.forgotten.store(forgotten, Ordering::Relaxed);
    }

    pub(crate) fn parent(&self) -> Option<NodeId> {
        self.parent_of_kind(&self.ref_kind())
    }

    /// Whether the inode is reopened through `file`.
    pub(crate) fn is_reopened_through(&self, file: &File) -> bool {
        matches!(&*self.ref_kind(), RefKind::Open(shared) if shared.as_raw_fd() == file.as_raw_fd())
    }

    /// Counts another use by its name. Returns the number of those before; threads that count at
    /// the same moment may be counted as one.
    pub(crate) fn count_use_by_name(&self) -> u8 {
        let before = self.uses_by_name.load(Ordering::Relaxed);
        let now = before.saturating_add(1);
        self.uses_by_name.store(now, Ordering::Relaxed);
        before
    }

    /// The file type, which never changes.
    pub(crate) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.record.sort())
    }

    /// Whether `identity`, which has this inode's key, certainly describes this inode.
    pub(crate) fn is(&self, identity: &Identity) -> bool {
        // The descriptor keeps the inode number from being reused. If the birth time differs
        // nevertheless, either the file system changed it (overlayfs on copy-up) or the `statx` is
        // older than the inode.
        self.has_birth_of(identity) && (self.slot.is_full() || self.is_settled())
    }

    /// Whether `identity` can be this inode. It is certain if [`is_settled`](Self::is_settled).
    pub(crate) fn may_be(&self, identity: &Identity) -> bool {
        self.key() == identity.key && self.has_birth_of(identity)
    }

    fn has_birth_of(&self, identity: &Identity) -> bool {
        self.record.birth() == birth_of(identity)
    }

    /// Whether number and birth time tell the inode from all later ones.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Stores the birth time of an `identity` that certainly describes this inode.
    ///
    /// Inode numbers are reused, and birth times come from a clock with ticks of milliseconds: a
    /// file that is created, removed and created again within one tick can have the same number and
    /// the same birth time. Once the clock has passed the birth time of an inode that still exists,
    /// every later inode with its number has a later birth time. From then on number and birth time
    /// are sufficient; until then file handles are compared.
    pub(crate) fn settle(&self, identity: &Identity, settled: bool) {
        let birth = birth_of(identity);
        if birth != self.record.birth() {
            self.record.set_birth(birth);
        }
        self.set_settled(settled);
    }

    /// Sets whether number and birth time tell the inode from all later ones.
    pub(crate) fn set_settled(&self, settled: bool) {
        self.settled.store(settled, Ordering::Relaxed);
    }
}

fn birth_of(identity: &Identity) -> i64 {
    identity.birth.unwrap_or(NO_BIRTH)
}
