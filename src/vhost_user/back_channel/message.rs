//! A request on the back channel, as it is sent.
//!
//! Only data. The invariant: a message has a descriptor exactly if its request takes one.

use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{
    BackendReq, VhostUserHeaderFlag, VhostUserMMap, VhostUserMMapFlags, VhostUserMsgValidator,
    VhostUserProtocolFeatures as Feature,
};
use vm_memory::ByteValued;

use crate::device::{BackChannelError, BackendRequest, SharedMapping};
use crate::vhost_user::message::Header;

/// A request as it is sent.
pub(super) struct Message<'a> {
    pub(super) number: BackendReq,
    pub(super) bytes: Vec<u8>,
    pub(super) fd: Option<BorrowedFd<'a>>,
}

impl<'a> Message<'a> {
    pub(super) fn new(
        request: BackendRequest,
        fd: Option<BorrowedFd<'a>>,
    ) -> Result<Self, BackChannelError> {
        let (number, mapping) = match &request {
            BackendRequest::ConfigChanged => (BackendReq::CONFIG_CHANGE_MSG, None),
            BackendRequest::MapSharedMemory(mapping) => (BackendReq::SHMEM_MAP, Some(mapping)),
            BackendRequest::UnmapSharedMemory(mapping) => (BackendReq::SHMEM_UNMAP, Some(mapping)),
        };
        match (number, fd) {
            (BackendReq::SHMEM_MAP, None) => {
                return Err(BackChannelError::Invalid("it has no descriptor"));
            }
            (BackendReq::SHMEM_MAP, Some(_)) | (_, None) => {}
            (_, Some(_)) => return Err(BackChannelError::Invalid("it takes no descriptor")),
        }
        let payload = mapping.map(payload).transpose()?;
        let body = payload.as_ref().map_or(&[][..], ByteValued::as_slice);
        let header = Header {
            request: number.into(),
            flags: Header::VERSION | VhostUserHeaderFlag::NEED_REPLY.bits(),
            size: u32::try_from(body.len()).unwrap_or(u32::MAX),
        };
        Ok(Self {
            number,
            bytes: [&header.bytes(), body].concat(),
            fd,
        })
    }

    /// Whether the front end has accepted the features that the request belongs to.
    pub(super) fn check_negotiated(&self, protocol: u64) -> Result<(), BackChannelError> {
        // SHMEM says by itself that SHMEM_MAP has a descriptor: crosvm accepts SHMEM without
        // BACKEND_SEND_FD.
        let of_request = match self.number {
            BackendReq::SHMEM_MAP | BackendReq::SHMEM_UNMAP => (Feature::SHMEM, "SHMEM"),
            _ => (Feature::CONFIG, "CONFIG"),
        };
        let needs = [(Feature::REPLY_ACK, "REPLY_ACK"), of_request];
        let missing = |(feature, _): &&(Feature, _)| protocol & feature.bits() == 0;
        match needs.iter().find(missing) {
            Some((_, name)) => Err(BackChannelError::NotNegotiated(name)),
            None => Ok(()),
        }
    }
}

fn payload(mapping: &SharedMapping) -> Result<VhostUserMMap, BackChannelError> {
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
        Ok(payload)
    } else {
        Err(BackChannelError::Invalid("its range"))
    }
}
