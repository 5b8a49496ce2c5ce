//! Migration of a session to another server: saving it here, loading it there.
//!
//! The queues are stopped meanwhile, so no request is being served; the barrier makes sure of it.
//! The invariant: a session that was loaded is complete, and if loading fails there is no session.

use super::{Session, terms};
use crate::fs::{FileSystem, Migrate, MoveError};
use crate::fuse::abi::InitFlags;
use crate::fuse::init::{self, Negotiated};
use crate::migration::stream::{self, Agreement};
use crate::migration::{Cause, DeviceState};

impl<F: FileSystem + ?Sized> Session<F> {
    /// The whole session, as bytes for [`load`](Self::load). It continues here if its queues do.
    ///
    /// # Errors
    ///
    /// See [`MoveError`].
    pub fn save(&self) -> Result<Vec<u8>, MoveError> {
        let _closed = self.barrier.close();
        match self.mappings() {
            0 => {}
            count => return Err(MoveError::Mapped { count }),
        }
        let mut snapshot = self.migrate()?.save()?;
        snapshot.agreement = self.negotiated().map(|negotiated| Agreement {
            minor: negotiated.minor,
            flags: negotiated.flags.bits(),
            max_readahead: negotiated.max_readahead,
            max_write: negotiated.max_write,
            max_pages: negotiated.max_pages,
            max_background: negotiated.max_background,
        });
        Ok(stream::encode(&snapshot)?)
    }

    /// Called when the saved session has been sent. Releases what only one server can hold.
    pub fn release_for_migration(&self) {
        let _closed = self.barrier.close();
        if let Some(migrate) = self.fs.migrate() {
            migrate.release_for_migration();
        }
    }

    /// Called when the session continues here. Does nothing unless something was released.
    pub fn reacquire(&self) {
        if let Some(migrate) = self.fs.migrate() {
            migrate.reacquire();
        }
    }

    /// Continues a session that another server has saved. The current session is discarded.
    ///
    /// # Errors
    ///
    /// See [`MoveError`]. The session then waits for INIT.
    pub fn load(&self, bytes: &[u8]) -> Result<(), MoveError> {
        let snapshot = stream::decode(bytes)?;
        let closed = self.barrier.close();
        self.end(&closed);
        let negotiated = snapshot.agreement.as_ref().map(|agreed| Negotiated {
            minor: agreed.minor,
            flags: InitFlags::from_bits(agreed.flags),
            max_readahead: agreed.max_readahead,
            max_write: agreed.max_write,
            max_pages: agreed.max_pages,
            max_background: agreed.max_background,
        });
        if let Some(negotiated) = &negotiated {
            let missing = negotiated.flags.without(init::accepted(&self.options));
            if missing != InitFlags::NONE {
                return Err(MoveError::Options {
                    missing: missing.to_string(),
                });
            }
            self.fs.begin(&terms(negotiated.flags));
        }
        if let Err(error) = self.migrate().and_then(|migrate| migrate.load(&snapshot)) {
            self.end(&closed);
            return Err(error);
        }
        if let Some(negotiated) = negotiated {
            log::info!("session resumed: {negotiated}");
            self.agree(negotiated);
            self.record_agreement(Some(negotiated.words()));
        }
        Ok(())
    }

    fn migrate(&self) -> Result<&dyn Migrate, MoveError> {
        self.fs.migrate().ok_or(MoveError::Unsupported)
    }
}

impl<F: FileSystem + ?Sized> DeviceState for Session<F> {
    fn save(&self) -> Result<Vec<u8>, Cause> {
        Ok(self.save()?)
    }

    fn saved(&self) {
        self.release_for_migration();
    }

    fn load(&self, bytes: &[u8]) -> Result<(), Cause> {
        Ok(self.load(bytes)?)
    }
}
