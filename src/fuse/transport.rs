//! What a transport must offer for one request and its reply.

use crate::io::GuestBuffer;

/// Length of `fuse_out_header` in bytes; every reply begins with one.
pub const OUT_HEADER_LEN: usize = 16;

/// What a request that can't be done twice has said before it took effect. All words are 0 where
/// nothing was said.
pub type RecordedIntent = [u64; 4];

/// One request on its transport: bytes to read in order, room for the reply.
///
/// Each byte of the request is read once only, as the guest may change it meanwhile. One of
/// the three ways to answer must be taken; an exchange that is dropped instead answers an
/// error by itself, so that the guest never waits for ever.
pub trait Transport: Sized + 'static {
    /// Notes which request this is, where that outlives the process: before it takes effect.
    fn note(&mut self, _unique: u64) {}

    /// Says what the request intends, where that outlives the process: before it takes effect.
    fn record_intent(&mut self, _intent: RecordedIntent) {}

    /// Whether a process that is no more has begun this request and not answered it; then, what
    /// it had said.
    fn previous_attempt(&self) -> Option<RecordedIntent> {
        None
    }

    /// Bytes of the request that have not been read yet.
    fn readable(&self) -> usize;

    /// Copies the next bytes of the request; returns how many, fewer than asked only at the end.
    fn read(&mut self, into: &mut [u8]) -> usize;

    /// The next `len` bytes of the request, left where they are: the payload of a WRITE.
    /// `None` if there are not that many.
    fn payload(&mut self, len: usize) -> Option<GuestBuffer>;

    /// Room for the reply in bytes, header included.
    fn writable(&self) -> usize;

    /// The room behind the reply's header, `len` bytes of it: the target of a READ. `None` if
    /// there is not that much.
    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer>;

    /// Answers with `parts`, one after the other. Nothing is written, and the exchange ends
    /// with an empty reply, where the room is too small.
    fn reply(self, parts: &[&[u8]]);

    /// Answers with `header`, the `filled` bytes behind it being in place already: they came
    /// through [`reply_buffer`](Self::reply_buffer).
    fn reply_filled(self, header: &[u8; OUT_HEADER_LEN], filled: usize);

    /// Ends the exchange without a reply: FORGET and the like.
    fn no_reply(self);
}
