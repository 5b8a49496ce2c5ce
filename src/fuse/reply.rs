//! Converts the results of a file system to FUSE replies and sends them.
//!
//! It makes one decision: which attributes the guest may not cache. The invariant: a reply's header
//! counts exactly the bytes that are sent with it.

use std::time::Duration;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::{
    Attr, AttrOut, CopyFileRangeOut, EntryOut, FileLock, GetxattrOut, InitOut, Kstatfs, LkOut,
    LseekOut, OpenOut, OutHeader, StatfsOut, Statx, StatxOut, StatxTime, WriteOut, attr_flags,
    open_reply_flags,
};
use super::{OUT_HEADER_LEN, Transport};
use crate::fs::{Attributes, Entry, Opened, Statistics, Timestamp};
use crate::io::{LockKind, RecordLock};

/// The reply to a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// Success without a body.
    Done,
    Entry(EntryOut),
    Attributes(AttrOut),
    Statx(Box<StatxOut>),
    Opened(OpenOut),
    Created(EntryOut, OpenOut),
    Statistics(StatfsOut),
    XattrLen(GetxattrOut),
    Offset(LseekOut),
    Lock(LkOut),
    Written(WriteOut),
    Copied(CopyFileRangeOut),
    Init(InitOut),
    Bytes(Vec<u8>),
}

impl Answer {
    /// Sends the reply to the request `unique`.
    pub(super) fn send<E: Transport>(&self, transport: E, unique: u64) {
        let (first, second): (&[u8], &[u8]) = match self {
            Self::Done => (&[], &[]),
            Self::Entry(out) => (out.as_bytes(), &[]),
            Self::Attributes(out) => (out.as_bytes(), &[]),
            Self::Statx(out) => (out.as_bytes(), &[]),
            Self::Opened(out) => (out.as_bytes(), &[]),
            Self::Created(entry, opened) => (entry.as_bytes(), opened.as_bytes()),
            Self::Statistics(out) => (out.as_bytes(), &[]),
            Self::XattrLen(out) => (out.as_bytes(), &[]),
            Self::Offset(out) => (out.as_bytes(), &[]),
            Self::Lock(out) => (out.as_bytes(), &[]),
            Self::Written(out) => (out.as_bytes(), &[]),
            Self::Copied(out) => (out.as_bytes(), &[]),
            Self::Init(out) => (out.as_bytes(), &[]),
            Self::Bytes(bytes) => (bytes, &[]),
        };
        let header = header(unique, 0, first.len().saturating_add(second.len()));
        transport.reply(&[&header, first, second]);
    }
}

/// Sends an error as the reply to the request `unique`.
pub(super) fn send_error<E: Transport>(transport: E, unique: u64, errno: Errno) {
    transport.reply(&[&error_reply(unique, errno)]);
}

/// Sends the reply to the request `unique`; its `filled` bytes are already in place.
pub(super) fn send_filled<E: Transport>(transport: E, unique: u64, filled: usize) {
    transport.reply_filled(&header(unique, 0, filled), filled);
}

/// An inode, as LOOKUP returns it; `dax` marks it for DAX.
pub(super) fn entry_out(entry: &Entry, dax: bool) -> EntryOut {
    let attribute_ttl = attribute_ttl(&entry.attributes, entry.attribute_ttl);
    EntryOut {
        nodeid: entry.node.0,
        generation: entry.generation,
        entry_valid: entry.entry_ttl.as_secs(),
        attr_valid: attribute_ttl.as_secs(),
        entry_valid_nsec: entry.entry_ttl.subsec_nanos(),
        attr_valid_nsec: attribute_ttl.subsec_nanos(),
        attr: Attr {
            flags: if entry.submount {
                attr_flags::SUBMOUNT
            } else {
                dax_flag(dax)
            },
            ..attr(&entry.attributes)
        },
    }
}

/// A negative entry, as LOOKUP returns it; the guest may cache it for `ttl`.
pub(super) fn no_entry_out(ttl: Duration) -> EntryOut {
    EntryOut {
        entry_valid: ttl.as_secs(),
        entry_valid_nsec: ttl.subsec_nanos(),
        ..EntryOut::default()
    }
}

/// Attributes, as GETATTR returns them; `dax` marks their file for DAX.
pub(super) fn attr_out((attributes, ttl): &(Attributes, Duration), dax: bool) -> AttrOut {
    let ttl = attribute_ttl(attributes, *ttl);
    AttrOut {
        attr_valid: ttl.as_secs(),
        attr_valid_nsec: ttl.subsec_nanos(),
        dummy: 0,
        attr: Attr {
            flags: dax_flag(dax),
            ..attr(attributes)
        },
    }
}

/// Attributes, as STATX returns them.
pub(super) fn statx_out(
    (from, birth, ttl): &(Attributes, Option<Timestamp>, Duration),
) -> Box<StatxOut> {
    let time = |at: Timestamp| StatxTime {
        tv_sec: at.seconds,
        tv_nsec: at.nanoseconds,
        reserved: 0,
    };
    let ttl = attribute_ttl(from, *ttl);
    let birth_bit = if birth.is_some() {
        libc::STATX_BTIME
    } else {
        0
    };
    Box::new(StatxOut {
        attr_valid: ttl.as_secs(),
        attr_valid_nsec: ttl.subsec_nanos(),
        stat: Statx {
            mask: libc::STATX_BASIC_STATS | birth_bit,
            blksize: from.block_size,
            nlink: from.links,
            uid: from.uid,
            gid: from.gid,
            // Types and permissions are 16 bits.
            mode: u16::try_from(from.mode & 0xffff).unwrap_or_default(),
            ino: from.inode,
            size: from.size,
            blocks: from.blocks,
            atime: time(from.accessed),
            btime: time(birth.unwrap_or_default()),
            ctime: time(from.changed),
            mtime: time(from.modified),
            rdev_major: from.rdev >> 8 & 0xfff,
            rdev_minor: from.rdev & 0xff | from.rdev >> 12 & 0xfff00,
            ..Statx::default()
        },
        ..StatxOut::default()
    })
}

/// An opened file or directory. `record_locks` says whether those of the guest are served here.
pub(super) fn open_out(opened: &Opened, record_locks: bool) -> OpenOut {
    let flags = [
        (opened.direct_io, open_reply_flags::DIRECT_IO),
        (opened.keep_cache, open_reply_flags::KEEP_CACHE),
        (opened.cache_dir, open_reply_flags::CACHE_DIR),
        (opened.no_flush && !record_locks, open_reply_flags::NOFLUSH),
    ];
    OpenOut {
        fh: opened.handle.0,
        open_flags: flags
            .iter()
            .filter(|(set, _)| *set)
            .fold(0, |all, (_, flag)| all | flag),
        backing_id: 0,
    }
}

/// Statistics of the file system.
pub(super) fn statfs_out(statistics: &Statistics) -> StatfsOut {
    StatfsOut {
        st: Kstatfs {
            blocks: statistics.blocks,
            bfree: statistics.blocks_free,
            bavail: statistics.blocks_available,
            files: statistics.files,
            ffree: statistics.files_free,
            bsize: statistics.block_size,
            namelen: statistics.name_length,
            frsize: statistics.fragment_size,
            ..Kstatfs::default()
        },
    }
}

/// A lock, as GETLK returns it.
pub(super) fn file_lock(lock: &RecordLock) -> FileLock {
    let kind = match lock.kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::Unlock => libc::F_UNLCK,
    };
    FileLock {
        start: lock.start,
        end: lock.end,
        kind: kind.cast_unsigned(),
        pid: 0,
    }
}

/// How long the guest may use attributes without asking again: not at all if a program has the
/// user or the group of its file. Linux keeps the cached mode when a WRITE clears the set-ID bits,
/// so it would run changed content with them until the attributes expire.
fn attribute_ttl(attributes: &Attributes, ttl: Duration) -> Duration {
    let mode = attributes.mode;
    let gives_group = mode & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID | libc::S_IXGRP;
    let gives_id = mode & libc::S_ISUID != 0 || gives_group;
    if mode & libc::S_IFMT == libc::S_IFREG && gives_id {
        Duration::ZERO
    } else {
        ttl
    }
}

/// The flag by which a guest decides whether it maps a file.
fn dax_flag(dax: bool) -> u32 {
    if dax { attr_flags::DAX } else { 0 }
}

fn attr(from: &Attributes) -> Attr {
    Attr {
        ino: from.inode,
        size: from.size,
        blocks: from.blocks,
        atime: from.accessed.seconds.cast_unsigned(),
        mtime: from.modified.seconds.cast_unsigned(),
        ctime: from.changed.seconds.cast_unsigned(),
        atimensec: from.accessed.nanoseconds,
        mtimensec: from.modified.nanoseconds,
        ctimensec: from.changed.nanoseconds,
        mode: from.mode,
        nlink: from.links,
        uid: from.uid,
        gid: from.gid,
        rdev: from.rdev,
        blksize: from.block_size,
        // `entry_out` and `attr_out` set them.
        flags: 0,
    }
}

/// The reply that fails the request `unique` with `errno`, for a transport that completes a request
/// which was dropped without a reply.
#[must_use]
pub(crate) fn error_reply(unique: u64, errno: Errno) -> [u8; OUT_HEADER_LEN] {
    header(unique, errno.raw_os_error().saturating_neg(), 0)
}

fn header(unique: u64, error: i32, body: usize) -> [u8; OUT_HEADER_LEN] {
    // No reply is longer than a `u32` can count: the transport's space is smaller.
    let len = u32::try_from(body.saturating_add(OUT_HEADER_LEN)).unwrap_or(u32::MAX);
    zerocopy::transmute!(OutHeader { len, error, unique })
}
