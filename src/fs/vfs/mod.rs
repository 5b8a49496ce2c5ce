//! Several file systems under one mount: `--vfs`.
//!
//! Each is mounted at a [`MountPoint`]; empty directories lead to it where no other file system has
//! one. Node ids carry the number of the mount in their upper bits, so a request finds its file
//! system without a search, and handles and open files are the file system's own: data are read and
//! written as without this layer. The invariant: a node id never refers to another file system than
//! the one that assigned it.

mod attributes;
mod entries;
mod file_system;
mod inspect;
mod mount_point;
mod points;
mod readdir;
mod sync;
mod table;

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Caller, FileSystem, NegotiatedTerms, Timestamp};
use crate::device::BackChannel;

pub use self::mount_point::{MountPoint, MountPointError};

use self::table::{Mount, Shards, Table};

/// Several file systems under one mount.
///
/// A name that is a mount point, or leads to one, can't be removed, renamed or replaced (`EBUSY`,
/// `EEXIST`), and the directories that only lead to mount points can't be changed (`EROFS`). Files
/// can't be linked or renamed from one mount to another (`EXDEV`). What the guest holds of a file
/// system that was unmounted is `ESTALE`.
#[derive(Debug)]
pub struct Vfs {
    /// Distinguishes it from others of this process.
    number: u64,
    shards: Shards,
    changes: Mutex<Changes>,
    options: VfsOptions,
    /// A file system has been mounted whose methods may block.
    may_block: AtomicBool,
    /// Evictions of file systems that were unmounted.
    evictions_before: AtomicU64,
    /// The time of the directories that lead to mount points.
    made: Timestamp,
}

/// How several file systems appear under one mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VfsOptions {
    /// File systems with extended attributes will be mounted. Without, the guest's kernel learns
    /// that there are none, and doesn't ask again.
    pub xattr: bool,
    /// The guest's kernel is told where another file system is mounted.
    pub announce_submounts: bool,
}

impl Default for VfsOptions {
    fn default() -> Self {
        Self {
            xattr: true,
            announce_submounts: true,
        }
    }
}

/// What a change of the mounts needs, and what a file system that is mounted later has to be told.
#[derive(Debug)]
struct Changes {
    table: Table,
    terms: Option<NegotiatedTerms>,
    channel: Option<Arc<dyn BackChannel>>,
}

/// Why a file system can't be mounted or unmounted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// Another file system is mounted there.
    #[error("a file system is mounted at {0} already")]
    InUse(MountPoint),
    /// Nothing is mounted there.
    #[error("no file system is mounted at {0}")]
    NotMounted(MountPoint),
    /// Other file systems are mounted below.
    #[error("file systems are mounted below {0}: unmount them first")]
    Busy(MountPoint),
    /// The guest's session has terms that the file system doesn't support.
    #[error("the guest uses the mount in a way that the file system at {0} doesn't support")]
    Terms(MountPoint),
    /// A number is used once, so that node ids are never reused.
    #[error("65535 file systems have been mounted, and there can't be more")]
    TooMany,
}

thread_local! {
    /// The last `Vfs` that the thread has served, and how many of its mounts it is prepared for.
    static PREPARED: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
}

impl Vfs {
    /// A root without any mount.
    #[must_use]
    pub fn new(options: VfsOptions) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let table = Table::new();
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            shards: Shards::new(&table),
            changes: Mutex::new(Changes {
                table,
                terms: None,
                channel: None,
            }),
            options,
            may_block: AtomicBool::new(false),
            evictions_before: AtomicU64::new(0),
            made: attributes::now(),
        }
    }

    /// Mounts `fs` at `point`. A guest that is connected sees it as soon as it looks the name up
    /// again, at most a second later, or after `--negative-timeout` if it has looked in vain.
    ///
    /// # Errors
    ///
    /// See [`MountError`]; nothing is mounted then.
    pub fn mount(&self, point: &MountPoint, fs: Arc<dyn FileSystem>) -> Result<(), MountError> {
        let mut changes = self.changes();
        let mut table = changes.table.clone();
        let number = u16::try_from(table.mounts.len() + 1).map_err(|_large| MountError::TooMany)?;
        let points = Arc::make_mut(&mut table.points);
        let at = points.make(point);
        if points.get(at).is_some_and(|point| point.mount.is_some()) {
            return Err(MountError::InUse(point.clone()));
        }
        points.set_mount(at, Some(number));
        if let Some(terms) = &changes.terms {
            if fs.accept(terms) != Ok(*terms) {
                return Err(MountError::Terms(point.clone()));
            }
            fs.begin(terms);
        }
        if let Some(channel) = &changes.channel {
            fs.connected(channel);
        }
        if fs.may_block() {
            // Relaxed: who finds the file system has found the table first, under a lock.
            self.may_block.store(true, Ordering::Relaxed);
        }
        table.mounts.push(Some(Mount { fs, point: at }));
        table.find_directories();
        self.shards.replace(&table);
        changes.table = table;
        Ok(())
    }

    /// Unmounts what is mounted at `point`, and returns it. From here on what the guest holds of it
    /// is `ESTALE`, open files too; requests that are being served complete. It is released when
    /// these and the caller have dropped it.
    ///
    /// # Errors
    ///
    /// See [`MountError`]; nothing changes then.
    pub fn unmount(&self, point: &MountPoint) -> Result<Arc<dyn FileSystem>, MountError> {
        let mut changes = self.changes();
        let mut table = changes.table.clone();
        let missing = || MountError::NotMounted(point.clone());
        let points = Arc::make_mut(&mut table.points);
        let at = points.find(point).ok_or_else(missing)?;
        let number = at.mount.ok_or_else(missing)?;
        if !at.children.is_empty() {
            return Err(MountError::Busy(point.clone()));
        }
        let at = at.number;
        points.set_mount(at, None);
        points.prune(at);
        let slot = table.mounts.get_mut(usize::from(number) - 1);
        let mount = slot.and_then(Option::take).ok_or_else(missing)?;
        self.shards.replace(&table);
        changes.table = table;
        let evictions = mount.fs.usage().evictions;
        self.evictions_before
            .fetch_add(evictions, Ordering::Relaxed);
        Ok(mount.fs)
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table for the request that this thread serves.
    fn table(&self) -> super::Result<Arc<Table>> {
        let table = self.shards.get();
        if PREPARED.get() != (self.number, table.mounts.len()) {
            self.prepare_for(&table).map_err(|error| {
                let errno = error.raw_os_error();
                errno.map_or(rustix::io::Errno::IO, rustix::io::Errno::from_raw_os_error)
            })?;
        }
        Ok(table)
    }

    /// Prepares this thread for what has been mounted since it last served a request here.
    fn prepare_for(&self, table: &Table) -> std::io::Result<()> {
        let prepared = match PREPARED.get() {
            (number, prepared) if number == self.number => prepared,
            _ => 0,
        };
        for mount in table.mounts.iter().skip(prepared).flatten() {
            mount.fs.prepare_thread()?;
        }
        PREPARED.set((self.number, table.mounts.len()));
        Ok(())
    }
}

impl Table {
    /// Finds the directories that the points between two mounts stand for: the guest may know them
    /// already. On a thread of its own, as file systems prepare the threads that use them.
    fn find_directories(&self) {
        let between = |number: &u64| {
            let point = self.points.get(*number);
            point.is_some_and(|point| point.mount.is_none() && point.within.is_some())
        };
        if !self.points.numbers().iter().any(between) {
            return;
        }
        let found = std::thread::scope(|scope| {
            let search = || self.search();
            let thread = std::thread::Builder::new().spawn_scoped(scope, search)?;
            thread.join().map_err(|_panic| std::io::ErrorKind::Other)?
        });
        if let Err(error) = found {
            // They are found by their next lookup.
            log::debug!("looking for the directories above mount points: {error}");
        }
    }

    fn search(&self) -> std::io::Result<()> {
        for mount in self.all() {
            mount.fs.prepare_thread()?;
        }
        for number in self.points.numbers() {
            let Some(point) = self.points.get(number) else {
                continue;
            };
            let parent = self.points.get(point.parent);
            let above = parent.and_then(|parent| Some((parent, parent.directory()?)));
            let (Some(_), Some((parent, (mount, node)))) = (point.within, above) else {
                continue;
            };
            let name = parent.children.iter().find(|(_, child)| **child == number);
            let (Some((name, _)), Some(mounted)) = (name, self.mount(mount)) else {
                continue;
            };
            let fs = &mounted.fs;
            let server = Caller {
                uid: Some(0),
                gid: Some(0),
                ..Caller::default()
            };
            if let Ok(entry) = fs.lookup(&server, node, name) {
                let is_directory = attributes::is_directory(&entry.attributes);
                point.stand_for(is_directory.then_some(entry.node));
                fs.forget(entry.node, 1);
            }
        }
        Ok(())
    }
}
