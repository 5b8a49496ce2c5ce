//! What the server keeps of its privileges.
//!
//! The invariant: from the end of [`drop_capabilities`] on the process can't get back what it
//! has dropped, by whatever program it might run.

use std::str::FromStr;

use rustix::io::Errno;
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid};

use super::Needs;

/// Capabilities to be kept beyond those that are needed, and to be dropped of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilityChanges {
    kept: u64,
    dropped: u64,
}

/// What is no list of capabilities.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no capability to keep (+NAME) or to drop (-NAME); a list is such as +sys_admin:-mknod"
)]
pub struct UnknownCapability(String);

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

/// What was kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// File handles can be opened.
    pub(super) file_handles: bool,
    /// `CAP_SYS_ADMIN`.
    pub(super) admin: bool,
}

/// Whether the namespaces have to be had by way of a user namespace.
pub(super) fn is_ordinary_user() -> bool {
    let may = |sets: CapabilitySets| sets.effective.contains(CapabilitySet::SYS_ADMIN);
    !rustix::process::geteuid().is_root() && !rustix::thread::capabilities(None).is_ok_and(may)
}

/// What `needs` takes of the capabilities of a server that may have any.
fn needed(needs: Needs) -> CapabilitySet {
    // Reading whatever the guest's superuser reads, without a trace.
    let mut set = CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER;
    if needs.file_handles {
        set |= CapabilitySet::DAC_READ_SEARCH;
    }
    if !needs.readonly {
        // Owners, modes, devices and file capabilities as the guest says.
        set |= CapabilitySet::CHOWN
            | CapabilitySet::FSETID
            | CapabilitySet::SETUID
            | CapabilitySet::SETGID
            | CapabilitySet::MKNOD
            | CapabilitySet::SETFCAP;
    }
    set
}

/// Takes on ids of the user namespace; the ones it has had may mean nothing there, but would go on
/// meaning on the host what they have always meant.
pub(super) fn take_ids(uid: u32, gid: u32) -> Result<(), Errno> {
    keep_over_changes_of_ids()?;
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

/// Makes capabilities stay what they are when ids change, and root as good as anybody: by its id
/// alone it gets no capability. Done here, as it takes one that is dropped.
fn keep_over_changes_of_ids() -> Result<(), Errno> {
    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    let present = rustix::thread::capabilities_secure_bits()?;
    rustix::thread::set_capabilities_secure_bits(present | bits)
}

/// Lets the capabilities that the process has be those of the program that is run in its place: where
/// it has them by a user namespace, and no id there of a superuser, they would be lost.
pub(super) fn keep_over_exec() -> Result<(), Errno> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.inheritable = sets.permitted;
    match rustix::thread::set_capabilities(None, sets) {
        // Of a superuser whose bounding set is smaller; such a one needs it not.
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

/// Drops all capabilities but those that are needed, for ever.
pub(super) fn drop_capabilities(
    needs: Needs,
    change_ids: bool,
    changes: &CapabilityChanges,
) -> Result<Kept, Errno> {
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
        log::warn!("--modcaps: the server hasn't got {}", names(missing));
    }
    let kept = wanted & sets.permitted;
    if sets.effective.contains(CapabilitySet::SETPCAP) {
        keep_over_changes_of_ids()?;
        for capability in CapabilitySet::all() - kept {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // Younger than the kernel.
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
    Ok(Kept {
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
    fn changes_are_read_as_launchers_write_them() {
        let changes: CapabilityChanges = "+sys_admin:-CAP_MKNOD:+Chown".parse().unwrap();
        let kept = CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN;
        assert_eq!(changes.kept, kept.bits());
        assert_eq!(changes.dropped, CapabilitySet::MKNOD.bits());
        for bad in ["", "sys_admin", "+", "+sys_adm", "+chown,-mknod", "+chown:"] {
            assert!(bad.parse::<CapabilityChanges>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_share_that_is_only_read_takes_fewer() {
        let needs = Needs {
            readonly: true,
            file_handles: false,
        };
        assert_eq!(
            needed(needs),
            CapabilitySet::DAC_OVERRIDE | CapabilitySet::FOWNER
        );
        let all = needed(Needs {
            readonly: false,
            file_handles: true,
        });
        assert!(!all.contains(CapabilitySet::SYS_ADMIN));
        assert_eq!(all.iter().count(), 9);
    }
}
