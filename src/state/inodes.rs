//! Records of inodes: an inode's identity, the guest's lookups of it, and how it is found again.
//!
//! The words of a record: node id; lookups, with a mark of the request that counted last; inode
//! number; device; birth; mount and file type; the blobs of its name and its file handle; state,
//! which includes whether the guest has removed its last name, and descriptor.

use std::sync::Arc;

use super::blobs::Name;
use super::slabs::{RecordKind, STATE, word_of};
use super::{SlotRef, StateError, Table};

const NODE: usize = 0;
const LOOKUPS: usize = 1;
const NUMBER: usize = 2;
const DEVICE: usize = 3;
const BIRTH: usize = 4;
const MOUNT: usize = 5;
const BLOBS: usize = 6;

/// The state of a record in use.
const LIVE: u64 = 1;
/// Bit of the state: the guest has removed the inode's last name, or created it without one.
const NAMELESS: u64 = 1 << 8;

/// Bits of the lookup count; the mark is above.
const COUNT: u64 = (1 << 48) - 1;
/// Bit of a mark: lookups were added. Without it lookups were dropped.
const ADDED: u64 = 1 << 63;

/// The recorded fields of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeFields {
    /// The guest's node id.
    pub node: u64,
    /// Inode number on its file system.
    pub number: u64,
    /// Major number in the upper half, minor in the lower.
    pub device: u64,
    /// Mount id, as `statx(2)` returns it.
    pub mount: u64,
    /// Creation time, nanoseconds since 1970; `i64::MIN` if unknown.
    pub birth: i64,
    /// File type: the type bits of `st_mode`.
    pub sort: u32,
    /// Lookups that the guest has not dropped.
    pub lookups: u64,
}

/// The record of an inode. Dropping it removes it from the table, unless the table is closed.
#[derive(Debug)]
pub struct InodeRecord {
    table: Arc<Table>,
    slot: SlotRef,
}

/// The mark for the request `unique`. Linux numbers requests in steps of two, and the numbers of
/// requests in flight at the same time are close to each other.
fn mark(unique: u64, added: bool) -> u64 {
    let number = (unique >> 1 & 0x7fff) << 48;
    if added { number | ADDED } else { number }
}

impl Table {
    /// Records an inode that the request `unique` made known to the guest. `None` if the table is
    /// full.
    pub fn new_inode(self: &Arc<Self>, fields: &InodeFields, unique: u64) -> Option<InodeRecord> {
        let slot = self.allocate(RecordKind::Inode)?;
        let record = InodeRecord {
            table: Arc::clone(self),
            slot,
        };
        record.set(NODE, fields.node);
        record.set(LOOKUPS, fields.lookups & COUNT | mark(unique, true));
        record.set(NUMBER, fields.number);
        record.set(DEVICE, fields.device);
        record.set(BIRTH, fields.birth.cast_unsigned());
        let mount = fields.mount & 0xffff_ffff;
        record.set(MOUNT, mount | u64::from(fields.sort) << 32);
        record.set(BLOBS, 0);
        record.set(STATE, LIVE);
        Some(record)
    }

    /// Whether another inode can be recorded at this moment.
    #[must_use]
    pub fn has_room_for_inode(&self) -> bool {
        let slot = self.allocate(RecordKind::Inode);
        slot.inspect(|slot| self.free(*slot)).is_some()
    }

    /// The inodes of a table that was opened. Must be called only once, since each inode has one
    /// record.
    pub fn take_inodes(self: &Arc<Self>) -> Vec<InodeRecord> {
        let mut records = Vec::new();
        self.slabs.for_each(RecordKind::Inode, |slot| {
            records.push(InodeRecord {
                table: Arc::clone(self),
                slot,
            });
        });
        records
    }

    pub(super) fn check_inodes(&self) -> Result<(), StateError> {
        let mut fault = None;
        let mut nodes = std::collections::HashSet::new();
        let known = self.nodes_given_out();
        self.slabs.for_each(RecordKind::Inode, |slot| {
            let first = word_of(slot);
            let node = self.load(first + NODE);
            let (name, handle) = halves(self.load(first + BLOBS));
            let what = if self.load(first + STATE) & 0xff != LIVE {
                "the state of an inode"
            } else if node == 0 || node >= known || !nodes.insert(node) {
                "the node id of an inode"
            } else if name != 0 && !self.claim_blob(name) {
                "the name of an inode"
            } else if handle != 0 && !self.claim_blob(handle) {
                "the file handle of an inode"
            } else {
                return;
            };
            fault.get_or_insert(StateError::Damaged { what, at: first });
        });
        fault.map_or(Ok(()), Err)
    }
}

fn halves(word: u64) -> (SlotRef, SlotRef) {
    let low = u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(word >> 32).unwrap_or(0);
    (low, high)
}

impl InodeRecord {
    #[inline]
    fn get(&self, at: usize) -> u64 {
        self.table.load(word_of(self.slot) + at)
    }

    #[inline]
    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.slot) + at, value);
    }

    /// The guest's node id.
    #[must_use]
    pub fn node(&self) -> u64 {
        self.get(NODE)
    }

    /// Inode number on its file system.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.get(NUMBER)
    }

    /// Major number in the upper half, minor in the lower.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.get(DEVICE)
    }

    /// Mount id.
    #[must_use]
    pub fn mount(&self) -> u64 {
        self.get(MOUNT) & 0xffff_ffff
    }

    /// The type bits of `st_mode`.
    #[must_use]
    pub fn sort(&self) -> u32 {
        halves(self.get(MOUNT)).1
    }

    /// Creation time; `i64::MIN` if unknown.
    #[must_use]
    pub fn birth(&self) -> i64 {
        self.get(BIRTH).cast_signed()
    }

    /// Sets the creation time.
    pub fn set_birth(&self, birth: i64) {
        self.set(BIRTH, birth.cast_unsigned());
    }

    /// Sets the device and mount id that the inode has in this process.
    pub fn set_location(&self, device: u64, mount: u64) {
        self.set(DEVICE, device);
        let sort = u64::from(self.sort()) << 32;
        self.set(MOUNT, mount & 0xffff_ffff | sort);
    }

    /// Lookups that the guest has not dropped.
    #[inline]
    #[must_use]
    pub fn lookups(&self) -> u64 {
        self.get(LOOKUPS) & COUNT
    }

    /// Sets the lookup count after the request `unique` added or dropped lookups. Must not be
    /// called concurrently.
    #[inline]
    pub fn set_lookups(&self, lookups: u64, unique: u64, added: bool) {
        self.set(LOOKUPS, lookups.min(COUNT) | mark(unique, added));
    }

    /// Whether the request `unique` was the last to change the lookup count, and in this direction.
    #[must_use]
    pub fn was_counted_by(&self, unique: u64, added: bool) -> bool {
        unique != 0 && self.get(LOOKUPS) & !COUNT == mark(unique, added)
    }

    /// The name and directory it was last seen at.
    #[must_use]
    pub fn name(&self) -> Option<Name> {
        let (name, _) = halves(self.get(BLOBS));
        (name != 0).then(|| self.table.name(name))
    }

    /// The node id of the directory it was last seen in.
    #[must_use]
    pub fn parent(&self) -> Option<u64> {
        let (name, _) = halves(self.get(BLOBS));
        (name != 0).then(|| self.table.parent_of(name))
    }

    /// The print of its file handle that is recorded with its name.
    #[must_use]
    pub fn print(&self) -> Option<u64> {
        let (name, _) = halves(self.get(BLOBS));
        (name != 0).then(|| self.table.print_of(name))
    }

    /// Whether it was last seen at this name in this directory.
    #[must_use]
    pub fn goes_by(&self, parent: u64, name: &[u8]) -> bool {
        let (slot, _) = halves(self.get(BLOBS));
        slot != 0 && self.table.is_name(slot, parent, name)
    }

    /// Sets where it was last seen: the node id of the directory, the name, and a print of the file
    /// handle or 0. Returns false if the table is full; then the location is unknown.
    pub fn set_name(&self, parent: u64, name: &[u8], print: u64) -> bool {
        let new = self.table.new_name(parent, name, print);
        self.replace_name(new.unwrap_or(0));
        new.is_some()
    }

    /// Clears the location where it was last seen.
    pub fn end_name(&self) {
        self.replace_name(0);
    }

    fn replace_name(&self, new: SlotRef) {
        let (old, handle) = halves(self.get(BLOBS));
        if new != old {
            self.set(BLOBS, u64::from(new) | u64::from(handle) << 32);
            self.table.free_blob(old);
        }
    }

    /// The recorded file handle.
    #[must_use]
    pub fn handle(&self) -> Option<Vec<u8>> {
        let (_, handle) = halves(self.get(BLOBS));
        (handle != 0).then(|| self.table.blob(handle))
    }

    /// Sets the file handle. Returns false if the table is full.
    pub fn set_handle(&self, handle: &[u8]) -> bool {
        let (name, old) = halves(self.get(BLOBS));
        let new = self.table.new_blob(handle);
        self.set(BLOBS, u64::from(name) | u64::from(new.unwrap_or(0)) << 32);
        self.table.free_blob(old);
        new.is_some()
    }

    /// The number of its descriptor, if it has one.
    #[must_use]
    pub fn descriptor(&self) -> Option<i32> {
        descriptor(self.get(STATE))
    }

    /// Sets the number of its descriptor: after it was opened, and to none before it is closed.
    /// Must not be called concurrently, nor together with [`set_nameless`](Self::set_nameless).
    pub fn set_descriptor(&self, fd: Option<i32>) {
        let nameless = self.get(STATE) & NAMELESS;
        self.set(STATE, LIVE | nameless | with_descriptor(fd));
    }

    /// Whether the guest has removed the inode's last name, or created it without one.
    #[inline]
    #[must_use]
    pub fn is_nameless(&self) -> bool {
        self.get(STATE) & NAMELESS != 0
    }

    /// Sets [`is_nameless`](Self::is_nameless). Must not be called concurrently, nor together with
    /// [`set_descriptor`](Self::set_descriptor).
    pub fn set_nameless(&self, nameless: bool) {
        let others = self.get(STATE) & !NAMELESS;
        self.set(STATE, others | if nameless { NAMELESS } else { 0 });
    }
}

/// The descriptor in a record's state.
pub(super) fn descriptor(state: u64) -> Option<i32> {
    i32::try_from(state >> 32).ok()?.checked_sub(1)
}

/// The part of a record's state that names a descriptor.
pub(super) fn with_descriptor(fd: Option<i32>) -> u64 {
    let number = fd
        .and_then(|fd| u32::try_from(fd).ok())
        .map_or(0, |fd| fd.wrapping_add(1));
    u64::from(number) << 32
}

impl Drop for InodeRecord {
    fn drop(&mut self) {
        if self.table.is_closed() {
            return;
        }
        let (name, handle) = halves(self.get(BLOBS));
        self.set(STATE, 0);
        self.table.free_blob(name);
        self.table.free_blob(handle);
        self.table.free(self.slot);
    }
}
