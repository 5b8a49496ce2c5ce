//! Renames: RENAME and RENAME2.
//!
//! What is renamed is copied up first. A directory that lies in a lower layer is renamed only if
//! the upper layer may say where it lies ([`Options::redirect_dirs`](super::Options)); otherwise
//! the guest gets `EXDEV`, and programs copy it instead. The invariant: the old name of something
//! that a lower layer has is a whiteout in the same moment.

use std::ffi::CStr;
use std::sync::{Arc, PoisonError};

use rustix::fs::RenameFlags;
use rustix::io::Errno;

use super::copy_up::CopyUp;
use super::layer::{Redirect, SERVER};
use super::lookup::Search;
use super::node::{Node, Real, Stack};
use super::work::{EXCHANGE, WHITEOUT};
use super::{Overlay, UPPER};
use crate::fs::{Caller, NodeId, Result, XattrFlags};

/// The longest path that a redirect may have, as in the kernel.
const REDIRECT_MAX: usize = 256;

/// A name in a directory.
type At<'a> = (&'a Arc<Node>, &'a CStr);

impl Overlay {
    pub(super) fn rename_node(
        &self,
        caller: &Caller,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.upper()?;
        let flags = RenameFlags::from_bits_retain(flags);
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        // A whiteout is nothing that the guest could see.
        if !(flags - known).is_empty() || flags == known {
            return Err(Errno::INVAL);
        }
        let (old_parent, new_parent) = (self.nodes.get(from.0)?, self.nodes.get(to.0)?);
        let (old, new): (At<'_>, At<'_>) = ((&old_parent, from.1), (&new_parent, to.1));
        let exchanges = flags.contains(RenameFlags::EXCHANGE);
        let moved = self.existing(&old_parent, from.1)?;
        self.check_movable(&moved)?;
        let replaced = exchanges
            .then(|| self.existing(&new_parent, to.1))
            .transpose()?;
        if let Some(replaced) = &replaced {
            self.check_movable(replaced)?;
        }
        self.copy_up(&old_parent, CopyUp::Whole)?;
        self.copy_up(&new_parent, CopyUp::Whole)?;
        self.copy_up(&moved, CopyUp::Whole)?;
        let _renames = (old_parent.id != new_parent.id)
            .then(|| self.renames.lock().unwrap_or_else(PoisonError::into_inner));
        let (first, second) = if old_parent.id <= new_parent.id {
            (&old_parent, &new_parent)
        } else {
            (&new_parent, &old_parent)
        };
        if let Some(replaced) = &replaced {
            self.copy_up(replaced, CopyUp::Whole)?;
            let _first = first.lock_names();
            let _second = (first.id != second.id).then(|| second.lock_names());
            return self.exchange(caller, (old, &moved), (new, replaced));
        }
        let _first = first.lock_names();
        let _second = (first.id != second.id).then(|| second.lock_names());
        self.replace(caller, (old, &moved), new, flags)
    }

    /// Fails with `EXDEV` if a directory can't be renamed because it lies in a lower layer.
    fn check_movable(&self, node: &Arc<Node>) -> Result<()> {
        let is_pure = self.is_upper(node.top()) && !node.is_merged();
        if node.is_dir && !is_pure && !self.options.redirect_dirs {
            return Err(Errno::XDEV);
        }
        Ok(())
    }

    /// Prepares a directory that gets a new name: what lies below that name is hidden, or what lies
    /// below its old name is found.
    fn prepare_move(&self, (old, moved): (At<'_>, &Arc<Node>), new: At<'_>) -> Result<()> {
        if !moved.is_dir {
            return Ok(());
        }
        if moved.is_merged() {
            return self.set_redirect(old, moved, new);
        }
        if new.0.is_merged() {
            self.layers[UPPER].set_opaque(moved.top().node)?;
        }
        Ok(())
    }

    fn replace(
        &self,
        caller: &Caller,
        (old, moved): (At<'_>, &Arc<Node>),
        new: At<'_>,
        flags: RenameFlags,
    ) -> Result<()> {
        let (fs, _) = self.upper()?;
        let (old_stack, new_stack) = (old.0.stack(), new.0.stack());
        let (old_upper, new_upper) = (old.0.top().node, new.0.top().node);
        let Search {
            found: replaced,
            has_whiteout,
        } = self.search(&new_stack, new.1)?;
        if let Some(replaced) = &replaced {
            if flags.contains(RenameFlags::NOREPLACE) {
                return Err(Errno::EXIST);
            }
            if replaced.top() == Some(moved.top()) {
                // Two names of one inode: nothing happens, as always.
                return Ok(());
            }
            match (moved.is_dir, replaced.is_dir()) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                (true, true) if !self.is_empty(&replaced.stack)? => return Err(Errno::NOTEMPTY),
                (true, true) => {
                    let is_in_upper = replaced.top().is_some_and(|top| self.is_upper(top));
                    if is_in_upper && !self.is_bare(&replaced.stack)? {
                        self.clear_empty(replaced, new_upper, new.1)?;
                    }
                }
                (false, false) => {}
            }
        }
        if moved.is_dir && !moved.is_at(old.0, old.1) {
            // Renamed or removed in the meantime.
            return Err(Errno::STALE);
        }
        let leaves_whiteout = old_stack.len() > 1 && self.is_in_lower(&old_stack, old.1)?;
        self.prepare_move((old, moved), new)?;
        let (from, to) = ((old_upper, old.1), (new_upper, new.1));
        if has_whiteout && moved.is_dir {
            // The whiteout is where the directory was.
            fs.rename(&SERVER, from, to, EXCHANGE)?;
            if !leaves_whiteout {
                fs.unlink(&SERVER, old_upper, old.1)?;
            }
        } else if leaves_whiteout {
            fs.rename(&SERVER, from, to, WHITEOUT)?;
        } else {
            fs.rename(caller, from, to, 0)?;
        }
        drop(replaced);
        self.detach(new.0, new.1);
        let forgotten = self.nodes.rename(old, new);
        self.forget_reals(forgotten);
        Ok(())
    }

    /// Whether a directory has no entry at all in the upper layer, nor anything below.
    fn is_bare(&self, stack: &Stack) -> Result<bool> {
        match stack.as_slice() {
            [upper] => Ok(self.names_in(*upper)?.is_empty()),
            _ => Ok(false),
        }
    }

    fn exchange(
        &self,
        caller: &Caller,
        one: (At<'_>, &Arc<Node>),
        other: (At<'_>, &Arc<Node>),
    ) -> Result<()> {
        let (fs, _) = self.upper()?;
        let is_current = |(at, node): (At<'_>, &Arc<Node>)| {
            let found = self.search(&at.0.stack(), at.1)?.found;
            Ok(found.is_some_and(|found| found.top() == Some(node.top())))
        };
        if !is_current(one)? || !is_current(other)? {
            return Err(Errno::STALE);
        }
        self.prepare_move(one, other.0)?;
        self.prepare_move(other, one.0)?;
        let at = |at: At<'_>| at.0.top().node;
        let (from, to) = ((at(one.0), one.0.1), (at(other.0), other.0.1));
        fs.rename(caller, from, to, EXCHANGE)?;
        let forgotten = self.nodes.exchange(one.0, other.0);
        self.forget_reals(forgotten);
        Ok(())
    }

    /// Records where a merged directory lies in the layers below, before it gets another name.
    fn set_redirect(&self, old: At<'_>, moved: &Arc<Node>, new: At<'_>) -> Result<()> {
        let (fs, upper) = (self.upper()?.0, moved.top());
        let name = self.options.xattr_prefix.redirect();
        let known = self.layers[UPPER].xattr(upper.node, name)?;
        let value = match known {
            // An absolute one stays right wherever the directory goes.
            Some(value) if value.starts_with(b"/") => return Ok(()),
            Some(_) if old.0.id == new.0.id => return Ok(()),
            None if old.0.id == new.0.id => old.1.to_bytes().to_vec(),
            _ => self.lower_path(upper, old)?,
        };
        if value.len() > REDIRECT_MAX {
            return Err(Errno::XDEV);
        }
        let flags = XattrFlags::empty();
        fs.setxattr(&SERVER, upper.node, name, &value, flags)
    }

    /// The path of a directory of the upper layer, now at `at`, in the layers below.
    fn lower_path(&self, upper: Real, at: At<'_>) -> Result<Vec<u8>> {
        let name = self.options.xattr_prefix.redirect();
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut next = Some((upper, Arc::clone(at.0), at.1.to_owned()));
        while let Some((real, parent, own_name)) = next.take() {
            let redirect = if self.is_upper(real) {
                self.layers[UPPER].xattr(real.node, name)?
            } else {
                None
            };
            match redirect.map(|value| Redirect::parse(&value)).transpose()? {
                Some(Redirect::Path(path)) => {
                    parts.extend(path.into_iter().rev().map(|part| part.into_bytes()));
                    break;
                }
                Some(Redirect::Name(name)) => parts.push(name.into_bytes()),
                None => parts.push(own_name.into_bytes()),
            }
            next = parent
                .location()
                .map(|location| (parent.top(), location.parent, location.name));
        }
        let mut path = Vec::new();
        for part in parts.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(part);
        }
        Ok(path)
    }
}
