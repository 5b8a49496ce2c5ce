//! Slots: areas of guest memory, each for one request and its reply.
//!
//! A request's header and arguments end at a page boundary, and so does a reply's header, so that
//! the data of WRITE and READ are on whole pages, as they are in a guest's page cache. The
//! invariant: the two areas of a slot are its own; nothing here knows whether they are in use.

use vmm::memory::MemoryError;
use vmm::{Buf, Gpa, Memory};

use crate::request::{IN_HEADER, OUT_HEADER, Request};

/// Requests that a lane may have in flight. Beyond that, the kernel waits.
pub(crate) const SLOTS: u16 = 256;

/// The longest payload of a request or reply, in bytes.
pub(crate) const PAYLOAD: u32 = 1 << 20;

const PAGE: u32 = 4096;

/// Bytes before the payload of a WRITE, the only request with a long payload.
const WRITE_HEAD: u32 = 80;

/// Guest memory that one slot takes.
pub(crate) const SLOT_BYTES: u64 = 2 * AREA_BYTES;
/// Guest memory for a request alone.
pub(crate) const AREA_BYTES: u64 = (PAYLOAD + PAGE) as u64;

/// Buffers enough for the longest request or reply: headers, arguments and pages.
pub(crate) const MOST_BUFFERS: usize = (PAYLOAD / PAGE) as usize + 2;

/// The memory that a request is read into.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    /// A page's boundary, one page after the area's beginning.
    payload: Gpa,
}

impl Area {
    /// Allocates an area.
    pub(crate) fn new(memory: &Memory) -> Result<Self, MemoryError> {
        let gpa = memory.alloc(AREA_BYTES, PAGE.into())?;
        Ok(Self {
            payload: gpa.offset(PAGE.into()),
        })
    }

    /// The buffer that `/dev/fuse` may fill.
    pub(crate) fn incoming(self) -> Buf {
        Buf::new(self.before(WRITE_HEAD), WRITE_HEAD + PAYLOAD)
    }

    /// The request in this area as a chain's buffers: header, arguments, pages.
    pub(crate) fn readable(self, request: &Request, bufs: &mut Vec<Buf>) {
        bufs.clear();
        let start = self.before(WRITE_HEAD);
        bufs.push(Buf::new(start, IN_HEADER.min(request.len)));
        let arguments = request.len.min(WRITE_HEAD).saturating_sub(IN_HEADER);
        if arguments > 0 {
            bufs.push(Buf::new(start.offset(IN_HEADER.into()), arguments));
        }
        pages(self.payload, request.len.saturating_sub(WRITE_HEAD), bufs);
    }

    fn before(self, bytes: u32) -> Gpa {
        Gpa(self.payload.0 - u64::from(bytes))
    }
}

/// The areas of a request and its reply.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) request: Area,
    reply: Area,
}

impl Slot {
    /// Allocates a slot.
    pub(crate) fn new(memory: &Memory) -> Result<Self, MemoryError> {
        Ok(Self {
            request: Area::new(memory)?,
            reply: Area::new(memory)?,
        })
    }

    /// The address of the reply.
    pub(crate) fn reply(&self) -> Gpa {
        self.reply.before(OUT_HEADER)
    }

    /// Room for a reply of this many bytes after its header, as a chain's buffers.
    pub(crate) fn writable(&self, room: Option<u32>, bufs: &mut Vec<Buf>) {
        bufs.clear();
        if let Some(room) = room {
            bufs.push(Buf::new(self.reply(), OUT_HEADER));
            pages(self.reply.payload, room.min(PAYLOAD), bufs);
        }
    }
}

/// Splits `len` bytes into pages, as a guest does whose pages are anywhere in memory.
fn pages(gpa: Gpa, len: u32, bufs: &mut Vec<Buf>) {
    let mut at = gpa;
    let mut left = len;
    while left > 0 {
        let piece = left.min(PAGE);
        bufs.push(Buf::new(at, piece));
        at = at.offset(piece.into());
        left -= piece;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::Region;

    fn request(len: u32) -> Request {
        Request {
            opcode: 0,
            unique: 0,
            len,
            reply: None,
        }
    }

    #[test]
    fn payloads_lie_on_pages_and_the_longest_fits() {
        let memory = Memory::new(&[Region::new(0, SLOT_BYTES + 4096)]).unwrap();
        let slot = Slot::new(&memory).unwrap();
        let mut bufs = Vec::new();
        slot.request.readable(&request(80 + PAYLOAD), &mut bufs);
        let lens: Vec<_> = bufs.iter().map(|buf| buf.len).collect();
        assert_eq!(lens[..3], [40, 40, 4096]);
        assert_eq!(bufs.len(), MOST_BUFFERS);
        assert_eq!(bufs[2].gpa.0 % 4096, 0);
        slot.writable(Some(PAYLOAD), &mut bufs);
        assert_eq!((bufs[0].len, bufs[1].gpa.0 % 4096), (16, 0));
        assert!(bufs.len() <= MOST_BUFFERS);
    }

    #[test]
    fn a_short_request_has_no_empty_buffers() {
        let memory = Memory::new(&[Region::new(0, SLOT_BYTES + 4096)]).unwrap();
        let slot = Slot::new(&memory).unwrap();
        let mut bufs = Vec::new();
        for (len, count) in [(40, 1), (41, 2), (80, 2), (81, 3)] {
            slot.request.readable(&request(len), &mut bufs);
            assert_eq!(bufs.len(), count);
            assert_eq!(bufs.iter().map(|buf| buf.len).sum::<u32>(), len);
        }
        slot.writable(Some(0), &mut bufs);
        assert_eq!(bufs.len(), 1);
        slot.writable(None, &mut bufs);
        assert!(bufs.is_empty());
    }
}
