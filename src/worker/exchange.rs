//! A chain as FUSE sees it: where virtio and FUSE meet.

use crate::fuse::{Exchange, OUT_HEADER_LEN};
use crate::io::GuestBuffer;
use crate::virtqueue::Chain;

impl Exchange for Chain {
    fn readable(&self) -> usize {
        self.readable()
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        self.read(into)
    }

    fn payload(&mut self, len: usize) -> Option<GuestBuffer> {
        self.payload(len)
    }

    fn writable(&self) -> usize {
        self.writable()
    }

    fn reply_buffer(&mut self, len: usize) -> Option<GuestBuffer> {
        self.room(OUT_HEADER_LEN, len)
    }

    fn reply(self, parts: &[&[u8]]) {
        self.reply(parts);
    }

    fn reply_filled(self, header: &[u8; OUT_HEADER_LEN], filled: usize) {
        self.reply_filled(header, filled);
    }

    fn no_reply(self) {
        self.no_reply();
    }
}
