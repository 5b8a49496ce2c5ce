//! Options of the heading Caching: what the guest may keep of what it has seen, and for how long.

use std::time::Duration;

use clap::Args;

use super::seconds::seconds;
use crate::fs::passthrough::Cache;

/// What the guest may cache.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Caching")]
pub struct Caching {
    /// Caching policy: never, metadata, auto or always
    ///
    /// - never: nothing; each access goes to the host
    /// - metadata: names and attributes for a day, no data
    /// - auto: names and attributes for a second, data until the file
    ///   changes
    /// - always: everything for a day, data also across close and open;
    ///   for directories that nobody but this guest changes
    #[arg(
        long,
        value_name = "POLICY",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub cache: Cache,

    /// How long the guest may rely on attributes
    ///
    /// A number of seconds, such as 0.5.
    ///
    /// [default: set by --cache]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub attr_timeout: Option<Duration>,

    /// How long the guest may rely on a name
    ///
    /// A number of seconds, such as 0.5.
    ///
    /// [default: set by --cache]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub entry_timeout: Option<Duration>,

    /// How long the guest may rely on a name's absence
    ///
    /// Programs that search for files along a path then send fewer requests. A file created on the
    /// host is seen later by as much.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "0")]
    pub negative_timeout: Duration,

    /// Let the guest collect writes and send them later
    ///
    /// Writes reach the server in larger pieces, which is faster for many small ones. A
    /// crash of the guest loses what it would have lost on a disk of its own. Nobody else may write
    /// to the same files meanwhile.
    #[arg(long)]
    pub writeback: bool,

    /// Pass the guest's O_DIRECT on to the host
    ///
    /// Reads and writes then bypass the host's cache as well as the guest's. Without this option
    /// they bypass the guest's cache only.
    #[arg(long)]
    pub allow_direct_io: bool,

    /// Allow shared writable mmap with any --cache policy
    ///
    /// With --cache never and metadata the guest refuses such mappings unless this option is given.
    /// Mapped pages are cached, whatever --cache says.
    #[arg(long)]
    pub allow_mmap: bool,

    /// List directories without attributes of the files
    ///
    /// This suits directories whose files are seldom accessed, such as mail queues.
    #[arg(long)]
    pub no_readdirplus: bool,

    /// Let the guest use files without OPEN requests
    ///
    /// The server opens a file when it is first read or written, and keeps the descriptor as long as
    /// there is room. This saves three requests for each file that a program opens. Needs --cache
    /// auto or always.
    #[arg(
        long,
        conflicts_with_all = ["posix_locks", "flock", "allow_direct_io", "preserve_noatime"]
    )]
    pub no_open: bool,

    /// Let the guest read directories without OPENDIR requests
    ///
    /// The guest may then keep lists of names until the directory changes. Not with --cache never.
    #[arg(long)]
    pub no_opendir: bool,

    /// Closed files to keep open for reuse
    ///
    /// A file that the guest had open for reading, and has closed, then opens again without a system
    /// call. 0 keeps none. The maximum is a quarter of --max-open-inodes.
    #[arg(long, value_name = "N", default_value = "1024")]
    pub max_spare_files: usize,
}
