//! What a previous server process did for a request that is replayed.
//!
//! The invariant: a request counts as done only if the current state of the file system shows it.

use std::ffi::CStr;
use std::sync::Arc;

use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::inode_table::{Identity, Inode, stat_name};
use crate::fs::{NodeId, Result};

/// The identity of the inode with this name. Counts no lookup.
pub(crate) fn identity_at(fds: &Descriptors, parent: NodeId, name: &CStr) -> Result<Identity> {
    let parent = fds.inode(parent)?;
    let stat = stat_name(&fds.fd(&parent)?, name)?;
    Ok(Identity::of(&stat))
}

/// Opens an inode, so that the result of a lookup can be compared with it.
fn open_to_compare(fds: &Descriptors, inode: &Inode) {
    if let Err(error) = fds.open_closed(inode) {
        log::debug!("can't open node {}: {error}", inode.node().0);
    }
}

/// Whether the inode with this `number` no longer has `name`, as after an UNLINK or RMDIR that
/// the previous process executed but did not record.
pub(crate) fn name_was_removed(
    fds: &Descriptors,
    parent: NodeId,
    name: &CStr,
    number: u64,
) -> bool {
    let there = identity_at(fds, parent, name);
    if there.is_ok_and(|there| there.key.number == number) {
        return false;
    }
    if let (Ok(parent), Some(lost)) = (fds.inode(parent), fds.inodes().by_name(parent, name)) {
        let change = fds.inodes().begin_name_change([&parent, &parent]);
        note_other_names(&lost);
        fds.inodes().record_removal(&lost, &parent, name, &change);
        fds.inodes().set_nameless(&lost, true);
    }
    true
}

/// Whether the inode with this `number` has moved from `from` to `to`, as after a RENAME that
/// the previous process executed but did not record. If so, records its new name.
pub(crate) fn name_was_renamed(
    fds: &Descriptors,
    from: (NodeId, &CStr),
    to: (NodeId, &CStr),
    number: u64,
) -> bool {
    let left = identity_at(fds, from.0, from.1);
    let there = match identity_at(fds, to.0, to.1) {
        Ok(there) if there.key.number == number => there,
        _ => return false,
    };
    if left.as_ref().is_ok_and(|left| left.key == there.key) {
        return false;
    }
    if let (Ok(old), Ok(new)) = (fds.inode(from.0), fds.inode(to.0)) {
        let moved = fds.inodes().by_name(from.0, from.1);
        let replaced = fds.inodes().by_name(to.0, to.1);
        let change = fds.inodes().begin_name_change([&old, &new]);
        let is = |inode: &Arc<Inode>, identity: &Identity| inode.may_be(identity);
        if let Some(moved) = moved.as_ref().filter(|it| is(it, &there)) {
            fds.inodes().record_rename(moved, &new, to.1, &change);
        }
        match (&replaced, &left) {
            (Some(other), _) if is(other, &there) => {}
            // The two were exchanged.
            (Some(other), Ok(left)) if is(other, left) => {
                fds.inodes().record_rename(other, &old, from.1, &change);
            }
            (Some(other), _) => {
                note_other_names(other);
                fds.inodes().record_removal(other, &new, to.1, &change);
                fds.inodes().set_nameless(other, true);
            }
            _ => {}
        }
        drop(change);
        moved
            .iter()
            .chain(&replaced)
            .for_each(|inode| open_to_compare(fds, inode));
    }
    true
}

/// Records that an inode whose known name is gone may have another name.
fn note_other_names(inode: &Inode) {
    let _ref_kind = inode.ref_kind();
    if inode.record().handle().is_none() {
        inode.record().set_handle(&[]);
    }
}
