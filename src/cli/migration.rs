//! Options of live migration: how a guest's session goes to another server, and comes from one.

use clap::{Args, ValueEnum};

use crate::fs::passthrough;

/// How a guest is moved.
#[derive(Clone, Copy, Debug, Default, Args)]
#[command(next_help_heading = "Live migration")]
pub struct Migration {
    /// How this server tells the next one which files the guest has. find-paths: by their paths
    /// in the directory, which the other side has too, or a copy of it. file-handles: by file
    /// handle, where both share one file system (also a network's); give it on both sides, as
    /// the destination needs CAP_DAC_READ_SEARCH for it.
    #[arg(long, value_name = "MODE", value_enum, default_value_t)]
    pub migration_mode: Mode,

    /// What this server does as a destination where a file of the guest is not to be had. abort:
    /// it refuses the guest, which goes on where it was. guest-error: it takes the guest, which
    /// gets errors for that file.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub migration_on_error: OnError,

    /// Send file handles along with paths, by which the destination makes sure that it finds the
    /// very same files. For a file system that both sides share.
    #[arg(long)]
    pub migration_verify_handles: bool,

    /// Look before each path is sent whether it leads to its file, and ask the host's kernel for
    /// another if not. For directories in which others than guests rename; the guest stands
    /// still meanwhile. For files that are open it is done always.
    #[arg(long)]
    pub migration_confirm_paths: bool,
}

/// `--migration-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// By path.
    #[default]
    FindPaths,
    /// By file handle.
    FileHandles,
}

/// `--migration-on-error`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// The guest stays where it is.
    #[default]
    Abort,
    /// The guest gets errors.
    GuestError,
}

impl From<Migration> for passthrough::MigrationOptions {
    fn from(migration: Migration) -> Self {
        Self {
            mode: match migration.migration_mode {
                Mode::FindPaths => passthrough::MigrationMode::FindPaths,
                Mode::FileHandles => passthrough::MigrationMode::FileHandles,
            },
            on_error: match migration.migration_on_error {
                OnError::Abort => passthrough::OnMigrationError::Abort,
                OnError::GuestError => passthrough::OnMigrationError::GuestError,
            },
            verify_handles: migration.migration_verify_handles,
            confirm_paths: migration.migration_confirm_paths,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Options;
    use crate::config::Config;
    use crate::fs::passthrough::{MigrationMode, MigrationOptions, OnMigrationError};

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
    fn what_is_asked_for_reaches_the_file_system() {
        assert_eq!(options(&[]), Migration::default().into());
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
