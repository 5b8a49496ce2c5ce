//! The report of a serving process to its guardian: that it serves, and since when.
//!
//! The invariant: a report is one write of fixed length, so it arrives as a whole.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The present time on the monotonic clock, which all processes share.
#[must_use]
pub(crate) fn now() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What a serving process sends to its guardian once it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(super) root: RawFd,
    pub(super) mounts: Option<RawFd>,
    /// When it began to serve ([`now`]).
    pub(crate) since: Duration,
}

impl Report {
    const LEN: usize = 16;

    fn bytes(self) -> [u8; Self::LEN] {
        let nanoseconds = u64::try_from(self.since.as_nanos()).unwrap_or(u64::MAX);
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.root.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.mounts.unwrap_or(-1).to_le_bytes());
        bytes[8..].copy_from_slice(&nanoseconds.to_le_bytes());
        bytes
    }

    /// Reads a report, if one has arrived.
    pub(crate) fn read(pipe: &OwnedFd) -> Option<Self> {
        let mut bytes = [0; Self::LEN];
        if rustix::io::read(pipe, &mut bytes) != Ok(Self::LEN) {
            return None;
        }
        let [r0, r1, r2, r3, m0, m1, m2, m3, since @ ..] = bytes;
        Some(Self {
            root: RawFd::from_le_bytes([r0, r1, r2, r3]),
            mounts: Some(RawFd::from_le_bytes([m0, m1, m2, m3])).filter(|fd| *fd >= 0),
            since: Duration::from_nanos(u64::from_le_bytes(since)),
        })
    }
}

/// The serving process's end of the pipe on which it reports to its guardian that it serves.
#[derive(Debug, Default)]
pub struct Serving {
    pub(super) pipe: Option<OwnedFd>,
    pub(super) root: RawFd,
    pub(super) mounts: Option<OwnedFd>,
}

impl Serving {
    /// Reports that the process serves; does nothing if no report was requested.
    pub fn report(&self) {
        let Some(pipe) = &self.pipe else { return };
        let report = Report {
            root: self.root,
            mounts: self.mounts.as_ref().map(AsRawFd::as_raw_fd),
            since: now(),
        };
        if let Err(error) = rustix::io::write(pipe, &report.bytes()) {
            log::warn!("reporting to the guardian that the process serves: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn report_arrives_as_sent() {
        let (reports, pipe) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        assert_eq!(Report::read(&reports), None);
        for mounts in [None, Some(9)] {
            let sent = Report {
                root: 7,
                mounts,
                since: now(),
            };
            rustix::io::write(&pipe, &sent.bytes()).unwrap();
            assert_eq!(Report::read(&reports), Some(sent));
        }
    }
}
