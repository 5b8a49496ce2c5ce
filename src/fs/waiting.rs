//! Operations that turn out to take long: the request is repeated where it may wait.
//!
//! A file system whose metadata methods are usually short answers on the worker itself
//! ([`FileSystem::may_block`](super::FileSystem::may_block) is false). A call that finds that it has
//! to wait, before it has changed anything, asks [`is_allowed`] and fails with [`MUST_WAIT`] where it
//! isn't. The session then repeats the request on a thread that may wait. The invariant: only
//! callers that repeat such a request forbid waiting, so everybody else never sees the error.

use std::cell::Cell;

use rustix::io::Errno;

use crate::io::set_while;

/// The request has to wait and must be repeated where it may. Never reaches a guest: the number is
/// the kernel's internal `ERESTARTSYS`.
pub const MUST_WAIT: Errno = Errno::from_raw_os_error(512);

thread_local! {
    static FORBIDDEN: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread may wait now.
#[must_use]
pub fn is_allowed() -> bool {
    !FORBIDDEN.get()
}

/// Calls `act`, in which methods of a file system fail with [`MUST_WAIT`] instead of waiting. The
/// caller repeats the call elsewhere if that happens.
pub fn forbid<T>(act: impl FnOnce() -> T) -> T {
    set_while(&FORBIDDEN, true, act)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_forbidden_only_within_the_call() {
        assert!(is_allowed());
        assert!(forbid(|| !is_allowed() && forbid(|| !is_allowed())));
        assert!(is_allowed());
        let unwound =
            std::panic::catch_unwind(|| forbid(|| std::panic::resume_unwind(Box::new(()))));
        assert!(unwound.is_err() && is_allowed());
    }
}
