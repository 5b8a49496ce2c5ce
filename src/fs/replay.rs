//! What a file system offers so that requests survive the server process that serves them.
//!
//! A process that takes over replays the requests that the previous one left unanswered. The
//! invariant: with the information from [`Replay`], a request that took effect is recognised and
//! not executed again.

use std::ffi::CStr;

use super::{Handle, LockOwner, NodeId, Result};
use crate::io::Lock;

/// Lets another process continue the session from shared memory or a state file.
///
/// A file system without it can't outlive its process: `--supervise` and `--state` are refused.
pub trait Replay {
    /// The calling thread serves the request `unique` from now on. Changes that the file system
    /// makes belong to this request.
    fn begin_request(&self, unique: u64);

    /// Whether the previous process has applied FORGETs of `node` for the request `unique`.
    fn was_forgotten(&self, node: NodeId, unique: u64) -> bool;

    /// The inode number that the previous process recorded for the request `unique` before a
    /// removal or rename: no other inode can have been removed or moved.
    fn recorded_inode(&self, unique: u64) -> Option<u64>;

    /// The inode number behind `name` in `parent`; doesn't count as a lookup.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is none, otherwise those of `stat(2)`.
    fn inode_at(&self, parent: NodeId, name: &CStr) -> Result<u64>;

    /// Whether the guest knows the inode behind `name` in `parent`.
    fn is_known(&self, parent: NodeId, name: &CStr) -> bool;

    /// Whether the previous process completed this UNLINK or RMDIR of the inode with this `number`.
    fn was_removed(&self, parent: NodeId, name: &CStr, number: u64) -> bool;

    /// Whether the previous process completed this RENAME of the inode with this `number`. If so,
    /// the inode is then known by its new name.
    fn was_renamed(&self, from: (NodeId, &CStr), to: (NodeId, &CStr), number: u64) -> bool;

    /// Records a lock that was taken or released on what
    /// [`FileSystem::file`](super::FileSystem::file) or
    /// [`FileSystem::lock_file`](super::FileSystem::lock_file) returned.
    fn record_lock(&self, node: NodeId, handle: Handle, owner: LockOwner, lock: Lock);
}
