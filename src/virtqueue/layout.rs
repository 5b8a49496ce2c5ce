//! The memory layout of a split virtqueue (virtio 1.2, sections 2.7.5 to 2.7.8).
//!
//! Offsets, lengths and flags. The invariant: nothing here accesses memory.

#![allow(
    clippy::arithmetic_side_effects,
    reason = "all operands are 16-bit indexes, all results fit 32 bits"
)]

/// The most entries a queue may have (virtio 1.2, section 2.7).
pub(crate) const MAX_SIZE: u16 = 32768;

pub(crate) const DESCRIPTOR_LEN: usize = 16;
pub(crate) const DESCRIPTOR_ALIGN: u64 = 16;
pub(crate) const AVAILABLE_ALIGN: u64 = 2;
pub(crate) const USED_ALIGN: u64 = 4;

/// `VIRTQ_DESC_F_NEXT`: the chain continues at `next`.
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device may write to the buffer.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver wants no call.
pub(crate) const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: the device wants no kick.
pub(crate) const NO_NOTIFY: u16 = 1;

/// Offset of the flags, in the available and in the used ring.
pub(crate) const FLAGS: usize = 0;
/// Offset of the index, in the available and in the used ring.
pub(crate) const INDEX: usize = 2;

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn parse(bytes: [u8; DESCRIPTOR_LEN]) -> Self {
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = bytes;
        Self {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

pub(crate) fn descriptors_len(size: u16) -> u64 {
    u64::from(size) * DESCRIPTOR_LEN as u64
}

pub(crate) fn descriptor_at(index: u16) -> usize {
    usize::from(index) * DESCRIPTOR_LEN
}

/// Length of the available ring: flags, index, entries and `used_event`.
pub(crate) fn available_len(size: u16) -> u64 {
    6 + 2 * u64::from(size)
}

pub(crate) fn available_entry(index: u16, size: u16) -> usize {
    4 + 2 * usize::from(index & (size - 1))
}

pub(crate) fn used_event(size: u16) -> usize {
    4 + 2 * usize::from(size)
}

/// Length of the used ring: flags, index, elements and `avail_event`.
pub(crate) fn used_len(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

pub(crate) fn used_element(index: u16, size: u16) -> usize {
    4 + 8 * usize::from(index & (size - 1))
}

pub(crate) fn avail_event(size: u16) -> usize {
    4 + 8 * usize::from(size)
}

/// Whether a step of the index from `old` to `new` passes `event`, so that the other side asked for
/// a notification (virtio 1.2, section 2.7.10.1).
pub(crate) fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_is_true_exactly_for_events_within_step() {
        assert!(passes(5, 6, 5));
        assert!(!passes(6, 6, 5));
        assert!(passes(5, 10, 3));
        assert!(!passes(2, 10, 3));
        assert!(passes(u16::MAX, 0, u16::MAX));
        assert!(!passes(3, 3, 3), "no step passes nothing");
    }

    #[test]
    fn entry_offsets_wrap_at_queue_size() {
        assert_eq!(available_entry(0x1_03, 0x100), 4 + 2 * 3);
        assert_eq!(used_element(0xffff, 0x100), 4 + 8 * 0xff);
    }
}
