//! What each message of the front end does to a session.
//!
//! The messages are valid (`dispatch`). The invariant: a queue is stopped before anything changes
//! that it relies on; a handler that fails before that has changed nothing.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::Error as ProtocolError;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserSingleMemoryRegion, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};

use super::Runner;
use super::back_channel::Link;
use super::session::{Session, SessionError, duplicate, eventfd};
use crate::device;
use crate::error_chain;
use crate::guest_memory::{DirtyLog, Memory, Region, RegionDescription};
use crate::migration::{Direction, TransferError};
use crate::virtqueue::{InflightRegion, Queue, RingAddresses};

/// Protocol features that may be offered.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::BACKEND_SEND_FD);

/// The reply to GET_MAX_MEM_SLOTS.
pub(super) const MAX_MEM_SLOTS: u64 = Memory::MAX_REGIONS as u64;

/// Logs the cause of a failed transfer, as the front end gets only a number.
fn log_failure(error: &TransferError) {
    log::error!("migration failed: {}", error_chain::one_line(error));
}

impl<R: Runner> Session<'_, R> {
    /// The protocol features that are offered.
    pub(super) fn protocol_features(&self) -> VhostUserProtocolFeatures {
        if self.runner.can_migrate() {
            PROTOCOL_FEATURES
        } else {
            PROTOCOL_FEATURES.difference(VhostUserProtocolFeatures::DEVICE_STATE)
        }
    }

    pub(super) fn set_features(&mut self, accepted: u64) -> Result<(), SessionError> {
        let extra = accepted & !device::FEATURES;
        if extra != 0 {
            return Err(SessionError::Features { accepted, extra });
        }
        if Some(accepted) == self.features {
            return Ok(());
        }
        self.change_all(|session| session.features = Some(accepted))
    }

    pub(super) fn set_protocol_features(&mut self, accepted: u64) -> Result<(), SessionError> {
        let extra = accepted & !self.protocol_features().bits();
        if extra != 0 {
            return Err(SessionError::Features { accepted, extra });
        }
        self.protocol = Some(accepted);
        self.channel.set_protocol_features(accepted);
        Ok(())
    }

    pub(super) fn set_backend_req_fd(&mut self, fd: &OwnedFd) -> Result<(), SessionError> {
        let link = Link::new(duplicate(fd)?).map_err(SessionError::BackChannel)?;
        // The snapshot keeps the previous one open as long as it names it.
        self.channel.connect(None);
        self.link = Some(Arc::new(link));
        self.opens_channel = true;
        Ok(())
    }

    fn map(&self, region: &VhostUserMemoryRegion, fd: &OwnedFd) -> Result<Region, SessionError> {
        let description = RegionDescription {
            file: File::from(duplicate(fd)?),
            offset: region.mmap_offset,
            guest: region.guest_phys_addr,
            user: region.user_addr,
            len: region.memory_size,
        };
        Ok(Region::map(description, &self.memory_lost)?)
    }

    pub(super) fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        fds: &[OwnedFd],
    ) -> Result<(), SessionError> {
        let regions = table
            .iter()
            .zip(fds)
            .map(|(region, fd)| self.map(region, fd))
            .collect::<Result<Vec<_>, _>>()?;
        let regions = Memory::new(regions, None)?;
        self.change_all(|session| session.regions = regions)?;
        log::debug!("memory table of {} regions", self.regions.regions().len());
        Ok(())
    }

    pub(super) fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: &OwnedFd,
    ) -> Result<(), SessionError> {
        let regions = self.regions.with_region(self.map(region, fd)?)?;
        self.change_all(|session| session.regions = regions)
    }

    pub(super) fn remove_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
    ) -> Result<(), SessionError> {
        let regions = self.regions.without_region(
            region.guest_phys_addr,
            region.user_addr,
            region.memory_size,
        )?;
        self.change_all(|session| session.regions = regions)
    }

    pub(super) fn set_vring_num(&mut self, index: u32, num: u32) -> Result<(), SessionError> {
        let (queue, _) = self.vring(index)?;
        Queue::check_size(queue, num)?;
        let size = u16::try_from(num).map_err(|_checked| ProtocolError::InvalidParam)?;
        self.change(index, |vring| vring.size = size)
    }

    pub(super) fn set_vring_addr(&mut self, ring: &VhostUserVringAddr) -> Result<(), SessionError> {
        let logged = ring.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0;
        let log = ring.log;
        let addresses = RingAddresses {
            descriptors: ring.descriptor,
            available: ring.available,
            used: ring.used,
            log: logged.then_some(log),
        };
        self.change(ring.index, |vring| vring.addresses = Some(addresses))
    }

    pub(super) fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), SessionError> {
        // A split ring has its index in the low half (vhost-user specification, "A vring
        // state description").
        let base = u16::try_from(base & 0xffff).map_err(|_masked| ProtocolError::InvalidParam)?;
        self.change(index, |vring| vring.base = base)
    }

    pub(super) fn get_vring_base(
        &mut self,
        index: u32,
    ) -> Result<VhostUserVringState, SessionError> {
        self.change(index, |vring| vring.kick = None)?;
        let (_, vring) = self.vring(index)?;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    pub(super) fn set_vring_kick(
        &mut self,
        index: u8,
        fd: Option<&OwnedFd>,
    ) -> Result<(), SessionError> {
        let (queue, _) = self.vring(u32::from(index))?;
        let kick = fd.ok_or(SessionError::NoKick(queue))?;
        let kick = eventfd(queue, duplicate(kick)?)?;
        self.change(u32::from(index), |vring| vring.kick = Some(kick))
    }

    pub(super) fn set_vring_call(
        &mut self,
        index: u8,
        fd: Option<&OwnedFd>,
    ) -> Result<(), SessionError> {
        let (queue, vring) = self.vring(u32::from(index))?;
        let fd = fd.map(|fd| eventfd(queue, duplicate(fd)?)).transpose()?;
        vring.call.set(fd.clone());
        vring.call_fd = fd;
        if vring.running {
            // A completion during the exchange may have signalled the old eventfd.
            vring.call.signal();
        }
        Ok(())
    }

    pub(super) fn set_vring_err(
        &mut self,
        index: u8,
        fd: Option<&OwnedFd>,
    ) -> Result<(), SessionError> {
        let (_, vring) = self.vring(u32::from(index))?;
        vring.err = fd.map(duplicate).transpose()?.map(Arc::new);
        Ok(())
    }

    pub(super) fn set_vring_enable(
        &mut self,
        index: u32,
        enable: bool,
    ) -> Result<(), SessionError> {
        let (_, vring) = self.vring(index)?;
        if vring.enabled == enable {
            return Ok(());
        }
        self.change(index, |vring| vring.enabled = enable)
    }

    /// Part of the configuration space. `None` if it doesn't reach that far.
    pub(super) fn get_config(&mut self, offset: u32, size: u32) -> Option<Vec<u8>> {
        if self.device.tag.is_none()
            && offset == 0
            && !std::mem::replace(&mut self.warned_of_missing_tag, true)
        {
            log::warn!(
                "the VMM reads the mount tag from this server, which has none: set --tag NAME, \
                 unless the VMM has a setting of its own"
            );
        }
        let space = self.device.config_space();
        let offset = usize::try_from(offset).ok()?;
        let size = usize::try_from(size).ok()?;
        Some(space.get(offset..offset.checked_add(size)?)?.to_vec())
    }

    pub(super) fn set_config(&self, offset: u32, bytes: &[u8]) {
        // A guest can cause this, so it must not end the session.
        log::debug!(
            "ignoring a write of {} bytes at {offset} to the read-only configuration space",
            bytes.len()
        );
    }

    pub(super) fn set_log_base(
        &mut self,
        log: &VhostUserLog,
        fd: &OwnedFd,
    ) -> Result<(), SessionError> {
        let file = File::from(duplicate(fd)?);
        log::debug!("dirty log on descriptor {}", file.as_raw_fd());
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size, &self.memory_lost)?;
        self.change_all(|session| session.log = Some(Arc::new(log)))
    }

    pub(super) fn get_inflight_fd(
        &mut self,
        wanted: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, OwnedFd), SessionError> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        let max = self.device.queues();
        if queues > max {
            let index = u32::from(queues.saturating_sub(1));
            return Err(SessionError::NoSuchQueue { index, queues: max });
        }
        let (file, len) = InflightRegion::create(queues, size)?;
        Ok((VhostUserInflight::new(len, 0, queues, size), file.into()))
    }

    pub(super) fn set_inflight_fd(
        &mut self,
        given: &VhostUserInflight,
        fd: &OwnedFd,
    ) -> Result<(), SessionError> {
        let (queues, size) = (given.num_queues, given.queue_size);
        let region = InflightRegion::map(
            File::from(duplicate(fd)?),
            (given.mmap_offset, given.mmap_size),
            (queues, size),
            &self.memory_lost,
        )?;
        log::debug!("in-flight region for {queues} queues of {size} entries");
        self.change_all(|session| session.inflight = Some(region))
    }

    /// Starts to save or load the device's state.
    ///
    /// # Errors
    ///
    /// The error has been logged, and doesn't end the session.
    pub(super) fn start_transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        fd: File,
    ) -> Result<(), TransferError> {
        let direction = match direction {
            VhostTransferStateDirection::SAVE => Direction::Save,
            VhostTransferStateDirection::LOAD => Direction::Load,
        };
        let started = if self.vrings.iter().any(|vring| vring.running) {
            Err(TransferError::QueuesRunning)
        } else {
            let state = self.runner.device_state();
            self.transfer.start(direction, fd, state)
        };
        started.inspect_err(log_failure)
    }

    /// Waits for the end of a transfer.
    ///
    /// # Errors
    ///
    /// As [`start_transfer`](Self::start_transfer).
    pub(super) fn finish_transfer(&mut self) -> Result<(), TransferError> {
        self.transfer.finish().inspect_err(log_failure)
    }
}
