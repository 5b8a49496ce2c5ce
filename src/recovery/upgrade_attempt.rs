//! An upgrade in progress, as one program passes it to the next.
//!
//! It owns the old program's file and the connection of the client that asked for the upgrade. The
//! invariant: the outcome is reported once, when a process serves.

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::metrics::Process;
use crate::sandbox::FdIdentity;

/// How long a program may take until it serves.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The first words of the line that reports success to the client.
pub(super) const UPGRADED: &str = "upgraded ";
/// The first words of the line that reports failure.
pub(super) const NOT_UPGRADED: &str = "not upgraded: ";

/// An upgrade in progress.
#[derive(Debug)]
pub(super) struct UpgradeAttempt {
    /// When the previous process stopped serving.
    pub(super) since: Duration,
    /// The program to return to.
    pub(super) old: Option<FdIdentity>,
    /// The client that asked for the upgrade.
    pub(super) client: Option<UnixStream>,
    /// Why the upgrade failed, if the old program runs again.
    pub(super) failed: Option<String>,
}

impl UpgradeAttempt {
    pub(super) fn since(&self) -> Duration {
        self.since
    }

    /// The descriptors that the guardian needs for the upgrade.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let old = self.old.as_ref().map(|old| old.fd.as_raw_fd());
        let client = self.client.as_ref().map(AsRawFd::as_raw_fd);
        old.into_iter().chain(client).collect()
    }

    /// As what it is counted, when a process serves.
    pub(super) fn outcome(&self) -> Process {
        match &self.failed {
            None => Process::Upgrade,
            Some(_) => Process::FailedUpgrade,
        }
    }

    /// Reports the outcome: this program serves.
    pub(super) fn report(self, pause: Duration) {
        let pause = milliseconds(pause);
        let version = env!("CARGO_PKG_VERSION");
        match &self.failed {
            None => {
                log::warn!("upgraded to {version}; serving again, after {pause:.1} ms");
                let line = format!("{UPGRADED}to {version}; the guest waited for {pause:.1} ms");
                send_line(self.client.as_ref(), &line);
            }
            Some(reason) => {
                log::error!("not upgraded: {reason}; serving again, after {pause:.1} ms");
                let line = format!(
                    "{NOT_UPGRADED}{reason}; the previous program keeps running, the guest waited \
                     for {pause:.1} ms"
                );
                send_line(self.client.as_ref(), &line);
            }
        }
    }
}

/// Sends a line to the client, which may have disconnected.
pub(super) fn send_line(mut client: Option<&UnixStream>, line: &str) {
    if let Some(client) = &mut client {
        let _ = writeln!(client, "{line}");
    }
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
