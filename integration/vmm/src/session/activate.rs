//! The second half of a handshake: memory and rings are shared, and the rings start. A front end does
//! this once the guest's driver is there, and again when the driver comes back.

use super::{Session, SessionError, number};
use crate::connection::ConnectionError;
use crate::connection::message::{feature, protocol};
use crate::profile::Profile;

/// A message about one ring.
#[derive(Clone, Copy)]
enum Vring {
    Num,
    Addr,
    /// The base from the caller's list, 0 if it has none.
    Base,
    /// The base is 0 whatever the caller's list says.
    BaseZero,
    Kick,
    Call,
    /// A call that goes nowhere, while the front end has the guest's interrupt masked.
    CallMasked,
    /// The call again, known to have arrived. QEMU does not wait here; but its guest's first
    /// request comes long after, and ours at once: it would be answered by the masked call.
    CallUnmasked,
    Err,
    Enable,
}

impl Profile {
    /// Sends memory and rings and starts them, each at its base (0 if it has none).
    pub(crate) fn activate(self, session: &mut Session, bases: &[u16]) -> Result<(), SessionError> {
        match self {
            Self::Simple => {
                session.set_features()?;
                session.connection.set_mem_table(&session.memory)?;
                session.send_inflight()?;
                let ring = [
                    Vring::Num,
                    Vring::Base,
                    Vring::Addr,
                    Vring::Call,
                    Vring::Kick,
                ];
                session.each_ring(&ring, bases)?;
                session.each_ring(&[Vring::Enable], bases)
            }
            Self::Qemu => {
                session.each_ring(&[Vring::CallMasked], bases)?;
                session.set_features()?;
                session.set_memory_as_qemu()?;
                let ring = [Vring::Num, Vring::Base, Vring::Addr, Vring::Kick];
                session.each_ring(&ring, bases)?;
                session.each_ring(&[Vring::Enable], bases)?;
                session.each_ring(&[Vring::CallUnmasked], bases)
            }
            Self::CloudHypervisor => {
                session.set_features()?;
                session.connection.set_mem_table(&session.memory)?;
                session.each_ring(&[Vring::Num], bases)?;
                session.send_inflight()?;
                let ring = [Vring::Addr, Vring::Base, Vring::Call, Vring::Kick];
                session.each_ring(&ring, bases)?;
                session.each_ring(&[Vring::Enable], bases)
            }
            Self::Dragonball => {
                session.each_ring(&[Vring::Call], bases)?;
                session.connection.set_mem_table(&session.memory)?;
                let rounds = [
                    Vring::Num,
                    Vring::Base,
                    Vring::Addr,
                    Vring::Kick,
                    Vring::Call,
                    Vring::Enable,
                ];
                for message in rounds {
                    session.each_ring(&[message], bases)?;
                }
                Ok(())
            }
            Self::Crosvm => {
                session.set_features()?;
                session.connection.set_mem_table(&session.memory)?;
                let ring = [
                    Vring::Num,
                    Vring::Addr,
                    Vring::Base,
                    Vring::Call,
                    Vring::Kick,
                    Vring::Enable,
                ];
                session.each_ring(&ring, bases)
            }
            Self::Libkrun => {
                session.connection.set_owner()?;
                session.connection.set_mem_table(&session.memory)?;
                session.set_features()?;
                let ring = [
                    Vring::Num,
                    Vring::BaseZero,
                    Vring::Addr,
                    Vring::Kick,
                    Vring::Call,
                    Vring::Enable,
                ];
                session.each_ring(&ring, bases)
            }
        }
    }
}

impl Session {
    /// Sends what QEMU sends about the rings before there is a driver: unconnected calls and error
    /// eventfds, then the device's reset, twice.
    pub(super) fn announce_as_qemu(&mut self) -> Result<(), SessionError> {
        self.about_ring(0, Vring::CallMasked, &[])?;
        self.each_ring(&[Vring::CallMasked, Vring::Err], &[])?;
        if self.connection.has(protocol::RESET_DEVICE) {
            self.connection.reset_device()?;
            self.connection.reset_device()?;
        }
        Ok(())
    }

    fn set_features(&mut self) -> Result<(), SessionError> {
        Ok(self.connection.set_features(self.features)?)
    }

    /// Region by region if the back end supports that, once; and acknowledged if it supports that.
    fn set_memory_as_qemu(&mut self) -> Result<(), SessionError> {
        let memory = &self.memory;
        if self.connection.has(protocol::CONFIGURE_MEM_SLOTS) {
            if std::mem::replace(&mut self.regions_added, true) {
                return Ok(());
            }
            for region in memory.regions() {
                self.connection.acknowledged(|c| c.add_mem_reg(region))?;
            }
        } else {
            self.connection.acknowledged(|c| c.set_mem_table(memory))?;
        }
        Ok(())
    }

    /// These messages for the first ring, then for the second, and so on.
    fn each_ring(&mut self, messages: &[Vring], bases: &[u16]) -> Result<(), SessionError> {
        for index in 0..self.queues.len() {
            for &message in messages {
                self.about_ring(index, message, bases)?;
            }
        }
        Ok(())
    }

    fn about_ring(
        &mut self,
        index: usize,
        message: Vring,
        bases: &[u16],
    ) -> Result<(), ConnectionError> {
        let Some(queue) = self.queues.get(index) else {
            return Ok(());
        };
        let has_protocol_features = self.features & feature::PROTOCOL_FEATURES != 0;
        let qemu = self.profile() == Profile::Qemu;
        let connection = &mut self.connection;
        let short = number(index);
        let number = u32::from(short);
        match message {
            Vring::Num => connection.set_vring_num(number, queue.size().into()),
            Vring::Addr => connection.set_vring_addr(number, &self.memory, queue, 0),
            Vring::Base => {
                let base = bases.get(index).copied().unwrap_or(0);
                connection.set_vring_base(number, base.into())
            }
            Vring::BaseZero => connection.set_vring_base(number, 0),
            Vring::Kick => connection.set_vring_kick(short, Some(queue.kick_event())),
            Vring::Call => connection.set_vring_call(short, Some(queue.call_event())),
            Vring::CallMasked => connection.set_vring_call(short, self.masked.get(index)),
            Vring::CallUnmasked => {
                connection.settled(|c| c.set_vring_call(short, Some(queue.call_event())))
            }
            Vring::Err => connection.set_vring_err(short, self.errors.get(index)),
            Vring::Enable if !has_protocol_features => Ok(()),
            Vring::Enable if qemu => connection.settled(|c| c.set_vring_enable(number, true)),
            Vring::Enable => connection.set_vring_enable(number, true),
        }
    }
}
