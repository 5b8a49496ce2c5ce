//! Tells a VMM that keeps the guest's memory to itself from one that breaks the protocol.
//!
//! Without memory that both have no request can be served, and each VMM has to be told to share it: the
//! mistake that is made most often. The invariant: nothing here changes a session, only what is said
//! of its end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Runner;
use super::message_reader::Watch;
use super::proxy::FdMessage;
use super::session::{SHARE, Session, SessionError};
use super::vring::Vring;
use crate::virtqueue::QueueIndex;
use crate::virtqueue::memory::Window;

/// `VHOST_USER_SET_MEM_TABLE` and `VHOST_USER_ADD_MEM_REG`.
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;

/// Bytes of a message's header, and of a region in a table.
const HEADER: usize = 12;
const REGION: usize = 32;

/// What is wrong with a message that was refused, if it should have brought memory.
pub(super) fn missing(message: &FdMessage) -> Option<SessionError> {
    let word = |at: usize| {
        let bytes = message.bytes.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map(|bytes| u32::from_ne_bytes(*bytes))
    };
    let regions = match word(0)? {
        // The number comes first in the body, and four bytes later as many regions.
        SET_MEM_TABLE => {
            let regions = word(HEADER)?;
            let described = message.bytes.len().checked_sub(HEADER + 8)? / REGION;
            // What counts more or fewer than it has is another fault.
            usize::try_from(regions)
                .is_ok_and(|regions| regions == described)
                .then_some(regions)?
        }
        ADD_MEM_REG => 1,
        _ => return None,
    };
    let fds = message.fds.len();
    let none = regions == 0 || u32::try_from(fds).is_ok_and(|fds| fds < regions);
    none.then_some(SessionError::NotShared { regions, fds })
}

/// How long after the first kick something has to be in its queue.
const GRACE: Duration = Duration::from_secs(2);

/// A VMM may hand over a file that it has mapped for itself alone (QEMU's memory-backend-file without
/// share=on). Then nothing of what the guest writes is seen here, and a queue that it has kicked is
/// empty. Looked at once in a session.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Suspicion {
    /// No request queue has been kicked.
    #[default]
    Open,
    /// One has, and is looked at then.
    Until(Instant),
    /// It was looked at.
    Over,
}

impl Suspicion {
    /// Whether a kick is waited for.
    pub(super) fn is_open(self) -> bool {
        matches!(self, Self::Open)
    }

    pub(super) fn watch(self, kick: Option<&Arc<OwnedFd>>) -> Watch<'_> {
        match (self, kick) {
            (Self::Open, Some(kick)) => Watch::Readable(kick.as_fd()),
            (Self::Until(end), _) => Watch::Until(end),
            (Self::Open | Self::Over, _) => Watch::Nothing,
        }
    }

    /// What was watched for has come about; whether the queue is to be looked at now.
    pub(super) fn is_due(&mut self) -> bool {
        let due = matches!(self, Self::Until(_));
        *self = if due {
            Self::Over
        } else {
            Self::Until(Instant::now() + GRACE)
        };
        due
    }
}

impl<R: Runner> Session<'_, R> {
    /// The kick eventfd of the first request queue that runs. It is never read, and so stays readable.
    pub(super) fn first_kick(&self) -> Option<Arc<OwnedFd>> {
        let mut requests = self.vrings.iter().skip(1);
        requests.find(|vring| vring.running)?.kick.clone()
    }

    /// Tells of it, if a request queue was kicked in whose rings nothing has ever been.
    pub(super) fn tell_of_private_memory(&self) {
        let requests = (0..).map(QueueIndex).zip(&self.vrings).skip(1);
        let mut kicked = requests.filter(|(_, vring)| vring.running && is_kicked(vring));
        if let Some((index, _)) = kicked.find(|(_, vring)| self.is_blank(vring) == Some(true)) {
            log::warn!(
                "the guest has kicked queue {index}, and nothing is in it: if its mount hangs, the VMM \
                 has mapped the VM's memory for itself alone; {SHARE}"
            );
        }
    }

    fn is_blank(&self, vring: &Vring) -> Option<bool> {
        let addresses = vring.addresses?;
        // Flags and index, two bytes each.
        let index = |ring| {
            let window = Window::new(self.memory(), ring, 4, 2)?;
            Some(window.load_u16(2, Ordering::Relaxed))
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

    fn message(words: &[u32], fds: usize) -> FdMessage {
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        FdMessage {
            bytes: words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
            fds: (0..fds).map(|_| open()).collect(),
        }
    }

    #[test]
    fn memory_without_a_descriptor_is_not_shared() {
        let table = |regions: u32, described: usize| {
            let head = [SET_MEM_TABLE, 1, 8, regions, 0];
            [&head[..], &vec![0; 8 * described]].concat()
        };
        assert!(missing(&message(&table(0, 0), 0)).is_some());
        assert!(missing(&message(&table(2, 2), 1)).is_some());
        assert!(missing(&message(&table(2, 2), 2)).is_none());
        assert!(missing(&message(&table(2, 1), 1)).is_none());
        assert!(missing(&message(&table(u32::MAX, 1), 1)).is_none());
        assert!(missing(&message(&[ADD_MEM_REG, 1, 40], 0)).is_some());
        assert!(missing(&message(&[1, 1, 0], 0)).is_none());
        assert!(missing(&message(&[SET_MEM_TABLE], 0)).is_none());
        let text = missing(&message(&table(1, 1), 0)).unwrap().to_string();
        assert!(
            text.contains("share=on") && text.contains("shared=on"),
            "{text}"
        );
    }
}
