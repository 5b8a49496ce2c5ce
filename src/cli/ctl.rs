//! The command `ringfsd ctl` and its options.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use log::LevelFilter;

use super::limits::{BandwidthLimit, OperationLimit, bandwidth, operations, settings};
use super::values::log_level;
use crate::limits::Settings;

/// Look into a running server, or change its settings
///
/// The server must have been started with --control unix:SOCKET. Only its user and root can control
/// it.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringfsd ctl",
    bin_name = "ringfsd ctl",
    version,
    flatten_help = true
)]
pub struct Ctl {
    /// Path of the server's control socket, or name of its share
    ///
    /// A NAME stands for NAME.ctl in /run/ringfsd, where ringfsd@NAME of systemd has it, in
    /// /run/ringfsd-user or in $XDG_RUNTIME_DIR/ringfsd.
    pub socket: PathBuf,

    /// Print the reply as one line of JSON
    ///
    /// A failure is printed as JSON too; the exit status is then 1, as without this option.
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
#[command(rename_all = "kebab-case", disable_help_subcommand = true)]
pub enum CtlCommand {
    /// Show what the server serves, how, and whether a VMM is connected
    Status,
    /// Show the counters of requests, and what is in use
    Statistics {
        /// Measure how long requests take, for the next 10 seconds
        ///
        /// Durations in the reply are those of earlier calls with this option. With --metrics they
        /// are always measured.
        #[arg(long)]
        durations: bool,
    },
    /// Show the files with the most requests
    ///
    /// Requests are counted by file from the first call on, until none has come for 10 seconds.
    WatchFiles {
        /// Show up to N files, at most 10000
        #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10000))]
        limit: u64,
    },
    /// Set the log level
    ///
    /// The level is kept when the serving process is replaced, and ends with the server.
    SetLogLevel {
        /// Log level: off, error, warn, info, debug or trace
        #[arg(value_parser = log_level(), ignore_case = true, hide_possible_values = true)]
        level: LevelFilter,
        /// Part of the server, such as fs or vhost_user; without it all of them
        room: Option<String>,
    },
    /// Set how much the guest may ask for in a second
    ///
    /// All limits are replaced: what isn't named isn't limited any more. They apply to requests that
    /// wait, too, and are kept when the serving process is replaced.
    SetLimits(LimitArgs),
    /// List the inodes that the guest knows
    Inodes(PageArgs),
    /// List the files and directories that the guest has open
    Handles(PageArgs),
    /// Close what is open only because it may be needed again
    ///
    /// That is files that the guest has closed, and descriptors of inodes that can be opened again.
    /// The guest notices nothing but that the next use takes longer.
    DropCaches,
    /// Mount a directory while the server runs
    ///
    /// The server must have been started with --vfs.
    Mount {
        /// Where, seen from the root of the guest's mount
        point: String,
        /// Directory to mount
        directory: PathBuf,
        /// Refuse every change
        #[arg(long)]
        readonly: bool,
    },
    /// Unmount a file system while the server runs
    ///
    /// What the guest has open of it fails with ESTALE.
    Unmount {
        /// Where, seen from the root of the guest's mount
        point: String,
    },
    /// Replace the server with this program
    ///
    /// See `ringfsd upgrade --help`; here the process is found by the socket.
    Upgrade,
    /// Show threads, queues and requests, to diagnose a server that hangs
    Dump,
}

/// What is limited, and how much.
#[derive(Clone, Debug, Args)]
pub struct LimitArgs {
    /// Operations a second, as for --limit-iops
    #[arg(long, value_name = "[KIND=]N[,burst=M]", value_parser = operations)]
    pub iops: Vec<OperationLimit>,
    /// Bytes a second, as for --limit-bandwidth
    #[arg(long, value_name = "[KIND=]BYTES[,burst=M]", value_parser = bandwidth)]
    pub bandwidth: Vec<BandwidthLimit>,
}

impl LimitArgs {
    /// The limits. A later one of the same kind replaces an earlier one.
    #[must_use]
    pub fn settings(&self) -> Settings {
        settings(&self.iops, &self.bandwidth)
    }
}

/// Which part of a list is shown.
#[derive(Clone, Copy, Debug, Args)]
pub struct PageArgs {
    /// Begin with this entry, which an earlier call has named
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub after: u64,
    /// Show up to N entries, at most 10000
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=10000))]
    pub limit: u64,
    /// Show all entries
    #[arg(long, conflicts_with_all = ["after", "limit"])]
    pub all: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_command_has_help_and_its_arguments() {
        Ctl::command().debug_assert();
        let parse = |arguments: &[&str]| Ctl::try_parse_from([&["ctl", "/s"], arguments].concat());
        assert!(matches!(
            parse(&["set-log-level", "DEBUG", "fs"]).unwrap().command,
            CtlCommand::SetLogLevel {
                level: LevelFilter::Debug,
                room: Some(_)
            }
        ));
        assert!(parse(&["status", "--json"]).unwrap().json);
        for wrong in [
            &[][..],
            &["dance"],
            &["set-log-level", "loud"],
            &["inodes", "--limit=0"],
            &["mount", "/a"],
            &["handles", "--all", "--after=1"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
