//! The front end's messages, one method each, named as the specification names them.
//!
//! Where a method doesn't document errors, they are [`Connection::command`]'s for a message without
//! a reply of its own, and [`Connection::query`]'s for one with a reply.

#![expect(
    clippy::missing_errors_doc,
    reason = "one text for all of them, in the header"
)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use zerocopy::{FromBytes, IntoBytes};

use super::message::{
    ConfigHeader, DeviceState, FsConfig, InflightLayout, Log, MemoryRegion, VRING_NO_FD,
    VringAddress, VringState, protocol, request,
};
use super::{Connection, ConnectionError, bad_reply, io_error};
use crate::event::Event;
use crate::memory::{MappedRegion, Memory};
use crate::ring::Queue;

impl Connection {
    /// The features that the back end offers; [`super::message::feature`].
    pub fn get_features(&mut self) -> Result<u64, ConnectionError> {
        self.get_u64(request::GET_FEATURES)
    }

    /// Sets the features.
    pub fn set_features(&mut self, features: u64) -> Result<(), ConnectionError> {
        self.command(request::SET_FEATURES, features.as_bytes(), &[])
    }

    /// The protocol features that the back end offers; [`protocol`].
    pub fn get_protocol_features(&mut self) -> Result<u64, ConnectionError> {
        self.get_u64(request::GET_PROTOCOL_FEATURES)
    }

    /// Sets the protocol features. The message itself is sent under those that were set before.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), ConnectionError> {
        let message = request::SET_PROTOCOL_FEATURES;
        self.command(message, features.as_bytes(), &[])?;
        self.protocol_features = features;
        Ok(())
    }

    /// Takes the session (SET_OWNER).
    pub fn set_owner(&mut self) -> Result<(), ConnectionError> {
        self.command(request::SET_OWNER, &[], &[])
    }

    /// Gives the session up (RESET_OWNER).
    pub fn reset_owner(&mut self) -> Result<(), ConnectionError> {
        self.command(request::RESET_OWNER, &[], &[])
    }

    /// Resets the device.
    pub fn reset_device(&mut self) -> Result<(), ConnectionError> {
        self.command(request::RESET_DEVICE, &[], &[])
    }

    /// The maximum number of queues.
    pub fn get_queue_num(&mut self) -> Result<u64, ConnectionError> {
        self.get_u64(request::GET_QUEUE_NUM)
    }

    /// The maximum number of memory regions.
    pub fn get_max_mem_slots(&mut self) -> Result<u64, ConnectionError> {
        self.get_u64(request::GET_MAX_MEM_SLOTS)
    }

    /// Sends all regions of `memory` at once.
    pub fn set_mem_table(&mut self, memory: &Memory) -> Result<(), ConnectionError> {
        let regions: Vec<_> = memory.regions().iter().map(entry).collect();
        let fds: Vec<_> = memory.regions().iter().map(MappedRegion::fd).collect();
        self.set_mem_table_raw(&regions, &fds)
    }

    /// SET_MEM_TABLE with any regions, and any file descriptors.
    pub fn set_mem_table_raw(
        &mut self,
        regions: &[MemoryRegion],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        let count = u64::try_from(regions.len()).unwrap_or(u64::MAX);
        let body = [count.as_bytes(), regions.as_bytes()].concat();
        self.command(request::SET_MEM_TABLE, &body, fds)
    }

    /// Adds one region.
    pub fn add_mem_reg(&mut self, region: &MappedRegion) -> Result<(), ConnectionError> {
        self.add_mem_reg_raw(entry(region), Some(region.fd()))
    }

    /// ADD_MEM_REG with any region, and any file descriptor or none.
    pub fn add_mem_reg_raw(
        &mut self,
        region: MemoryRegion,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ConnectionError> {
        let body = [0_u64.as_bytes(), region.as_bytes()].concat();
        self.command(request::ADD_MEM_REG, &body, fd.as_slice())
    }

    /// Removes one region. No file descriptor is sent.
    pub fn rem_mem_reg(&mut self, region: MemoryRegion) -> Result<(), ConnectionError> {
        let body = [0_u64.as_bytes(), region.as_bytes()].concat();
        self.command(request::REM_MEM_REG, &body, &[])
    }

    /// Sends the dirty log. With LOG_SHMFD it has a reply, of which there are several forms, so only
    /// its arrival is checked.
    pub fn set_log_base(&mut self, log: Log, fd: BorrowedFd<'_>) -> Result<(), ConnectionError> {
        if self.has(protocol::LOG_SHMFD) {
            self.query(request::SET_LOG_BASE, log.as_bytes(), &[fd])?;
            return Ok(());
        }
        self.command(request::SET_LOG_BASE, log.as_bytes(), &[fd])
    }

    /// Sends an eventfd to signal changes of the dirty log.
    pub fn set_log_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), ConnectionError> {
        self.command(request::SET_LOG_FD, &[], &[fd])
    }

    /// Sets a ring's size.
    pub fn set_vring_num(&mut self, index: u32, size: u32) -> Result<(), ConnectionError> {
        self.set_vring_state(request::SET_VRING_NUM, index, size)
    }

    /// Sets the available index at which a ring resumes.
    pub fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), ConnectionError> {
        self.set_vring_state(request::SET_VRING_BASE, index, base)
    }

    /// Enables or disables a ring.
    pub fn set_vring_enable(&mut self, index: u32, on: bool) -> Result<(), ConnectionError> {
        self.set_vring_state(request::SET_VRING_ENABLE, index, u32::from(on))
    }

    /// Stops a ring. Returns the available index at which it would resume.
    pub fn get_vring_base(&mut self, index: u32) -> Result<u32, ConnectionError> {
        let message = request::GET_VRING_BASE;
        let asked = VringState { index, num: 0 };
        let state: VringState = self.query(message, asked.as_bytes(), &[])?.value()?;
        if state.index != index {
            let what = format!("it is for ring {}, not {index}", state.index);
            return Err(bad_reply(message, what));
        }
        Ok(state.num)
    }

    /// Sets a ring's addresses to those of `queue` in `memory`. `flags` may be
    /// [`super::message::VRING_LOG`].
    pub fn set_vring_addr(
        &mut self,
        index: u32,
        memory: &Memory,
        queue: &Queue,
        flags: u32,
    ) -> Result<(), ConnectionError> {
        let at = queue.addresses();
        self.set_vring_addr_raw(VringAddress {
            index,
            flags,
            descriptors: memory.user_address(at.descriptors)?,
            used: memory.user_address(at.used)?,
            available: memory.user_address(at.available)?,
            log: at.used.0,
        })
    }

    /// SET_VRING_ADDR with any addresses.
    pub fn set_vring_addr_raw(&mut self, address: VringAddress) -> Result<(), ConnectionError> {
        self.command(request::SET_VRING_ADDR, address.as_bytes(), &[])
    }

    /// Sends a ring's kick; without one the back end must poll.
    pub fn set_vring_kick(
        &mut self,
        index: u8,
        kick: Option<&Event>,
    ) -> Result<(), ConnectionError> {
        self.set_vring_fd(request::SET_VRING_KICK, index, kick)
    }

    /// Sends a ring's call; without one the front end polls.
    pub fn set_vring_call(
        &mut self,
        index: u8,
        call: Option<&Event>,
    ) -> Result<(), ConnectionError> {
        self.set_vring_fd(request::SET_VRING_CALL, index, call)
    }

    /// Sends the eventfd that signals a ring's errors.
    pub fn set_vring_err(
        &mut self,
        index: u8,
        error: Option<&Event>,
    ) -> Result<(), ConnectionError> {
        self.set_vring_fd(request::SET_VRING_ERR, index, error)
    }

    /// Reads `size` bytes of the configuration space at `offset`.
    pub fn get_config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>, ConnectionError> {
        let message = request::GET_CONFIG;
        let header = ConfigHeader {
            offset,
            size,
            flags: 0,
        };
        let mut body = header.as_bytes().to_vec();
        body.resize(size_of::<ConfigHeader>() + size as usize, 0);
        let reply = self.query(message, &body, &[])?;
        match ConfigHeader::read_from_prefix(&reply.body) {
            Ok((said, bytes))
                if said.offset == offset && said.size == size && bytes.len() == size as usize =>
            {
                Ok(bytes.to_vec())
            }
            _ => {
                let what = format!("{} bytes for {offset}, {size}", reply.body.len());
                Err(bad_reply(message, what))
            }
        }
    }

    /// Reads the configuration space of a virtio-fs device in one message.
    pub fn get_fs_config(&mut self) -> Result<FsConfig, ConnectionError> {
        let bytes = self.get_config(0, 40)?;
        FsConfig::read_from_bytes(&bytes)
            .map_err(|_size| bad_reply(request::GET_CONFIG, "not 40 bytes".to_owned()))
    }

    /// Writes to the configuration space at `offset`.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        let header = ConfigHeader {
            offset,
            size: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            flags: 0,
        };
        let body = [header.as_bytes(), bytes].concat();
        self.command(request::SET_CONFIG, &body, &[])
    }

    /// Requests the region in which the back end marks what is in flight.
    pub fn get_inflight_fd(
        &mut self,
        queues: u16,
        queue_size: u16,
    ) -> Result<(InflightLayout, OwnedFd), ConnectionError> {
        let message = request::GET_INFLIGHT_FD;
        let asked = InflightLayout {
            num_queues: queues,
            queue_size,
            ..InflightLayout::default()
        };
        let mut reply = self.query(message, asked.as_bytes(), &[])?;
        // Without the structure's padding it is 20 bytes long.
        if reply.body.len() == 20 {
            reply.body.resize(size_of::<InflightLayout>(), 0);
        }
        let layout = reply.value()?;
        match reply.fds.pop() {
            Some(fd) => Ok((layout, fd)),
            None => Err(bad_reply(message, "no file descriptor".to_owned())),
        }
    }

    /// Sends that region back.
    pub fn set_inflight_fd(
        &mut self,
        layout: InflightLayout,
        fd: BorrowedFd<'_>,
    ) -> Result<(), ConnectionError> {
        self.command(request::SET_INFLIGHT_FD, layout.as_bytes(), &[fd])
    }

    /// Sends a pipe for the device's state. `direction` is
    /// [`DeviceState::SAVE`] or [`DeviceState::LOAD`]. The back end may return another one to use
    /// instead.
    pub fn set_device_state_fd(
        &mut self,
        direction: u32,
        fd: BorrowedFd<'_>,
    ) -> Result<Option<OwnedFd>, ConnectionError> {
        let message = request::SET_DEVICE_STATE_FD;
        let state = DeviceState {
            direction,
            phase: 0,
        };
        let mut reply = self.query(message, state.as_bytes(), &[fd])?;
        let code = reply.value::<u64>()?;
        match (code & 0xff, code & 0x100 != 0, reply.fds.pop()) {
            (0, true, None) => Ok(None),
            (0, false, Some(fd)) => Ok(Some(fd)),
            (0, ..) => {
                let what = "it does not say whether a file descriptor comes".to_owned();
                Err(bad_reply(message, what))
            }
            _ => Err(ConnectionError::Refused {
                request: message,
                code,
            }),
        }
    }

    /// Asks whether the device's state was transferred completely.
    pub fn check_device_state(&mut self) -> Result<(), ConnectionError> {
        let message = request::CHECK_DEVICE_STATE;
        match self.get_u64(message)? {
            0 => Ok(()),
            code => Err(ConnectionError::Refused {
                request: message,
                code,
            }),
        }
    }

    /// The sizes of the shared-memory regions that the device wants, by number.
    pub fn get_shmem_config(&mut self) -> Result<Vec<u64>, ConnectionError> {
        let message = request::GET_SHMEM_CONFIG;
        let reply = self.query(message, &[], &[])?;
        let count = reply.value::<[u32; 2]>()?[0] as usize;
        let sizes = reply.body.get(8..8 + 8 * count).unwrap_or_default();
        let sizes: Vec<_> = sizes
            .chunks_exact(8)
            .flat_map(u64::read_from_bytes)
            .collect();
        if sizes.len() == count {
            Ok(sizes)
        } else {
            let what = format!("{count} regions in {} bytes", reply.body.len());
            Err(bad_reply(message, what))
        }
    }

    /// Sends one end of a new socket for the back end's requests. Returns the other end.
    pub fn set_backend_req_fd(&mut self) -> Result<Self, ConnectionError> {
        let pair = UnixStream::pair();
        let (ours, theirs) = pair.map_err(io_error("make a socket for"))?;
        self.command(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        Self::new(ours)
    }

    fn get_u64(&mut self, message: u32) -> Result<u64, ConnectionError> {
        self.query(message, &[], &[])?.value()
    }

    fn set_vring_state(
        &mut self,
        message: u32,
        index: u32,
        num: u32,
    ) -> Result<(), ConnectionError> {
        let state = VringState { index, num };
        self.command(message, state.as_bytes(), &[])
    }

    fn set_vring_fd(
        &mut self,
        message: u32,
        index: u8,
        event: Option<&Event>,
    ) -> Result<(), ConnectionError> {
        let index = u64::from(index);
        match event {
            Some(event) => self.command(message, index.as_bytes(), &[event.as_fd()]),
            None => self.command(message, (index | VRING_NO_FD).as_bytes(), &[]),
        }
    }
}

fn entry(region: &MappedRegion) -> MemoryRegion {
    MemoryRegion {
        gpa: region.gpa(),
        size: region.len(),
        user_address: region.user_address(),
        mmap_offset: region.file_offset(),
    }
}
