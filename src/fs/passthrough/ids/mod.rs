//! User and group ids: how they are mapped between guest and host, and who owns new files.
//!
//! The invariant: an id of the guest reaches the host only after it was mapped, and an id of the
//! host likewise.

mod credentials;
mod id_map;

use std::os::fd::OwnedFd;

pub(crate) use self::credentials::{CredentialsGuard, overrides, prepare_thread};
pub use self::id_map::{IdMap, IdOverlap, IdRule, IdRuleError};

use self::credentials::CredentialPolicy;
use crate::fs::{Attributes, Caller, Result};

/// The ids of guest and host.
#[derive(Debug)]
pub(crate) struct Ids {
    users: IdMap,
    groups: IdMap,
    policy: CredentialPolicy,
}

impl Ids {
    /// For files on the file system of `root`.
    ///
    /// # Errors
    ///
    /// Those of `fstatfs(2)`.
    pub(crate) fn new(users: IdMap, groups: IdMap, root: &OwnedFd) -> Result<Self> {
        Ok(Self {
            users,
            groups,
            policy: CredentialPolicy::for_file_system(root)?,
        })
    }

    /// The host's attributes as the guest sees them.
    pub(crate) fn attributes_for_guest(&self, on_host: Attributes) -> Attributes {
        Attributes {
            uid: self.users.to_guest(on_host.uid),
            gid: self.groups.to_guest(on_host.gid),
            ..on_host
        }
    }

    /// Maps a user id of the guest.
    ///
    /// # Errors
    ///
    /// `EPERM` if the guest may not use it.
    pub(crate) fn user_on_host(&self, uid: u32) -> Result<u32> {
        self.users.to_host(uid)
    }

    /// As [`user_on_host`](Self::user_on_host), for a group id.
    pub(crate) fn group_on_host(&self, gid: u32) -> Result<u32> {
        self.groups.to_host(gid)
    }

    /// Maps the ids of the caller to the host's.
    ///
    /// # Errors
    ///
    /// `EPERM` if the guest may not use them.
    pub(crate) fn caller_on_host(&self, caller: &Caller) -> Result<Caller> {
        Ok(Caller {
            uid: caller.uid.map(|uid| self.users.to_host(uid)).transpose()?,
            gid: caller.gid.map(|gid| self.groups.to_host(gid)).transpose()?,
            // A group that the caller may not use is left out.
            group: caller
                .group
                .and_then(|group| self.groups.to_host(group).ok()),
            ..*caller
        })
    }

    /// Makes `caller` the owner of everything that this thread creates until the guard is dropped,
    /// with the mode masked by `umask`.
    ///
    /// # Errors
    ///
    /// `EOVERFLOW` if the caller has no ids; `EPERM` if the guest may not use them, or if they have
    /// no mapping in the server's user namespace.
    pub(crate) fn as_caller(
        &self,
        proc_fds: &OwnedFd,
        caller: &Caller,
        umask: Option<u32>,
    ) -> Result<CredentialsGuard> {
        let caller = self.caller_on_host(caller)?;
        self.policy.as_caller(proc_fds, &caller, umask)
    }
}
