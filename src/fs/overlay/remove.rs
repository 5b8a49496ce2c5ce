//! Removes names: UNLINK and RMDIR.
//!
//! A name that a lower layer has is replaced by a whiteout. The invariant: a removed name doesn't
//! appear again, whenever the server ends.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::io::Errno;

use super::copy_up::CopyUp;
use super::layer::SERVER;
use super::lookup::Found;
use super::node::Node;
use super::work::{EXCHANGE, NOREPLACE};
use super::{Overlay, UPPER};
use crate::fs::{Caller, NodeId, Result};

impl Overlay {
    pub(super) fn remove(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &CStr,
        is_dir: bool,
    ) -> Result<()> {
        let (fs, _) = self.upper()?;
        let parent = self.nodes.get(parent)?;
        self.copy_up(&parent, CopyUp::Whole)?;
        let _names = parent.lock_names();
        let (upper, stack) = (parent.top().node, parent.stack());
        if stack.len() == 1 && !is_dir {
            fs.unlink(caller, upper, name)?;
            return Ok(());
        }
        let found = self.search(&stack, name)?.found.ok_or(Errno::NOENT)?;
        match (found.is_dir(), is_dir) {
            (true, false) => return Err(Errno::ISDIR),
            (false, true) => return Err(Errno::NOTDIR),
            _ => {}
        }
        if is_dir && !self.is_empty(&found.stack)? {
            return Err(Errno::NOTEMPTY);
        }
        if self.is_in_lower(&stack, name)? {
            self.cover(&found, upper, name)?;
        } else if is_dir {
            self.remove_directory(caller, &found, upper, name)?;
        } else {
            fs.unlink(caller, upper, name)?;
        }
        drop(found);
        self.detach(&parent, name);
        Ok(())
    }

    /// The node known as `name` in `parent`, if there is one, has lost that name.
    pub(super) fn detach(&self, parent: &Arc<Node>, name: &CStr) {
        let forgotten = self.nodes.detach(parent, name);
        self.forget_reals(forgotten);
    }

    /// Replaces what was `found` by a whiteout.
    fn cover(&self, found: &Found<'_>, parent: NodeId, name: &CStr) -> Result<()> {
        let (fs, _, work) = self.work()?;
        let is_in_upper = found.top().is_some_and(|top| self.is_upper(top));
        let whiteout = self.new_whiteout()?;
        let flags = match (is_in_upper, found.is_dir()) {
            (false, _) => NOREPLACE,
            (true, false) => 0,
            (true, true) => EXCHANGE,
        };
        let from = (work, whiteout.as_c_str());
        if let Err(error) = fs.rename(&SERVER, from, (parent, name), flags) {
            self.discard(&whiteout, false);
            return Err(error);
        }
        if flags == EXCHANGE {
            // The directory is there now, with whiteouts in it.
            self.discard(&whiteout, true);
        }
        Ok(())
    }

    /// Removes a directory of the upper layer that nothing below has the name of.
    fn remove_directory(
        &self,
        caller: &Caller,
        found: &Found<'_>,
        parent: NodeId,
        name: &CStr,
    ) -> Result<()> {
        let (fs, upper, work) = self.work()?;
        if found.stack.len() == 1 {
            match fs.rmdir(caller, parent, name) {
                // There are whiteouts in it.
                Err(Errno::NOTEMPTY | Errno::EXIST) => {}
                removed => return removed,
            }
        }
        let aside = upper.new_name();
        fs.rename(&SERVER, (parent, name), (work, &aside), NOREPLACE)?;
        self.discard(&aside, true);
        Ok(())
    }

    /// Replaces `name`, a directory of the upper layer in which the guest sees nothing, by an empty
    /// one, so that it can be replaced.
    pub(super) fn clear_empty(&self, found: &Found<'_>, parent: NodeId, name: &CStr) -> Result<()> {
        let (fs, _, work) = self.work()?;
        let top = found.top().filter(|top| top.layer == UPPER);
        let model = top.ok_or(Errno::IO)?;
        let (empty, entry) = self.new_opaque_like(model.node)?;
        self.forget_upper(entry.node);
        let exchanged = fs.rename(&SERVER, (work, &empty), (parent, name), EXCHANGE);
        self.discard(&empty, true);
        exchanged
    }
}
