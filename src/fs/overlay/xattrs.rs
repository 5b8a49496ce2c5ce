//! Extended attributes: those of the topmost inode, without the overlay's own.
//!
//! The invariant: no name reaches a layer or the guest that [`XattrPrefix`](super::XattrPrefix)
//! hasn't mapped.

use std::borrow::Cow;
use std::ffi::CStr;

use rustix::io::Errno;

use super::Overlay;
use super::copy_up::CopyUp;
use crate::fs::{Caller, NodeId, Result, XattrFlags};

/// The limit of a list of names (`XATTR_LIST_MAX`).
const LIST_MAX: usize = 65536;

/// The result of a layer, in which `ENOSYS` would make the guest's kernel stop sending the request,
/// also for files of the other layers.
fn of_layer<T>(result: Result<T>) -> Result<T> {
    match result {
        Err(Errno::NOSYS) => Err(Errno::OPNOTSUPP),
        result => result,
    }
}

impl Overlay {
    pub(super) fn check_xattrs(&self) -> Result<()> {
        if self.options.xattr {
            Ok(())
        } else {
            Err(Errno::NOSYS)
        }
    }

    /// The name in a layer of the guest's attribute `name`.
    pub(super) fn layer_name<'a>(&self, name: &'a CStr) -> Cow<'a, CStr> {
        match self.options.xattr_prefix.to_layer(name) {
            Some(escaped) => Cow::Owned(escaped),
            None => Cow::Borrowed(name),
        }
    }

    pub(super) fn set_xattr(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let node = self.nodes.get(node)?;
        let name = self.layer_name(name);
        self.copy_up(&node, CopyUp::Whole)?;
        let top = node.top();
        of_layer(
            self.layer(top)
                .setxattr(caller, top.node, &name, value, flags),
        )
    }

    pub(super) fn xattr_value(
        &self,
        caller: &Caller,
        node: NodeId,
        name: &CStr,
        limit: usize,
    ) -> Result<Vec<u8>> {
        let top = self.nodes.get(node)?.top();
        let name = self.layer_name(name);
        of_layer(self.layer(top).getxattr(caller, top.node, &name, limit))
    }

    pub(super) fn xattr_len(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<usize> {
        let top = self.nodes.get(node)?.top();
        let name = self.layer_name(name);
        of_layer(self.layer(top).getxattr_len(caller, top.node, &name))
    }

    pub(super) fn remove_xattr(&self, caller: &Caller, node: NodeId, name: &CStr) -> Result<()> {
        let node = self.nodes.get(node)?;
        let name = self.layer_name(name);
        let top = node.top();
        if !self.is_upper(top) {
            // Without the attribute there is nothing to remove, nor to copy up for.
            of_layer(self.layer(top).getxattr_len(caller, top.node, &name))?;
            self.copy_up(&node, CopyUp::Whole)?;
        }
        let top = node.top();
        of_layer(self.layer(top).removexattr(caller, top.node, &name))
    }

    pub(super) fn xattr_names(
        &self,
        caller: &Caller,
        node: NodeId,
        limit: usize,
    ) -> Result<Vec<u8>> {
        let top = self.nodes.get(node)?.top();
        let names = of_layer(self.layer(top).listxattr(caller, top.node, LIST_MAX))?;
        let names = self.options.xattr_prefix.to_guest(&names);
        if names.len() > limit {
            return Err(Errno::RANGE);
        }
        Ok(names)
    }
}
