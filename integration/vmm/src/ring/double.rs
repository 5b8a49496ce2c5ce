//! A minimal device side of a ring, for tests of this crate.

use std::sync::atomic::{Ordering, fence};

use super::areas::{Addresses, Areas, Descriptor};
use super::{AVAIL_NO_INTERRUPT, need_event};
use crate::memory::{Buf, Gpa, Memory};

pub(crate) struct Device {
    memory: Memory,
    areas: Areas,
    event_idx: bool,
    next: u16,
    used: u16,
    called: u16,
}

#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) indirect: bool,
    pub(crate) readable: Vec<Buf>,
    pub(crate) writable: Vec<Buf>,
}

impl Device {
    pub(crate) fn new(memory: &Memory, at: Addresses, size: u16, event_idx: bool) -> Self {
        Self {
            memory: memory.clone(),
            areas: Areas::new(memory, at, size).unwrap(),
            event_idx,
            next: 0,
            used: 0,
            called: 0,
        }
    }

    /// The next chain, or none, in which case the driver was asked for a kick.
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        if self.areas.avail_idx().load(Ordering::Acquire) == self.next {
            self.areas.avail_event().store(self.next, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if self.areas.avail_idx().load(Ordering::Acquire) == self.next {
                return None;
            }
        }
        let head = self.areas.avail_entry(self.next).load(Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
        Some(self.chain(head))
    }

    fn chain(&self, head: u16) -> Chain {
        let mut chain = Chain {
            head,
            indirect: false,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut descriptor = self.areas.descriptor(head);
        let mut table = None;
        if descriptor.flags & Descriptor::INDIRECT != 0 {
            chain.indirect = true;
            table = Some(Gpa(descriptor.addr));
            descriptor = self.indirect(descriptor.addr, 0);
        }
        loop {
            let buf = Buf::new(Gpa(descriptor.addr), descriptor.len);
            if descriptor.flags & Descriptor::WRITE == 0 {
                assert!(chain.writable.is_empty(), "readable after writable");
                chain.readable.push(buf);
            } else {
                chain.writable.push(buf);
            }
            if descriptor.flags & Descriptor::NEXT == 0 {
                return chain;
            }
            descriptor = match table {
                Some(Gpa(table)) => self.indirect(table, descriptor.next),
                None => self.areas.descriptor(descriptor.next),
            };
        }
    }

    fn indirect(&self, table: u64, index: u16) -> Descriptor {
        let at = Gpa(table + 16 * u64::from(index));
        Descriptor {
            addr: self.memory.read_obj(at).unwrap(),
            len: self.memory.read_obj(at.offset(8)).unwrap(),
            flags: self.memory.read_obj(at.offset(12)).unwrap(),
            next: self.memory.read_obj(at.offset(14)).unwrap(),
        }
    }

    /// Returns a chain. True if the driver wants a call.
    pub(crate) fn complete(&mut self, head: u16, len: u32) -> bool {
        self.areas.write_used_elem(self.used, u32::from(head), len);
        self.used = self.used.wrapping_add(1);
        self.areas.used_idx().store(self.used, Ordering::Release);
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.called, self.used);
        if self.event_idx {
            let event = self.areas.used_event().load(Ordering::Relaxed);
            need_event(event, self.used, old)
        } else {
            self.areas.avail_flags().load(Ordering::Relaxed) & AVAIL_NO_INTERRUPT == 0
        }
    }

    pub(crate) fn set_used_flags(&self, flags: u16) {
        self.areas.used_flags().store(flags, Ordering::Relaxed);
    }

    pub(crate) fn set_used_idx(&self, index: u16) {
        self.areas.used_idx().store(index, Ordering::Release);
    }

    /// The bytes of the readable buffers.
    pub(crate) fn input(&self, chain: &Chain) -> Vec<u8> {
        let read = |buf: &Buf| self.memory.read_vec(buf.gpa, buf.len as usize).unwrap();
        chain.readable.iter().flat_map(read).collect()
    }

    /// Writes to the writable buffers as far as they go.
    pub(crate) fn output(&self, chain: &Chain, bytes: &[u8]) -> u32 {
        let mut left = bytes;
        for buf in &chain.writable {
            let (now, later) = left.split_at(left.len().min(buf.len as usize));
            self.memory.write(buf.gpa, now).unwrap();
            left = later;
        }
        u32::try_from(bytes.len() - left.len()).unwrap()
    }
}
