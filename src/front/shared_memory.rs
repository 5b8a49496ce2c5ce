//! Tells a VMM that keeps the guest's memory to itself from one that breaks the protocol.
//!
//! Without memory that both have no request can be served, and each VMM has to be told to share it: the
//! mistake that is made most often. The invariant: nothing here changes a session, only what is said
//! of its end.

use super::relay::Parcel;
use super::session::SessionError;

/// What to do about it.
pub(super) const SHARE: &str = "start QEMU with `-object memory-backend-memfd,id=mem,size=SIZE,share=on -numa node,memdev=mem`, \
     Cloud Hypervisor with `--memory size=SIZE,shared=on`, libvirt with `<memoryBacking><source \
     type='memfd'/><access mode='shared'/></memoryBacking>`";

/// `VHOST_USER_SET_MEM_TABLE` and `VHOST_USER_ADD_MEM_REG`.
const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;

/// Bytes of a message's header, and of a region in a table.
const HEADER: usize = 12;
const REGION: usize = 32;

/// What is wrong with a message that was refused, if it should have brought memory.
pub(super) fn missing(message: &Parcel) -> Option<SessionError> {
    let word = |at: usize| {
        let bytes = message.bytes.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map(|bytes| u32::from_ne_bytes(*bytes))
    };
    let regions = match word(0)? {
        // The number comes first in the body, and four bytes later as many regions.
        SET_MEM_TABLE => {
            let regions = word(HEADER)?;
            let described = message.bytes.len().checked_sub(HEADER + 8)? / REGION;
            // What counts more or fewer than it has is another fault.
            usize::try_from(regions)
                .is_ok_and(|regions| regions == described)
                .then_some(regions)?
        }
        ADD_MEM_REG => 1,
        _ => return None,
    };
    let fds = message.fds.len();
    let none = regions == 0 || u32::try_from(fds).is_ok_and(|fds| fds < regions);
    none.then_some(SessionError::NotShared { regions, fds })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(words: &[u32], fds: usize) -> Parcel {
        let open = || std::fs::File::open("/dev/null").unwrap().into();
        Parcel {
            bytes: words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
            fds: (0..fds).map(|_| open()).collect(),
        }
    }

    #[test]
    fn memory_without_a_descriptor_is_not_shared() {
        let table = |regions: u32, described: usize| {
            let head = [SET_MEM_TABLE, 1, 8, regions, 0];
            [&head[..], &vec![0; 8 * described]].concat()
        };
        assert!(missing(&parcel(&table(0, 0), 0)).is_some());
        assert!(missing(&parcel(&table(2, 2), 1)).is_some());
        assert!(missing(&parcel(&table(2, 2), 2)).is_none());
        assert!(missing(&parcel(&table(2, 1), 1)).is_none());
        assert!(missing(&parcel(&table(u32::MAX, 1), 1)).is_none());
        assert!(missing(&parcel(&[ADD_MEM_REG, 1, 40], 0)).is_some());
        assert!(missing(&parcel(&[1, 1, 0], 0)).is_none());
        assert!(missing(&parcel(&[SET_MEM_TABLE], 0)).is_none());
        let text = missing(&parcel(&table(1, 1), 0)).unwrap().to_string();
        assert!(
            text.contains("share=on") && text.contains("shared=on"),
            "{text}"
        );
    }
}
