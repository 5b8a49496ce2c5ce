//! The virtio-fs device: its queues, features and configuration space (virtio 1.2, section 5.11).
//! Nothing here has state.

mod back_channel;

use std::num::NonZeroU16;

pub use back_channel::{BackChannel, BackChannelError, BackendRequest, SharedMapping};

/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub(crate) const INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub(crate) const VERSION_1: u64 = 1 << 32;
/// `VHOST_F_LOG_ALL` (vhost-user specification): log all changes of guest memory.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// `VHOST_USER_F_PROTOCOL_FEATURES` (vhost-user specification).
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The features that the device offers. A VMM may accept each of them, so each is implemented.
pub(crate) const FEATURES: u64 =
    INDIRECT_DESC | EVENT_IDX | VERSION_1 | LOG_ALL | PROTOCOL_FEATURES;

/// Length of `struct virtio_fs_config`, bytes.
pub const CONFIG_LEN: usize = TAG_LEN + 4 + 4;

/// Length of the tag field, bytes.
const TAG_LEN: usize = 36;

/// The name by which the guest mounts the file system: 1 to 36 bytes without a NUL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag(String);

/// Why a string is not a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// The string is empty.
    #[error("a tag can't be empty")]
    Empty,
    /// The string is longer than the field.
    #[error("a tag has at most 36 bytes, this one has {0}")]
    TooLong(usize),
    /// The string has a NUL, which would end the tag in the guest.
    #[error("a tag can't contain a NUL byte")]
    Nul,
}

impl std::str::FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, TagError> {
        match text.len() {
            0 => Err(TagError::Empty),
            len if len > TAG_LEN => Err(TagError::TooLong(len)),
            _ if text.contains('\0') => Err(TagError::Nul),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A virtio-fs device as the front end sees it.
#[derive(Clone, Debug)]
pub struct Device {
    /// The tag in the configuration space; `None` if the VMM has its own.
    pub tag: Option<Tag>,
    /// Request queues, without the high-priority queue.
    pub request_queues: NonZeroU16,
    /// The size of the DAX window, bytes; 0 if there is none.
    pub dax_window: u64,
    /// A VMM that hasn't accepted SHMEM is asked to map into the window by FS_MAP and FS_UNMAP.
    pub dax_fs_map: bool,
}

impl Device {
    /// The number of all queues, including the high-priority queue.
    #[must_use]
    pub fn queues(&self) -> u16 {
        self.request_queues.get().saturating_add(1)
    }

    /// The configuration space (`struct virtio_fs_config`): tag, number of request queues, and the
    /// size of notification buffers, which is 0.
    #[must_use]
    pub fn config_space(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let tag = self.tag.as_ref().map_or("", |tag| &tag.0);
        space[..tag.len()].copy_from_slice(tag.as_bytes());
        let queues = u32::from(self.request_queues.get());
        space[TAG_LEN..TAG_LEN + 4].copy_from_slice(&queues.to_le_bytes());
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_space_has_tag_and_queues() {
        let device = Device {
            tag: Some("shared".parse().unwrap()),
            request_queues: NonZeroU16::new(4).unwrap(),
            dax_window: 0,
            dax_fs_map: false,
        };
        let space = device.config_space();
        assert_eq!(&space[..7], b"shared\0");
        assert_eq!(space[36..], [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(device.queues(), 5);
    }

    #[test]
    fn impossible_tags_are_refused() {
        assert_eq!("".parse::<Tag>(), Err(TagError::Empty));
        assert_eq!("x".repeat(37).parse::<Tag>(), Err(TagError::TooLong(37)));
        assert_eq!("a\0b".parse::<Tag>(), Err(TagError::Nul));
        assert!("x".repeat(36).parse::<Tag>().is_ok());
    }
}
