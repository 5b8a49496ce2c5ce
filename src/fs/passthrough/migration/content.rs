//! Migrates the content and metadata of files that have lost their last name.
//!
//! The invariant: a recreated file has a name in the shared directory for no longer than it takes
//! to open it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, StatxFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::super::Passthrough;
use super::super::inode::Inode;
use super::super::inode_ref::{reopen_fd, stat_fd};
use crate::fs::{NodeId, Result};
use crate::migration::stream::{MAX_CONTENT, Nameless};

/// How many bytes of a file are read at once.
const CHUNK_LEN: usize = 1 << 20;

impl Passthrough {
    /// The content and metadata of a file or directory without a name. `left` is the number of
    /// bytes that may still be sent.
    pub(super) fn content_of(&self, inode: &Inode, left: &mut u64) -> Result<Nameless> {
        let fd = self.fd(inode)?;
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
        let file = self.with_room(|| reopen_fd(&fd, &self.proc_fds, OFlags::RDONLY))?;
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

    /// How many bytes of content may be sent in total.
    pub(super) fn max_content() -> u64 {
        MAX_CONTENT
    }

    /// Creates a file or directory without a name. Returns an `O_PATH` descriptor of it.
    pub(super) fn recreate_nameless(&self, kind: FileType, nameless: &Nameless) -> Result<OwnedFd> {
        self.writable()?;
        let root = self.inodes.any(NodeId::ROOT).ok_or(Errno::STALE)?;
        let root = self.fd(&root)?;
        match kind {
            FileType::RegularFile => {
                let file = self.nameless_file(root.as_fd())?;
                for (at, chunk) in &nameless.pieces {
                    write_all(&file, chunk, *at)?;
                }
                rustix::fs::ftruncate(&file, nameless.size)?;
                set_metadata(&file, nameless)?;
                self.with_room(|| reopen_fd(&file, &self.proc_fds, OFlags::PATH))
            }
            FileType::Directory => {
                let (name, ()) =
                    with_unused_name(|name| rustix::fs::mkdirat(root.as_fd(), name, Mode::RWXU))?;
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(root.as_fd(), &*name, flags, Mode::empty());
                rustix::fs::unlinkat(root.as_fd(), &*name, rustix::fs::AtFlags::REMOVEDIR)?;
                let directory = opened?;
                set_metadata(&directory, nameless)?;
                self.with_room(|| reopen_fd(&directory, &self.proc_fds, OFlags::PATH))
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn nameless_file(&self, root: BorrowedFd<'_>) -> Result<OwnedFd> {
        let mode = Mode::RUSR | Mode::WUSR;
        let access = OFlags::RDWR | OFlags::CLOEXEC;
        // The root may be an `O_PATH` descriptor.
        let here = OFlags::TMPFILE | access;
        match self.with_room(|| rustix::fs::openat(root, c".", here, mode)) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
            made => return made,
        }
        let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | access;
        let (name, file) = with_unused_name(|name| rustix::fs::openat(root, name, new, mode))?;
        rustix::fs::unlinkat(root, &*name, rustix::fs::AtFlags::empty())?;
        Ok(file)
    }
}

/// Creates something under a name that doesn't exist.
fn with_unused_name<T>(make: impl Fn(&str) -> rustix::io::Result<T>) -> Result<(String, T)> {
    loop {
        let name = format!(".ringfsd-{:016x}", super::super::lookup::new_generation());
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
