//! Detects a VMM that has not shared the guest's memory.
//!
//! Without shared memory no request can be served, and every VMM has to be configured to share it;
//! forgetting this is the most common mistake. The invariant: nothing here changes a session, only
//! the messages about it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{FrontendReq, VhostUserMemory, VhostUserMemoryRegion};

use super::Runner;
use super::message::{FdMessage, Header};
use super::message_reader::Watch;
use super::session::{SHARE_MEMORY_HINT, Session, SessionError};
use super::vring::Vring;
use crate::virtqueue::QueueIndex;

/// Returns an error if a refused message should have handed over memory and lacks descriptors.
pub(super) fn diagnose(message: &FdMessage) -> Option<SessionError> {
    let header = Header::read(&message.bytes)?;
    let body = message.bytes.get(Header::LEN..)?;
    let regions = match FrontendReq::try_from(header.request) {
        Ok(FrontendReq::SET_MEM_TABLE) => {
            let regions = u32::from_ne_bytes(*body.first_chunk()?);
            let described = body.len().checked_sub(size_of::<VhostUserMemory>())?
                / size_of::<VhostUserMemoryRegion>();
            // A number that differs from the regions in the message is another fault.
            usize::try_from(regions)
                .is_ok_and(|regions| regions == described)
                .then_some(regions)?
        }
        Ok(FrontendReq::ADD_MEM_REG) => 1,
        _ => return None,
    };
    let fds = message.fds.len();
    let missing = regions == 0 || u32::try_from(fds).is_ok_and(|fds| fds < regions);
    missing.then_some(SessionError::NotShared { regions, fds })
}

/// How long after the first kick its queue may stay empty.
const GRACE: Duration = Duration::from_secs(2);

/// Progress of the check for private memory, which runs once in a session.
///
/// A VMM may hand over a file that it has mapped privately (QEMU's memory-backend-file without
/// share=on). Then the server doesn't see what the guest writes, and a queue that the guest has
/// kicked is empty.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum PrivateMemoryCheck {
    /// Waiting for the first kick of a request queue.
    #[default]
    AwaitingKick,
    /// A queue was kicked and will be checked at this time.
    CheckAt(Instant),
    /// The check is over.
    Done,
}

impl PrivateMemoryCheck {
    /// Whether the check waits for a kick.
    pub(super) fn awaits_kick(self) -> bool {
        matches!(self, Self::AwaitingKick)
    }

    /// Returns the condition to wait for; `kick` is that of [`Session::first_kick`].
    pub(super) fn watch(self, kick: Option<&Arc<OwnedFd>>) -> Watch<'_> {
        match (self, kick) {
            (Self::AwaitingKick, Some(kick)) => Watch::Readable(kick.as_fd()),
            (Self::CheckAt(time), _) => Watch::Until(time),
            (Self::AwaitingKick | Self::Done, _) => Watch::Nothing,
        }
    }

    /// Advances the check after its condition came true. Returns whether to check the queue now.
    pub(super) fn watch_fired(&mut self) -> bool {
        let due = matches!(self, Self::CheckAt(_));
        *self = if due {
            Self::Done
        } else {
            Self::CheckAt(Instant::now() + GRACE)
        };
        due
    }
}

impl<R: Runner> Session<'_, R> {
    /// Returns the kick eventfd of the first request queue that runs. Nothing reads it, so it stays
    /// readable after a kick.
    pub(super) fn first_kick(&self) -> Option<Arc<OwnedFd>> {
        let mut requests = self.vrings.iter().skip(1);
        requests.find(|vring| vring.running)?.kick.clone()
    }

    /// Logs a warning if a request queue was kicked and the indexes of all rings that run are still 0.
    /// One ring that has been used shows that the memory is shared: QEMU also kicks queues by itself.
    pub(super) fn warn_of_private_memory(&self) {
        let mut running = self.vrings.iter().filter(|vring| vring.running);
        if !running.all(|vring| self.is_blank(vring) == Some(true)) {
            return;
        }
        let requests = (0..).map(QueueIndex).zip(&self.vrings).skip(1);
        let mut kicked = requests.filter(|(_, vring)| vring.running && is_kicked(vring));
        if let Some((index, _)) = kicked.next() {
            log::warn!(
                "the guest has kicked queue {index}, which is empty: if its mount hangs, the VMM has \
                 not shared the VM's memory; {SHARE_MEMORY_HINT}"
            );
        }
    }

    fn is_blank(&self, vring: &Vring) -> Option<bool> {
        let addresses = vring.addresses?;
        // A ring begins with its flags and its index, two bytes each.
        let index = |ring: u64| {
            let guest = self.memory().guest_address(ring.checked_add(2)?)?;
            let mut bytes = [0; 2];
            let mapped = self.memory().read(guest, &mut bytes);
            mapped.then(|| u16::from_le_bytes(bytes))
        };
        Some(index(addresses.available)? == 0 && index(addresses.used)? == 0)
    }
}

fn is_kicked(vring: &Vring) -> bool {
    let Some(kick) = &vring.kick else {
        return false;
    };
    let mut fds = [PollFd::from_borrowed_fd(kick.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET_MEM_TABLE: u32 = FrontendReq::SET_MEM_TABLE as u32;
    const ADD_MEM_REG: u32 = FrontendReq::ADD_MEM_REG as u32;

    fn message(words: &[u32], fds: usize) -> FdMessage {
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        FdMessage {
            bytes: words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
            fds: (0..fds).map(|_| open()).collect(),
        }
    }

    #[test]
    fn diagnose_reports_memory_without_descriptor() {
        let table = |regions: u32, described: usize| {
            let head = [SET_MEM_TABLE, 1, 8, regions, 0];
            [&head[..], &vec![0; 8 * described]].concat()
        };
        assert!(diagnose(&message(&table(0, 0), 0)).is_some());
        assert!(diagnose(&message(&table(2, 2), 1)).is_some());
        assert!(diagnose(&message(&table(2, 2), 2)).is_none());
        assert!(diagnose(&message(&table(2, 1), 1)).is_none());
        assert!(diagnose(&message(&table(u32::MAX, 1), 1)).is_none());
        assert!(diagnose(&message(&[ADD_MEM_REG, 1, 40], 0)).is_some());
        assert!(diagnose(&message(&[1, 1, 0], 0)).is_none());
        assert!(diagnose(&message(&[SET_MEM_TABLE], 0)).is_none());
        let text = diagnose(&message(&table(1, 1), 0)).unwrap().to_string();
        assert!(
            text.contains("share=on") && text.contains("shared=on"),
            "{text}"
        );
    }
}
