//! Closes what is open only because it may be needed again, when an operator asks for it.
//!
//! The invariant: nothing is closed that a program of the guest has open, or that couldn't be opened
//! again.

use super::Descriptors;
use super::eviction::MIN_FDS;
use crate::fs::Dropped;

impl Descriptors {
    /// Closes files that the guest has closed or never opened, and the descriptors of inodes.
    pub(crate) fn drop_caches(&self) -> Dropped {
        let closed_files = self.files.closed().count();
        self.files.closed().clear();
        let unreported = self.files.handleless().count();
        self.files.handleless().close_some(|| true);
        let descriptors = self.inodes.descriptors();
        self.close_some(|| self.inodes.descriptors() > MIN_FDS);
        Dropped {
            closed_files,
            unreported_opens: unreported.saturating_sub(self.files.handleless().count()),
            inode_descriptors: descriptors.saturating_sub(self.inodes.descriptors()),
        }
    }
}
