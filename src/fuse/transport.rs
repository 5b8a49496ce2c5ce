//! The interface between the dispatch and the transport of one request and its reply.

use crate::io::GuestBuffer;

/// Length of `fuse_out_header` in bytes; every reply begins with one.
pub const OUT_HEADER_LEN: usize = 16;

/// What was recorded about a request that can't be repeated, before it took effect. All words are 0
/// if nothing was recorded.
pub(crate) type RecordedIntent = [u64; 4];

/// One request on its transport: bytes to read in order, and space for the reply.
///
/// Each byte of the request is read only once, as the guest may change it meanwhile. One of the
/// three replying methods must be called. A transport that is dropped without a reply sends an
/// error by itself, so the guest never waits forever.
pub trait Transport: Sized + 'static {
    /// Records the request's number where it outlives the process. Called before the request takes
    /// effect.
    fn note(&mut self, _unique: u64) {}

    /// Records what the request is about to do where it outlives the process. Called before the
    /// request takes effect.
    fn record_intent(&mut self, _intent: RecordedIntent) {}

    /// The request can't be decoded.
    fn note_malformed(&mut self) {}

    /// What a previous process recorded about this request, if it began the request and did not
    /// answer it.
    fn previous_attempt(&self) -> Option<RecordedIntent> {
        None
    }

    /// Whether only the beginning of the request, or of the space for its reply, can be accessed. The
    /// request then fails with `EFAULT`.
    fn is_incomplete(&self) -> bool {
        false
    }

    /// Bytes of the request that have not been read yet.
    fn readable(&self) -> usize;

    /// Copies the next bytes of the request and returns their number, which is less than asked for
    /// only at the end of the request.
    fn read(&mut self, into: &mut [u8]) -> usize;

    /// The next `len` bytes of the request, without a copy: the payload of a WRITE. `None` if fewer
    /// are left.
    fn payload(&mut self, len: usize) -> Option<GuestBuffer>;

    /// Space for the reply in bytes, header included.
    fn writable(&self) -> usize;

    /// The first `len` bytes of the space behind the reply's header: the target of a READ. `None`
    /// if there is less.
    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer>;

    /// Replies with `parts`, one after the other. If the space is too small, nothing is written and
    /// the reply is empty.
    fn reply(self, parts: &[&[u8]]);

    /// Replies with `header` and the `filled` bytes behind it, which were written through
    /// [`reply_buffer`](Self::reply_buffer).
    fn reply_filled(self, header: &[u8; OUT_HEADER_LEN], filled: usize);

    /// Completes the request without a reply: FORGET and BATCH_FORGET, INTERRUPT.
    fn no_reply(self);
}
