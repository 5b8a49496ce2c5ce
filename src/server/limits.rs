//! The limits that a launcher has set for the process: raised as far as that takes no privilege, refused
//! where the server would die of them in the middle of serving, and named where they are in the way.
//!
//! The invariant: a hard limit is the launcher's word, and is what it was when the server serves.

use std::error::Error;
use std::fmt::Write;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vm_memory::mmap::MmapRegionError;

use super::control_group;
use crate::config::Config;
use crate::fs::passthrough;

/// A limit, and where it is set.
#[derive(Clone, Copy, Debug)]
struct Limit {
    resource: Resource,
    /// Its name in `setrlimit(2)`, what a shell and what systemd calls it.
    names: &'static str,
}

const FILE_SIZE: Limit = Limit {
    resource: Resource::Fsize,
    names: "RLIMIT_FSIZE (ulimit -f, LimitFSIZE=)",
};
const ADDRESSES: Limit = Limit {
    resource: Resource::As,
    names: "RLIMIT_AS (ulimit -v, LimitAS=)",
};
const DATA: Limit = Limit {
    resource: Resource::Data,
    names: "RLIMIT_DATA (ulimit -d, LimitDATA=)",
};
const LOCKED: Limit = Limit {
    resource: Resource::Memlock,
    names: "RLIMIT_MEMLOCK (ulimit -l, LimitMEMLOCK=)",
};
const PROCESSES: Limit = Limit {
    resource: Resource::Nproc,
    names: "RLIMIT_NPROC (ulimit -u, LimitNPROC=)",
};
const DESCRIPTORS: Limit = Limit {
    resource: Resource::Nofile,
    names: "RLIMIT_NOFILE (ulimit -n, LimitNOFILE=, --rlimit-nofile)",
};
const TIME: Limit = Limit {
    resource: Resource::Cpu,
    names: "RLIMIT_CPU (ulimit -t, LimitCPU=)",
};

/// Those of which the soft limit becomes the hard one; descriptors have an option of their own.
const RAISED: [Resource; 7] = [
    Resource::Fsize,
    Resource::As,
    Resource::Data,
    Resource::Memlock,
    Resource::Nproc,
    Resource::Sigpending,
    Resource::Cpu,
];

const STACK: Limit = Limit {
    resource: Resource::Stack,
    names: "RLIMIT_STACK (ulimit -s, LimitSTACK=)",
};

/// What the first thread's stack may come to, and what it needs.
const STACK_MOST: u64 = 8 << 20;
const STACK_LEAST: u64 = 512 << 10;

/// What one inode that a guest knows costs of the heap, at most.
const INODE: u64 = 400;

/// And of the table of what a session holds.
const RECORD: u64 = 128;

/// And of the kernel's memory, which is charged to the control group too: measured with ext4, 1,340 bytes
/// for the inode and its directory entry, and 256 for its part of a block on disk.
const CACHED: u64 = 1664;

/// In a group with this much more memory the kernel evicts inodes in time. In a smaller one it may not:
/// it can't evict those that descriptors hold or whose changes are being written, nor any for an
/// allocation within a file system, and then kills the server.
const CACHE: u64 = 32 << 20;

/// What the server takes of a control group's memory when a guest holds nothing.
const BASE: u64 = 8 << 20;

/// What a descriptor costs the kernel, with the inode that it keeps there.
const DESCRIPTOR: u64 = 2048;

/// What the server takes of memory beside its inodes, its table and the guest's memory.
const REST: u64 = 256 << 20;

/// Descriptors of a server that serves a guest who has nothing open: its own, those of a worker, and those
/// of a queue.
const OWN: u64 = 24;
const WORKER: u64 = 6;
const QUEUE: u64 = 3;

/// Why the server can't live with a limit; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    /// The table can't be made.
    #[error(
        "{} allows files of {limit} bytes, and the table of what a session holds may need \
         {needed}, mostly holes: raise it, give the server CAP_SYS_RESOURCE, or a smaller \
         --max-inodes",
        FILE_SIZE.names
    )]
    FileSize {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// Memory would run out as the guest gets to know inodes.
    #[error(
        "{name} allows {limit} bytes, and the server may need {needed} for the {inodes} inodes of \
         --max-inodes: raise it (the memory of a control group is a better limit), or give a smaller \
         --max-inodes"
    )]
    Memory {
        /// Which limit.
        name: &'static str,
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
        /// For so many inodes.
        inodes: usize,
    },
    /// The kernel would kill the server.
    #[error(
        "after {limit} seconds of processor time the kernel would kill the server, as {} says: set \
         no such limit, or give --supervise, by which another process goes on",
        TIME.names
    )]
    Time {
        /// What is allowed.
        limit: u64,
    },
    /// The first thread has no stack to speak of.
    #[error(
        "{} allows the first thread a stack of {limit} bytes, and it needs {STACK_LEAST}: raise it",
        STACK.names
    )]
    Stack {
        /// What is allowed.
        limit: u64,
    },
    /// There are no descriptors for a session.
    #[error(
        "{} allows {limit} descriptors, and the server needs {needed} for its {workers} workers and \
         {queues} queues before the guest opens anything: raise it, or give fewer --workers and \
         --request-queues",
        DESCRIPTORS.names
    )]
    Descriptors {
        /// What is allowed.
        limit: u64,
        /// What is needed.
        needed: u64,
        /// For so many workers.
        workers: usize,
        /// And so many queues.
        queues: u16,
    },
}

/// Raises soft limits as far as that takes no privilege. To be called first.
///
/// # Errors
///
/// There is no stack for what follows.
pub fn raise_limits() -> Result<(), LimitError> {
    let raise = |resource, most: Option<u64>| {
        let limit = getrlimit(resource);
        let wanted = match (limit.maximum, most) {
            (Some(hard), Some(most)) => Some(hard.min(most)),
            (hard, most) => hard.or(most),
        };
        let lower = match (limit.current, wanted) {
            (Some(soft), Some(wanted)) => soft < wanted,
            (soft, None) => soft.is_some(),
            (None, Some(_)) => false,
        };
        if lower {
            // Only a filter of the launcher's forbids it, and then the limit is what it is.
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
    // Without a limit, programs are laid out in memory as they were of old.
    raise(STACK.resource, Some(STACK_MOST));
    match getrlimit(STACK.resource).current {
        Some(limit) if limit < STACK_LEAST => Err(LimitError::Stack { limit }),
        _ => Ok(()),
    }
}

/// Has the guest hold less where no numbers were asked for, and the memory of a control group is too
/// small for as much as usual: the kernel would kill the server, and the guest gets `ENFILE`.
pub(super) fn fit(config: &mut Config) {
    let Some((limit, place)) = control_group::memory() else {
        return;
    };
    let room = limit.saturating_sub(BASE);
    let part = |of, each| usize::try_from(room / of / each).unwrap_or(usize::MAX);
    let options = &mut config.share.file_system;
    // The host's caches have the rest, which give way.
    let evicted = room.saturating_sub(CACHE) / 2 / (INODE + RECORD);
    let inodes = part(2, INODE + RECORD + CACHED)
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
    let place = place.display();
    if options.max_inodes == passthrough::Options::default().max_inodes {
        log::info!("--max-inodes {inodes}: {place} allows {limit} bytes of memory");
        options.max_inodes = inodes;
    } else {
        log::warn!(
            "--max-inodes {}: there may be memory for {inodes}, as {place} allows {limit} bytes",
            options.max_inodes
        );
    }
}

/// Refuses limits that the server would die of while it serves, and tells of those that the guest will
/// notice.
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
            "the kernel kills the process that serves after {limit} seconds of processor time, as \
             {} says",
            TIME.names
        );
    }
    let inodes = config.share.file_system.max_inodes;
    let heap = INODE.saturating_mul(inodes as u64).saturating_add(REST);
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
    let needed = OWN
        .saturating_add(WORKER.saturating_mul(workers as u64))
        .saturating_add(QUEUE.saturating_mul(u64::from(queues) + 1));
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
            "no file that the guest writes can become larger than {limit} bytes (EFBIG), as {} says",
            FILE_SIZE.names
        );
    }
    Ok(())
}

/// What a file may come to that has to be made.
pub(super) fn file_size() -> Option<u64> {
    getrlimit(FILE_SIZE.resource).current
}

/// Does something without the limit of file sizes, where the process has the privilege to lift it for
/// that long.
pub(super) fn without_file_size_limit<T>(act: impl FnOnce() -> T) -> T {
    let limit = getrlimit(FILE_SIZE.resource);
    let none = Rlimit {
        current: None,
        maximum: None,
    };
    let lifted = limit.maximum.is_some() && setrlimit(FILE_SIZE.resource, none).is_ok();
    let done = act();
    if lifted && let Err(error) = setrlimit(FILE_SIZE.resource, limit) {
        log::warn!("{} stays lifted: {error}", FILE_SIZE.names);
    }
    done
}

/// What the limits were that [`explain`] names, when the process had not yet been kept to system calls of
/// which asking for limits is none.
static KNOWN: OnceLock<Vec<(&'static str, u64)>> = OnceLock::new();

/// Remembers the limits, for [`explain`].
pub(super) fn remember() {
    let named = [FILE_SIZE, ADDRESSES, DATA, LOCKED, PROCESSES, DESCRIPTORS];
    let finite = named
        .into_iter()
        .filter_map(|limit| Some((limit.names, getrlimit(limit.resource).current?)));
    let _known = KNOWN.get_or_init(|| finite.collect());
}

/// An error with its causes, in one line, and the limits that may be behind it.
#[must_use]
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let mut text = super::chain(error);
    let mut cause = Some(error);
    let mut errno = None;
    while let Some(error) = cause {
        let known = error.downcast_ref::<Errno>().copied();
        errno = known
            .or_else(|| Errno::from_io_error(error.downcast_ref()?))
            .or_else(|| match error.downcast_ref()? {
                MmapRegionError::Mmap(error) => Errno::from_io_error(error),
                _ => None,
            })
            .or(errno);
        cause = error.source();
    }
    let suspects: &[Limit] = match errno {
        Some(Errno::MFILE) => &[DESCRIPTORS],
        Some(Errno::FBIG) => &[FILE_SIZE],
        Some(Errno::NOMEM) => &[ADDRESSES, DATA, LOCKED],
        Some(Errno::AGAIN) => &[PROCESSES],
        _ => &[],
    };
    remember();
    for (name, allowed) in KNOWN.get().into_iter().flatten() {
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
