//! A chain as the FUSE session sees it. The server's own transport, in `worker`, does the same and
//! replies to a dropped request; here a dropped one is a finding.

use ringfsd::internals::fuse::{OUT_HEADER_LEN, Transport};
use ringfsd::internals::virtqueue::Chain;
use ringfsd::io::GuestBuffer;

/// One chain.
#[derive(Debug)]
pub struct OnChain(pub Chain);

impl Transport for OnChain {
    fn is_incomplete(&self) -> bool {
        self.0.is_incomplete()
    }

    fn readable(&self) -> usize {
        self.0.readable()
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        self.0.read(into)
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        self.0.payload(len)
    }

    fn writable(&self) -> usize {
        self.0.writable()
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        self.0.reply_buffer(OUT_HEADER_LEN, len)
    }

    fn reply(self, parts: &[&[u8]]) {
        self.0.reply(parts);
    }

    fn reply_filled(self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        self.0.reply_filled(header, filled);
    }

    fn no_reply(self) {
        self.0.no_reply();
    }
}
