//! Attributes, errors and the like, from fuse-backend-rs's types to those of [`fs`](crate::fs) and
//! back.

use std::io::{self, ErrorKind};

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{Entry, FileLock, FsOptions, OpenOptions, SetattrValid};
use rustix::io::Errno;

use crate::fs::{
    Attributes, Changes, Handle, NegotiatedTerms, NewTime, Opened, Statistics, Timestamp,
};
use crate::io::{Lock, LockKind, RecordLock};

/// `FUSE_ATTR_SUBMOUNT`.
pub(super) const ATTR_SUBMOUNT: u32 = 1;

/// `FUSE_LK_FLOCK`: the lock is one on the whole file.
const LOCK_IS_FLOCK: u32 = 1;

/// The last byte of a lock that extends to the end of the file.
const LAST_BYTE: u64 = i64::MAX.cast_unsigned();

/// The errno for the guest. An error without an errno gets that of its kind, or `EIO`.
pub(super) fn errno(error: &io::Error) -> Errno {
    if let Some(errno) = Errno::from_io_error(error) {
        return errno;
    }
    match error.kind() {
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::PermissionDenied => Errno::ACCESS,
        ErrorKind::AlreadyExists => Errno::EXIST,
        ErrorKind::WouldBlock => Errno::AGAIN,
        ErrorKind::InvalidInput => Errno::INVAL,
        ErrorKind::TimedOut => Errno::TIMEDOUT,
        ErrorKind::Interrupted => Errno::INTR,
        ErrorKind::Unsupported => Errno::OPNOTSUPP,
        ErrorKind::StorageFull => Errno::NOSPC,
        ErrorKind::ReadOnlyFilesystem => Errno::ROFS,
        _ => Errno::IO,
    }
}

/// Narrows a value; a larger one becomes the maximum.
fn narrow(value: impl TryInto<u32>) -> u32 {
    value.try_into().unwrap_or(u32::MAX)
}

fn size(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn timestamp(seconds: i64, nanoseconds: i64) -> Timestamp {
    Timestamp {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    }
}

pub(super) fn attributes(stat: &stat64) -> Attributes {
    Attributes {
        inode: stat.st_ino,
        size: size(stat.st_size),
        blocks: size(stat.st_blocks),
        accessed: timestamp(stat.st_atime, stat.st_atime_nsec),
        modified: timestamp(stat.st_mtime, stat.st_mtime_nsec),
        changed: timestamp(stat.st_ctime, stat.st_ctime_nsec),
        mode: stat.st_mode,
        links: narrow(stat.st_nlink),
        uid: stat.st_uid,
        gid: stat.st_gid,
        // The lower half of glibc's encoding is the kernel's of 32 bits.
        rdev: narrow(stat.st_rdev & 0xffff_ffff),
        block_size: narrow(stat.st_blksize),
    }
}

/// The value of a `stat64` in which all is zero.
pub(super) fn zeroed() -> stat64 {
    Entry::default().attr
}

/// What SETATTR changes, and which of the attributes these are.
pub(super) fn changes(changes: &Changes) -> (stat64, SetattrValid) {
    let (mut stat, mut valid) = (zeroed(), SetattrValid::empty());
    if let Some(mode) = changes.mode {
        stat.st_mode = mode;
        valid |= SetattrValid::MODE;
    }
    if let Some(uid) = changes.uid {
        stat.st_uid = uid;
        valid |= SetattrValid::UID;
    }
    if let Some(gid) = changes.gid {
        stat.st_gid = gid;
        valid |= SetattrValid::GID;
    }
    if let Some(size) = changes.size {
        stat.st_size = i64::try_from(size).unwrap_or(i64::MAX);
        valid |= SetattrValid::SIZE;
    }
    if let Some(time) = changes.accessed {
        let (at, now) = new_time(time);
        (stat.st_atime, stat.st_atime_nsec) = (at.seconds, at.nanoseconds.into());
        valid |= SetattrValid::ATIME;
        valid.set(SetattrValid::ATIME_NOW, now);
    }
    if let Some(time) = changes.modified {
        let (at, now) = new_time(time);
        (stat.st_mtime, stat.st_mtime_nsec) = (at.seconds, at.nanoseconds.into());
        valid |= SetattrValid::MTIME;
        valid.set(SetattrValid::MTIME_NOW, now);
    }
    (stat, valid)
}

fn new_time(time: NewTime) -> (Timestamp, bool) {
    match time {
        NewTime::Now => (Timestamp::default(), true),
        NewTime::At(at) => (at, false),
    }
}

pub(super) fn opened(handle: Handle, options: OpenOptions) -> Opened {
    Opened {
        handle,
        keep_cache: options.contains(OpenOptions::KEEP_CACHE),
        direct_io: options.contains(OpenOptions::DIRECT_IO),
        cache_dir: options.contains(OpenOptions::CACHE_DIR),
        no_flush: false,
    }
}

pub(super) fn statistics(stat: &statvfs64) -> Statistics {
    Statistics {
        blocks: stat.f_blocks,
        blocks_free: stat.f_bfree,
        blocks_available: stat.f_bavail,
        files: stat.f_files,
        files_free: stat.f_ffree,
        block_size: narrow(stat.f_bsize),
        // A file system that counts in one unit may set only that one.
        fragment_size: match narrow(stat.f_frsize) {
            0 => narrow(stat.f_bsize),
            fragment => fragment,
        },
        name_length: narrow(stat.f_namemax),
    }
}

/// A lock, and the flags that say of which kind it is.
pub(super) fn lock(lock: Lock) -> (FileLock, u32) {
    let (kind, start, end, flags) = match lock {
        Lock::Record(RecordLock { kind, start, end }) => (kind, start, end, 0),
        Lock::Whole(kind) => (kind, 0, LAST_BYTE, LOCK_IS_FLOCK),
    };
    let kind = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    let lock = FileLock {
        start,
        end,
        lock_type: kind.cast_unsigned(),
        pid: 0,
    };
    (lock, flags)
}

/// The lock that GETLK has found, if there is one.
pub(super) fn found_lock(found: &FileLock) -> Option<RecordLock> {
    let kind = match found.lock_type.cast_signed() {
        libc::F_RDLCK => LockKind::Shared,
        libc::F_WRLCK => LockKind::Exclusive,
        _ => return None,
    };
    Some(RecordLock {
        kind,
        start: found.start,
        end: found.end.min(LAST_BYTE),
    })
}

/// What INIT offers a file system under these `terms`.
pub(super) fn offered(terms: &NegotiatedTerms) -> FsOptions {
    let always = FsOptions::ASYNC_READ
        | FsOptions::EXPORT_SUPPORT
        | FsOptions::BIG_WRITES
        | FsOptions::DONT_MASK
        | FsOptions::AUTO_INVAL_DATA
        | FsOptions::ASYNC_DIO
        | FsOptions::PARALLEL_DIROPS
        | FsOptions::MAX_PAGES
        | FsOptions::INIT_EXT
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO;
    TERMS
        .iter()
        .filter(|(term, _)| *term(&mut terms.clone()))
        .fold(always, |all, (_, option)| all | *option)
}

/// Those of the `terms` that a file system `wanted` at INIT.
pub(super) fn wanted(terms: &NegotiatedTerms, wanted: FsOptions) -> NegotiatedTerms {
    let mut accepted = NegotiatedTerms {
        // The caller of each request has to be known.
        idmapped: false,
        ..*terms
    };
    for (term, option) in TERMS {
        *term(&mut accepted) &= wanted.contains(*option);
    }
    accepted
}

/// A field of the terms.
type Term = fn(&mut NegotiatedTerms) -> &mut bool;

/// Terms that a file system may refuse.
const TERMS: &[(Term, FsOptions)] = &[
    (
        |terms| &mut terms.collects_writes,
        FsOptions::WRITEBACK_CACHE,
    ),
    (|terms| &mut terms.no_open, FsOptions::ZERO_MESSAGE_OPEN),
    (
        |terms| &mut terms.no_opendir,
        FsOptions::ZERO_MESSAGE_OPENDIR,
    ),
    (
        |terms| &mut terms.kills_set_id,
        FsOptions::HANDLE_KILLPRIV_V2,
    ),
    (|terms| &mut terms.record_locks, FsOptions::POSIX_LOCKS),
    (|terms| &mut terms.file_locks, FsOptions::FLOCK_LOCKS),
];
