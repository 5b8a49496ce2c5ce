//! Migrates the content and metadata of files that have lost their last name.
//!
//! The invariant: a recreated file has a name in the shared directory for no longer than it takes
//! to open it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, StatxFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::fs::passthrough::descriptors::Descriptors;
use crate::fs::passthrough::inode_table::reopen_fd;
use crate::fs::passthrough::inode_table::stat_fd;
use crate::fs::passthrough::inode_table::{Inode, new_generation};
use crate::fs::{NodeId, Result};
use crate::migration::stream::Nameless;

/// How many bytes of a file are read at once.
const CHUNK_LEN: usize = 1 << 20;

/// The content and metadata of a file or directory without a name. `left` is the number of
/// bytes that may still be sent.
pub(super) fn content_of(fds: &Descriptors, inode: &Inode, left: &mut u64) -> Result<Nameless> {
    let fd = fds.fd(inode)?;
    let stat = stat_fd(&fd, StatxFlags::BASIC_STATS)?;
    let nanoseconds = |at: rustix::fs::StatxTimestamp| {
        at.tv_sec
            .saturating_mul(1_000_000_000)
            .saturating_add(i64::from(at.tv_nsec))
    };
    let mut nameless = Nameless {
        mode: u32::from(stat.stx_mode) & 0o7777,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        size: 0,
        times: [nanoseconds(stat.stx_atime), nanoseconds(stat.stx_mtime)],
        pieces: Vec::new(),
    };
    match inode.kind() {
        FileType::Directory => return Ok(nameless),
        FileType::RegularFile => {}
        _ => return Err(Errno::OPNOTSUPP),
    }
    nameless.size = stat.stx_size;
    let file = fds.with_room(|| reopen_fd(&fd, fds.proc_fds(), OFlags::RDONLY))?;
    let mut at = 0;
    loop {
        at = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(at) => at,
            // The rest is a hole.
            Err(Errno::NXIO) => return Ok(nameless),
            Err(error) => return Err(error),
        };
        let hole = rustix::fs::seek(&file, SeekFrom::Hole(at))?;
        while at < hole {
            let wanted = usize::try_from(hole - at)
                .unwrap_or(CHUNK_LEN)
                .min(CHUNK_LEN);
            let mut chunk = vec![0; wanted];
            let read = rustix::io::pread(&file, &mut chunk[..], at)?;
            if read == 0 {
                return Ok(nameless);
            }
            chunk.truncate(read);
            *left = left.checked_sub(read as u64).ok_or(Errno::FBIG)?;
            nameless.pieces.push((at, chunk));
            at += read as u64;
        }
    }
}

/// Creates a file or directory without a name. Returns an `O_PATH` descriptor of it.
pub(super) fn recreate_nameless(
    fds: &Descriptors,
    kind: FileType,
    nameless: &Nameless,
) -> Result<OwnedFd> {
    fds.writable()?;
    let root = fds.inodes().any(NodeId::ROOT).ok_or(Errno::STALE)?;
    let root = fds.fd(&root)?;
    match kind {
        FileType::RegularFile => {
            let file = nameless_file(fds, root.as_fd())?;
            for (at, chunk) in &nameless.pieces {
                write_all(&file, chunk, *at)?;
            }
            rustix::fs::ftruncate(&file, nameless.size)?;
            set_metadata(&file, nameless)?;
            fds.with_room(|| reopen_fd(&file, fds.proc_fds(), OFlags::PATH))
        }
        FileType::Directory => {
            let (name, ()) =
                with_unused_name(|name| rustix::fs::mkdirat(root.as_fd(), name, Mode::RWXU))?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(root.as_fd(), &*name, flags, Mode::empty());
            rustix::fs::unlinkat(root.as_fd(), &*name, rustix::fs::AtFlags::REMOVEDIR)?;
            let directory = opened?;
            set_metadata(&directory, nameless)?;
            fds.with_room(|| reopen_fd(&directory, fds.proc_fds(), OFlags::PATH))
        }
        _ => Err(Errno::OPNOTSUPP),
    }
}

fn nameless_file(fds: &Descriptors, root: BorrowedFd<'_>) -> Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    let access = OFlags::RDWR | OFlags::CLOEXEC;
    // The root may be an `O_PATH` descriptor.
    let here = OFlags::TMPFILE | access;
    match fds.with_room(|| rustix::fs::openat(root, c".", here, mode)) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        made => return made,
    }
    let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | access;
    let (name, file) = with_unused_name(|name| rustix::fs::openat(root, name, new, mode))?;
    rustix::fs::unlinkat(root, &*name, rustix::fs::AtFlags::empty())?;
    Ok(file)
}

/// Creates something under a name that doesn't exist.
fn with_unused_name<T>(make: impl Fn(&str) -> rustix::io::Result<T>) -> Result<(String, T)> {
    loop {
        let name = format!(".ringfsd-{:016x}", new_generation());
        match make(&name) {
            Err(Errno::EXIST) => {}
            made => return Ok((name, made?)),
        }
    }
}

fn write_all(file: &OwnedFd, bytes: &[u8], mut at: u64) -> Result<()> {
    let mut left = bytes;
    while !left.is_empty() {
        let written = rustix::io::pwrite(file, left, at)?;
        if written == 0 {
            return Err(Errno::IO);
        }
        left = left.get(written..).unwrap_or_default();
        at = at.saturating_add(written as u64);
    }
    Ok(())
}

/// Sets owner, mode and times. If this server may not give files to that owner, it stays the owner.
fn set_metadata(file: &OwnedFd, nameless: &Nameless) -> Result<()> {
    let owned = std::os::unix::fs::fchown(file, Some(nameless.uid), Some(nameless.gid));
    match owned.map_err(|error| Errno::from_io_error(&error)) {
        Ok(()) | Err(Some(Errno::PERM | Errno::INVAL)) => {}
        Err(error) => return Err(error.unwrap_or(Errno::IO)),
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(nameless.mode))?;
    let [accessed, modified] = nameless.times.map(|at| Timespec {
        tv_sec: at.div_euclid(1_000_000_000),
        tv_nsec: at.rem_euclid(1_000_000_000),
    });
    let times = Timestamps {
        last_access: accessed,
        last_modification: modified,
    };
    rustix::fs::futimens(file, &times)
}
