//! Options as resolved: an impossible setting can't be written down here.

use std::num::{NonZeroU16, NonZeroUsize};
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::device::Tag;
use crate::fuse::SessionOptions;
use crate::io::Choice;

/// Where front ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// On a socket that the server makes.
    Path(PathBuf),
    /// On a listening socket that the launcher handed over.
    Inherited(RawFd),
}

/// All that the server goes by.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where front ends connect.
    pub listen: Listen,
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
    /// End after the first session.
    pub once: bool,
    /// What guests may do, as the FUSE session wants it told.
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
