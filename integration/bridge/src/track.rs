//! A track: a request queue with the slots of its requests, which outlives a mount.
//!
//! A lane works on it and leaves it behind; the requests on it are the lane's. The invariant:
//! nothing is in flight on a track that no lane has, unless the lane was stopped.

use std::io;
use std::time::Duration;

use vmm::fuse::wire::{InHeader, OutHeader, opcode};
use vmm::memory::MemoryError;
use vmm::{Memory, Queue};

use crate::error::LaneError;
use crate::request::{IN_HEADER, OUT_HEADER, Request};
use crate::slot::{SLOTS, Slot};

/// How long the server may take for what is in flight when the file system is unmounted.
pub(crate) const CLOSING: Duration = Duration::from_secs(10);

/// A request queue with the slots of its requests.
#[derive(Debug)]
pub(crate) struct Track {
    pub(crate) queue: Queue,
    pub(crate) slots: Vec<Slot>,
}

impl Track {
    /// Makes a track.
    pub(crate) fn new(memory: &Memory, queue: Queue) -> Result<Self, MemoryError> {
        let slots: Result<_, _> = (0..SLOTS).map(|_| Slot::new(memory)).collect();
        Ok(Self {
            queue,
            slots: slots?,
        })
    }

    /// Sends DESTROY for an unmounted file system, which the kernel does on virtio-fs and not for
    /// `/dev/fuse`. A chain that is returned empty counts as a reply, as in Linux.
    pub(crate) fn destroy(&mut self, memory: &Memory) -> Result<(), LaneError> {
        let Some(slot) = self.slots.first() else {
            return Ok(());
        };
        let header = InHeader {
            len: IN_HEADER,
            opcode: opcode::DESTROY,
            unique: 2,
            ..InHeader::default()
        };
        let start = slot.request.incoming().gpa;
        memory.write_obj(start, &header)?;
        let request = Request::parse(memory, start)?;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        slot.request.readable(&request, &mut readable);
        slot.writable(request.reply, &mut writable);
        self.queue.push(&readable, &writable, 0)?;
        self.queue.kick()?;
        self.queue.wait(CLOSING)?;
        let used = self.queue.pop()?;
        if used.is_some_and(|used| used.len >= OUT_HEADER) {
            let reply: OutHeader = memory.read_obj(slot.reply())?;
            if reply.error != 0 {
                let error = io::Error::from_raw_os_error(reply.error.saturating_neg());
                return Err(LaneError::Destroy(error));
            }
        }
        Ok(())
    }
}
