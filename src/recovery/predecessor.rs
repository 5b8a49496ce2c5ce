//! Waits for a killed server that still holds the lock of the state file, or the socket.
//!
//! The kernel takes a while to end a process that has a guest's memory and many open files. A
//! launcher may restart the server before that (systemd: after 100 ms), and must not be refused.
//! The invariant: the wait takes no longer than [`EXIT_TIMEOUT`], and the log says at once what is
//! waited for.

use std::time::{Duration, Instant};

/// How long a process may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to sleep between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Calls `acquire` until it succeeds, fails with an error that isn't `is_busy`, or time is up.
pub(crate) fn wait_while<T, E: std::fmt::Display>(
    mut acquire: impl FnMut() -> Result<T, E>,
    is_busy: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let start = Instant::now();
    let mut has_logged = false;
    loop {
        match acquire() {
            Err(error) if is_busy(&error) && start.elapsed() < EXIT_TIMEOUT => {
                if !has_logged {
                    log::warn!(
                        "waiting up to {} seconds for the previous server to end: {error}",
                        EXIT_TIMEOUT.as_secs()
                    );
                    has_logged = true;
                }
                std::thread::sleep(RETRY_INTERVAL);
            }
            Ok(acquired) => {
                if has_logged {
                    let waited = start.elapsed().as_secs_f64() * 1000.0;
                    log::info!("the previous server has ended, after {waited:.0} ms");
                }
                return Ok(acquired);
            }
            error => return error,
        }
    }
}
