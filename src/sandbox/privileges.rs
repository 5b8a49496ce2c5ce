//! The capabilities that the serving process keeps.
//!
//! The invariant: once [`drop_capabilities`] has returned, the process can't get back what it has
//! dropped, whatever program it runs.

use std::str::FromStr;

use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid};

use super::Needs;

/// Capabilities to keep in addition to those that are needed, and capabilities to drop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityChanges {
    kept: u64,
    dropped: u64,
}

/// The error of a malformed list of capabilities.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is neither a capability to keep (+NAME) nor one to drop (-NAME); a list looks like \
     +sys_admin:-mknod"
)]
pub struct UnknownCapability(String);

impl CapabilityChanges {
    /// Whether the server keeps `CAP_SYS_RESOURCE`, which a quota doesn't bind.
    #[must_use]
    pub fn keeps_sys_resource(&self) -> bool {
        self.kept & !self.dropped & CapabilitySet::SYS_RESOURCE.bits() != 0
    }
}

impl FromStr for CapabilityChanges {
    type Err = UnknownCapability;

    fn from_str(text: &str) -> Result<Self, UnknownCapability> {
        let mut changes = Self::default();
        for item in text.split(':') {
            let unknown = || UnknownCapability(item.to_owned());
            let (set, name) = match item.split_at_checked(1) {
                Some(("+", name)) => (&mut changes.kept, name),
                Some(("-", name)) => (&mut changes.dropped, name),
                _ => return Err(unknown()),
            };
            let name = name.to_ascii_uppercase();
            let name = name.strip_prefix("CAP_").unwrap_or(&name);
            *set |= CapabilitySet::from_name(name).ok_or_else(unknown)?.bits();
        }
        Ok(changes)
    }
}

/// What the process can do with the capabilities that it has kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Retained {
    /// It can open file handles (`CAP_DAC_READ_SEARCH`).
    pub(super) file_handles: bool,
    /// It has `CAP_SYS_ADMIN`.
    pub(super) admin: bool,
}

/// Whether making namespaces needs a user namespace first.
pub(super) fn is_ordinary_user() -> bool {
    let may = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::SYS_ADMIN);
    !rustix::process::geteuid().is_root() && !rustix::thread::capabilities(None).is_ok_and(may)
}

/// The capabilities that a server with these needs uses.
fn needed(needs: Needs) -> CapabilitySet {
    // Read whatever the guest's superuser may read, without changing access times.
    let mut set = CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER;
    if needs.file_handles {
        set |= CapabilitySet::DAC_READ_SEARCH;
    }
    if !needs.readonly {
        // Set owners, modes, devices and file capabilities as the guest asks.
        set |= CapabilitySet::CHOWN
            | CapabilitySet::FSETID
            | CapabilitySet::SETUID
            | CapabilitySet::SETGID
            | CapabilitySet::MKNOD
            | CapabilitySet::SETFCAP;
    }
    set
}

/// Sets the ids of the user namespace. The previous ids may not be mapped there, but would still
/// own files on the host.
pub(super) fn set_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    detach_capabilities_from_ids()?;
    if rustix::process::getegid().as_raw() != gid || rustix::process::getgid().as_raw() != gid {
        let gid = Gid::from_raw(gid);
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    }
    if rustix::process::geteuid().as_raw() != uid || rustix::process::getuid().as_raw() != uid {
        let uid = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    Ok(())
}

/// Makes capabilities independent of ids: they stay when ids change, and id 0 alone gives none.
/// This needs `CAP_SETPCAP`, which is dropped later.
fn detach_capabilities_from_ids() -> Result<(), Errno> {
    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    let present = rustix::thread::capabilities_secure_bits()?;
    rustix::thread::set_capabilities_secure_bits(present | bits)
}

/// Makes the next program in this process keep its capabilities. A process that has them from its
/// user namespace, but isn't id 0 there, would lose them.
pub(crate) fn keep_over_exec() -> Result<(), Errno> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = sets.permitted;
    match rustix::thread::set_capabilities(None, sets) {
        // EPERM: root with a reduced bounding set, which doesn't need this.
        Ok(()) | Err(Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    for capability in sets.permitted {
        match rustix::thread::configure_capability_in_ambient_set(capability, true) {
            Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Drops all capabilities that aren't needed, for good.
pub(super) fn drop_capabilities(
    needs: Needs,
    change_ids: bool,
    changes: &CapabilityChanges,
) -> Result<Retained, Errno> {
    rustix::thread::set_no_new_privs(true)?;
    let sets = rustix::thread::capabilities(None)?;
    let mut wanted = needed(needs);
    if !change_ids {
        wanted -= CapabilitySet::SETUID | CapabilitySet::SETGID;
    }
    wanted |= CapabilitySet::from_bits_retain(changes.kept);
    wanted -= CapabilitySet::from_bits_retain(changes.dropped);
    let missing = CapabilitySet::from_bits_retain(changes.kept) - sets.permitted;
    if !missing.is_empty() {
        log::warn!("--modcaps: the server doesn't have {}", names(missing));
    }
    let kept = wanted & sets.permitted;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        detach_capabilities_from_ids()?;
        for capability in CapabilitySet::all() - kept {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // EINVAL: this kernel doesn't know the capability.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    log::debug!("capabilities: {}", names(kept));
    Ok(Retained {
        file_handles: kept.contains(CapabilitySet::DAC_READ_SEARCH),
        admin: kept.contains(CapabilitySet::SYS_ADMIN),
    })
}

fn names(set: CapabilitySet) -> String {
    if set.is_empty() {
        return "none".to_owned();
    }
    let names: Vec<_> = set
        .iter_names()
        .map(|(name, _)| name.to_ascii_lowercase())
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_parsed_with_and_without_prefix_in_any_case() {
        let changes: CapabilityChanges = "+sys_admin:-CAP_MKNOD:+Chown".parse().unwrap();
        let kept = CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN;
        assert_eq!(changes.kept, kept.bits());
        assert_eq!(changes.dropped, CapabilitySet::MKNOD.bits());
        assert!(!changes.keeps_sys_resource());
        let changes: CapabilityChanges = "+sys_resource".parse().unwrap();
        assert!(changes.keeps_sys_resource());
        for bad in ["", "sys_admin", "+", "+sys_adm", "+chown,-mknod", "+chown:"] {
            assert!(bad.parse::<CapabilityChanges>().is_err(), "{bad}");
        }
    }

    #[test]
    fn readonly_share_needs_fewer_capabilities() {
        let needs = Needs {
            readonly: true,
            file_handles: false,
            more_directories: false,
        };
        assert_eq!(
            needed(needs),
            CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER
        );
        let all = needed(Needs {
            readonly: false,
            file_handles: true,
            more_directories: false,
        });
        assert!(!all.contains(CapabilitySet::SYS_ADMIN));
        assert_eq!(all.iter().count(), 9);
    }
}
