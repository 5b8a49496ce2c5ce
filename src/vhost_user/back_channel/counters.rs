//! Counts the requests and answers on the back channel, in memory that outlives the process.
//!
//! An answer doesn't say which request it belongs to; only their order tells. So a process that
//! continues after another was killed must know whether the last request was sent, and how much of
//! an answer was received. Both are counted by the kernel, in the system call that sends or
//! receives (`sys/receipt.rs`). The invariant: [`RequestCounters::due`] is exactly the number of answers
//! that are still to be received.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::sys::receipt::{Receipt, halves, word};
use crate::sys::shared::{MappedWords, WORD};
use crate::vhost_user::message::Header;

/// Length of an answer: a header and a number.
pub(super) const ANSWER: usize = Header::LEN + 8;

/// Positions of the words.
mod at {
    /// The receipt of the request that is sent.
    pub(super) const SENDING: usize = 0;
    /// The receipt of the answers. It has counted whole answers in the upper 24 bits of its second
    /// half, and bytes of the next one in the lower 8.
    pub(super) const RECEIVING: usize = 8;
    /// The length of the request that is being sent, or 0; and in the upper half the requests that
    /// were sent.
    pub(super) const SENT: usize = 16;
    /// Whether the channel can't be used any more.
    pub(super) const BROKEN: usize = 17;
    /// How many words there are.
    pub(super) const END: usize = 18;
}

/// Requests and answers are counted modulo this.
const MODULUS: u32 = 1 << 24;

/// What [`RequestCounters::receive`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// An answer is complete.
    Answer,
    /// Nothing, or not enough.
    Nothing,
    /// The end of the stream.
    End,
    /// Descriptors, which no answer has.
    Descriptors,
}

/// The counters of one back channel.
#[derive(Debug)]
pub(super) struct RequestCounters {
    words: MappedWords,
}

impl RequestCounters {
    /// Counters at 0, in memory of their own.
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"ringfsd-back-channel", flags)?;
        rustix::fs::ftruncate(&file, (at::END * WORD) as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(Self {
            words: MappedWords::map(file, at::END)?,
        })
    }

    /// Continues with the counters of a process that has ended.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the file isn't one that [`new`](Self::new) has made.
    pub(super) fn resume(file: OwnedFd) -> Result<Self, Errno> {
        let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK);
        let len = usize::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
        let long_enough = len >= at::END * WORD;
        if !sealed || !long_enough {
            return Err(Errno::INVAL);
        }
        let counters = Self {
            words: MappedWords::map(file, at::END)?,
        };
        counters.settle();
        Ok(counters)
    }

    /// The file that the counters are in.
    pub(super) fn file(&self) -> Option<&OwnedFd> {
        self.words.file()
    }

    /// Whether the channel can't be used any more.
    pub(super) fn is_broken(&self) -> bool {
        self.load(at::BROKEN) != 0
    }

    /// The channel can't be used any more, by this process or the next.
    pub(super) fn break_off(&self) {
        self.store(at::BROKEN, 1);
    }

    /// How many answers are still to be received.
    pub(super) fn due(&self) -> u32 {
        let [_, sent] = halves(self.load(at::SENT));
        let (answers, _) = self.received();
        sent.wrapping_sub(answers) % MODULUS
    }

    /// How many bytes of the next answer have been received, by this process or another.
    pub(super) fn partial(&self) -> usize {
        self.received().1
    }

    /// Sends a request, without waiting.
    ///
    /// # Errors
    ///
    /// Those of `sendmsg(2)`; nothing was sent then, or the channel is broken.
    pub(super) fn send(
        &self,
        socket: impl AsFd,
        request: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        let receipt = self.receipt(at::SENDING)?;
        let len = u32::try_from(request.len()).map_err(|_large| Errno::MSGSIZE)?;
        let [_, sent] = halves(self.load(at::SENT));
        // In this order: the receipt is about the request that is named next.
        receipt.clear();
        self.store(at::SENT, word([len, sent]));
        let result = receipt.try_send(socket, request, fds);
        self.settle();
        result
    }

    /// Decides what became of the request that was being sent.
    fn settle(&self) {
        let [len, sent] = halves(self.load(at::SENT));
        let done = self.receipt(at::SENDING).map_or(0, Receipt::sent);
        if len == 0 || done == 0 {
            self.store(at::SENT, word([0, sent]));
        } else if u32::try_from(done) == Ok(len) {
            self.store(at::SENT, word([0, sent.wrapping_add(1) % MODULUS]));
        } else {
            // The kernel sends what is shorter than a page at once.
            self.break_off();
        }
    }

    /// Receives what there is of the next answer, without waiting, into its place in `answer`.
    ///
    /// # Errors
    ///
    /// Those of `recvmsg(2)`.
    pub(super) fn receive(
        &self,
        socket: impl AsFd,
        answer: &mut [u8; ANSWER],
    ) -> Result<Found, Errno> {
        let receipt = self.receipt(at::RECEIVING)?;
        let (answers, partial) = self.received();
        receipt.settle(answers << 8 | u32::try_from(partial).unwrap_or(0));
        let left = answer.get_mut(partial..).unwrap_or_default();
        let has_fds = match receipt.try_receive(socket, left) {
            Ok(has_fds) => has_fds,
            Err(Errno::AGAIN) => return Ok(Found::Nothing),
            Err(error) => return Err(error),
        };
        match self.received() {
            _ if has_fds => Ok(Found::Descriptors),
            (now, _) if now != answers => Ok(Found::Answer),
            (_, now) if now == partial => Ok(Found::End),
            _ => Ok(Found::Nothing),
        }
    }

    /// Whole answers, and bytes of the next one, that have been received.
    fn received(&self) -> (u32, usize) {
        let [now, before] = halves(self.load(at::RECEIVING + Receipt::WORDS - 1));
        let bytes = usize::try_from((before & 0xff).saturating_add(now)).unwrap_or(usize::MAX);
        let answers = before >> 8;
        if bytes < ANSWER {
            (answers, bytes)
        } else {
            ((answers + 1) % MODULUS, 0)
        }
    }

    fn receipt(&self, first: usize) -> Result<Receipt<'_>, Errno> {
        let words = self.words.get_some(first, Receipt::WORDS);
        words.and_then(Receipt::new).ok_or(Errno::INVAL)
    }

    fn word(&self, index: usize) -> Option<&AtomicU64> {
        self.words.get(index)
    }

    fn load(&self, index: usize) -> u64 {
        self.word(index)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, index: usize, value: u64) {
        if let Some(word) = self.word(index) {
            word.store(value, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What the next process finds.
    fn next(counters: &RequestCounters) -> RequestCounters {
        RequestCounters::resume(counters.file().unwrap().try_clone().unwrap()).unwrap()
    }

    #[test]
    fn request_counts_exactly_if_it_was_sent() {
        // How many of 12 bytes the kernel has sent before the process was killed.
        for (sent, due) in [(0, 0), (12, 1)] {
            let counters = RequestCounters::new().unwrap();
            counters.store(at::SENT, word([12, 7]));
            counters.store(at::RECEIVING + 7, word([0, 7 << 8]));
            counters.store(at::SENDING + 7, word([sent, 0]));
            let next = next(&counters);
            assert_eq!((next.due(), next.is_broken()), (due, false));
        }
        let counters = RequestCounters::new().unwrap();
        counters.store(at::SENT, word([12, 0]));
        counters.store(at::SENDING + 7, word([5, 0]));
        assert!(next(&counters).is_broken());
    }

    #[test]
    fn answer_counts_exactly_if_it_was_received() {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        let counters = RequestCounters::new().unwrap();
        counters.send(&ours, &[1; 12], &[]).unwrap();
        vmm.read_exact(&mut [0; 12]).unwrap();
        let mut bytes = [0; ANSWER];
        assert_eq!(counters.receive(&ours, &mut bytes), Ok(Found::Nothing));
        vmm.write_all(&[7; 5]).unwrap();
        assert_eq!(counters.receive(&ours, &mut bytes), Ok(Found::Nothing));
        let counters = next(&counters);
        assert_eq!((counters.due(), counters.partial()), (1, 5));
        vmm.write_all(&[8; ANSWER]).unwrap();
        assert_eq!(counters.receive(&ours, &mut bytes), Ok(Found::Answer));
        assert_eq!(bytes[..6], [7, 7, 7, 7, 7, 8]);
        let counters = next(&counters);
        assert_eq!((counters.due(), counters.partial()), (0, 0));
        assert_eq!(counters.receive(&ours, &mut bytes), Ok(Found::Nothing));
        assert_eq!(counters.partial(), 5, "bytes that nobody has asked for");
        drop(vmm);
        assert_eq!(counters.receive(&ours, &mut bytes), Ok(Found::End));
    }

    #[test]
    fn counts_wrap_around() {
        let (mut vmm, ours) = UnixStream::pair().unwrap();
        let counters = RequestCounters::new().unwrap();
        counters.store(at::SENT, word([0, MODULUS - 1]));
        counters.store(at::RECEIVING + 7, word([0, (MODULUS - 1) << 8]));
        for _ in 0..3 {
            assert_eq!(counters.due(), 0);
            counters.send(&ours, &[1; 12], &[]).unwrap();
            assert_eq!(counters.due(), 1);
            vmm.write_all(&[0; ANSWER]).unwrap();
            let found = counters.receive(&ours, &mut [0; ANSWER]);
            assert_eq!(found, Ok(Found::Answer));
        }
    }

    #[test]
    fn only_its_own_memory_is_resumed() {
        let plain = rustix::fs::memfd_create(c"other", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&plain, 4096).unwrap();
        assert!(RequestCounters::resume(plain).is_err());
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(RequestCounters::resume(null.into()).is_err());
    }
}
