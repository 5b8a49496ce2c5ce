//! The first half of a handshake: what a front end does when it starts.
//!
//! The orders were observed on the front ends and are kept with their oddities.

use std::os::unix::net::UnixStream;
use std::path::Path;

use zerocopy::FromBytes;

use super::{Agreed, Options, Session, SessionError, number};
use crate::connection::message::{FsConfig, feature, protocol};
use crate::connection::{Connection, ConnectionError};
use crate::profile::Profile;

impl Profile {
    /// Sets up a session on this stream.
    ///
    /// # Errors
    /// [`SessionError`], for whichever message fails.
    pub fn connect(self, stream: UnixStream, options: &Options) -> Result<Session, SessionError> {
        self.connect_on(Connection::new(stream)?, options)
    }

    /// Connects to a listening back end and sets up a session.
    ///
    /// # Errors
    /// [`SessionError`], for whichever message fails.
    pub fn connect_path(
        self,
        path: impl AsRef<Path>,
        options: &Options,
    ) -> Result<Session, SessionError> {
        self.connect_on(Connection::connect(path)?, options)
    }

    /// Performs the first half only: memory and queues are made, and not sent. For what
    /// has to happen before the rings start, as loading a device's state;
    /// [`Session::restart`] with zeros (no bases) does the second half.
    ///
    /// # Errors
    /// [`SessionError`], for whichever message fails.
    pub fn prepare(self, stream: UnixStream, options: &Options) -> Result<Session, SessionError> {
        self.begin(Connection::new(stream)?, options)
    }

    fn connect_on(
        self,
        connection: Connection,
        options: &Options,
    ) -> Result<Session, SessionError> {
        let mut session = self.begin(connection, options)?;
        self.activate(&mut session, &[])?;
        Ok(session)
    }

    fn begin(self, mut connection: Connection, options: &Options) -> Result<Session, SessionError> {
        connection.set_timeout(options.timeout)?;
        let agreed = match self {
            Self::Simple => self.negotiate_simple(connection, options),
            Self::Qemu => self.negotiate_qemu(connection, options),
            Self::CloudHypervisor => self.negotiate_cloud_hypervisor(connection, options),
            Self::Dragonball => self.negotiate_dragonball(connection, options),
            Self::Crosvm => self.negotiate_crosvm(connection, options),
            Self::Libkrun => self.negotiate_libkrun(connection, options),
        };
        let mut session = Session::new(self, agreed?, options)?;
        if self == Self::Qemu {
            session.announce_as_qemu()?;
        }
        Ok(session)
    }

    fn negotiate_simple(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        connection.set_owner()?;
        let features = accept(&mut connection, options)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        connection.set_need_reply(true);
        let queues = wanted_queues(options);
        check_queues(&mut connection, queues)?;
        let mut agreed = self.agreed(connection, features, queues, options);
        if agreed.connection.has(protocol::CONFIG) {
            agreed.config = Some(agreed.connection.get_fs_config()?);
        }
        if agreed.connection.has(protocol::SHMEM) {
            agreed.shared_memory = agreed.connection.get_shmem_config()?;
        }
        if agreed.connection.has(protocol::BACKEND_REQ) {
            agreed.backend = Some(agreed.connection.set_backend_req_fd()?);
        }
        Ok(agreed)
    }

    fn negotiate_qemu(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        let features = accept(&mut connection, options)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        let queues = wanted_queues(options);
        check_queues(&mut connection, queues)?;
        if connection.has(protocol::CONFIGURE_MEM_SLOTS) {
            connection.get_max_mem_slots()?;
        }
        let mut agreed = self.agreed(connection, features, queues, options);
        if agreed.connection.has(protocol::BACKEND_REQ) {
            agreed.backend = Some(agreed.connection.set_backend_req_fd()?);
        }
        agreed.connection.set_owner()?;
        agreed.connection.get_features()?;
        Ok(agreed)
    }

    fn negotiate_cloud_hypervisor(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        connection.set_owner()?;
        let features = accept(&mut connection, options)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        connection.set_need_reply(true);
        let queues = wanted_queues(options);
        check_queues(&mut connection, queues)?;
        Ok(self.agreed(connection, features, queues, options))
    }

    fn negotiate_dragonball(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        connection.get_features()?;
        connection.set_owner()?;
        let features = accept(&mut connection, options)?;
        connection.set_features(features)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        // It does not ask how many queues there are.
        let queues = wanted_queues(options);
        let mut agreed = self.agreed(connection, features, queues, options);
        if agreed.connection.has(protocol::BACKEND_REQ) {
            agreed.backend = Some(agreed.connection.set_backend_req_fd()?);
        }
        Ok(agreed)
    }

    fn negotiate_crosvm(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        connection.set_owner()?;
        let features = accept(&mut connection, options)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        let backend = if connection.has(protocol::BACKEND_REQ) {
            Some(connection.set_backend_req_fd()?)
        } else {
            None
        };
        let queues = all_queues(&mut connection)?;
        let mut agreed = self.agreed(connection, features, queues, options);
        agreed.backend = backend;
        if agreed.connection.has(protocol::SHMEM) {
            agreed.shared_memory = agreed.connection.get_shmem_config()?;
        }
        // The features that the guest takes are passed on when it starts the device.
        agreed.config = read_config_as_a_driver(&mut agreed.connection)?;
        Ok(agreed)
    }

    fn negotiate_libkrun(
        self,
        mut connection: Connection,
        options: &Options,
    ) -> Result<Agreed, SessionError> {
        let features = accept(&mut connection, options)?;
        self.ask_protocol_features(&mut connection, features, options)?;
        let queues = match options.request_queues {
            Some(_) => wanted_queues(options),
            None => all_queues(&mut connection)?,
        };
        let mut agreed = self.agreed(connection, features, queues, options);
        // Before SET_OWNER, which comes with the driver.
        agreed.config = read_config_as_a_driver(&mut agreed.connection)?;
        Ok(agreed)
    }

    fn agreed(
        self,
        connection: Connection,
        features: u64,
        queues: u16,
        options: &Options,
    ) -> Agreed {
        Agreed {
            connection,
            features,
            queues,
            queue_size: options.queue_size.unwrap_or(self.queue_size()),
            config: None,
            backend: None,
            shared_memory: Vec::new(),
        }
    }

    fn ask_protocol_features(
        self,
        connection: &mut Connection,
        features: u64,
        options: &Options,
    ) -> Result<(), ConnectionError> {
        if features & feature::PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let offered = connection.get_protocol_features()?;
        connection.set_protocol_features(offered & options.asked(self))
    }
}

/// GET_FEATURES, and the accepted features.
fn accept(connection: &mut Connection, options: &Options) -> Result<u64, ConnectionError> {
    Ok(connection.get_features()? & options.features)
}

/// The queues to make, the high-priority one included.
fn wanted_queues(options: &Options) -> u16 {
    options.request_queues.unwrap_or(1).saturating_add(1)
}

/// GET_QUEUE_NUM, if there is MQ, as the limit.
fn check_queues(connection: &mut Connection, wanted: u16) -> Result<(), SessionError> {
    if connection.has(protocol::MQ) {
        let offered = connection.get_queue_num()?;
        if offered < u64::from(wanted) {
            return Err(SessionError::TooManyQueues { wanted, offered });
        }
    }
    Ok(())
}

/// GET_QUEUE_NUM, if there is MQ, as the number; the fewest that the device type has where
/// there is not.
fn all_queues(connection: &mut Connection) -> Result<u16, SessionError> {
    if connection.has(protocol::MQ) {
        let offered = connection.get_queue_num()?;
        Ok(u16::from(number(
            usize::try_from(offered).unwrap_or(usize::MAX),
        )))
    } else {
        Ok(2)
    }
}

/// The configuration space as a guest's driver reads it where each access becomes a message: the
/// tag byte by byte, then the number of queues.
fn read_config_as_a_driver(
    connection: &mut Connection,
) -> Result<Option<FsConfig>, ConnectionError> {
    if !connection.has(protocol::CONFIG) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    for offset in 0..36 {
        bytes.extend(connection.get_config(offset, 1)?);
    }
    bytes.extend(connection.get_config(36, 4)?);
    Ok(FsConfig::read_from_bytes(&bytes).ok())
}
