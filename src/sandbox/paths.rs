//! Landlock: limits the files that the server may open, by whichever descriptor or path.
//!
//! The kernel checks the directories above a file. So the limit also holds if a compromised server
//! escapes namespaces or `chroot`, and for directories that are moved out of the share. The
//! invariant: if the kernel has Landlock, it is used; if not, the log says so.

use std::os::fd::BorrowedFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::SandboxError;

/// The oldest version that is used (Linux 5.19). Earlier ones forbid to rename between directories.
const MIN: ABI = ABI::V2;
/// The newest version that is used, if the kernel has it.
const MAX: ABI = ABI::V6;

/// A file or directory at or below which files may be opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowed<'a> {
    pub(super) fd: BorrowedFd<'a>,
    /// Nothing may be changed there.
    pub(super) readonly: bool,
}

/// Restricts the calling thread, and those it starts, to opening and changing files at or below
/// `all`.
///
/// # Errors
///
/// The kernel has Landlock, and refuses the ruleset.
pub(super) fn restrict_to(all: &[Allowed<'_>]) -> Result<(), SandboxError> {
    match restrict(all) {
        Ok(RulesetStatus::NotEnforced) => {
            log::info!(
                "Landlock: not used, as this kernel doesn't have it (Linux 5.19 or later has it)"
            );
        }
        Ok(status) => log::debug!("Landlock: {status:?}"),
        Err(error) => return Err(SandboxError::Landlock(Box::new(error))),
    }
    Ok(())
}

fn restrict(all: &[Allowed<'_>]) -> Result<RulesetStatus, RulesetError> {
    let required = Ruleset::default()
        .set_compatibility(CompatLevel::SoftRequirement)
        .handle_access(AccessFs::from_all(MIN))?;
    let ruleset = required
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(MAX))?
        .handle_access(AccessNet::from_all(MAX))?
        .scope(Scope::from_all(MAX))?
        .create()?;
    let rules = all.iter().map(|Allowed { fd, readonly }| {
        let access = match readonly {
            true => AccessFs::from_read(MAX),
            false => AccessFs::from_all(MAX),
        };
        Ok::<_, RulesetError>(PathBeneath::new(*fd, access & !AccessFs::Execute))
    });
    let status = ruleset.add_rules(rules)?.restrict_self()?;
    Ok(status.ruleset)
}
