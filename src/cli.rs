//! Options as typed, and their help.

mod confinement;
mod launcher;
mod migration;
mod operations;
mod sharing;
mod syslog;
mod upgrade;

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Parser, ValueEnum};

use crate::config::{Config, Descriptors, Listen, Share};
use crate::device::Tag;
use crate::io::Choice;

pub use self::confinement::{Confinement, Sandbox, Seccomp};
pub use self::launcher::{CAPABILITIES, asks_for_capabilities, asks_for_upgrade, expand, refusal};
pub use self::migration::{Migration, Mode, OnError};
pub use self::operations::Operations;
pub use self::sharing::{Cache, Contradiction, FileHandles, PosixAcl, Sharing};
pub use self::syslog::{Syslog, head as syslog_head};
pub use self::upgrade::Upgrade;

/// Share a directory of this host with a virtual machine over virtio-fs.
///
/// The server listens on a unix socket; the VMM connects to it as its vhost-user front end and
/// hands over the guest's memory. In the guest, `mount -t virtiofs TAG /mnt` shows the
/// directory.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringfsd",
    version,
    args_override_self = true,
    group(ArgGroup::new("listen").required(true).args(["socket", "fd"])),
    after_help = "To replace a running server by this program: ringfsd upgrade --help\n\n\
        Example, with QEMU (the guest's memory must be shared):\n  \
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

    /// Let the members of GROUP, a name or a number, connect to the new socket too.
    #[arg(long, value_name = "GROUP", requires = "socket")]
    pub socket_group: Option<String>,

    /// The directory that the guest sees; nothing outside of it can be reached. A single file may
    /// be given too: the guest sees a directory with that file in it.
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

    /// Look at the rings for up to N microseconds before sleeping, where the guest has lately
    /// been quick to ask again; saves the wake-up that costs a request more than its work. A
    /// guest that is idle costs nothing. 0 never looks.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub poll_us: u32,

    /// How many descriptors the process may have open: inodes that the guest knows, and files
    /// that it has open, need one each. More than the hard limit takes CAP_SYS_RESOURCE; 0
    /// leaves both limits as they are. [default: the hard limit]
    #[arg(long, value_name = "N")]
    pub rlimit_nofile: Option<u64>,

    /// How many descriptors this program may have for what the guest knows and has open. Beyond
    /// that, those of inodes that are not in use are closed, and opened again when needed: by
    /// file handle with CAP_DAC_READ_SEARCH, else by name. [default, and most: three quarters
    /// of the limit of open files]
    #[arg(long, value_name = "N")]
    pub max_open_inodes: Option<NonZeroUsize>,

    /// How many inodes the guest may know at the same time; beyond that LOOKUP and all that
    /// makes something new is ENFILE. One costs this program 200 to 400 bytes of memory, and
    /// the guest's kernel some four times that, which is what bounds a guest that is none too
    /// large.
    #[arg(long, value_name = "N", default_value = "16777216")]
    pub max_inodes: NonZeroUsize,

    /// How many inodes that the guest's kernel has dropped from its cache are remembered, so that
    /// file handles which the guest has of them stay good: for a guest that exports the directory
    /// by NFS, or whose programs use open_by_handle_at(2). The longest dropped goes first. 0
    /// remembers none: such a file handle is ESTALE.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub remember_inodes: usize,

    /// How many files and directories the guest may have open at the same time, those included
    /// that its locks need; beyond that opening is ENFILE, and locking ENOLCK. [default, and
    /// most: three quarters of the limit of open files]
    #[arg(long, value_name = "N")]
    pub max_handles: Option<NonZeroUsize>,

    /// Keep what the guest knows, has open and has locked in FILE, and go on from it: if this
    /// program is killed or stopped while a VMM is connected that comes back by itself (Cloud
    /// Hypervisor), the next one with the same FILE serves the guest as if nothing had been. A
    /// file on /run costs memory alone, and is gone when the host restarts, as the guest is.
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,

    /// How many files that the guest had open for reading and has closed are kept open for when it
    /// opens them again, which then takes no system call; 0 for none. A quarter of what
    /// --max-open-inodes allows at most.
    #[arg(long, value_name = "N", default_value = "1024")]
    pub max_spare_files: usize,

    /// End when the first VMM has disconnected, instead of waiting for the next.
    #[arg(long)]
    pub once: bool,

    /// Go on, should the process that serves be killed: another one takes its place, and the VMM
    /// and the guest notice a pause. The program can then be replaced while it serves, see
    /// `ringfsd upgrade --help`.
    #[arg(long)]
    pub supervise: bool,

    /// What to log to standard error. The environment variable RINGFSD_LOG takes finer
    /// filters, such as `info,ringfsd::front=debug`.
    #[arg(long, value_name = "LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,

    /// Log to syslog instead.
    #[arg(long)]
    pub syslog: bool,

    /// As --log-level debug.
    #[arg(short = 'd')]
    pub debug: bool,

    /// Does nothing: the server always stays in the foreground.
    #[arg(short = 'f')]
    pub foreground: bool,

    /// Does nothing: see --workers.
    #[arg(long, value_name = "N")]
    pub thread_pool_size: Option<usize>,

    /// An older spelling of the long options, without their dashes, source= being
    /// --shared-dir: -o source=/srv/vm1,cache=auto,no_xattr.
    #[arg(short = 'o', value_name = "OPTION[=VALUE],…")]
    pub older: Option<String>,

    /// Say as JSON what this server is, for libvirt, and end.
    #[arg(long, exclusive = true)]
    pub print_capabilities: bool,

    /// What may be done with the directory.
    #[command(flatten)]
    pub sharing: Sharing,

    /// What is served only where it is asked for.
    #[command(flatten)]
    pub operations: Operations,

    /// How a guest is moved.
    #[command(flatten)]
    pub migration: Migration,

    /// What keeps the server in.
    #[command(flatten)]
    pub confinement: Confinement,
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

impl Options {
    /// What to log, of all that says something of it.
    #[must_use]
    pub fn level(&self) -> LogLevel {
        if self.debug {
            self.log_level.max(LogLevel::Debug)
        } else {
            self.log_level
        }
    }
}

/// `--log-level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
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
    /// For developers, all there is.
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

impl TryFrom<Options> for Config {
    type Error = Contradiction;

    fn try_from(options: Options) -> Result<Self, Contradiction> {
        let listen = match (options.socket, options.fd) {
            (Some(path), _) => Listen::Path(path),
            (None, fd) => Listen::Inherited(fd.unwrap_or(-1)),
        };
        let workers = options.workers.unwrap_or_else(Self::default_workers);
        let as_workers = || {
            let count = u16::try_from(workers.get()).unwrap_or(u16::MAX);
            NonZeroU16::new(count).unwrap_or(NonZeroU16::MIN)
        };
        let mut share = Share::try_from(options.sharing)?;
        share.file_system.max_open_inodes = options.max_open_inodes.map(NonZeroUsize::get);
        share.file_system.max_inodes = options.max_inodes.get();
        share.file_system.remember_inodes = options.remember_inodes;
        share.file_system.max_handles = options.max_handles.map(NonZeroUsize::get);
        share.file_system.max_spare_files = options.max_spare_files;
        share.file_system.migration = options.migration.into();
        options.operations.apply(&mut share.session);
        Ok(Self {
            listen,
            shared_dir: options.shared_dir,
            socket_group: options.socket_group,
            tag: options.tag,
            request_queues: options.request_queues.unwrap_or_else(as_workers),
            workers,
            runtime: match options.runtime {
                Runtime::Auto => Choice::Auto,
                Runtime::Uring => Choice::Uring,
                Runtime::Tokio => Choice::Tokio,
            },
            poll: Duration::from_micros(u64::from(options.poll_us)),
            state: options.state,
            once: options.once,
            supervise: options.supervise,
            descriptors: match options.rlimit_nofile {
                None => Descriptors::Most,
                Some(0) => Descriptors::Inherited,
                Some(limit) => Descriptors::Limit(limit),
            },
            sandbox: options.confinement.into(),
            share,
        })
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
            assert_eq!(
                Config::try_from(options).unwrap().listen,
                Listen::Path("/s".into())
            );
        }
    }

    #[test]
    fn a_number_is_taken_as_it_is_given() {
        let config = |args: &[&str]| {
            let common = ["ringfsd", "--fd=3", "--shared-dir=/d"];
            let options = Options::try_parse_from(common.iter().chain(args)).unwrap();
            Config::try_from(options).unwrap()
        };
        let poll = |args: &[&str]| config(args).poll.as_micros();
        assert_eq!((poll(&[]), poll(&["--poll-us=7"])), (50, 7));
        assert_eq!(poll(&["--poll-us", "0"]), 0);
        let most = |args: &[&str]| config(args).share.file_system.max_open_inodes;
        assert_eq!((most(&[]), most(&["--max-open-inodes=7"])), (None, Some(7)));
        let workers = config(&["--workers=3", "--thread-pool-size=9"]);
        let queues = workers.request_queues.get();
        assert_eq!((workers.workers.get(), queues), (3, 3));
        assert_eq!(config(&["--request-queues=5"]).request_queues.get(), 5);
    }

    #[test]
    fn options_that_can_not_be_are_refused() {
        for bad in [
            &["--shared-dir", "/d"][..],
            &["--socket", "/s"],
            &["--socket", "/s", "--fd", "3", "--shared-dir", "/d"],
            &["--fd", "-1", "--shared-dir", "/d"],
            &["--fd", "3", "--shared-dir", "/d", "--workers", "0"],
            &["--fd", "3", "--shared-dir", "/d", "--max-open-inodes", "0"],
            &[
                "--fd",
                "3",
                "--shared-dir",
                "/d",
                "--request-queues",
                "1025",
            ],
            &["--fd", "3", "--shared-dir", "/d", "--tag", ""],
            &["--fd", "3", "--shared-dir", "/d", "--poll-us", "1001"],
            &["--fd", "3", "--shared-dir", "/d", "--runtime", "epoll"],
        ] {
            let args = std::iter::once(&"ringfsd").chain(bad);
            let error = Options::try_parse_from(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
    }
}
