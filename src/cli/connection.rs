//! Options of the heading Connection: the socket, the queues, and the threads that serve them.

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::persona::Persona;
use crate::config::Config;
use crate::device::Tag;
use crate::io::Choice;

/// How the VMM connects, and the threads that serve it.
#[derive(Clone, Debug, Args)]
#[command(
    next_help_heading = "Connection",
    group = ArgGroup::new("listen").required(true).args(["socket", "fd"])
)]
pub struct Connection {
    /// Listen for the VMM on a new Unix socket at PATH
    ///
    /// A socket file that a dead server left is replaced; if a running server listens on it, this
    /// one fails. The file is removed at exit. Only the server's user can connect, unless
    /// --socket-group is given.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Listen on inherited socket descriptor N
    ///
    /// N is a listening Unix socket that the launcher created and left open for the server. The
    /// launcher decides who can connect to it. A connected socket is refused. The server exits when
    /// the first VMM disconnects, unless --keep-listening or --state is given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub fd: Option<RawFd>,

    /// Let members of GROUP connect to the new socket too
    ///
    /// GROUP is a name or a number. The socket then has mode 0770 instead of 0700.
    ///
    /// [default: only the server's user can connect]
    #[arg(long, value_name = "GROUP", requires = "socket", conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// Tag by which the guest mounts the directory
    ///
    /// A tag has up to 36 bytes. This option is for VMMs that read the tag from the server
    /// (crosvm, libkrun, Cloud Hypervisor's --generic-vhost-user). Others have a setting of their
    /// own and ignore it.
    ///
    /// [default: none]
    #[arg(long, value_name = "TAG")]
    pub tag: Option<Tag>,

    /// Request queues that the VMM may set up, 1 to 1024
    ///
    /// Each queue is served by one worker. QEMU's num-request-queues and Cloud Hypervisor's
    /// num_queues must not be larger. Guest kernels from 6.11 on spread a mount over all queues;
    /// older ones use the first.
    ///
    /// [default: the number of workers]
    #[arg(long, value_name = "N", value_parser = request_queues)]
    pub request_queues: Option<NonZeroU16>,

    /// Threads that serve the queues, 1 to 256
    ///
    /// More workers than the guest has processors, or than the host can spare, don't help.
    ///
    /// [default: the number of processors, at most 4]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<NonZeroUsize>,

    /// File I/O by: auto, uring, tokio, tokio-uring
    ///
    /// - auto: io_uring if the kernel has it and permits it, else
    ///   threads; the log has the reason
    /// - uring: io_uring; refuse to start if unavailable
    /// - tokio: a pool of threads
    /// - tokio-uring: io_uring by the crate of this name, less
    ///   confined than uring; in programs built with it only
    #[arg(
        long,
        value_name = "RUNTIME",
        value_enum,
        ignore_case = true,
        default_value_t,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub runtime: Choice,

    /// Poll the rings for up to N µs before sleeping
    ///
    /// A worker polls only while the guest sends its next request within that time. This saves
    /// the wake-up, which costs more than most requests; an idle guest costs nothing. N is at most
    /// 1000; 0 disables polling.
    #[arg(long, value_name = "N", default_value_t = Config::DEFAULT_POLL_US, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub poll_us: u32,

    /// Exit when the first VMM disconnects
    ///
    /// This is the default with --fd and with --compat virtiofsd. Without it the server waits for
    /// the next VMM.
    #[arg(long, overrides_with = "keep_listening")]
    pub once: bool,

    /// Wait for the next VMM when one disconnects
    ///
    /// This is the default with --socket, and undoes --once.
    #[arg(long)]
    pub keep_listening: bool,

    /// Write the process id to PATH, and lock the file
    ///
    /// The file has mode 0600, appears once a VMM can connect, is locked (flock) while the server
    /// runs, and stays when it exits.
    ///
    /// [default: none; the socket's path with .pid appended with --compat virtiofsd]
    #[arg(long, value_name = "PATH")]
    pub pid_file: Option<PathBuf>,

    /// Behave like ringfsd or virtiofsd
    ///
    /// With virtiofsd, defaults, exit codes and files are those of virtiofsd 1.14; the manual lists
    /// the differences. A program that is started under the name virtiofsd behaves so by itself.
    ///
    /// [default: by the program's name]
    #[arg(
        long,
        value_name = "PROGRAM",
        value_enum,
        ignore_case = true,
        hide_possible_values = true
    )]
    pub compat: Option<Persona>,

    /// Take options as a list: -o source=DIR,cache=auto
    ///
    /// This is an older spelling that some launchers use. Each item is a long option without its
    /// dashes, with _ or - between words; source= is --shared-dir, ro is --readonly. Items apply
    /// after all other options. Two commas stand for one comma within a value.
    #[arg(short = 'o', value_name = "LIST")]
    pub older: Option<String>,

    /// Accepted for compatibility; has no effect
    ///
    /// The server always stays in the foreground.
    #[arg(short = 'f')]
    pub foreground: bool,

    /// Accepted for compatibility; has no effect
    ///
    /// See --workers.
    #[arg(long, value_name = "N")]
    pub thread_pool_size: Option<usize>,
}

fn request_queues(text: &str) -> Result<NonZeroU16, String> {
    match text.parse::<NonZeroU16>() {
        Ok(count) if count.get() <= 1024 => Ok(count),
        _ => Err("expected a number from 1 to 1024".to_owned()),
    }
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(count) if count.get() <= 256 => Ok(count),
        _ => Err("expected a number from 1 to 256".to_owned()),
    }
}
