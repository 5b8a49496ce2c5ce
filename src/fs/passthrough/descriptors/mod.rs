//! Opens the descriptors of inodes and keeps the number of all the guest's descriptors within limits.

pub(crate) mod forget;
pub(crate) mod limits;
pub(crate) mod lost_inodes;
pub(crate) mod paths;
pub(crate) mod reopen;
pub(crate) mod reopen_policy;
pub(crate) mod search;
pub(crate) mod sharing;
