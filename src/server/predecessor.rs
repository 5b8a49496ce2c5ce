//! Waits for a killed server that still has what the new one needs: the lock of the state file, or the
//! socket.
//!
//! The kernel takes a while to end a process with a guest's memory and many open files. Whoever
//! restarts a server (systemd within 100 ms) shall not be refused for that. The invariant: a server
//! that lives on is waited for no longer than [`START_TIMEOUT`], and the log says at once what is waited for.

use std::time::{Duration, Instant};

/// How long a process may take to end.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(5);

/// Calls `take` until its answer is none of those that `is_busy` names, or time is up.
pub(super) fn wait_while<T, E: std::fmt::Display>(
    mut take: impl FnMut() -> Result<T, E>,
    is_busy: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        match take() {
            Err(error) if is_busy(&error) && begun.elapsed() < START_TIMEOUT => {
                if !told {
                    log::warn!(
                        "waiting up to {} seconds for a server that may be about to end: {error}",
                        START_TIMEOUT.as_secs()
                    );
                    told = true;
                }
                std::thread::sleep(INTERVAL);
            }
            Ok(taken) => {
                if told {
                    let waited = begun.elapsed().as_secs_f64() * 1000.0;
                    log::info!("it has ended, after {waited:.0} ms");
                }
                return Ok(taken);
            }
            error => return error,
        }
    }
}
