//! The shared directory as the host sees it, with everything that the host has removed from a path.
//!
//! The invariant: a reader of the lock finds each inode that was ever at a path either there, or
//! below a displaced directory, or among the displaced files, up to the number that is kept.

use std::collections::{HashMap, VecDeque};
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

use rustix::fs::{Mode, OFlags, fstat, open, openat};

use crate::effect::{Effect, name_of};

/// The directories that are used, parents first. The host replaces and removes them.
pub const DIRECTORIES: [&str; 3] = ["d0", "d1", "d1/e"];

/// How many displaced files and directories are kept open.
const KEPT: usize = 10_000;

/// The shared directory.
#[derive(Debug)]
pub struct Share {
    root: PathBuf,
    state: RwLock<State>,
    serial: AtomicU64,
}

/// The history of the share.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// The latest last.
    displaced: VecDeque<Displaced>,
    /// When the host last changed the content of the file at a path.
    changed: HashMap<String, Instant>,
    /// When a directory was last removed or made.
    moved: HashMap<String, Instant>,
    /// Files and directories that programs of the guest are reading, or when they last did.
    read: HashMap<String, Reading>,
    /// Directories that were renamed, and where they were before.
    pub(crate) renamed: VecDeque<(PathBuf, String)>,
}

/// How a file is being read.
#[derive(Clone, Copy, Debug)]
struct Reading {
    readers: u64,
    ended: Instant,
}

/// Something that was removed from a path.
#[derive(Debug)]
struct Displaced {
    path: String,
    fd: OwnedFd,
    is_directory: bool,
    at: Instant,
}

/// Where an effect was found.
#[derive(Debug)]
pub(crate) struct Found {
    /// When the file in which it was found was removed from the path, unless it still is there.
    pub(crate) displaced: Option<Instant>,
    /// Whether the whole directory was removed, and not the file.
    pub(crate) with_directory: bool,
    /// Whether it has a name on the host.
    pub(crate) is_named: bool,
    /// For messages.
    pub(crate) what: String,
}

impl State {
    /// Records that `fd` was removed from `path`.
    pub(crate) fn displace(&mut self, path: &str, fd: OwnedFd, is_directory: bool) {
        if self.displaced.len() >= KEPT {
            self.displaced.pop_front();
        }
        let at = Instant::now();
        if is_directory {
            self.moved.insert(path.to_owned(), at);
        }
        let path = path.to_owned();
        self.displaced.push_back(Displaced {
            path,
            fd,
            is_directory,
            at,
        });
    }

    /// Records that the host has just changed the content of the file at `path`.
    pub(crate) fn change(&mut self, path: &str) {
        self.changed.insert(path.to_owned(), Instant::now());
    }

    /// Records that a directory was made or removed.
    pub(crate) fn moved(&mut self, path: &str) {
        self.moved.insert(path.to_owned(), Instant::now());
    }
}

impl Share {
    /// Whether a directory that was above `path` still exists, renamed.
    pub(crate) fn has_moved_above(&self, path: &str) -> bool {
        let state = self.read();
        state.renamed.iter().any(|(_, old)| {
            path.strip_prefix(old.as_str())
                .is_some_and(|rest| rest.starts_with('/'))
        })
    }

    /// Uses a directory as the share, and makes the directories that are used in it.
    ///
    /// # Errors
    /// If they can't be made.
    pub fn new(root: &Path) -> std::io::Result<Self> {
        for directory in DIRECTORIES {
            std::fs::create_dir_all(root.join(directory))?;
        }
        Ok(Self {
            root: root.to_owned(),
            state: RwLock::default(),
            serial: AtomicU64::new(0),
        })
    }

    /// A path of the share as a path of the host.
    #[must_use]
    pub fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A number that is used once.
    pub(crate) fn number(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, State> {
        let state = self.state.write();
        state.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        let state = self.state.read();
        state.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens what is at `path` now, without anything that a program could notice.
    pub(crate) fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        open(self.at(path), flags, Mode::empty())
    }

    /// Whether all directories above `path` have existed, unchanged, since `since`.
    pub(crate) fn directories_stay(&self, path: &str, since: Instant) -> bool {
        let state = self.read();
        DIRECTORIES.iter().all(|directory| {
            let rest = path.strip_prefix(directory);
            let is_above = rest.is_some_and(|rest| rest.starts_with('/'));
            let moved = state.moved.get(*directory);
            !is_above || moved.is_none_or(|at| *at < since) && self.at(directory).is_dir()
        })
    }

    /// Whether the host has changed the content of the file at `path` since `since`.
    pub(crate) fn was_changed(&self, path: &str, since: Instant) -> bool {
        let state = self.read();
        state.changed.get(path).is_some_and(|at| *at >= since)
    }

    /// Whether the host has removed the file at `path`, or a directory above it, since `since`.
    pub(crate) fn was_displaced(&self, path: &str, since: Instant) -> bool {
        let state = self.read();
        let displaced = state.displaced.iter().rev();
        displaced.take_while(|last| last.at >= since).any(|last| {
            let rest = path.strip_prefix(&*last.path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }

    /// Calls `read` while the file at `path` is recorded as one that the guest may have open.
    pub(crate) fn while_reading<T>(&self, path: &str, read: impl FnOnce() -> T) -> T {
        let mut state = self.write();
        let nobody = || Reading {
            readers: 0,
            ended: Instant::now(),
        };
        let reading = state.read.entry(path.to_owned());
        reading.or_insert_with(nobody).readers += 1;
        drop(state);
        let done = read();
        let mut state = self.write();
        if let Some(reading) = state.read.get_mut(path) {
            reading.readers -= 1;
            reading.ended = Instant::now();
        }
        done
    }

    /// Whether a program of the guest has had the file at `path` open for reading since `since`.
    pub(crate) fn was_read(&self, path: &str, since: Instant) -> bool {
        let state = self.read();
        let reading = state.read.get(path);
        reading.is_some_and(|reading| reading.readers > 0 || reading.ended >= since)
    }

    /// Whether the directory of `path` was being listed since `since`, so that the guest knows each
    /// name in it.
    pub(crate) fn was_listed(&self, path: &str, since: Instant) -> bool {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        self.was_read(directory, since)
    }

    /// Describes where an `effect` is that is not where it must be, for messages.
    pub(crate) fn search(&self, effect: &Effect) -> String {
        let state = self.read();
        let displaced = state.displaced.iter().rev();
        let mut found: Vec<_> = displaced
            .filter(|displaced| effect.is_in(displaced.fd.as_fd()))
            .map(|displaced| format!("what was {}, {}", displaced.path, name_of(&displaced.fd)))
            .collect();
        let mut directories = vec![self.root.clone()];
        while let Some(directory) = directories.pop() {
            let entries = std::fs::read_dir(&directory).into_iter().flatten();
            for entry in entries.flatten() {
                let path = entry.path();
                if path.is_dir() {
                    directories.push(path);
                } else if let Ok(file) = std::fs::File::open(&path)
                    && effect.is_in(file.as_fd())
                {
                    found.push(format!("{}, {}", path.display(), name_of(&file)));
                }
            }
        }
        if found.is_empty() {
            "nowhere".to_owned()
        } else {
            found.join(" and ")
        }
    }

    /// Looks for the `effect` of a program on the file that was at `path`.
    pub(crate) fn find(&self, path: &str, effect: &Effect) -> Option<Found> {
        let state = self.read();
        let flags = OFlags::RDONLY;
        if let Ok(now) = self.open(path, flags)
            && effect.is_in(now.as_fd())
        {
            return Some(Found {
                displaced: None,
                with_directory: false,
                is_named: true,
                what: name_of(&now),
            });
        }
        for displaced in state.displaced.iter().rev() {
            let Some(rest) = path.strip_prefix(&*displaced.path) else {
                continue;
            };
            let found = |fd: &OwnedFd| Found {
                displaced: Some(displaced.at),
                with_directory: displaced.is_directory,
                is_named: fstat(fd).is_ok_and(|stat| stat.st_nlink > 0),
                what: name_of(fd),
            };
            if rest.is_empty() && effect.is_in(displaced.fd.as_fd()) {
                return Some(found(&displaced.fd));
            }
            if let Some(below) = rest.strip_prefix('/')
                && displaced.is_directory
                && let Ok(below) = CString::new(below)
                && let Ok(file) = openat(
                    &displaced.fd,
                    &below,
                    flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK,
                    Mode::empty(),
                )
                && effect.is_in(file.as_fd())
            {
                return Some(found(&file));
            }
        }
        None
    }
}
