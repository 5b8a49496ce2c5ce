//! What the guest has open: handles, files without a handle, closed files that are cached, record
//! locks, and files that are being closed.

pub(crate) mod closed_fd_cache;
pub(crate) mod closer;
pub(crate) mod handleless;
pub(crate) mod handles;
pub(crate) mod record_locks;
