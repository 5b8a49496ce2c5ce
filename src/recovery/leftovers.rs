//! What the previous serving process has left: its vhost-user session, and open descriptors.
//!
//! The invariant: only what the state table names stays open. What it says may have been written by
//! a process that a guest had compromised, so this is done once the process has no privileges left
//! that it could be tricked into using.

use std::os::fd::RawFd;

use super::RecoveryError;
use crate::sandbox;
use crate::state::Table;
use crate::vhost_user::SessionSnapshot;

/// Returns the session that the previous process has left, if it had one. Closes all descriptors
/// but `own` and those that the session or the table names.
pub(crate) fn sort_leftovers(
    table: &Table,
    own: &[RawFd],
) -> Result<Option<SessionSnapshot>, RecoveryError> {
    let block = table.session_snapshot();
    let snapshot = match block.map(|block| SessionSnapshot::decode(&block)) {
        None => None,
        Some(Ok(snapshot)) if snapshot.descriptors().iter().any(|fd| own.contains(fd)) => {
            log::error!("the session can't resume: it names a descriptor of the server's own");
            None
        }
        Some(Ok(snapshot)) => Some(snapshot),
        Some(Err(error)) => {
            log::error!("the session can't resume: {error}");
            None
        }
    };
    let mut keep = own.to_vec();
    keep.extend(table.descriptors());
    keep.extend(snapshot.iter().flat_map(SessionSnapshot::descriptors));
    sandbox::close_all_but(&keep).map_err(RecoveryError::Leftovers)?;
    Ok(snapshot)
}
