//! What users and programs of the host do to a shared directory: editors, builds, `git`, `rm`.
//!
//! Names that begin with `log` are neither renamed nor removed by the guest's programs, so the host
//! may rename over them and remove them at once. Files at other names are first renamed to a name
//! of the host's own, so that the file that is kept is the one that was there. The invariant of
//! [`Share`] holds after each operation.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

use rustix::fs::{AtFlags, CWD, OFlags, RenameFlags, linkat, renameat, renameat_with, unlinkat};
use rustix::io::Errno;

use crate::share::{DIRECTORIES, Share, State};

/// Permissions of files that the host creates: no program of the guest sets these.
const MODE: u32 = 0o750;

/// How often a directory is emptied while a guest still creates files in it.
const TRIES: usize = 100;

/// One change of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileChange {
    /// Write a new file and rename it over the old one.
    Replace,
    /// Remove it.
    Remove,
    /// Remove it and create it anew.
    Recreate,
    /// Give it a second name for a backup, and rename a new file over it.
    ReplaceWithBackup,
    /// Rename it to a backup, and create it anew.
    MoveToBackup,
    /// Change the permissions.
    ChangeMode,
    /// Empty it.
    Truncate,
    /// Write into it.
    Rewrite,
}

impl FileChange {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Replace,
        Self::Remove,
        Self::Recreate,
        Self::ReplaceWithBackup,
        Self::MoveToBackup,
        Self::ChangeMode,
        Self::Truncate,
        Self::Rewrite,
    ];
}

/// One change of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectoryChange {
    /// Rename it away and make a new one.
    Replace,
    /// Exchange it with another one.
    Exchange,
    /// Remove its content.
    Empty,
    /// Remove it with its content.
    Remove,
    /// Remove it with its content, and make a new one.
    Recreate,
    /// Rename it away, remove that, and make a new one.
    ReplaceAndRemove,
}

impl DirectoryChange {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Replace,
        Self::Exchange,
        Self::Empty,
        Self::Remove,
        Self::Recreate,
        Self::ReplaceAndRemove,
    ];
}

type Done = rustix::io::Result<()>;

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

fn is_replaced_by_guest(path: &str) -> bool {
    !path.rsplit('/').next().unwrap_or(path).starts_with("log")
}

impl Share {
    /// Changes the file at `path`; skips a file that doesn't exist.
    ///
    /// # Errors
    /// Those of the host's file system; a missing directory is none.
    pub fn change_file(&self, path: &str, change: FileChange) -> Done {
        let mut state = self.write();
        ignore_missing(self.try_change_file(&mut state, path, change))
    }

    fn try_change_file(&self, state: &mut State, path: &str, change: FileChange) -> Done {
        let (old, backup) = (format!("{path}.old"), format!("{path}.bak"));
        match change {
            FileChange::Replace => self.replace(state, path),
            FileChange::Remove => self.take_away(state, path, path),
            FileChange::Recreate => {
                self.take_away(state, path, path)?;
                self.put(path)
            }
            FileChange::ReplaceWithBackup => {
                self.take_away(state, &backup, path)?;
                let linked = linkat(CWD, self.at(path), CWD, self.at(&backup), AtFlags::empty());
                ignore_missing(linked)?;
                self.replace(state, path)
            }
            FileChange::MoveToBackup => {
                self.take_away(state, &old, path)?;
                match renameat(CWD, self.at(path), CWD, self.at(&old)) {
                    Ok(()) => {
                        let fd = self.open(&old, OFlags::RDONLY)?;
                        state.displace(path, fd, false);
                    }
                    other => ignore_missing(other)?,
                }
                self.put(path)
            }
            FileChange::ChangeMode => {
                let mode = fs::Permissions::from_mode(MODE);
                let changed = fs::set_permissions(self.at(path), mode);
                state.change(path);
                changed.map_err(errno)
            }
            FileChange::Truncate => {
                let file = fs::OpenOptions::new().write(true).open(self.at(path));
                let changed = file.and_then(|file| file.set_len(0));
                state.change(path);
                changed.map_err(errno)
            }
            FileChange::Rewrite => {
                let file = fs::OpenOptions::new().write(true).open(self.at(path));
                let changed = file.and_then(|mut file| file.write_all(self.text().as_bytes()));
                state.change(path);
                changed.map_err(errno)
            }
        }
    }

    fn text(&self) -> String {
        format!("host {:8}\n", self.number())
    }

    /// An unused path at the top of the share.
    fn own_path(&self, kind: &str) -> String {
        format!("{kind}-{}", self.number())
    }

    /// A new file under a name of the host's own, in the directory of `path`.
    fn draft(&self, path: &str) -> rustix::io::Result<String> {
        let draft = format!("{path}.draft");
        fs::write(self.at(&draft), self.text()).map_err(errno)?;
        let mode = fs::Permissions::from_mode(MODE);
        fs::set_permissions(self.at(&draft), mode).map_err(errno)?;
        Ok(draft)
    }

    /// Renames a new file over the one at `path`.
    fn replace(&self, state: &mut State, path: &str) -> Done {
        let draft = self.draft(path)?;
        let (from, to) = (self.at(&draft), self.at(path));
        for _ in 0..TRIES {
            let renamed = match self.open(path, OFlags::RDONLY) {
                Err(Errno::NOENT) => renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE),
                Err(errno) => Err(errno),
                Ok(_) if is_replaced_by_guest(path) => {
                    let swapped = renameat_with(CWD, &from, CWD, &to, RenameFlags::EXCHANGE);
                    swapped.and_then(|()| self.take_away(state, &draft, path))
                }
                Ok(victim) => {
                    renameat(CWD, &from, CWD, &to).map(|()| state.displace(path, victim, false))
                }
            };
            match renamed {
                Err(Errno::NOENT | Errno::EXIST) if from.exists() => {}
                done => return done,
            }
        }
        Err(Errno::AGAIN)
    }

    /// Makes a new file at `path`, unless the guest has made one.
    fn put(&self, path: &str) -> Done {
        let draft = self.draft(path)?;
        let (from, to) = (self.at(&draft), self.at(path));
        match renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => unlinkat(CWD, &from, AtFlags::empty()),
            done => done,
        }
    }

    /// Removes the file at `place`, which was known as `path`.
    fn take_away(&self, state: &mut State, place: &str, path: &str) -> Done {
        let mut place = place.to_owned();
        if is_replaced_by_guest(path) {
            let own = self.own_path("gone");
            match renameat(CWD, self.at(&place), CWD, self.at(&own)) {
                Ok(()) => place = own,
                other => return ignore_missing(other),
            }
        }
        match self.open(&place, OFlags::RDONLY) {
            Ok(victim) => {
                unlinkat(CWD, self.at(&place), AtFlags::empty())?;
                state.displace(path, victim, false);
                Ok(())
            }
            Err(errno) => ignore_missing(Err(errno)),
        }
    }

    /// Changes the directory at `path`.
    ///
    /// # Errors
    /// Those of the host's file system.
    pub fn change_directory(&self, path: &str, change: DirectoryChange) -> Done {
        let mut state = self.write();
        let state = &mut *state;
        match change {
            DirectoryChange::Replace => {
                self.move_away(state, path)?;
            }
            DirectoryChange::Exchange => {
                let own = self.own_path("dir");
                fs::create_dir(self.at(&own)).map_err(errno)?;
                fs::write(self.at(&own).join("log0"), self.text()).map_err(errno)?;
                let flags = RenameFlags::EXCHANGE;
                match renameat_with(CWD, self.at(&own), CWD, self.at(path), flags) {
                    Ok(()) => self.note_moved(state, path, own)?,
                    missing => {
                        ignore_missing(missing)?;
                        self.remove_tree(state, &own, path)?;
                    }
                }
            }
            DirectoryChange::Empty => ignore_missing(self.empty(state, path, path))?,
            DirectoryChange::Remove => return self.remove_tree(state, path, path),
            DirectoryChange::Recreate => self.remove_tree(state, path, path)?,
            DirectoryChange::ReplaceAndRemove => {
                if let Some(own) = self.move_away(state, path)? {
                    self.remove_tree(state, &own, path)?;
                }
            }
        }
        self.make_directories(state)?;
        while state.renamed.len() > 4 {
            if let Some((old, path)) = state.renamed.pop_front()
                && let Some(old) = old.to_str()
            {
                self.remove_tree(state, old, &path)?;
            }
        }
        Ok(())
    }

    /// Makes the missing directories.
    ///
    /// # Errors
    /// Those of the host's file system.
    pub fn complete(&self) -> Done {
        self.make_directories(&mut self.write())
    }

    fn make_directories(&self, state: &mut State) -> Done {
        for directory in DIRECTORIES {
            match fs::create_dir(self.at(directory)).map_err(errno) {
                Ok(()) => state.moved(directory),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn move_away(&self, state: &mut State, path: &str) -> rustix::io::Result<Option<String>> {
        let own = self.own_path("dir");
        match renameat(CWD, self.at(path), CWD, self.at(&own)) {
            Ok(()) => {
                self.note_moved(state, path, own.clone())?;
                Ok(Some(own))
            }
            missing => ignore_missing(missing).map(|()| None),
        }
    }

    fn note_moved(&self, state: &mut State, path: &str, own: String) -> Done {
        let fd = self.open(&own, OFlags::PATH | OFlags::DIRECTORY)?;
        state.displace(path, fd, true);
        state.renamed.push_back((own.into(), path.to_owned()));
        Ok(())
    }

    /// Removes the content of the directory at `place`, which was known as `path`.
    fn empty(&self, state: &mut State, place: &str, path: &str) -> Done {
        let names = fs::read_dir(self.at(place)).map_err(errno)?;
        for entry in names {
            let entry = entry.map_err(errno)?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let (below, known) = (format!("{place}/{name}"), format!("{path}/{name}"));
            if entry.file_type().map_err(errno)?.is_dir() {
                self.remove_tree(state, &below, &known)?;
            } else {
                // A backup is known by the name that it is a backup of.
                let known = [".old", ".bak", ".draft"]
                    .iter()
                    .find_map(|end| known.strip_suffix(end))
                    .unwrap_or(&known);
                self.take_away(state, &below, known)?;
            }
        }
        Ok(())
    }

    /// Removes the directory at `place`, which was known as `path`.
    fn remove_tree(&self, state: &mut State, place: &str, path: &str) -> Done {
        let fd = match self.open(place, OFlags::PATH | OFlags::DIRECTORY) {
            Err(errno) => return ignore_missing(Err(errno)),
            Ok(fd) => fd,
        };
        for _ in 0..TRIES {
            ignore_missing(self.empty(state, place, path))?;
            match unlinkat(CWD, self.at(place), AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY) => {}
                Err(errno) => return ignore_missing(Err(errno)),
                Ok(()) => {
                    state.displace(path, fd, true);
                    return Ok(());
                }
            }
        }
        Err(Errno::NOTEMPTY)
    }
}

/// A missing name is skipped, which is no error.
fn ignore_missing(done: Done) -> Done {
    match done {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        done => done,
    }
}
