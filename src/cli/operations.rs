//! Operations that are served only where they are asked for.

use std::time::Duration;

use clap::{ArgGroup, Args};

use super::sharing::seconds;
use crate::fuse::SessionOptions;

/// What guests may do beyond what every file system lets them.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(
    next_help_heading = "Locks",
    group = ArgGroup::new("locks").args(["posix_locks", "flock"]).multiple(true)
)]
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

    /// Stop waiting for a lock after SECONDS; 0, the default, waits without limit.
    ///
    /// Linux' virtio-fs driver sends no interrupts: a program in the guest that waits for a lock
    /// can't be interrupted or killed until the wait ends. At the limit its system call fails
    /// with EAGAIN, and signals that came meanwhile take effect. Needs --posix-locks or --flock.
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = seconds,
        default_value = "0",
        hide_default_value = true,
        requires = "locks"
    )]
    pub lock_wait_limit: Duration,
}

impl Operations {
    /// Sets what of a session these options choose.
    pub fn apply(self, session: &mut SessionOptions) {
        session.posix_locks = self.posix_locks;
        session.flock = self.flock;
        session.lock_wait_limit = self.lock_wait_limit;
    }
}
