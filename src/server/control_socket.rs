//! The socket that the server is controlled by: made with the other one, and kept with it.
//!
//! The invariant: its file is removed by the process that outlives the serving one, and by no other.

use std::path::Path;

use super::error::ServerError;
use crate::error_chain;
use crate::recovery;
use crate::vhost_user::{ListenError, Listener};

/// Listens at `path`, for the server's own user and root alone.
pub(super) fn bind(path: &Path) -> Result<Listener, ServerError> {
    let busy = |error: &ListenError| matches!(error, ListenError::InUse(_));
    recovery::wait_while(|| Listener::bind(path), busy).map_err(|error| {
        let path = path.display();
        ServerError::Control(match &error {
            ListenError::InUse(_) => {
                format!("another server listens on {path}: stop it, or give each its own")
            }
            ListenError::NotASocket(_) => {
                format!("{path} exists and is not a socket: remove it, or give another path")
            }
            ListenError::TooLong { len, .. } => {
                format!("the path {path} is too long for a socket: it has {len} bytes")
            }
            other => error_chain::one_line(other),
        })
    })
}
