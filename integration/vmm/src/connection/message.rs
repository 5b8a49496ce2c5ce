//! The vhost-user protocol's constants and structures: message numbers, feature bits, payloads.
//!
//! Only data: nothing is sent here. A payload's bytes are its message's body.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Virtio and vhost feature bits (GET_FEATURES, SET_FEATURES).
pub mod feature {
    /// The dirty log is maintained.
    pub const LOG_ALL: u64 = 1 << 26;
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user has protocol features.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_ACCESS_PLATFORM`.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// `VIRTIO_F_RING_PACKED`.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_IN_ORDER`.
    pub const IN_ORDER: u64 = 1 << 35;
    /// `VIRTIO_F_NOTIFICATION_DATA`.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;
    /// `VIRTIO_F_RING_RESET`.
    pub const RING_RESET: u64 = 1 << 40;
}

/// Protocol feature bits (GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES).
pub mod protocol {
    /// Several queues; GET_QUEUE_NUM.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log is a file descriptor.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// NEED_REPLY is honoured.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// SET_BACKEND_REQ_FD.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG, SET_CONFIG.
    pub const CONFIG: u64 = 1 << 9;
    /// The back end may send file descriptors.
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    /// Host notifiers.
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    /// GET_INFLIGHT_FD, SET_INFLIGHT_FD.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Kicks and calls as messages.
    pub const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    /// ADD_MEM_REG, REM_MEM_REG, GET_MAX_MEM_SLOTS.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS, GET_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// Shared objects.
    pub const SHARED_OBJECT: u64 = 1 << 18;
    /// SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE.
    pub const DEVICE_STATE: u64 = 1 << 19;
    /// GET_SHMEM_CONFIG and the back end's requests to map.
    pub const SHMEM: u64 = 1 << 22;
}

/// Numbers of the front end's messages.
pub mod request {
    /// Requests the features.
    pub const GET_FEATURES: u32 = 1;
    /// Sets the features.
    pub const SET_FEATURES: u32 = 2;
    /// Takes the session (SET_OWNER).
    pub const SET_OWNER: u32 = 3;
    /// Gives the session up (RESET_OWNER, deprecated).
    pub const RESET_OWNER: u32 = 4;
    /// Sends the guest's memory.
    pub const SET_MEM_TABLE: u32 = 5;
    /// Sends the dirty log.
    pub const SET_LOG_BASE: u32 = 6;
    /// Sends an eventfd for the dirty log.
    pub const SET_LOG_FD: u32 = 7;
    /// Sets a ring's size.
    pub const SET_VRING_NUM: u32 = 8;
    /// Sets a ring's addresses.
    pub const SET_VRING_ADDR: u32 = 9;
    /// Sets the available index at which to resume.
    pub const SET_VRING_BASE: u32 = 10;
    /// Stops a ring and returns its index.
    pub const GET_VRING_BASE: u32 = 11;
    /// Sends a ring's kick.
    pub const SET_VRING_KICK: u32 = 12;
    /// Sends a ring's call.
    pub const SET_VRING_CALL: u32 = 13;
    /// Sends a ring's error eventfd.
    pub const SET_VRING_ERR: u32 = 14;
    /// Requests the protocol features.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// Sets the protocol features.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// Requests the maximum number of queues.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// Enables or disables a ring.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// Sends the socket for the back end's requests.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// Reads the configuration space.
    pub const GET_CONFIG: u32 = 24;
    /// Writes the configuration space.
    pub const SET_CONFIG: u32 = 25;
    /// Requests a region to mark what is in flight.
    pub const GET_INFLIGHT_FD: u32 = 31;
    /// Sends that region back.
    pub const SET_INFLIGHT_FD: u32 = 32;
    /// Resets the device.
    pub const RESET_DEVICE: u32 = 34;
    /// Requests the maximum number of memory regions.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// Adds a memory region.
    pub const ADD_MEM_REG: u32 = 37;
    /// Removes a memory region.
    pub const REM_MEM_REG: u32 = 38;
    /// Sets the device's status.
    pub const SET_STATUS: u32 = 39;
    /// Requests the device's status.
    pub const GET_STATUS: u32 = 40;
    /// Sends a pipe for the device's state.
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    /// Asks whether the state was transferred.
    pub const CHECK_DEVICE_STATE: u32 = 43;
    /// Requests the shared-memory regions.
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// Numbers of the back end's messages, on the socket of SET_BACKEND_REQ_FD.
pub mod backend_request {
    /// The configuration space has changed.
    pub const CONFIG_CHANGE_MSG: u32 = 2;
    /// Map files into the cache window, before `SHMEM_MAP` was specified.
    pub const FS_MAP: u32 = 6;
    /// Remove such mappings.
    pub const FS_UNMAP: u32 = 7;
    /// Map a file into a shared-memory region.
    pub const SHMEM_MAP: u32 = 9;
    /// Remove such a mapping.
    pub const SHMEM_UNMAP: u32 = 10;
}

/// Bits of a message's flags.
pub mod flag {
    /// The protocol's version, in the two lowest bits.
    pub const VERSION: u32 = 1;
    /// It is a reply.
    pub const REPLY: u32 = 1 << 2;
    /// A reply is requested for a message that has none.
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// Bit of [`VringAddress::flags`]: writes to the used ring are logged.
pub const VRING_LOG: u32 = 1;

/// Bit of SET_VRING_KICK, CALL and ERR: no file descriptor is sent.
pub const VRING_NO_FD: u64 = 1 << 8;

/// The header of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Header {
    /// One of [`request`], or anything else.
    pub request: u32,
    /// [`flag`] bits.
    pub flags: u32,
    /// Bytes of the body.
    pub size: u32,
}

/// A ring and a number: SET_VRING_NUM, BASE, ENABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct VringState {
    /// The ring.
    pub index: u32,
    /// The number.
    pub num: u32,
}

/// SET_VRING_ADDR. The ring's addresses are user addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct VringAddress {
    /// The ring.
    pub index: u32,
    /// [`VRING_LOG`].
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Guest address of the used ring, for the log.
    pub log: u64,
}

/// One region of SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct MemoryRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// User address.
    pub user_address: u64,
    /// Its offset in the file.
    pub mmap_offset: u64,
}

/// SHMEM_MAP and SHMEM_UNMAP, which the back end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct MMap {
    /// The region.
    pub shmid: u8,
    /// Unused.
    pub padding: [u8; 7],
    /// Where it begins in the file.
    pub fd_offset: u64,
    /// Where it begins in the region.
    pub shm_offset: u64,
    /// Bytes.
    pub len: u64,
    /// [`WRITABLE`](Self::WRITABLE) or 0.
    pub flags: u64,
}

impl MMap {
    /// The guest may write.
    pub const WRITABLE: u64 = 1;
}

/// FS_MAP and FS_UNMAP: mappings, of which those of length 0 are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct FsMap {
    /// Where they begin in the file.
    pub fd_offset: [u64; 8],
    /// Where they begin in the window.
    pub cache_offset: [u64; 8],
    /// Bytes.
    pub len: [u64; 8],
    /// [`READ`](Self::READ), [`WRITE`](Self::WRITE).
    pub flags: [u64; 8],
}

impl FsMap {
    /// The guest may read.
    pub const READ: u64 = 1;
    /// The guest may write.
    pub const WRITE: u64 = 2;
}

/// SET_LOG_BASE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Log {
    /// Bytes of the log.
    pub size: u64,
    /// Its offset in the file.
    pub offset: u64,
}

/// GET_INFLIGHT_FD, SET_INFLIGHT_FD. With the padding that the C structure has, as QEMU and the
/// rust-vmm front ends send it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct InflightLayout {
    /// Bytes of the region.
    pub mmap_size: u64,
    /// Its offset in the file.
    pub mmap_offset: u64,
    /// Rings that it covers.
    pub num_queues: u16,
    /// Entries of each ring.
    pub queue_size: u16,
    /// Padding.
    pub padding: u32,
}

/// The header of GET_CONFIG and SET_CONFIG; the bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct ConfigHeader {
    /// The offset in the configuration space.
    pub offset: u32,
    /// The number of bytes.
    pub size: u32,
    /// 0: a write by the driver; 1: by migration.
    pub flags: u32,
}

/// SET_DEVICE_STATE_FD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct DeviceState {
    /// [`DeviceState::SAVE`] or [`DeviceState::LOAD`].
    pub direction: u32,
    /// 0: all rings stopped.
    pub phase: u32,
}

impl DeviceState {
    /// The back end writes its state to the pipe.
    pub const SAVE: u32 = 0;
    /// The back end reads its state from the pipe.
    pub const LOAD: u32 = 1;
}

/// The configuration space of a virtio-fs device (virtio 1.2, 5.11.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct FsConfig {
    /// The tag, padded with NULs.
    pub tag: [u8; 36],
    /// Request queues that the device has.
    pub num_request_queues: u32,
}

impl FsConfig {
    /// The tag without its padding.
    #[must_use]
    pub fn tag(&self) -> &[u8] {
        let end = self.tag.iter().position(|&byte| byte == 0);
        self.tag
            .get(..end.unwrap_or(self.tag.len()))
            .unwrap_or_default()
    }
}
