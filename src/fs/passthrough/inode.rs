//! One inode that the guest knows: who it is, its descriptor, the way to it, and its record.
//!
//! The invariant: what is in the record is what holds, or held before the step that is being
//! taken; a descriptor stands there only while it is open.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use super::current_request;
use super::inode_ref::{Identity, Key, Mount, ParentLink, ReopenMethod};
use crate::fs::NodeId;
use crate::io::File;
use crate::state::{InodeFields, InodeRecord, Table};
use crate::sys::fd_slot::Slot;
use crate::sys::file_handle::FileHandle;

/// An inode that the guest knows.
#[derive(Debug)]
pub(super) struct Inode {
    /// What outlives this process: who it is; lookups that the guest has not given back, changed
    /// under the shard's lock only, which is what orders them; name, file handle, and the
    /// descriptor's number, changed under the lock of the way. It ends before the descriptor.
    pub(super) record: InodeRecord,
    /// Its descriptor, while it has one. Filled and emptied under the lock of the way.
    pub(super) slot: Slot,
    ref_kind: Mutex<RefKind>,
    /// Inodes whose way leads through this one. Changed as the lookups are.
    pub(super) children: AtomicU32,
    /// Whether another inode of the same number must have a later birth. See [`Self::settle`].
    settled: AtomicBool,
    /// Whether it stands in the line of those that the guest has given back. Changed as the
    /// lookups are.
    forgotten: AtomicBool,
}

/// Which [`ReopenMethod`] leads to an inode; what there is to it stands in the record.
#[derive(Debug)]
pub(super) enum RefKind {
    Nothing,
    Handle(Arc<Mount>),
    /// What the guest has open of it: it has no name, and no descriptor of its own.
    Open(File),
    Name,
    Removed,
}

const NO_BIRTH: i64 = i64::MIN;

/// How much older than now a birth must be to tell inodes apart: more than a tick of the clock
/// that file systems stamp with, and than the coarsest stamp (two seconds, FAT).
const SETTLED_AFTER: i64 = 4_000_000_000;

impl Inode {
    /// `None` if the table is full.
    pub(super) fn new(
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

    /// The root that has `record` of the process before, open as `fd`; `None` if it is another.
    pub(super) fn restore_root(
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
        root.settle_by_record();
        Some(root)
    }

    /// An inode that has a record, which says the rest.
    pub(super) fn recorded(record: InodeRecord, fd: Option<OwnedFd>, ref_kind: RefKind) -> Self {
        Self {
            record,
            slot: fd.map_or_else(Slot::empty, Slot::full),
            ref_kind: Mutex::new(ref_kind),
            children: AtomicU32::new(0),
            settled: AtomicBool::new(false),
            forgotten: AtomicBool::new(false),
        }
    }

    /// Finds out by the record whether number and birth are enough to tell it.
    pub(super) fn settle_by_record(&self) {
        let birth = self.record.birth();
        let settled = birth != NO_BIRTH && is_old(birth);
        self.settled.store(settled, Ordering::Relaxed);
    }

    /// Which way leads to it. For short: whoever looks the inode up waits.
    pub(super) fn ref_kind(&self) -> MutexGuard<'_, RefKind> {
        self.ref_kind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to reach it without its descriptor.
    pub(super) fn reopen_method(&self) -> ReopenMethod {
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

    /// The name that leads to it.
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

    /// Whether this is the name that leads to it.
    pub(super) fn is_linked_as(&self, ref_kind: &RefKind, parent: NodeId, name: &CStr) -> bool {
        matches!(ref_kind, RefKind::Name) && self.record.goes_by(parent.0, name.to_bytes())
    }

    /// Makes `way` what leads to it; answers in which directory the name was that did so before.
    pub(super) fn set_reopen_method(
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

    /// What tells it from another of its name, if a name leads to it.
    pub(super) fn print(&self, ref_kind: &RefKind) -> Option<u64> {
        matches!(ref_kind, RefKind::Name).then(|| self.record.print())?
    }

    /// Sets what tells it from another of its name.
    pub(super) fn set_digest(&self, ref_kind: &mut RefKind, digest: u64) {
        if let Some(link) = self
            .parent_link(ref_kind)
            .filter(|link| link.digest != digest)
        {
            self.set_reopen_method(ref_kind, ReopenMethod::Name(ParentLink { digest, ..link }));
        }
    }

    /// The directory of the name that leads to it.
    pub(super) fn parent_of_kind(&self, ref_kind: &RefKind) -> Option<NodeId> {
        let parent = matches!(ref_kind, RefKind::Name).then(|| self.record.parent());
        parent.flatten().map(NodeId)
    }

    pub(super) fn lookups(&self) -> u64 {
        self.record.lookups()
    }

    /// Whether the way to others leads through it.
    pub(super) fn has_children(&self) -> bool {
        self.children.load(Ordering::Relaxed) > 0
    }

    /// When it was made, nanoseconds since 1970, where that is known.
    pub(super) fn birth(&self) -> Option<i64> {
        Some(self.record.birth()).filter(|birth| *birth != NO_BIRTH)
    }

    /// What of it outlives this process.
    pub(super) fn record(&self) -> &InodeRecord {
        &self.record
    }

    pub(super) fn node(&self) -> NodeId {
        NodeId(self.record.node())
    }

    pub(super) fn key(&self) -> Key {
        Key {
            number: self.record.number(),
            device: self.record.device(),
            mount: self.record.mount(),
        }
    }

    /// Its descriptor, which its record names no more.
    pub(super) fn into_descriptor(self) -> Option<OwnedFd> {
        let Self { record, slot, .. } = self;
        drop(record);
        slot.into_inner()
    }

    /// Its descriptor.
    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Whether somebody still counts on it. Asked under the shard's lock.
    pub(super) fn is_in_use(&self) -> bool {
        self.node() == NodeId::ROOT
            || self.lookups() > 0
            || self.children.load(Ordering::Relaxed) > 0
            || self.is_forgotten()
    }

    /// Whether the guest has given it back, and is still to find it by its node id.
    #[inline]
    pub(super) fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
    }

    pub(super) fn set_forgotten(&self, forgotten: bool) {
        self.forgotten.store(forgotten, Ordering::Relaxed);
    }

    pub(super) fn parent(&self) -> Option<NodeId> {
        self.parent_of_kind(&self.ref_kind())
    }

    /// What sort of file it is: never changes.
    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.record.sort())
    }

    /// Whether `identity`, which has this inode's key, is this inode beyond doubt.
    pub(super) fn is(&self, identity: &Identity) -> bool {
        // A descriptor keeps the number from being given to another. A birth that differs all
        // the same is either a file system that moves it (overlayfs when it copies up) or a
        // `statx` from before the inode was there.
        self.has_birth_of(identity) && (self.slot.is_full() || self.is_settled())
    }

    /// Whether `identity` may be this inode, and is if [`is_settled`](Self::is_settled).
    pub(super) fn may_be(&self, identity: &Identity) -> bool {
        self.key() == identity.key && self.has_birth_of(identity)
    }

    fn has_birth_of(&self, identity: &Identity) -> bool {
        self.record.birth() == birth_of(identity)
    }

    /// Whether number and birth are enough to tell it from all that come later.
    pub(super) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// Takes over what is now known for sure to describe this inode.
    ///
    /// Inode numbers are reused, and births come from a clock with ticks of milliseconds: a
    /// file made, removed and made again within one tick may agree in both. But once the clock
    /// is past the birth of an inode that is still there, whatever takes its number later is
    /// born later. From then on number and birth are enough; before, handles are compared.
    pub(super) fn settle(&self, identity: &Identity) {
        let birth = birth_of(identity);
        if birth != self.record.birth() {
            self.record.set_birth(birth);
        }
        self.settled.store(identity.is_settled(), Ordering::Relaxed);
    }
}

impl Identity {
    /// Whether whatever takes this number later is born later. See [`Inode::settle`].
    pub(super) fn is_settled(&self) -> bool {
        self.birth.is_some_and(is_old)
    }
}

fn is_old(birth: i64) -> bool {
    now().is_some_and(|now| now.saturating_sub(birth) > SETTLED_AFTER)
}

fn birth_of(identity: &Identity) -> i64 {
    identity.birth.unwrap_or(NO_BIRTH)
}

pub(super) fn now() -> Option<i64> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let now = i64::try_from(since.as_nanos()).ok();
    #[cfg(test)]
    let now = now.and_then(|now| now.checked_add(CLOCK_AHEAD.get()));
    now
}

#[cfg(test)]
thread_local! {
    /// Nanoseconds by which the calling thread's clock is ahead of the host's.
    pub(super) static CLOCK_AHEAD: std::cell::Cell<i64> = const { std::cell::Cell::new(0) };
}
