//! What the fuzz targets do with their bytes.
//!
//! Each target makes many requests of one input, so that the fuzzer's own cost is small against
//! the server's. What must hold is asserted; a panic is a find. The invariant: an input does the
//! same each time, so that a find can be shown again.

pub mod count;
pub mod decode;
pub mod front_record;
pub mod guest;
pub mod moved;
pub mod request;
pub mod ring;
pub mod share;
pub mod source;
pub mod state;
pub mod transport;
pub mod vhost_user;
