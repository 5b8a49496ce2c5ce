//! A request on the back channel, as it is sent.
//!
//! Only data. There are two forms of the requests to map. `SHMEM_MAP` and `SHMEM_UNMAP` are the
//! specification's. `FS_MAP` and `FS_UNMAP` were never standardized; VMMs had them before, and their
//! numbers have since become those of `SHARED_OBJECT_ADD` and `SHARED_OBJECT_REMOVE`. The invariant: a
//! message has a descriptor exactly if its request takes one.

use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{
    BackendReq, VhostUserHeaderFlag, VhostUserMMap, VhostUserMMapFlags, VhostUserMsgValidator,
    VhostUserProtocolFeatures as Feature,
};
use vm_memory::ByteValued;

use crate::device::{BackChannelError, BackendRequest, SharedMapping};
use crate::vhost_user::message::Header;

/// Map files into the cache window of a virtio-fs device: `VHOST_USER_BACKEND_FS_MAP`.
pub(super) const FS_MAP: u32 = 6;

/// Remove such mappings: `VHOST_USER_BACKEND_FS_UNMAP`.
pub(super) const FS_UNMAP: u32 = 7;

/// How many mappings one of these messages has room for.
const FS_ENTRIES: usize = 8;

/// The only region of a device that has them: the virtio-fs cache window.
const WINDOW: u8 = 0;

/// Bits of the flags of such a mapping, which are those of `mmap(2)`.
mod fs_flag {
    pub(super) const READ: u64 = 1 << 0;
    pub(super) const WRITE: u64 = 1 << 1;
}

/// How the VMM is asked to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// `SHMEM_MAP` and `SHMEM_UNMAP`.
    SharedMemory,
    /// `FS_MAP` and `FS_UNMAP`.
    FsMap,
}

/// A request as it is sent.
pub(super) struct Message<'a> {
    pub(super) number: u32,
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<BorrowedFd<'a>>,
    /// The protocol features that it belongs to.
    needs: &'static [(Feature, &'static str)],
}

impl<'a> Message<'a> {
    pub(super) fn new(
        request: BackendRequest,
        fd: Option<BorrowedFd<'a>>,
        form: Form,
    ) -> Result<Self, BackChannelError> {
        let takes_fd = matches!(request, BackendRequest::MapSharedMemory(_));
        match (takes_fd, fd.is_some()) {
            (true, false) => return Err(BackChannelError::Invalid("it has no descriptor")),
            (false, true) => return Err(BackChannelError::Invalid("it takes no descriptor")),
            _ => {}
        }
        let (number, body) = match (&request, form) {
            (BackendRequest::ConfigChanged, _) => {
                (BackendReq::CONFIG_CHANGE_MSG.into(), Vec::new())
            }
            (BackendRequest::MapSharedMemory(mapping), Form::SharedMemory) => {
                (BackendReq::SHMEM_MAP.into(), payload(mapping)?)
            }
            (BackendRequest::UnmapSharedMemory(mapping), Form::SharedMemory) => {
                (BackendReq::SHMEM_UNMAP.into(), payload(mapping)?)
            }
            (BackendRequest::MapSharedMemory(mapping), Form::FsMap) => {
                (FS_MAP, fs_payload(mapping)?)
            }
            (BackendRequest::UnmapSharedMemory(mapping), Form::FsMap) => {
                (FS_UNMAP, fs_payload(mapping)?)
            }
        };
        let header = Header {
            request: number,
            flags: Header::VERSION | VhostUserHeaderFlag::NEED_REPLY.bits(),
            size: u32::try_from(body.len()).unwrap_or(u32::MAX),
        };
        Ok(Self {
            number,
            bytes: [&header.bytes()[..], &body].concat(),
            fd,
            needs: needs(&request, form),
        })
    }

    /// Whether the front end has accepted the features that the request belongs to.
    pub(super) fn check_negotiated(&self, protocol: u64) -> Result<(), BackChannelError> {
        let missing = |(feature, _): &&(Feature, _)| protocol & feature.bits() == 0;
        match self.needs.iter().find(missing) {
            Some((_, name)) => Err(BackChannelError::NotNegotiated(name)),
            None => Ok(()),
        }
    }
}

/// The protocol features that a request belongs to. SHMEM says by itself that SHMEM_MAP has a
/// descriptor: crosvm accepts SHMEM without BACKEND_SEND_FD.
fn needs(request: &BackendRequest, form: Form) -> &'static [(Feature, &'static str)] {
    const REPLY_ACK: (Feature, &str) = (Feature::REPLY_ACK, "REPLY_ACK");
    match (request, form) {
        (BackendRequest::ConfigChanged, _) => &[REPLY_ACK, (Feature::CONFIG, "CONFIG")],
        (_, Form::SharedMemory) => &[REPLY_ACK, (Feature::SHMEM, "SHMEM")],
        (_, Form::FsMap) => &[REPLY_ACK, (Feature::BACKEND_SEND_FD, "BACKEND_SEND_FD")],
    }
}

fn payload(mapping: &SharedMapping) -> Result<Vec<u8>, BackChannelError> {
    let flags = if mapping.writable {
        VhostUserMMapFlags::WRITABLE
    } else {
        VhostUserMMapFlags::empty()
    };
    let payload = VhostUserMMap {
        shmid: mapping.region,
        padding: [0; 7],
        fd_offset: mapping.file_offset,
        shm_offset: mapping.offset,
        len: mapping.len,
        flags: flags.bits(),
    };
    if payload.is_valid() {
        Ok(payload.as_slice().to_vec())
    } else {
        Err(BackChannelError::Invalid("its range"))
    }
}

/// Arrays of file offsets, offsets in the window, lengths and flags, of which the first element is
/// used: a VMM skips those of length 0.
fn fs_payload(mapping: &SharedMapping) -> Result<Vec<u8>, BackChannelError> {
    if mapping.region != WINDOW {
        return Err(BackChannelError::Invalid("its region"));
    }
    // The range is checked as that of the other form.
    payload(mapping)?;
    let flags = fs_flag::READ | if mapping.writable { fs_flag::WRITE } else { 0 };
    let mut bytes = Vec::with_capacity(4 * FS_ENTRIES * size_of::<u64>());
    for value in [mapping.file_offset, mapping.offset, mapping.len, flags] {
        bytes.extend(value.to_ne_bytes());
        bytes.extend([0; (FS_ENTRIES - 1) * size_of::<u64>()]);
    }
    Ok(bytes)
}
