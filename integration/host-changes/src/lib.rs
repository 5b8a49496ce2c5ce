//! Changes a shared directory on the host while programs of a guest write to it, and checks where
//! each acknowledged record is.
//!
//! [`Share`] is the host's side, [`Writer`] the guest's programs over any [`Programs`], and
//! [`Report`] what they found. The invariant: whatever the host removes from a path stays open
//! here, so that a record whose write was acknowledged to a program of the guest can be found,
//! wherever it is.

mod effect;
mod host;
mod programs;
mod random;
mod report;
mod run;
mod share;
mod writer;

pub use effect::{ATTRIBUTE, Effect};
pub use host::{DirectoryChange, FileChange};
pub use programs::{Mounted, Programs, Reliance};
pub use random::Random;
pub use report::Report;
pub use run::{Plan, run};
pub use share::{DIRECTORIES, Share};
pub use writer::{Action, File, Rules, Target, Writer};

/// A result, or the error number.
pub type Result<T> = std::result::Result<T, i32>;
