//! Records of inodes: who one is, how often the guest has it, how it is found again.
//!
//! The words of a record: node id; lookups, with a mark of the request that counted last; inode
//! number; device; birth; mount and sort; the texts of its name and its file handle; state,
//! whether the guest itself has taken its last name, and descriptor.

use std::sync::Arc;

use super::blobs::Name;
use super::slabs::{RecordKind, STATE, word_of};
use super::{RecordRef, StateError, Table};

const NODE: usize = 0;
const LOOKUPS: usize = 1;
const NUMBER: usize = 2;
const DEVICE: usize = 3;
const BIRTH: usize = 4;
const MOUNT: usize = 5;
const TEXTS: usize = 6;

/// The state of a record that is one.
const LIVE: u64 = 1;
/// Of the state: the guest itself has taken the last name from the inode, or made it without one.
const NAMELESS: u64 = 1 << 8;

/// Lookups are below; a mark stands above.
const COUNT: u64 = (1 << 48) - 1;
/// Of a mark: lookups were added. Without it they were given back.
const ADDED: u64 = 1 << 63;

/// Who an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeFields {
    /// What the guest calls it.
    pub node: u64,
    /// Its number on its file system.
    pub number: u64,
    /// Major number in the upper half, minor in the lower.
    pub device: u64,
    /// Where it is mounted, as `statx(2)` tells.
    pub mount: u64,
    /// When it was made, nanoseconds since 1970; `i64::MIN` if that is not known.
    pub birth: i64,
    /// What sort of file it is: the type bits of `st_mode`.
    pub sort: u32,
    /// Lookups that the guest has not given back.
    pub lookups: u64,
}

/// The record of an inode; dropping it ends it, unless the table is closed.
#[derive(Debug)]
pub struct InodeRecord {
    table: Arc<Table>,
    place: RecordRef,
}

/// A mark for the request `unique`. Linux counts requests in steps of two; of any two that are in
/// flight at the same time the numbers are close to each other.
fn mark(unique: u64, added: bool) -> u64 {
    let number = (unique >> 1 & 0x7fff) << 48;
    if added { number | ADDED } else { number }
}

impl Table {
    /// Writes an inode down, which the request `unique` has made known. `None` if the table is full.
    pub fn new_inode(self: &Arc<Self>, fields: &InodeFields, unique: u64) -> Option<InodeRecord> {
        let place = self.take(RecordKind::Inode)?;
        let record = InodeRecord {
            table: Arc::clone(self),
            place,
        };
        record.set(NODE, fields.node);
        record.set(LOOKUPS, fields.lookups & COUNT | mark(unique, true));
        record.set(NUMBER, fields.number);
        record.set(DEVICE, fields.device);
        record.set(BIRTH, fields.birth.cast_unsigned());
        let mount = fields.mount & 0xffff_ffff;
        record.set(MOUNT, mount | u64::from(fields.sort) << 32);
        record.set(TEXTS, 0);
        record.set(STATE, LIVE);
        Some(record)
    }

    /// Whether a further inode can be written down at this moment.
    #[must_use]
    pub fn has_room_for_inode(&self) -> bool {
        let place = self.take(RecordKind::Inode);
        place.inspect(|place| self.give_back(*place)).is_some()
    }

    /// The inodes of a table that was opened. To be called once; each has one record.
    pub fn take_inodes(self: &Arc<Self>) -> Vec<InodeRecord> {
        let mut records = Vec::new();
        self.slabs.each(RecordKind::Inode, |place| {
            records.push(InodeRecord {
                table: Arc::clone(self),
                place,
            });
        });
        records
    }

    pub(super) fn check_inodes(&self) -> Result<(), StateError> {
        let mut fault = None;
        let mut nodes = std::collections::HashSet::new();
        let known = self.nodes_given_out();
        self.slabs.each(RecordKind::Inode, |place| {
            let first = word_of(place);
            let node = self.load(first + NODE);
            let (name, handle) = halves(self.load(first + TEXTS));
            let what = if self.load(first + STATE) & 0xff != LIVE {
                "the state of an inode"
            } else if node == 0 || node >= known || !nodes.insert(node) {
                "the node id of an inode"
            } else if name != 0 && !self.claim_text(name) {
                "the name of an inode"
            } else if handle != 0 && !self.claim_text(handle) {
                "the file handle of an inode"
            } else {
                return;
            };
            fault.get_or_insert(StateError::Damaged { what, at: first });
        });
        fault.map_or(Ok(()), Err)
    }
}

fn halves(word: u64) -> (RecordRef, RecordRef) {
    let low = u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(word >> 32).unwrap_or(0);
    (low, high)
}

impl InodeRecord {
    #[inline]
    fn get(&self, at: usize) -> u64 {
        self.table.load(word_of(self.place) + at)
    }

    #[inline]
    fn set(&self, at: usize, value: u64) {
        self.table.store(word_of(self.place) + at, value);
    }

    /// What the guest calls it.
    #[must_use]
    pub fn node(&self) -> u64 {
        self.get(NODE)
    }

    /// Its number on its file system.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.get(NUMBER)
    }

    /// Major number in the upper half, minor in the lower.
    #[must_use]
    pub fn device(&self) -> u64 {
        self.get(DEVICE)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mount(&self) -> u64 {
        self.get(MOUNT) & 0xffff_ffff
    }

    /// The type bits of `st_mode`.
    #[must_use]
    pub fn sort(&self) -> u32 {
        halves(self.get(MOUNT)).1
    }

    /// When it was made; `i64::MIN` if that is not known.
    #[must_use]
    pub fn birth(&self) -> i64 {
        self.get(BIRTH).cast_signed()
    }

    /// Sets when it was made.
    pub fn set_birth(&self, birth: i64) {
        self.set(BIRTH, birth.cast_unsigned());
    }

    /// Sets what device and mount it has in this process.
    pub fn set_location(&self, device: u64, mount: u64) {
        self.set(DEVICE, device);
        let sort = u64::from(self.sort()) << 32;
        self.set(MOUNT, mount & 0xffff_ffff | sort);
    }

    /// Lookups that the guest has not given back.
    #[inline]
    #[must_use]
    pub fn lookups(&self) -> u64 {
        self.get(LOOKUPS) & COUNT
    }

    /// The request `unique` has added lookups, or given some back: from now on there are
    /// `lookups`. Not to be called by two at once.
    #[inline]
    pub fn set_lookups(&self, lookups: u64, unique: u64, added: bool) {
        self.set(LOOKUPS, lookups.min(COUNT) | mark(unique, added));
    }

    /// Whether lookups were changed last by the request `unique`, in this way.
    #[must_use]
    pub fn was_counted_by(&self, unique: u64, added: bool) -> bool {
        unique != 0 && self.get(LOOKUPS) & !COUNT == mark(unique, added)
    }

    /// Where it was last seen.
    #[must_use]
    pub fn name(&self) -> Option<Name> {
        let (name, _) = halves(self.get(TEXTS));
        (name != 0).then(|| self.table.name(name))
    }

    /// The node id of the directory where it was last seen.
    #[must_use]
    pub fn parent(&self) -> Option<u64> {
        let (name, _) = halves(self.get(TEXTS));
        (name != 0).then(|| self.table.parent_of(name))
    }

    /// The print of its file handle that stands with its name.
    #[must_use]
    pub fn print(&self) -> Option<u64> {
        let (name, _) = halves(self.get(TEXTS));
        (name != 0).then(|| self.table.print_of(name))
    }

    /// Whether this is where it was last seen.
    #[must_use]
    pub fn goes_by(&self, parent: u64, name: &[u8]) -> bool {
        let (place, _) = halves(self.get(TEXTS));
        place != 0 && self.table.is_name(place, parent, name)
    }

    /// Sets where it was last seen: the node id of the directory, the name, and a print of the file
    /// handle or 0. False if the table is full: then that is not known.
    pub fn set_name(&self, parent: u64, name: &[u8], print: u64) -> bool {
        let new = self.table.new_name(parent, name, print);
        self.replace_name(new.unwrap_or(0));
        new.is_some()
    }

    /// Where it was last seen is not known any more.
    pub fn end_name(&self) {
        self.replace_name(0);
    }

    fn replace_name(&self, new: RecordRef) {
        let (old, handle) = halves(self.get(TEXTS));
        if new != old {
            self.set(TEXTS, u64::from(new) | u64::from(handle) << 32);
            self.table.end_text(old);
        }
    }

    /// Its file handle, as `holds` wrote it down.
    #[must_use]
    pub fn handle(&self) -> Option<Vec<u8>> {
        let (_, handle) = halves(self.get(TEXTS));
        (handle != 0).then(|| self.table.text(handle))
    }

    /// Sets its file handle. False if the table is full.
    pub fn set_handle(&self, handle: &[u8]) -> bool {
        let (name, old) = halves(self.get(TEXTS));
        let new = self.table.new_text(handle);
        self.set(TEXTS, u64::from(name) | u64::from(new.unwrap_or(0)) << 32);
        self.table.end_text(old);
        new.is_some()
    }

    /// The number of its descriptor, if it has one.
    #[must_use]
    pub fn descriptor(&self) -> Option<i32> {
        descriptor(self.get(STATE))
    }

    /// Sets the number of its descriptor: after it was opened, and to none before it is closed. Not to
    /// be called by two at once, nor together with [`set_nameless`](Self::set_nameless).
    pub fn set_descriptor(&self, fd: Option<i32>) {
        let nameless = self.get(STATE) & NAMELESS;
        self.set(STATE, LIVE | nameless | with_descriptor(fd));
    }

    /// Whether the guest itself has taken the last name from the inode, or made it without one.
    #[inline]
    #[must_use]
    pub fn is_nameless(&self) -> bool {
        self.get(STATE) & NAMELESS != 0
    }

    /// Sets whether that is so; likewise.
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
        let (name, handle) = halves(self.get(TEXTS));
        self.set(STATE, 0);
        self.table.end_text(name);
        self.table.end_text(handle);
        self.table.give_back(self.place);
    }
}
