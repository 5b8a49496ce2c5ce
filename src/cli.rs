//! Options as typed, and their help.

mod operations;

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{ArgGroup, Parser, ValueEnum};

use crate::config::{Config, Listen};
use crate::device::Tag;
use crate::fuse::SessionOptions;
use crate::io::Choice;

pub use self::operations::Operations;

/// Share a directory of this host with a virtual machine over virtio-fs.
///
/// The server listens on a unix socket; the VMM connects to it as its vhost-user front end and
/// hands over the guest's memory. In the guest, `mount -t virtiofs TAG /mnt` shows the
/// directory.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringfsd",
    version,
    group(ArgGroup::new("listen").required(true).args(["socket", "fd"])),
    after_help = "Example, with QEMU (the guest's memory must be shared):\n  \
        ringfsd --socket /run/vm1.sock --shared-dir /srv/vm1 &\n  \
        qemu-system-x86_64 … -m 4G \\\n    \
        -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\\n    \
        -chardev socket,id=fs,path=/run/vm1.sock \\\n    \
        -device vhost-user-fs-pci,chardev=fs,tag=shared\n  \
        guest# mount -t virtiofs shared /mnt"
)]
pub struct Options {
    /// Listen on a new unix socket at PATH. The socket file of a server that died is replaced;
    /// one that a running server holds is an error. Removed at the end.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Listen on descriptor N, a listening unix socket that the launcher made and left open
    /// for this program.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    pub fd: Option<RawFd>,

    /// The directory that the guest sees. Nothing outside of it can be reached.
    #[arg(long, value_name = "DIR")]
    pub shared_dir: PathBuf,

    /// The name by which the guest mounts the directory, up to 36 bytes, for VMMs that take it
    /// from the server (crosvm, libkrun, Cloud Hypervisor's --generic-vhost-user). The others
    /// have a setting of their own, and this one is not used.
    #[arg(long, value_name = "TAG")]
    pub tag: Option<Tag>,

    /// Request queues that the VMM may set up, 1 to 1024, each served by a worker. QEMU's
    /// num-request-queues and Cloud Hypervisor's num_queues may not be larger. Guest kernels
    /// from 6.11 on spread a mount over all of them; older ones use the first. [default: as
    /// many as workers]
    #[arg(long, value_name = "N", value_parser = queues)]
    pub request_queues: Option<NonZeroU16>,

    /// Worker threads that serve the queues. More than the guest has processors, or this host
    /// has to spare, don't help. [default: the number of processors, at most 4]
    #[arg(long, value_name = "N", value_parser = workers)]
    pub workers: Option<NonZeroUsize>,

    /// What the workers wait for the disk with: uring is io_uring, tokio is a pool of threads.
    /// auto takes io_uring where the kernel has it and allows it, and says in the log why not.
    #[arg(long, value_name = "RUNTIME", value_enum, default_value_t = Runtime::Auto)]
    pub runtime: Runtime,

    /// End when the first VMM has disconnected, instead of waiting for the next.
    #[arg(long)]
    pub once: bool,

    /// What to log to standard error. The environment variable RINGFSD_LOG takes finer
    /// filters, such as `info,ringfsd::front=debug`.
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,

    /// What is served only where it is asked for.
    #[command(flatten)]
    pub operations: Operations,
}

/// `--runtime`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    /// `io_uring` where it can be had.
    Auto,
    /// `io_uring`, or an error.
    Uring,
    /// Threads.
    Tokio,
}

/// `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What was asked for and failed.
    Error,
    /// Also what is odd but was survived.
    Warn,
    /// Also rare changes of state: sessions, what was negotiated.
    Info,
    /// For developers.
    Debug,
    /// For developers, each request.
    Trace,
}

impl From<LogLevel> for log::LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Off => Self::Off,
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

fn queues(text: &str) -> Result<NonZeroU16, String> {
    match text.parse::<NonZeroU16>() {
        Ok(count) if count.get() <= 1024 => Ok(count),
        _ => Err("a number from 1 to 1024".to_owned()),
    }
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(count) if count.get() <= 256 => Ok(count),
        _ => Err("a number from 1 to 256".to_owned()),
    }
}

impl From<Options> for Config {
    fn from(options: Options) -> Self {
        let listen = match (options.socket, options.fd) {
            (Some(path), _) => Listen::Path(path),
            (None, fd) => Listen::Inherited(fd.unwrap_or(-1)),
        };
        let workers = options.workers.unwrap_or_else(Self::default_workers);
        let as_workers = || {
            let count = u16::try_from(workers.get()).unwrap_or(u16::MAX);
            NonZeroU16::new(count).unwrap_or(NonZeroU16::MIN)
        };
        let mut session = SessionOptions::default();
        options.operations.apply(&mut session);
        Self {
            listen,
            shared_dir: options.shared_dir,
            tag: options.tag,
            request_queues: options.request_queues.unwrap_or_else(as_workers),
            workers,
            runtime: match options.runtime {
                Runtime::Auto => Choice::Auto,
                Runtime::Uring => Choice::Uring,
                Runtime::Tokio => Choice::Tokio,
            },
            once: options.once,
            session,
        }
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
    fn socket_and_socket_path_are_the_same() {
        for name in ["--socket", "--socket-path"] {
            let options =
                Options::try_parse_from(["ringfsd", name, "/s", "--shared-dir", "/d"]).unwrap();
            assert_eq!(Config::from(options).listen, Listen::Path("/s".into()));
        }
    }

    #[test]
    fn options_that_can_not_be_are_refused() {
        for bad in [
            &["--shared-dir", "/d"][..],
            &["--socket", "/s"],
            &["--socket", "/s", "--fd", "3", "--shared-dir", "/d"],
            &["--fd", "-1", "--shared-dir", "/d"],
            &["--fd", "3", "--shared-dir", "/d", "--workers", "0"],
            &[
                "--fd",
                "3",
                "--shared-dir",
                "/d",
                "--request-queues",
                "1025",
            ],
            &["--fd", "3", "--shared-dir", "/d", "--tag", ""],
            &["--fd", "3", "--shared-dir", "/d", "--runtime", "epoll"],
        ] {
            let args = std::iter::once(&"ringfsd").chain(bad);
            let error = Options::try_parse_from(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }
}
