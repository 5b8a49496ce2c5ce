//! The resolved configuration of a server. The invariant: an impossible setting has no
//! representation.

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::device::Tag;
use crate::fs::passthrough;
use crate::fuse::SessionOptions;
use crate::io::Choice;
use crate::sandbox;

/// Where front ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// On a socket that the server creates.
    Path(PathBuf),
    /// On a listening socket inherited from the launcher.
    Inherited(RawFd),
}

/// How many descriptors the server may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    /// As many as the hard limit permits.
    Most,
    /// As many as the inherited soft limit permits.
    Inherited,
    /// This many.
    Limit(u64),
    /// This many if permitted, and as many as the hard limit permits if it doesn't or permits more.
    AtLeast(u64),
}

/// The configuration of a server.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front ends connect.
    pub listen: Listen,
    /// The group that may connect to a socket that the server creates, besides the server's user.
    pub socket_group: Option<String>,
    /// The directory that guests see.
    pub shared_dir: PathBuf,
    /// The tag in the configuration space, for front ends that read it there.
    pub tag: Option<Tag>,
    /// Request queues, without the high-priority queue.
    pub request_queues: NonZeroU16,
    /// Worker threads.
    pub workers: NonZeroUsize,
    /// The runtime of the workers.
    pub runtime: Choice,
    /// How long a worker polls its rings at most before it sleeps; zero disables polling.
    pub poll: Duration,
    /// The file that keeps the session's state across servers.
    pub state: Option<PathBuf>,
    /// The file that has the process id and is locked while the server runs.
    pub pid_file: Option<PathBuf>,
    /// Replace a file at the socket's path even if it isn't a socket.
    pub replaces_files: bool,
    /// Exit after the first session.
    pub once: bool,
    /// Restart the serving process if it is killed.
    pub supervise: bool,
    /// The limit of open descriptors.
    pub descriptors: Descriptors,
    /// The sandbox of the server.
    pub sandbox: sandbox::Options,
    /// What guests may do with the directory.
    pub share: Share,
}

/// What guests may do with the directory: the options of the two rooms that implement it.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// Options of the file system.
    pub file_system: passthrough::Options,
    /// Options of the FUSE session.
    pub session: SessionOptions,
}

impl Config {
    /// One worker for each processor, up to four: a single guest rarely keeps more busy, and each
    /// costs its ring's memory.
    #[must_use]
    pub fn default_workers() -> NonZeroUsize {
        const MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);
        std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cpus| cpus.min(MAX))
    }
}
