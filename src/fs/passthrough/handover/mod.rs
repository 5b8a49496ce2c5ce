//! Continues a session in another server process or on another server.

pub(crate) mod migration;
pub(crate) mod replay;
pub(crate) mod resume;
