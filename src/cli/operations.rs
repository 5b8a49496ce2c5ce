//! Operations that are served only where they are asked for.

use clap::Args;

use crate::fuse::SessionOptions;

/// What guests may do beyond what every file system lets them.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(next_help_heading = "Locks")]
pub struct Operations {
    /// Carry the guest's record locks (fcntl, lockf) to the host, where they conflict with
    /// those of the host's programs and of other guests. Without this they hold within the
    /// guest only.
    #[arg(long)]
    pub posix_locks: bool,

    /// Carry the guest's locks on whole files (flock) to the host, as --posix-locks does with
    /// record locks.
    #[arg(long)]
    pub flock: bool,
}

impl Operations {
    /// Sets what of a session these options choose.
    pub fn apply(self, session: &mut SessionOptions) {
        session.posix_locks = self.posix_locks;
        session.flock = self.flock;
    }
}
