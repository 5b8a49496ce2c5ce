//! A chain as FUSE sees it: where virtio and FUSE meet.
//!
//! The invariant: a request that nobody answered, because what served it panicked or was
//! dropped, is answered with EIO. An empty used element would look to the guest like a success
//! without content.

use crate::fuse::{OUT_HEADER_LEN, RecordedIntent, Transport, error_reply};
use crate::io::GuestBuffer;
use crate::virtqueue::Chain;

/// Where `unique` ends in `fuse_in_header`.
const UNIQUE_END: usize = 16;

/// One request's chain, with what an answer of last resort needs.
#[derive(Debug)]
pub(super) struct ChainTransport {
    chain: Option<Chain>,
    /// The first bytes of the request, as far as they were read: length, opcode, `unique`.
    start: [u8; UNIQUE_END],
    started: usize,
    /// A server before this one has begun it, and had said this.
    begun: Option<RecordedIntent>,
}

impl ChainTransport {
    pub(super) fn new(chain: Chain) -> Self {
        // Where nothing was noted nothing was done.
        let previous = chain.previous().filter(|it| it.unique != 0);
        Self {
            begun: previous.map(|it| it.intent),
            chain: Some(chain),
            start: [0; UNIQUE_END],
            started: 0,
        }
    }

    /// For one of the answers, which end the request.
    fn take(&mut self) -> Option<Chain> {
        self.chain.take()
    }
}

impl Transport for ChainTransport {
    fn note(&mut self, unique: u64) {
        if let Some(chain) = &self.chain {
            chain.note_unique(unique);
        }
    }

    fn record_intent(&mut self, intent: RecordedIntent) {
        if let Some(chain) = &self.chain {
            chain.set_intent(intent);
        }
    }

    fn previous_attempt(&self) -> Option<RecordedIntent> {
        self.begun
    }

    fn readable(&self) -> usize {
        self.chain.as_ref().map_or(0, Chain::readable)
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        let count = self.chain.as_mut().map_or(0, |chain| chain.read(into));
        let missing = &mut self.start[self.started..];
        let more = missing.len().min(count);
        missing[..more].copy_from_slice(&into[..more]);
        self.started += more;
        count
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        self.chain.as_mut()?.payload(len)
    }

    fn writable(&self) -> usize {
        self.chain.as_ref().map_or(0, Chain::writable)
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        self.chain.as_mut()?.room(OUT_HEADER_LEN, len)
    }

    fn reply(mut self, parts: &[&[u8]]) {
        if let Some(chain) = self.take() {
            chain.reply(parts);
        }
    }

    fn reply_filled(mut self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        if let Some(chain) = self.take() {
            chain.reply_filled(header, filled);
        }
    }

    fn no_reply(mut self) {
        if let Some(chain) = self.take() {
            chain.no_reply();
        }
    }
}

impl Drop for ChainTransport {
    fn drop(&mut self) {
        let Some(chain) = self.take() else {
            return;
        };
        let used = chain.used().clone();
        if self.started == UNIQUE_END {
            let [_, _, _, _, _, _, _, _, unique @ ..] = self.start;
            let unique = u64::from_le_bytes(unique);
            log::error!("request {unique:#x} was given up; the guest gets EIO");
            chain.reply(&[&error_reply(unique, rustix::io::Errno::IO)]);
        } else {
            drop(chain);
        }
        // No batch may come any more that would publish this.
        used.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtqueue::tests::{DESCRIPTORS, Driver, PLAIN};

    /// `VIRTQ_DESC_F_WRITE`.
    const WRITE: u16 = 2;

    #[test]
    fn a_request_that_is_given_up_is_answered_with_eio() {
        for read in [40, 16, 15, 0] {
            let mut driver = Driver::new(false);
            let mut queue = driver.queue(PLAIN);
            driver.write(0x5008, &0x1234_5678_u64.to_le_bytes());
            driver.chain(DESCRIPTORS, &[(0x5000, 40, 0), (0x6000, 16, WRITE)]);
            let mut request = ChainTransport::new(driver.take_one(&mut queue).unwrap());
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
    }
}
