//! Options as resolved: an impossible setting can't be written down here.

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
    /// On a socket that the server makes.
    Path(PathBuf),
    /// On a listening socket that the launcher handed over.
    Inherited(RawFd),
}

/// How many descriptors the server may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptors {
    /// As many as it may without privilege.
    Most,
    /// As many as the launcher has set.
    Inherited,
    /// This many.
    Limit(u64),
}

/// All that the server goes by.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front ends connect.
    pub listen: Listen,
    /// Who may connect to a socket that the server makes, beside its own user.
    pub socket_group: Option<String>,
    /// The directory that guests see.
    pub shared_dir: PathBuf,
    /// The tag in the configuration space, for front ends that ask there.
    pub tag: Option<Tag>,
    /// Request queues; the high-priority queue comes on top.
    pub request_queues: NonZeroU16,
    /// Worker threads.
    pub workers: NonZeroUsize,
    /// Which runtime the workers have.
    pub runtime: Choice,
    /// How long a worker looks at its rings, at most, before it sleeps.
    pub poll: Duration,
    /// The file in which what the guest holds outlives this process.
    pub state: Option<PathBuf>,
    /// End after the first session.
    pub once: bool,
    /// Go on with another process when the serving one has been killed.
    pub supervise: bool,
    /// How many descriptors may be open.
    pub descriptors: Descriptors,
    /// What keeps the server in.
    pub sandbox: sandbox::Options,
    /// What guests may do with the directory.
    pub share: Share,
}

/// What guests may do with the directory, as the two rooms concerned want it told.
#[derive(Clone, Debug, Default)]
pub struct Share {
    /// To the file system.
    pub file_system: passthrough::Options,
    /// To the FUSE session.
    pub session: SessionOptions,
}

impl Config {
    /// As many workers as there are processors, up to four: a single guest rarely keeps more
    /// busy, and each costs its ring's memory.
    #[must_use]
    pub fn default_workers() -> NonZeroUsize {
        const MOST: NonZeroUsize = NonZeroUsize::MIN.saturating_add(3);
        std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cpus| cpus.min(MOST))
    }
}
