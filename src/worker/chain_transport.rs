//! Implements the FUSE [`Transport`] for a virtqueue's chains.
//!
//! The invariant: a request without a reply, because serving it panicked or its future was dropped,
//! gets the reply EIO. To the guest, an empty used element would look like a success without
//! content.

use crate::fuse::{OUT_HEADER_LEN, RecordedIntent, Transport, error_reply};
use crate::io::GuestBuffer;
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
}

impl ChainTransport {
    pub(super) fn new(chain: Chain) -> Self {
        // Without a recorded `unique`, the previous process did nothing for the request.
        let previous = chain.previous().filter(|it| it.unique != 0);
        Self {
            previous_intent: previous.map(|it| it.intent),
            chain: Some(chain),
            header: [0; UNIQUE_END],
            header_len: 0,
        }
    }

    /// Takes the chain, for a reply or for the drop, which end the request.
    fn take(&mut self) -> Option<Chain> {
        self.chain.take()
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
        } else if self.header_len != UNIQUE_END {
            let missing = &mut self.header[self.header_len..];
            let more = missing.len().min(count);
            missing[..more].copy_from_slice(&into[..more]);
            self.header_len += more;
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
        if self.header_len == UNIQUE_END {
            let [_, _, _, _, _, _, _, _, unique @ ..] = self.header;
            let unique = u64::from_le_bytes(unique);
            log::error!("request {unique:#x} was dropped without a reply; replying EIO");
            chain.reply(&[&error_reply(unique, rustix::io::Errno::IO)]);
        } else {
            drop(chain);
        }
        // No later batch is certain to publish this.
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
    fn drop_of_request_replies_eio() {
        for read in [40, 16, 15, 0] {
            let mut driver = Driver::new(false);
            let mut queue = driver.queue(PLAIN);
            driver.write(0x5008, &0x1234_5678_u64.to_le_bytes());
            driver.chain(DESCRIPTORS, &[(0x5000, 40, 0), (0x6000, 16, WRITE)]);
            let mut request = ChainTransport::new(driver.pop_one(&mut queue).unwrap());
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
