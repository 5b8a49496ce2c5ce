//! Implements the FUSE [`Transport`] for a virtqueue's chains.
//!
//! The invariant: a request without a reply, because serving it panicked or its future was dropped,
//! gets the reply EIO. To the guest, an empty used element would look like a success without
//! content.

use std::rc::Rc;

use probe::probe;

use crate::fuse::abi::Opcode;
use crate::fuse::{OUT_HEADER_LEN, RecordedIntent, Transport, error_reply};
use crate::io::GuestBuffer;
use crate::metrics::{Count, Ended, Recorder, RequestStart};
use crate::virtqueue::Chain;

/// Where `unique` ends in `fuse_in_header`.
const UNIQUE_END: usize = 16;

/// One request's chain, with what the EIO reply needs.
#[derive(Debug)]
pub(super) struct ChainTransport {
    chain: Option<Chain>,
    /// The first bytes of the request, as far as they were read: length, opcode, `unique`.
    header: [u8; UNIQUE_END],
    header_len: usize,
    /// The intent that a previous server process recorded for the request.
    previous_intent: Option<RecordedIntent>,
    recorder: Rc<Recorder>,
    begun: RequestStart,
}

impl ChainTransport {
    pub(super) fn new(chain: Chain, recorder: &Rc<Recorder>) -> Self {
        // Without a recorded `unique`, the previous process did nothing for the request.
        let previous = chain.previous().filter(|it| it.unique != 0);
        Self {
            previous_intent: previous.map(|it| it.intent),
            chain: Some(chain),
            header: [0; UNIQUE_END],
            header_len: 0,
            begun: recorder.begin(),
            recorder: Rc::clone(recorder),
        }
    }

    /// Takes the chain, for a reply or for the drop, which end the request.
    fn take(&mut self) -> Option<Chain> {
        self.chain.take()
    }

    /// Returns the request's opcode; 0, which is none, if it was not read.
    fn opcode(&self) -> u32 {
        let [_, _, _, _, a, b, c, d, ..] = self.header;
        if self.header_len == UNIQUE_END {
            u32::from_le_bytes([a, b, c, d])
        } else {
            0
        }
    }

    /// Returns the request's `unique`, if it was read.
    fn unique(&self) -> Option<u64> {
        let [_, _, _, _, _, _, _, _, unique @ ..] = self.header;
        (self.header_len == UNIQUE_END).then_some(u64::from_le_bytes(unique))
    }

    /// Tells tracers that the request begins, whose first bytes are `request`.
    #[inline]
    fn probe_begin(&self, request: &[u8]) {
        let node: Option<&[u8; 8]> = request.get(UNIQUE_END..).and_then(<[u8]>::first_chunk);
        let node = node.map_or(0, |node| u64::from_le_bytes(*node));
        let queue = self.chain.as_ref().map_or(0, |it| it.used().index().0);
        probe!(
            ringfsd,
            request_begin,
            self.unique().unwrap_or(0),
            self.opcode(),
            node,
            queue
        );
    }

    /// Takes the chain, returns it by `send`, and counts the request, which has ended as `ended` says.
    fn end(&mut self, ended: Ended, send: impl FnOnce(Chain)) {
        let Some(chain) = self.take() else {
            return;
        };
        let queue = chain.used().index().0;
        send(chain);
        let (opcode, errno, bytes) = (ended.opcode, ended.errno, ended.read + ended.written);
        probe!(
            ringfsd,
            request_end,
            self.unique().unwrap_or(0),
            opcode,
            errno,
            bytes,
            queue
        );
        self.recorder.end(self.begun, &Ended { queue, ..ended });
    }
}

impl Transport for ChainTransport {
    fn note(&mut self, unique: u64) {
        if let Some(chain) = &self.chain {
            chain.record_unique(unique);
        }
    }

    fn record_intent(&mut self, intent: RecordedIntent) {
        if let Some(chain) = &self.chain {
            chain.record_intent(intent);
        }
    }

    fn note_malformed(&mut self) {
        self.recorder.count(Count::Malformed, 1);
    }

    fn previous_attempt(&self) -> Option<RecordedIntent> {
        self.previous_intent
    }

    fn is_incomplete(&self) -> bool {
        self.chain.as_ref().is_some_and(Chain::is_incomplete)
    }

    fn readable(&self) -> usize {
        self.chain.as_ref().map_or(0, Chain::readable)
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        let count = self.chain.as_mut().map_or(0, |chain| chain.read(into));
        if self.header_len == 0
            && let Some(start) = into[..count].first_chunk()
        {
            self.header = *start;
            self.header_len = UNIQUE_END;
            self.probe_begin(&into[..count]);
        } else if self.header_len != UNIQUE_END {
            let missing = &mut self.header[self.header_len..];
            let more = missing.len().min(count);
            missing[..more].copy_from_slice(&into[..more]);
            self.header_len += more;
            if self.header_len == UNIQUE_END {
                self.probe_begin(&[]);
            }
        }
        count
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        self.chain.as_mut()?.payload(len)
    }

    fn writable(&self) -> usize {
        self.chain.as_ref().map_or(0, Chain::writable)
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        self.chain.as_mut()?.reply_buffer(OUT_HEADER_LEN, len)
    }

    fn reply(mut self, parts: &[&[u8]]) {
        let opcode = self.opcode();
        let errno = parts.first().map_or(0, |header| errno_of(header));
        let ended = Ended {
            opcode,
            errno,
            written: match parts {
                [_, written, ..] if errno == 0 && opcode == WRITE => first_u32(written).into(),
                _ => 0,
            },
            ..Ended::default()
        };
        self.end(ended, |chain| chain.reply(parts));
    }

    fn reply_filled(mut self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        let ended = Ended {
            opcode: self.opcode(),
            errno: errno_of(header),
            read: filled as u64,
            ..Ended::default()
        };
        self.end(ended, |chain| chain.reply_filled(header, filled));
    }

    fn no_reply(mut self) {
        let ended = Ended {
            opcode: self.opcode(),
            ..Ended::default()
        };
        self.end(ended, Chain::no_reply);
    }
}

impl Drop for ChainTransport {
    fn drop(&mut self) {
        let Some(chain) = &self.chain else {
            return;
        };
        let used = chain.used().clone();
        let ended = Ended {
            opcode: self.opcode(),
            errno: libc::EIO.unsigned_abs(),
            ..Ended::default()
        };
        let unique = self.unique();
        self.end(ended, |chain| match unique {
            Some(unique) => {
                log::error!("request {unique:#x} was dropped without a reply; replying EIO");
                chain.reply(&[&error_reply(unique, rustix::io::Errno::IO)]);
            }
            None => drop(chain),
        });
        self.recorder.count(Count::Dropped, 1);
        // No later batch is certain to publish this.
        let published = used.publish_counted();
        self.recorder.published(published.chains, published.called);
    }
}

/// The number of WRITE.
const WRITE: u32 = Opcode::Write.number();

/// The errno in a reply's header; 0 if the request has succeeded.
fn errno_of(header: &[u8]) -> u32 {
    header.get(4..).map_or(0, first_u32).wrapping_neg()
}

/// The first number in `bytes`; 0 if there is none.
fn first_u32(bytes: &[u8]) -> u32 {
    bytes
        .first_chunk()
        .map_or(0, |word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Registry, Shape};
    use crate::virtqueue::tests::{DESCRIPTORS, Driver, PLAIN};

    /// `VIRTQ_DESC_F_WRITE`.
    const WRITE: u16 = 2;

    #[test]
    fn drop_of_request_replies_eio() {
        let shape = Shape {
            workers: 1,
            queues: 1,
            operation: |number| (number == 1).then(|| "lookup".to_owned()),
        };
        let metrics = Registry::for_this_process(shape).unwrap();
        let recorder = Rc::new(metrics.recorder(1));
        for read in [40, 16, 15, 0] {
            let mut driver = Driver::new(false);
            let mut queue = driver.queue(PLAIN);
            driver.write(0x5008, &0x1234_5678_u64.to_le_bytes());
            driver.chain(DESCRIPTORS, &[(0x5000, 40, 0), (0x6000, 16, WRITE)]);
            let chain = driver.pop_one(&mut queue).unwrap();
            let mut request = ChainTransport::new(chain, &recorder);
            request.read(&mut vec![0; read]);
            drop(request);
            assert_eq!(driver.used_index(), 1, "{read} bytes were read");
            if read >= UNIQUE_END {
                assert_eq!(driver.used_element(0), (0, 16));
                let header: [u8; 16] = driver.read(0x6000);
                assert_eq!(header[..4], 16_u32.to_le_bytes());
                assert_eq!(header[4..8], (-libc::EIO).to_le_bytes());
                assert_eq!(header[8..], 0x1234_5678_u64.to_le_bytes());
            } else {
                assert_eq!(driver.used_element(0), (0, 0));
            }
        }
        let snapshot = metrics.snapshot();
        assert_eq!(snapshot.guest_faults.dropped_requests, 4);
        assert_eq!(snapshot.operation("unknown").unwrap().requests, 4);
        assert_eq!(snapshot.operation("unknown").unwrap().errors, 4);
        // A chain without a header publishes itself.
        assert_eq!((snapshot.in_flight, snapshot.threads.batches), (0, 2));
    }
}
