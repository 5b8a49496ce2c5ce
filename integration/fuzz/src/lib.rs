//! What the fuzz targets do with their bytes.
//!
//! Each target makes many requests from one input, so that the fuzzer's own cost is small against
//! the server's. What must hold is asserted; a panic is a finding. The invariant: an input always
//! does the same, so that a finding can be reproduced.

pub mod back_channel;
pub mod control;
pub mod count;
pub mod decode;
pub mod guest;
pub mod migration;
pub mod request;
pub mod ring;
pub mod session_snapshot;
pub mod share;
pub mod source;
pub mod state;
pub mod transport;
pub mod vhost_user;
pub mod window;
