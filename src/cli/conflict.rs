//! Options that contradict each other, where clap can't express it.
//!
//! The invariant: an error names both options and says why they exclude each other.

use super::sources::SourceError;
use crate::fs::passthrough::IdOverlap;
use crate::fs::vfs::MountPoint;

/// Options, or the rules of one option, contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionConflict {
    /// Two rules of one option.
    #[error("{option}: {overlap}")]
    Rules {
        /// The option.
        option: &'static str,
        /// The rules.
        overlap: IdOverlap,
    },
    /// Two options.
    #[error("{option} can't be used with {other}: {reason}")]
    Options {
        /// One option.
        option: &'static str,
        /// The other option.
        other: &'static str,
        /// Why they exclude each other.
        reason: &'static str,
    },
    /// An option of which the program has no implementation.
    #[error("{option} takes a program that is built with `--features {feature}`; this one is not")]
    NotBuilt {
        /// The option.
        option: &'static str,
        /// The feature of the crate.
        feature: &'static str,
    },
    /// What is to be served can't be.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Two file systems have the same mount point.
    #[error("--vfs: two file systems can't be mounted at {0}")]
    MountedTwice(MountPoint),
}

/// Two options that exclude each other if the first value says so, and why.
pub(super) type Conflict = (bool, &'static str, &'static str, &'static str);

pub(super) fn refuse_first(
    conflicts: impl IntoIterator<Item = Conflict>,
) -> Result<(), OptionConflict> {
    match conflicts.into_iter().find(|(conflicting, ..)| *conflicting) {
        None => Ok(()),
        Some((_, option, other, reason)) => Err(OptionConflict::Options {
            option,
            other,
            reason,
        }),
    }
}
