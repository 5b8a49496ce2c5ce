//! Sends a message exactly once, even if the sender is killed and another process continues; and
//! counts what is received as exactly.
//!
//! `sendmmsg(2)` and `recvmmsg(2)` write the number of bytes that they have transferred into the message's header before they
//! return. The header is in memory that outlives the process. A process that is killed leaves the
//! kernel only after both the sending and the writing, so the next process knows what was sent. The
//! invariant: [`Receipt::sent`] is exactly the number of bytes that have been sent.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::last_errno;
use super::rights::MAX_FDS;

/// How many words of shared memory a receipt takes.
const WORDS: usize = 8;

/// A control message with descriptors.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    fds: [RawFd; MAX_FDS],
}

/// Counts how many bytes of a message were sent, in [`WORDS`](Self::WORDS) words of shared memory
/// that are 0 at first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Receipt<'a> {
    /// The header (`struct mmsghdr`).
    header: &'a [AtomicU64; WORDS],
    /// The header's last word: the number of bytes that the last call has sent, which the kernel
    /// writes, and in the padding after it the number of bytes that earlier calls have sent.
    count: &'a AtomicU64,
}

// The kernel's count is in the last word, and takes half of it.
const _: () = assert!(std::mem::offset_of!(libc::mmsghdr, msg_len) == (WORDS - 1) * 8);
const _: () = assert!(std::mem::offset_of!(libc::mmsghdr, msg_hdr) == 0);
const _: () = assert!(size_of::<libc::mmsghdr>() == WORDS * 8);
const _: () = assert!(align_of::<libc::mmsghdr>() <= align_of::<AtomicU64>());

impl<'a> Receipt<'a> {
    /// How many words a receipt takes.
    pub(crate) const WORDS: usize = WORDS;

    /// A receipt in these words, which no other code uses. `None` if their number isn't
    /// [`WORDS`](Self::WORDS).
    pub(crate) fn new(words: &'a [AtomicU64]) -> Option<Self> {
        let header: &[AtomicU64; WORDS] = words.try_into().ok()?;
        let count = header.last()?;
        Some(Self { header, count })
    }

    /// Begins a new message: nothing of it has been sent.
    pub(crate) fn clear(self) {
        self.count.store(0, Ordering::Release);
    }

    /// How many bytes of the message have been sent.
    pub(crate) fn sent(self) -> usize {
        let [now, before] = halves(self.count.load(Ordering::Acquire));
        usize::try_from(u64::from(now) + u64::from(before)).unwrap_or(usize::MAX)
    }

    /// Sends the rest of the message `bytes`; `fds` go with its first byte.
    ///
    /// # Errors
    ///
    /// Those of `sendmsg(2)`; `E2BIG` for more descriptors than a message can carry.
    pub(crate) fn send(
        self,
        socket: impl AsFd,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        self.send_all(socket, bytes, fds, 0)
    }

    /// As [`send`](Self::send), without waiting.
    ///
    /// # Errors
    ///
    /// As for `send`; `EAGAIN` if the socket has no room.
    pub(crate) fn try_send(
        self,
        socket: impl AsFd,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Errno> {
        self.send_all(socket, bytes, fds, libc::MSG_DONTWAIT)
    }

    fn send_all(
        self,
        socket: impl AsFd,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: libc::c_int,
    ) -> Result<(), Errno> {
        loop {
            let sent = self.sent();
            let Some(left) = bytes.get(sent..).filter(|left| !left.is_empty()) else {
                return Ok(());
            };
            let fds = if sent == 0 { fds } else { &[] };
            // One store for both halves: a process that is killed in between would leave a wrong
            // sum.
            let before = u32::try_from(sent).map_err(|_large| Errno::MSGSIZE)?;
            self.count.store(word([0, before]), Ordering::Release);
            match self.send_some(socket.as_fd(), left, fds, flags) {
                Ok(()) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes one call.
    fn send_some(
        self,
        socket: BorrowedFd<'_>,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: libc::c_int,
    ) -> Result<(), Errno> {
        if fds.len() > MAX_FDS {
            return Err(Errno::TOOBIG);
        }
        // SAFETY: all zeroes is a valid header, followed by valid numbers.
        let mut control: Control = unsafe { std::mem::zeroed() };
        let length = size_of::<libc::cmsghdr>() + size_of_val(fds);
        control.head.cmsg_level = libc::SOL_SOCKET;
        control.head.cmsg_type = libc::SCM_RIGHTS;
        // The field's type depends on the C library.
        control.head.cmsg_len = length as _;
        for (to, fd) in control.fds.iter_mut().zip(fds) {
            *to = fd.as_raw_fd();
        }
        let mut part = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: all zeroes is a valid header: no address, no parts, no control message.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            header.msg_control = (&raw mut control).cast();
            header.msg_controllen = length.next_multiple_of(size_of::<usize>()) as _;
        }
        let flags = flags | libc::MSG_NOSIGNAL;
        self.call(header, |shared| {
            // SAFETY: the kernel reads the header and what it points to, all of which live until
            // the call returns, and writes the message's length in it.
            unsafe { libc::sendmmsg(socket.as_raw_fd(), shared, 1, flags as _) }
        })
    }

    /// Receives into `bytes` what there is, by one call that doesn't wait. Returns whether
    /// descriptors came with it, which are closed.
    ///
    /// # Errors
    ///
    /// Those of `recvmsg(2)`; `EAGAIN` if there is nothing.
    pub(crate) fn try_receive(self, socket: impl AsFd, bytes: &mut [u8]) -> Result<bool, Errno> {
        let mut part = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: all zeroes is a valid header: no address, no parts, no control message.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        let socket = socket.as_fd().as_raw_fd();
        let mut received = 0;
        self.call(header, |shared| {
            let none = std::ptr::null_mut();
            // SAFETY: the kernel writes to `bytes`, which is borrowed exclusively, and to the
            // header; all live until the call returns.
            let result =
                unsafe { libc::recvmmsg(socket, shared, 1, libc::MSG_DONTWAIT as _, none) };
            if result > 0 {
                // SAFETY: the kernel has written the header's flags.
                received = unsafe { (*shared).msg_hdr.msg_flags };
            }
            result
        })?;
        // There was no room for them.
        Ok(received & libc::MSG_CTRUNC != 0)
    }

    /// Counts all that was received or sent until now as `before`.
    pub(crate) fn settle(self, before: u32) {
        self.count.store(word([0, before]), Ordering::Release);
    }

    /// Makes a call with `header` in shared memory, where the kernel adds its count.
    fn call(
        self,
        header: libc::msghdr,
        call: impl FnOnce(*mut libc::mmsghdr) -> libc::c_int,
    ) -> Result<(), Errno> {
        let shared = self.header.as_ptr().cast_mut().cast::<libc::mmsghdr>();
        // SAFETY: the header is within the words, which have its size and its alignment; the words
        // are interior mutable, and no other code uses them.
        unsafe { shared.cast::<libc::msghdr>().write(header) };
        let result = call(shared);
        let failed = (result < 0).then(last_errno);
        // Leave no addresses of this process in shared memory.
        for word in self.header.iter().take(WORDS - 1) {
            word.store(0, Ordering::Relaxed);
        }
        failed.map_or(Ok(()), Err)
    }
}

/// The halves of a word, in the order in which they are in memory.
pub(crate) fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_ne_bytes)
}

/// The reverse of [`halves`].
pub(crate) fn word(halves: [u32; 2]) -> u64 {
    let [[a, b, c, d], [e, f, g, h]] = halves.map(u32::to_ne_bytes);
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn words() -> Vec<AtomicU64> {
        (0..Receipt::WORDS).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn sent_message_is_not_sent_again() {
        let words = words();
        let receipt = Receipt::new(&words).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for _ in 0..2 {
            receipt.send(&ours, b"once", &[]).unwrap();
            assert_eq!(receipt.sent(), 4);
        }
        receipt.clear();
        receipt.send(&ours, b"again", &[ours.as_fd()]).unwrap();
        drop(ours);
        let mut got = Vec::new();
        // Reading the bytes without a control buffer closes the descriptor that came with them.
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"onceagain");
        assert!(
            words[..Receipt::WORDS - 1]
                .iter()
                .all(|word| word.load(Ordering::Relaxed) == 0)
        );
    }

    #[test]
    fn partly_sent_message_is_completed() {
        let words = words();
        let receipt = Receipt::new(&words).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // The last call has sent one byte, earlier ones two.
        receipt.count.store(word([1, 2]), Ordering::Relaxed);
        receipt.send(&ours, b"abcdef", &[]).unwrap();
        assert_eq!(receipt.sent(), 6);
        drop(ours);
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "def");
    }

    #[test]
    fn failed_call_counts_nothing_as_sent() {
        let words = words();
        let receipt = Receipt::new(&words).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(receipt.send(&ours, b"lost", &[]), Err(Errno::PIPE));
        assert_eq!(receipt.sent(), 0);
        let many = vec![ours.as_fd(); MAX_FDS + 1];
        assert_eq!(receipt.send(&ours, b"many", &many), Err(Errno::TOOBIG));
        assert!(Receipt::new(&words[1..]).is_none());
    }
}
