//! Resource limits (`setrlimit(2)`) that the launcher has set.
//!
//! Soft limits are raised as far as that needs no privilege. Limits that would kill the server
//! while it serves are refused at the start, and errors name the limits that may have caused them.
//! The invariant: while the server serves, each hard limit has the launcher's value.

use std::error::Error;
use std::fmt::Write;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vm_memory::mmap::MmapRegionError;

use super::control_group;
use crate::config::Config;
use crate::error_chain;
use crate::fs::passthrough;

/// A limit and its names.
#[derive(Clone, Copy, Debug)]
struct Limit {
    resource: Resource,
    /// Its names in `setrlimit(2)`, in a shell and in systemd.
    names: &'static str,
}

impl Limit {
    const fn new(resource: Resource, names: &'static str) -> Self {
        Self { resource, names }
    }
}

const FILE_SIZE: Limit = Limit::new(Resource::Fsize, "RLIMIT_FSIZE (ulimit -f, LimitFSIZE=)");
const ADDRESSES: Limit = Limit::new(Resource::As, "RLIMIT_AS (ulimit -v, LimitAS=)");
const DATA: Limit = Limit::new(Resource::Data, "RLIMIT_DATA (ulimit -d, LimitDATA=)");
const LOCKED: Limit = Limit::new(
    Resource::Memlock,
    "RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=)",
);
const PROCESSES: Limit = Limit::new(Resource::Nproc, "RLIMIT_NPROC (ulimit -u, LimitNPROC=)");
const DESCRIPTORS: Limit = Limit::new(
    Resource::Nofile,
    "RLIMIT_NOFILE (ulimit -n, LimitNOFILE=, --rlimit-nofile)",
);
const TIME: Limit = Limit::new(Resource::Cpu, "RLIMIT_CPU (ulimit -t, LimitCPU=)");

/// Limits whose soft limit is raised to the hard one. Descriptors have an option of their own.
const RAISED: [Resource; 7] = [
    Resource::Fsize,
    Resource::As,
    Resource::Data,
    Resource::Memlock,
    Resource::Nproc,
    Resource::Sigpending,
    Resource::Cpu,
];

const STACK: Limit = Limit::new(Resource::Stack, "RLIMIT_STACK (ulimit -s, LimitSTACK=)");

/// The largest stack of the first thread, and the smallest one that it can run on.
const STACK_MAX: u64 = 8 << 20;
const STACK_MIN: u64 = 512 << 10;

/// The most bytes of heap for an inode that a guest knows.
const INODE_HEAP: u64 = 400;

/// Bytes of an inode's record in the state table.
const INODE_RECORD: u64 = 128;

/// Bytes of kernel memory for a cached inode, which is charged to the control group too. Measured with
/// ext4: 1,340 for the inode and its directory entry, and 256 for its part of a block on disk.
const CACHED: u64 = 1664;

/// In a group with this much more memory the kernel evicts inodes in time. In a smaller one it may
/// not: it can't evict those that descriptors hold or whose changes are being written, nor any for an
/// allocation within a file system, and then kills the server.
const CACHE: u64 = 32 << 20;

/// Bytes of a control group's memory that the server uses when a guest holds nothing.
const BASE: u64 = 8 << 20;

/// Bytes of kernel memory for a descriptor and the inode that it keeps in memory.
const DESCRIPTOR: u64 = 2048;

/// Bytes of memory that the server uses beside its inodes, its state table and the guest's memory.
const OTHER: u64 = 256 << 20;

/// Descriptors that are needed while the guest has nothing open: the server's own, for each worker,
/// and for each queue.
const OWN_FDS: u64 = 24;
const WORKER_FDS: u64 = 6;
const QUEUE_FDS: u64 = 3;

/// Why the server can't run with a limit; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The state table can't be created.
    #[error(
        "{} allows files of {limit} bytes, and the session's state table may need {needed}, mostly \
         holes: raise the limit, give the server CAP_SYS_RESOURCE, or lower --max-inodes",
        FILE_SIZE.names
    )]
    FileSize {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// Memory would run out as the guest looks up inodes.
    #[error(
        "{name} allows {limit} bytes, and the server may need {needed} for the {inodes} inodes of \
         --max-inodes: raise the limit (a control group's memory limit is better), or lower \
         --max-inodes"
    )]
    Memory {
        /// Which limit.
        name: &'static str,
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
        /// For how many inodes.
        inodes: usize,
    },
    /// The kernel would kill the server.
    #[error(
        "{} makes the kernel kill the server after {limit} seconds of processor time: remove the \
         limit, or use --supervise, which starts another serving process",
        TIME.names
    )]
    Time {
        /// What is allowed.
        limit: u64,
    },
    /// The first thread's stack would be too small.
    #[error(
        "{} allows the first thread a stack of {limit} bytes, and it needs {STACK_MIN}: raise it",
        STACK.names
    )]
    Stack {
        /// What is allowed.
        limit: u64,
    },
    /// There are too few descriptors for a session.
    #[error(
        "{} allows {limit} descriptors, and the server needs {needed} for its {workers} workers and \
         {queues} queues before the guest opens anything: raise the limit, or lower --workers and \
         --request-queues",
        DESCRIPTORS.names
    )]
    Descriptors {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
        /// For how many workers.
        workers: usize,
        /// And for how many queues.
        queues: u16,
    },
}

/// Raises soft limits as far as that needs no privilege. To be called first.
///
/// # Errors
///
/// The stack is too small to run on.
pub fn raise_limits() -> Result<(), LimitError> {
    let raise = |resource, max: Option<u64>| {
        let limit = getrlimit(resource);
        let wanted = match (limit.maximum, max) {
            (Some(hard), Some(max)) => Some(hard.min(max)),
            (hard, max) => hard.or(max),
        };
        let is_lower = match (limit.current, wanted) {
            (Some(soft), Some(wanted)) => soft < wanted,
            (soft, None) => soft.is_some(),
            (None, Some(_)) => false,
        };
        if is_lower {
            // This fails only if a seccomp filter of the launcher forbids it: the limit stays then.
            let raised = Rlimit {
                current: wanted,
                ..limit
            };
            let _ = setrlimit(resource, raised);
        }
    };
    for resource in RAISED {
        raise(resource, None);
    }
    // With no limit on the stack, Linux uses its legacy layout of memory.
    raise(STACK.resource, Some(STACK_MAX));
    match getrlimit(STACK.resource).current {
        Some(limit) if limit < STACK_MIN => Err(LimitError::Stack { limit }),
        _ => Ok(()),
    }
}

/// The smallest memory limit of this process's control groups, and the file that sets it.
pub(crate) fn memory_of_control_group() -> Option<(u64, std::path::PathBuf)> {
    control_group::memory()
}

/// Lowers the limits on what a guest may hold if they are not set by options and the control group
/// has too little memory for the defaults. Beyond them the guest gets `ENFILE`; the kernel would
/// kill the server.
pub(super) fn fit(config: &mut Config) {
    let Some((limit, path)) = control_group::memory() else {
        return;
    };
    let available = limit.saturating_sub(BASE);
    let part = |of, each| usize::try_from(available / of / each).unwrap_or(usize::MAX);
    let options = &mut config.share.file_system;
    // The rest is for the host's caches, which the kernel shrinks when it has to.
    let evicted = available.saturating_sub(CACHE) / 2 / (INODE_HEAP + INODE_RECORD);
    let inodes = part(2, INODE_HEAP + INODE_RECORD + CACHED)
        .max(usize::try_from(evicted).unwrap_or(usize::MAX))
        .max(1024);
    options
        .max_open_inodes
        .get_or_insert(part(4, DESCRIPTOR).max(64));
    options
        .max_handles
        .get_or_insert(part(8, DESCRIPTOR).max(64));
    if options.max_inodes <= inodes {
        return;
    }
    let path = path.display();
    if options.max_inodes == passthrough::Options::default().max_inodes {
        log::info!("--max-inodes {inodes}: {path} allows {limit} bytes of memory");
        options.max_inodes = inodes;
    } else {
        log::warn!(
            "--max-inodes {}: memory may suffice for {inodes} only: {path} allows {limit} bytes",
            options.max_inodes
        );
    }
}

/// Refuses limits that would kill the server while it serves, and logs those that the guest will
/// notice. `table` is the size of the state table.
///
/// # Errors
///
/// See [`LimitError`].
pub(super) fn check(config: &Config, table: u64) -> Result<(), LimitError> {
    if let Some(limit) = getrlimit(TIME.resource).maximum {
        if !config.supervise {
            return Err(LimitError::Time { limit });
        }
        log::warn!(
            "{} makes the kernel kill the serving process after {limit} seconds of processor time",
            TIME.names
        );
    }
    let inodes = config.share.file_system.max_inodes;
    let heap = INODE_HEAP
        .saturating_mul(inodes as u64)
        .saturating_add(OTHER);
    for (limit, needed) in [(ADDRESSES, heap.saturating_add(table)), (DATA, heap)] {
        let Some(allowed) = getrlimit(limit.resource).current else {
            continue;
        };
        if allowed < needed {
            return Err(LimitError::Memory {
                name: limit.names,
                limit: allowed,
                needed,
                inodes,
            });
        }
        log::warn!("{} allows {allowed} bytes", limit.names);
    }
    let (workers, queues) = (config.workers.get(), config.request_queues.get());
    let needed = OWN_FDS
        .saturating_add(WORKER_FDS.saturating_mul(workers as u64))
        .saturating_add(QUEUE_FDS.saturating_mul(u64::from(queues) + 1));
    match getrlimit(DESCRIPTORS.resource).current {
        Some(limit) if limit < needed => {
            return Err(LimitError::Descriptors {
                limit,
                needed,
                workers,
                queues,
            });
        }
        _ => {}
    }
    if let Some(limit) = getrlimit(FILE_SIZE.resource).current {
        log::warn!(
            "{} keeps the guest from writing files larger than {limit} bytes (EFBIG)",
            FILE_SIZE.names
        );
    }
    Ok(())
}

/// The size limit of files that this process writes.
pub(super) fn file_size() -> Option<u64> {
    getrlimit(FILE_SIZE.resource).current
}

/// Runs `f` with the file size limit lifted, if the process has the privilege to lift it.
pub(super) fn without_file_size_limit<T>(f: impl FnOnce() -> T) -> T {
    let limit = getrlimit(FILE_SIZE.resource);
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    let lifted = limit.maximum.is_some() && setrlimit(FILE_SIZE.resource, unlimited).is_ok();
    let result = f();
    if lifted && let Err(error) = setrlimit(FILE_SIZE.resource, limit) {
        log::warn!("{} stays lifted: {error}", FILE_SIZE.names);
    }
    result
}

/// The finite limits that [`explain`] may name, read before the seccomp filter forbids to ask for
/// them.
static SAVED: OnceLock<Vec<(&'static str, u64)>> = OnceLock::new();

/// Saves the limits for [`explain`].
pub(super) fn save() {
    let named = [FILE_SIZE, ADDRESSES, DATA, LOCKED, PROCESSES, DESCRIPTORS];
    let finite = named
        .into_iter()
        .filter_map(|limit| Some((limit.names, getrlimit(limit.resource).current?)));
    let _saved = SAVED.get_or_init(|| finite.collect());
}

/// Formats an error and its causes in one line, with the limits that may have caused it.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut text = error_chain::one_line(error);
    let mut errno = None;
    for error in error_chain::causes(error) {
        let known = error.downcast_ref::<Errno>().copied();
        errno = known
            .or_else(|| Errno::from_io_error(error.downcast_ref()?))
            .or_else(|| match error.downcast_ref()? {
                MmapRegionError::Mmap(error) => Errno::from_io_error(error),
                _ => None,
            })
            .or(errno);
    }
    let suspects: &[Limit] = match errno {
        Some(Errno::MFILE) => &[DESCRIPTORS],
        Some(Errno::FBIG) => &[FILE_SIZE],
        Some(Errno::NOMEM) => &[ADDRESSES, DATA, LOCKED],
        Some(Errno::AGAIN) => &[PROCESSES],
        _ => &[],
    };
    save();
    for (name, allowed) in SAVED.get().into_iter().flatten() {
        if suspects.iter().any(|limit| limit.names == *name) {
            // Writing to a string doesn't fail.
            let _ = write!(text, "; {name} is {allowed}");
        }
    }
    if errno == Some(Errno::AGAIN) {
        text.push_str("; a control group may have a limit of its own (pids.max, TasksMax=)");
    }
    text
}
