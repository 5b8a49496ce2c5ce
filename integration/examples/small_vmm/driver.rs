//! The guest's virtio driver: one request queue, one request at a time.
//!
//! The invariant: descriptor 0 is what the device reads, and descriptor 1 what it writes.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::transport::Transport;

/// The first request queue; the one before it is for requests of high priority.
const QUEUE: usize = 1;
const SIZE: u16 = 16;

/// Where the parts of the ring and the two buffers are.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;

/// The longest reply.
const ROOM: u32 = 0x1_0000;

/// Flags of a descriptor (virtio 1.2, section 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

const VERSION_1: u64 = 1 << 32;

/// The driver of a device that was found.
pub(crate) struct Driver {
    memory: Arc<GuestMemoryMmap>,
    doorbell: EventFd,
    interrupt: EventFd,
    /// Requests so far.
    sent: u16,
}

impl Driver {
    /// Sets up the device as the specification says (virtio 1.2, section 3.1.1).
    pub(crate) fn probe(
        device: &mut Transport,
        memory: Arc<GuestMemoryMmap>,
    ) -> Result<Self, Box<dyn Error>> {
        // The rings of both queues begin empty.
        device.features = device.device_features() & VERSION_1;
        let mut tag = [0; 36];
        device.read_config(0, &mut tag);
        let tag = String::from_utf8_lossy(&tag);
        println!("the guest mounts {}", tag.trim_end_matches('\0'));
        let registers = &mut device.queues[QUEUE];
        registers.queue.set_size(SIZE);
        let halves = |address: u64| {
            let high = u32::try_from(address >> 32).ok();
            (u32::try_from(address & 0xffff_ffff).ok(), high)
        };
        let (low, high) = halves(DESCRIPTORS);
        registers.queue.set_desc_table_address(low, high);
        let (low, high) = halves(AVAILABLE);
        registers.queue.set_avail_ring_address(low, high);
        let (low, high) = halves(USED);
        registers.queue.set_used_ring_address(low, high);
        registers.queue.set_ready(true);
        let (doorbell, interrupt) = (
            registers.doorbell.try_clone()?,
            registers.interrupt.try_clone()?,
        );
        device.driver_ok()?;
        Ok(Self {
            memory,
            doorbell,
            interrupt,
            sent: 0,
        })
    }

    /// Sends a request, waits for the interrupt, and returns the reply.
    pub(crate) fn request(&mut self, request: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
        self.memory.write_slice(request, GuestAddress(REQUEST))?;
        let len = u32::try_from(request.len())?;
        self.describe(0, (REQUEST, len), NEXT, 1)?;
        self.describe(1, (REPLY, ROOM), WRITE, 0)?;
        let entry = AVAILABLE + 4 + u64::from(self.sent % SIZE) * 2;
        self.memory.write_obj(0_u16, GuestAddress(entry))?;
        self.sent = self.sent.wrapping_add(1);
        // Release: the device sees the entry and the descriptors with the index.
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.store(self.sent, index, Ordering::Release)?;
        self.doorbell.write(1)?;

        let index = GuestAddress(USED + 2);
        while self.memory.load::<u16>(index, Ordering::Acquire)? != self.sent {
            self.interrupt.read()?;
        }
        let element = USED + 4 + u64::from(self.sent.wrapping_sub(1) % SIZE) * 8;
        let len: u32 = self.memory.read_obj(GuestAddress(element + 4))?;
        let mut reply = vec![0; usize::try_from(len)?];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY))?;
        Ok(reply)
    }

    fn describe(
        &self,
        index: u64,
        (address, len): (u64, u32),
        flags: u16,
        next: u16,
    ) -> Result<(), Box<dyn Error>> {
        let at = GuestAddress(DESCRIPTORS + 16 * index);
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, at)?;
        Ok(())
    }
}
