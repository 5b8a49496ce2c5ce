//! Landlock: what the server may open, whatever descriptor or path leads there.
//!
//! It goes by the directories that lie above a file, so it holds where a way around namespaces or
//! `chroot` has been found, and for what is moved out of the shared directory. The invariant: a
//! kernel that has none of it is told of in the log; one that has it is made use of.

use std::os::fd::AsFd;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::SandboxError;

/// What the kernel must have at least: without it nothing could be moved between directories
/// (Linux 5.19).
const LEAST: ABI = ABI::V2;
/// What is used where the kernel has it.
const BEST: ABI = ABI::V6;

/// Lets the calling thread, and those it starts, open and change nothing but what lies at or below
/// `root`.
///
/// # Errors
///
/// The kernel has Landlock and refuses.
pub(super) fn restrict_to(root: impl AsFd) -> Result<(), SandboxError> {
    match restrict(root) {
        Ok(RulesetStatus::NotEnforced) => {
            log::info!("Landlock: not used, as this kernel lacks it (Linux 5.19 or later has it)");
        }
        Ok(status) => log::debug!("Landlock: {status:?}"),
        Err(error) => return Err(SandboxError::Landlock(Box::new(error))),
    }
    Ok(())
}

fn restrict(root: impl AsFd) -> Result<RulesetStatus, RulesetError> {
    let least = Ruleset::default()
        .set_compatibility(CompatLevel::SoftRequirement)
        .handle_access(AccessFs::from_all(LEAST))?;
    let ruleset = least
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(BEST))?
        .handle_access(AccessNet::from_all(BEST))?
        .scope(Scope::from_all(BEST))?
        .create()?;
    let allowed = AccessFs::from_all(BEST) & !AccessFs::Execute;
    let status = ruleset
        .add_rule(PathBeneath::new(root, allowed))?
        .restrict_self()?;
    Ok(status.ruleset)
}
