//! Options as typed, and their help.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::forgets::Form;
use crate::spec::{self, Typed};

/// Put load on a virtio-fs server through its socket, and measure what it does and what it costs.
///
/// This is the VMM's and the driver's side of the connection, without a VMM: it connects, shares
/// guest memory and queues, and sends FUSE requests that are prepared in that memory.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "load",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true,
    after_help = "A case is NAME[/SIZE][@DEPTH[xQUEUES]]: read/64k@8x4 is random reads of 64 KiB, \
        8 in flight on each of 4 queues. --list shows the names.\n\n\
        Example:\n  \
        ringfsd --socket /tmp/fs.sock --shared-dir /srv/share &\n  \
        load --socket /tmp/fs.sock --shared-dir /srv/share --pid $! --case getattr@1,read@32"
)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the bare system calls of a case in a loop, without a server: the upper limit.
    Bare(Bare),
    /// Measure this program itself, against a responder in the same process.
    Ceiling(Ceiling),
    /// Start many servers: what each takes to start, and what it uses while it is idle.
    Fleet(Fleet),
    /// Measure a server whose guest knows many inodes, has many files open, or lists large directories.
    Many(Many),
    /// Print the medians and ratios of results (--json) of several servers, as Markdown.
    Table(Table),
}

/// The options of a run against a server.
#[derive(Clone, Debug, Args)]
pub(crate) struct Run {
    /// The server's socket.
    #[arg(long, value_name = "PATH", required = true)]
    pub(crate) socket: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) share: Share,

    /// Show the cases and what they do.
    #[arg(long, exclusive = true)]
    pub(crate) list: bool,

    /// The server's process, to measure its CPU time, threads, context switches and memory.
    #[arg(long, value_name = "PID")]
    pub(crate) pid: Option<i32>,

    /// How to wait for a reply: sleep until the call eventfd is signalled, as a guest does, or poll
    /// the used ring.
    #[arg(long, value_enum, default_value_t = Wait::Call)]
    pub(crate) wait: Wait,

    /// Threads that drive the queues, at most one for each. [default: 1]
    #[arg(long, value_name = "N", default_value = "1", hide_default_value = true)]
    pub(crate) threads: NonZeroU32,

    /// How a guest's pages become descriptors: one for each page, or one for a whole transfer.
    #[arg(long, value_enum, default_value_t = Descriptors::Pages)]
    pub(crate) descriptors: Descriptors,

    /// Check what was read and written, and every name listed. Slower.
    #[arg(long)]
    pub(crate) verify: bool,

    /// Send no FLUSH before RELEASE. Linux sends it, unless the server replies that it needs none.
    #[arg(long)]
    pub(crate) no_flush: bool,

    /// Send no GETXATTR of security.capability before each WRITE. Linux sends it, unless the server
    /// replies ENOSYS or clears set-ID bits (killpriv-v2).
    #[arg(long)]
    pub(crate) no_getxattr: bool,

    /// How inodes are forgotten.
    #[arg(long, value_enum, default_value_t = Form::Case)]
    pub(crate) forget: Form,

    /// Offer the server to do without OPEN and OPENDIR, as Linux does. Off by default, so that every
    /// server gets the same requests.
    #[arg(long)]
    pub(crate) zero_message_open: bool,

    /// Drop the host's caches (as root) before each case; the cached cases then warm theirs.
    #[arg(long)]
    pub(crate) drop_caches: bool,

    #[command(flatten)]
    pub(crate) measure: Measure,
}

/// The location of the files.
#[derive(Clone, Debug, Args)]
pub(crate) struct Share {
    /// The directory that the server shares, as a path of this host. Files are made in its
    /// subdirectory ringfsd-load.
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) shared_dir: Option<PathBuf>,

    /// The size of the two large files.
    #[arg(long, value_name = "BYTES", default_value = "256m", value_parser = file_size)]
    pub(crate) file_size: u64,

    /// Keep the files for the next run.
    #[arg(long)]
    pub(crate) keep: bool,
}

/// What to measure and for how long.
#[derive(Clone, Debug, Args)]
pub(crate) struct Measure {
    /// The cases. [default: all but idle]
    #[arg(long = "case", value_name = "CASE,…", value_delimiter = ',')]
    pub(crate) cases: Vec<Typed>,

    /// Requests in flight on each queue, if the case does not say.
    #[arg(long, value_name = "1-128", value_parser = spec::parse_depth)]
    pub(crate) depth: Option<u16>,

    /// Bytes of a transfer, if the case does not say: a multiple of 4k up to 1m.
    #[arg(long, value_name = "BYTES", value_parser = spec::parse_size)]
    pub(crate) size: Option<u32>,

    /// Request queues, if the case does not say.
    #[arg(long, value_name = "N", value_parser = spec::parse_queues)]
    pub(crate) queues: Option<u16>,

    /// How long to measure each case.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub(crate) seconds: Duration,

    /// How long to run each case before it is measured.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    pub(crate) warm_up: Duration,

    /// End after this many operations on each queue, unless the time is up before.
    #[arg(long, value_name = "N")]
    pub(crate) ops: Option<NonZeroU64>,

    /// Print a line of JSON for each case instead of a table.
    #[arg(long)]
    pub(crate) json: bool,

    /// The server's name in the results.
    #[arg(long, value_name = "NAME", default_value = "server")]
    pub(crate) label: String,
}

impl Measure {
    /// The cases with their size, depth and queues.
    pub(crate) fn specs(&self) -> Vec<spec::Spec> {
        let resolve = |typed: Typed| typed.resolve(self.size, self.depth, self.queues);
        if self.cases.is_empty() {
            Typed::all().map(resolve).collect()
        } else {
            self.cases.iter().copied().map(resolve).collect()
        }
    }
}

/// The options of `bare`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Bare {
    #[command(flatten)]
    pub(crate) share: Share,

    #[command(flatten)]
    pub(crate) measure: Measure,
}

/// The options of `ceiling`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Ceiling {
    /// How the thread that drives the queue waits.
    #[arg(long, value_enum, default_value_t = Wait::Poll)]
    pub(crate) wait: Wait,

    /// How long to measure each case.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub(crate) seconds: Duration,

    /// Print a line of JSON for each case instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The options of `table`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Table {
    /// Files of lines of JSON, one for each measurement.
    #[arg(value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
}

/// The options of `fleet`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Fleet {
    /// A shell command that starts a server; %SOCKET% stands for the path of its socket.
    #[arg(long, value_name = "LINE")]
    pub(crate) command: String,

    /// The directory of the sockets.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,

    /// How many servers to start.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) count: u32,

    /// How long to measure the idle servers, and then a request on one in a hundred of them.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub(crate) seconds: Duration,

    /// The server's name in the results.
    #[arg(long, value_name = "NAME", default_value = "server")]
    pub(crate) label: String,

    /// Print the head of the table first.
    #[arg(long)]
    pub(crate) heading: bool,
}

/// The options of `many`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Many {
    /// The server's socket.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,

    /// The directory that the server shares, as a path of this host. Files are made in its
    /// subdirectory ringfsd-many, and stay there.
    #[arg(long, value_name = "DIR")]
    pub(crate) shared_dir: PathBuf,

    /// The server's process.
    #[arg(long, value_name = "PID")]
    pub(crate) pid: i32,

    /// Numbers of inodes that the guest knows, in ascending order.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) inodes: Vec<u32>,

    /// Numbers of files that are open, in ascending order.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) open_files: Vec<u32>,

    /// Numbers of entries of a directory.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub(crate) entries: Vec<u32>,
}

/// `--wait`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Wait {
    /// Sleep on the call eventfd.
    Call,
    /// Poll the used ring.
    Poll,
}

/// `--descriptors`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Descriptors {
    /// One for each page of 4 KiB, as in Linux.
    Pages,
    /// One for a whole transfer.
    Whole,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok();
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    match duration {
        Some(duration) if duration <= Duration::from_secs(3600) => Ok(duration),
        _ => Err("a number of seconds, at most 3600".to_owned()),
    }
}

fn file_size(text: &str) -> Result<u64, String> {
    let size = spec::parse_bytes(text)?;
    if (16 << 20..=1 << 40).contains(&size) && size.is_multiple_of(1 << 20) {
        Ok(size)
    } else {
        Err("a multiple of 1m, at least 16m".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_are_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn options_that_can_not_be_are_refused() {
        for bad in [
            &["--shared-dir", "/d"][..],
            &["--socket", "/s"],
            &["--socket", "/s", "--shared-dir", "/d", "--case", "reed"],
            &["--socket", "/s", "--shared-dir", "/d", "--depth", "129"],
            &["--socket", "/s", "--shared-dir", "/d", "--seconds", "-1"],
            &[
                "--socket",
                "/s",
                "--shared-dir",
                "/d",
                "--file-size",
                "5000",
            ],
            &["bare"],
            &["table"],
        ] {
            let args = std::iter::once(&"load").chain(bad);
            assert_eq!(Options::try_parse_from(args).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn cases_are_separated_by_commas() {
        let args = [
            "load",
            "bare",
            "--shared-dir",
            "/d",
            "--case",
            "read@1,getattr",
            "--depth",
            "4",
        ];
        let Some(Command::Bare(bare)) = Options::try_parse_from(args).unwrap().command else {
            panic!("it is another command");
        };
        let specs: Vec<_> = bare
            .measure
            .specs()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(specs, ["read/4k@1", "getattr@4"]);
    }
}
