//! INIT: removes what this transport doesn't support.
//!
//! Everything else is passed on unchanged. The invariant: nothing is added that neither side has
//! sent.

use vmm::fuse::wire::{InitIn, InitOut, init};
use vmm::memory::MemoryError;
use vmm::{Gpa, Memory};

use crate::slot::PAYLOAD;

/// Flags for what only a server can do that has `/dev/fuse` itself: pass files of its own by an
/// ioctl, take requests from an io_uring, have requests sent again by writing a notification.
const WITH_THE_DEVICE_ONLY: u64 = init::PASSTHROUGH | init::OVER_IO_URING | init::HAS_RESEND;

/// Pages of the longest payload.
const MOST_PAGES: u16 = 256;

/// Removes from the kernel's offer at `gpa` what the server could not use.
pub(crate) fn limit_offer(memory: &Memory, gpa: Gpa) -> Result<(), MemoryError> {
    let mut offer: InitIn = memory.read_obj(gpa)?;
    offer.flags &= !halves(WITH_THE_DEVICE_ONLY).0;
    offer.flags2 &= !halves(WITH_THE_DEVICE_ONLY).1;
    memory.write_obj(gpa, &offer)
}

/// Limits the server's reply at `gpa` to what fits into a slot.
pub(crate) fn limit_answer(memory: &Memory, gpa: Gpa) -> Result<(), MemoryError> {
    let mut answer: InitOut = memory.read_obj(gpa)?;
    answer.max_write = answer.max_write.min(PAYLOAD);
    answer.max_pages = answer.max_pages.min(MOST_PAGES);
    memory.write_obj(gpa, &answer)
}

/// The words `flags` and `flags2`.
fn halves(flags: u64) -> (u32, u32) {
    let low = u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(0);
    (low, u32::try_from(flags >> 32).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::Region;

    #[test]
    fn only_what_needs_the_device_is_taken_away() {
        let memory = Memory::new(&[Region::new(0, 4096)]).unwrap();
        let everything = InitIn {
            flags: u32::MAX,
            flags2: u32::MAX,
            ..InitIn::default()
        };
        memory.write_obj(Gpa(0), &everything).unwrap();
        limit_offer(&memory, Gpa(0)).unwrap();
        let left: InitIn = memory.read_obj(Gpa(0)).unwrap();
        assert_eq!(left.flags, u32::MAX);
        assert_eq!(u64::from(!left.flags2) << 32, WITH_THE_DEVICE_ONLY);
    }

    #[test]
    fn a_payload_fits_into_a_slot() {
        let memory = Memory::new(&[Region::new(0, 4096)]).unwrap();
        let greedy = InitOut {
            max_write: 8 << 20,
            max_pages: 2048,
            minor: 40,
            ..InitOut::default()
        };
        memory.write_obj(Gpa(0), &greedy).unwrap();
        limit_answer(&memory, Gpa(0)).unwrap();
        let limited: InitOut = memory.read_obj(Gpa(0)).unwrap();
        assert_eq!((limited.max_write, limited.max_pages), (1 << 20, 256));
        assert_eq!(limited.minor, 40);
    }
}
