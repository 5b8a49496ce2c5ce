//! Options of the heading Migration: how a guest's session is sent to another server, and received.

use clap::Args;

use crate::fs::passthrough::{MigrationMode, MigrationOptions, OnMigrationError};

/// Live migration.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(next_help_heading = "Migration")]
pub struct Migration {
    /// Identify files: find-paths or file-handles
    ///
    /// How this server, as the source, tells the destination which files
    /// the guest uses.
    ///
    /// - find-paths: by their paths in the directory, which the
    ///   destination must have, too, or a copy of it
    /// - file-handles: by file handle, if both servers share one file
    ///   system; a network file system too. Give it on both sides: the
    ///   destination needs CAP_DAC_READ_SEARCH for it
    #[arg(
        long,
        value_name = "MODE",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub migration_mode: MigrationMode,

    /// If a file is missing: abort or guest-error
    ///
    /// What this server, as the destination, does if it can't find or open
    /// a file of the guest.
    ///
    /// - abort: reject the guest, which resumes at the source
    /// - guest-error: accept the guest, which gets errors for that file
    #[arg(
        long,
        value_name = "WHAT",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub migration_on_error: OnMigrationError,

    /// Send file handles along with paths
    ///
    /// The destination compares them to make sure that it has found the very same files. This is for
    /// a file system that both servers share.
    #[arg(long)]
    pub migration_verify_handles: bool,

    /// Check each path before it is sent
    ///
    /// If a path doesn't lead to its file, the host's kernel is asked for another. This is for
    /// directories in which host programs rename files; the guest is paused meanwhile. Paths of open
    /// files are always checked.
    #[arg(long)]
    pub migration_confirm_paths: bool,
}

impl Migration {
    pub(super) fn resolved(self) -> MigrationOptions {
        MigrationOptions {
            mode: self.migration_mode,
            on_error: self.migration_on_error,
            verify_handles: self.migration_verify_handles,
            confirm_paths: self.migration_confirm_paths,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Options;
    use crate::config::Config;

    fn options(args: &[&str]) -> MigrationOptions {
        let common = ["ringfsd", "--fd=3", "--shared-dir=/d"];
        let options = Options::try_parse_from(common.iter().chain(args)).unwrap();
        Config::try_from(options)
            .unwrap()
            .share
            .file_system
            .migration
    }

    #[test]
    fn migration_options_reach_the_file_system() {
        assert_eq!(options(&[]), Migration::default().resolved());
        let all = options(&[
            "--migration-mode=file-handles",
            "--migration-on-error=guest-error",
            "--migration-verify-handles",
            "--migration-confirm-paths",
        ]);
        assert_eq!(
            all,
            MigrationOptions {
                mode: MigrationMode::FileHandles,
                on_error: OnMigrationError::GuestError,
                verify_handles: true,
                confirm_paths: true,
            }
        );
    }
}
