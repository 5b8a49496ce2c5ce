//! Attributes: GETATTR, STATX, SETATTR, ACCESS, STATFS.
//!
//! The invariant: a node reports the same inode number as long as the guest knows it.

use std::time::Duration;

use rustix::io::Errno;

use super::Overlay;
use super::copy_up::CopyUp;
use super::node::Node;
use crate::fs::{Attributes, Caller, Changes, Handle, NodeId, Result, Timestamp};

const WRITE: u32 = 0o2;

impl Overlay {
    /// Replaces what the layer says by what the guest sees.
    pub(super) fn show_attributes(&self, node: &Node, attributes: &mut Attributes) {
        attributes.inode = node.number();
        if node.is_dir && node.is_merged() {
            // The number of subdirectories isn't known. 1 tells programs so.
            attributes.links = 1;
        }
        if node.is_removed() && !node.is_dir && !self.is_upper(node.top()) {
            attributes.links = 0;
        }
    }

    pub(super) fn attributes(
        &self,
        node: &Node,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Duration)> {
        let top = node.top();
        let handle = handle.and_then(|handle| self.handles.for_attributes(node, top, handle));
        let caller = Caller::default();
        let (mut attributes, ttl) = self.layer(top).getattr(&caller, top.node, handle)?;
        self.show_attributes(node, &mut attributes);
        Ok((attributes, ttl))
    }

    pub(super) fn attributes_with_birth(
        &self,
        node: NodeId,
        handle: Option<Handle>,
    ) -> Result<(Attributes, Option<Timestamp>, Duration)> {
        let node = self.nodes.get(node)?;
        let top = node.top();
        let handle = handle.and_then(|handle| self.handles.for_attributes(&node, top, handle));
        let (mut attributes, birth, ttl) = self.layer(top).statx(top.node, handle)?;
        self.show_attributes(&node, &mut attributes);
        Ok((attributes, birth, ttl))
    }

    pub(super) fn set_attributes(
        &self,
        caller: &Caller,
        node: NodeId,
        handle: Option<Handle>,
        changes: &Changes,
    ) -> Result<(Attributes, Duration)> {
        let node = self.nodes.get(node)?;
        self.copy_up(
            &node,
            match changes.size {
                Some(0) => CopyUp::Truncated,
                _ => CopyUp::Whole,
            },
        )?;
        let top = node.top();
        let handle = handle.and_then(|handle| self.handles.for_attributes(&node, top, handle));
        let layer = self.layer(top);
        let (mut attributes, ttl) = layer.setattr(caller, top.node, handle, changes)?;
        self.show_attributes(&node, &mut attributes);
        Ok((attributes, ttl))
    }

    pub(super) fn check_access(&self, caller: &Caller, node: NodeId, mask: u32) -> Result<()> {
        let node = self.nodes.get(node)?;
        let top = node.top();
        if mask & WRITE == 0 || self.is_upper(top) {
            return self.layer(top).access(caller, top.node, mask);
        }
        if self.upper.is_none() {
            return Err(Errno::ROFS);
        }
        // The lower layer would refuse any write.
        let (attributes, _) = self.attributes(&node, None)?;
        crate::fs::permissions::check(caller, &attributes, mask)
    }
}
