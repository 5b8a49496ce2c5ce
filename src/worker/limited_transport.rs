//! A request on a share whose guest is limited: the chain, and what it has taken from the buckets.
//!
//! Which buckets a request takes from is in its first bytes. They are read once, when the chain is
//! taken off the ring, and the session gets this copy. The invariant: what a request pays for is
//! what is served.

use std::rc::Rc;
use std::sync::Arc;

use rustix::io::Errno;

use super::chain_transport::ChainTransport;
use crate::fuse::abi::{Handler, Opcode};
use crate::fuse::{OUT_HEADER_LEN, RecordedIntent, Transport, error_reply};
use crate::io::GuestBuffer;
use crate::limits::{Buckets, Kind, Load};
use crate::metrics::Recorder;
use crate::virtqueue::{Chain, UsedRing};

/// Bytes of `fuse_in_header`, and those of `fuse_read_in` or `fuse_write_in` up to the end of `size`.
/// The payload of a WRITE begins behind them.
const START: usize = 60;

/// A request, and what it takes from buckets.
#[derive(Debug)]
pub(super) struct LimitedTransport {
    inner: ChainTransport,
    used: Arc<UsedRing>,
    start: [u8; START],
    /// The part of `start` that the session hasn't read.
    unread: std::ops::Range<usize>,
    /// A previous process had taken the chain.
    resumed: bool,
    /// What it takes from the buckets; `None` if it is never held back.
    load: Option<Load>,
    /// The buckets that it has paid for its bytes.
    paid: Option<Arc<Buckets>>,
}

impl LimitedTransport {
    pub(super) fn new(chain: Chain, recorder: &Rc<Recorder>) -> Self {
        let used = Arc::clone(chain.used());
        let resumed = chain.previous().is_some();
        let mut inner = ChainTransport::new(chain, recorder);
        let mut start = [0; START];
        let len = inner.read(&mut start);
        let load = load(start.get(..len).unwrap_or_default(), &inner);
        Self {
            inner,
            used,
            start,
            unread: 0..len,
            resumed,
            load,
            paid: None,
        }
    }

    /// The used ring of the queue that it came on.
    pub(super) fn used(&self) -> &Arc<UsedRing> {
        &self.used
    }

    /// What it takes from the buckets; `None` if it is never held back.
    pub(super) fn load(&self) -> Option<Load> {
        self.load
    }

    /// Whether a previous process had taken the chain.
    pub(super) fn is_resumed(&self) -> bool {
        self.resumed
    }

    /// The number of the request.
    pub(super) fn unique(&self) -> u64 {
        word(&self.start, 8).map_or(0, u64::from_le_bytes)
    }

    /// Its load is taken from these buckets, and corrected when it is known what was transferred.
    pub(super) fn pays(mut self, buckets: &Arc<Buckets>) -> Self {
        if self.load.is_some_and(|load| load.bytes != 0) {
            self.paid = Some(Arc::clone(buckets));
        }
        self
    }

    /// Fails the request, which has had no effect.
    pub(super) fn interrupt(self) {
        let reply = error_reply(self.unique(), Errno::INTR);
        self.inner.reply(&[&reply]);
    }

    fn correct(&mut self, transferred: u64) {
        if let (Some(buckets), Some(load)) = (self.paid.take(), self.load) {
            buckets.correct(load, transferred);
        }
    }
}

/// What a request that begins with `start` takes from the buckets.
fn load(start: &[u8], request: &ChainTransport) -> Option<Load> {
    let opcode = word(start, 4).map_or(0, u32::from_le_bytes);
    let size = || word(start, 56).map_or(0, |size| u64::from(u32::from_le_bytes(size)));
    let at_most = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
    let (kind, bytes) = match Opcode::from_number(opcode) {
        Some(opcode) if is_exempt(opcode) => return None,
        Some(Opcode::Read) => {
            let room = request.writable().saturating_sub(OUT_HEADER_LEN);
            (Kind::Read, size().min(at_most(room)))
        }
        Some(Opcode::Write) => (Kind::Write, size().min(at_most(request.readable()))),
        // A copy takes its bytes when their number is known.
        Some(Opcode::CopyFileRange | Opcode::CopyFileRange64) => (Kind::Write, 1),
        Some(Opcode::Fallocate) => (Kind::Write, 0),
        _ => (Kind::Metadata, 0),
    };
    Some(Load { kind, bytes })
}

/// Whether requests are never held back: those that release what the guest holds, those that end a
/// wait, and those that begin or end a session.
fn is_exempt(opcode: Opcode) -> bool {
    match opcode.row().handler {
        Handler::Session | Handler::Forget | Handler::Interrupt => true,
        _ => matches!(opcode, Opcode::Release | Opcode::Releasedir),
    }
}

/// The bytes of a word at `at`.
fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The bytes that a reply says were transferred.
fn transferred(parts: &[&[u8]]) -> u64 {
    let error = parts.first().and_then(|header| word(header, 4));
    if error.map(i32::from_le_bytes) != Some(0) {
        return 0;
    }
    // `size` of `fuse_write_out`, or the low half of `fuse_copy_file_range_out`: one copy is
    // shorter than 4 GiB.
    let size = parts.get(1).and_then(|body| word(body, 0));
    size.map_or(0, |size| u64::from(u32::from_le_bytes(size)))
}

impl Transport for LimitedTransport {
    fn note(&mut self, unique: u64) {
        self.inner.note(unique);
    }

    fn record_intent(&mut self, intent: RecordedIntent) {
        self.inner.record_intent(intent);
    }

    fn note_malformed(&mut self) {
        self.inner.note_malformed();
    }

    fn previous_attempt(&self) -> Option<RecordedIntent> {
        self.inner.previous_attempt()
    }

    fn readable(&self) -> usize {
        self.inner.readable() + self.unread.len()
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        let unread = self.start.get(self.unread.clone()).unwrap_or_default();
        let first = unread.len().min(into.len());
        let (copied, rest) = into.split_at_mut(first);
        copied.copy_from_slice(&unread[..first]);
        self.unread.start += first;
        if rest.is_empty() {
            return first;
        }
        first + self.inner.read(rest)
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        if !self.unread.is_empty() {
            return None;
        }
        self.inner.payload(len)
    }

    fn writable(&self) -> usize {
        self.inner.writable()
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        self.inner.reply_buffer(len)
    }

    fn reply(mut self, parts: &[&[u8]]) {
        self.correct(transferred(parts));
        self.inner.reply(parts);
    }

    fn reply_filled(mut self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        self.correct(u64::try_from(filled).unwrap_or(u64::MAX));
        self.inner.reply_filled(header, filled);
    }

    fn no_reply(self) {
        self.inner.no_reply();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::opcode_name;
    use crate::metrics::{Registry, Shape};
    use crate::virtqueue::tests::{DESCRIPTORS, Driver, PLAIN};

    /// `VIRTQ_DESC_F_WRITE`.
    const WRITE: u16 = 2;

    /// Lets `look` see a request of `opcode` and `size` whose payload has `payload` bytes.
    fn with_request<T>(
        opcode: Opcode,
        size: u32,
        payload: u32,
        look: impl FnOnce(LimitedTransport) -> T,
    ) -> T {
        let mut driver = Driver::new(false);
        let mut queue = driver.queue(PLAIN);
        driver.write(0x5004, &opcode.number().to_le_bytes());
        driver.write(0x5008, &0x1234_u64.to_le_bytes());
        driver.write(0x5000 + 56, &size.to_le_bytes());
        driver.write(0x5000 + 76, b"last");
        let chain = [(0x5000, 80 + payload, 0), (0x6000, 16 + 1000, WRITE)];
        driver.chain(DESCRIPTORS, &chain);
        let shape = Shape {
            workers: 1,
            queues: 1,
            operation: opcode_name,
        };
        let metrics = Registry::for_this_process(shape).unwrap();
        let recorder = Rc::new(metrics.recorder(1));
        let chain = driver.pop_one(&mut queue).unwrap();
        look(LimitedTransport::new(chain, &recorder))
    }

    fn load_of(opcode: Opcode, size: u32, payload: u32) -> Option<Load> {
        with_request(opcode, size, payload, |request| request.load())
    }

    #[test]
    fn load_is_what_can_be_transferred() {
        let load = |kind, bytes| Some(Load { kind, bytes });
        assert_eq!(load_of(Opcode::Read, 100, 0), load(Kind::Read, 100));
        assert_eq!(load_of(Opcode::Read, u32::MAX, 0), load(Kind::Read, 1000));
        assert_eq!(load_of(Opcode::Write, 100, 200), load(Kind::Write, 100));
        assert!(load_of(Opcode::Write, u32::MAX, 200).unwrap().bytes < 300);
        assert_eq!(load_of(Opcode::Getattr, 100, 0), load(Kind::Metadata, 0));
        assert_eq!(load_of(Opcode::Fsync, 100, 0), load(Kind::Metadata, 0));
        assert_eq!(load_of(Opcode::Fallocate, 100, 0), load(Kind::Write, 0));
    }

    #[test]
    fn what_frees_or_interrupts_is_exempt() {
        let mut exempt: Vec<_> = Opcode::ALL.to_vec();
        exempt.retain(|opcode| load_of(*opcode, 0, 0).is_none());
        let expected = [
            Opcode::Forget,
            Opcode::Release,
            Opcode::Init,
            Opcode::Releasedir,
            Opcode::Interrupt,
            Opcode::Destroy,
            Opcode::BatchForget,
        ];
        assert_eq!(exempt, expected);
    }

    #[test]
    fn session_reads_each_byte_once_and_in_order() {
        with_request(Opcode::Write, 8, 8, |mut request| {
            assert_eq!(request.unique(), 0x1234);
            assert_eq!(request.readable(), 88);
            assert!(request.payload(8).is_none(), "the header isn't read yet");
            let mut header = [0; 40];
            assert_eq!(request.read(&mut header), 40);
            assert_eq!(header[8..10], [0x34, 0x12]);
            let mut arguments = [0; 40];
            assert_eq!(request.read(&mut arguments), 40);
            assert_eq!(arguments[16..20], 8_u32.to_le_bytes());
            assert_eq!(&arguments[36..], b"last");
            assert_eq!(request.readable(), 8);
            assert_eq!(request.payload(8).unwrap().len(), 8);
            request.no_reply();
        });
    }

    #[test]
    fn reply_tells_what_was_transferred() {
        let header = |error: i32| {
            let mut header = [0; OUT_HEADER_LEN];
            header[4..8].copy_from_slice(&error.to_le_bytes());
            header
        };
        let size = 77_u64.to_le_bytes();
        assert_eq!(transferred(&[&header(0), &size, &[]]), 77);
        assert_eq!(transferred(&[&header(-libc::EIO), &size, &[]]), 0);
        assert_eq!(transferred(&[&header(0)]), 0);
        assert_eq!(transferred(&[]), 0);
    }
}
