//! The files that the cases use, made on the host's side of the share.
//!
//! There are a large file for the page cache and one for O_DIRECT, a directory of files that the
//! server comes to know, one of files that it never knows for long, and one that is empty between
//! cases. The invariant: small files never change, and each byte of every file is its pattern's
//! unless a case has written there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::Advice;

use crate::pattern::Seed;

/// The directory in the share that contains all files.
pub(crate) const FOLDER: &str = "ringfsd-load";
/// The large files.
pub(crate) const DATA: &str = "data";
pub(crate) const DIRECT: &str = "direct";
/// The directories of small files, and the number of files in each.
pub(crate) const KNOWN: &str = "known";
pub(crate) const KNOWN_FILES: u32 = 1000;
pub(crate) const COLD: &str = "cold";
pub(crate) const COLD_FILES: u32 = 10_000;
/// The directory with as many files as directories mostly have, which the server never knows for long.
pub(crate) const FEW: &str = "few";
pub(crate) const FEW_FILES: u32 = 12;
/// The directory in which files are made and removed.
pub(crate) const NEW: &str = "new";
/// Bytes of a small file.
pub(crate) const SMALL: u32 = 4096;

const MARK: &str = "made";
const PIECE: usize = 1 << 20;

/// Errors of the files.
#[derive(Debug, thiserror::Error)]
#[error("can't {act} {path}", path = path.display())]
pub(crate) struct ShareError {
    act: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The files.
#[derive(Debug)]
pub(crate) struct Share {
    folder: PathBuf,
    file_size: u64,
    keep: bool,
}

/// The name of a small file.
pub(crate) fn name(number: u32) -> [u8; 6] {
    let mut name = *b"f00000";
    let mut left = number;
    for digit in name.iter_mut().skip(1).rev() {
        *digit = b'0' + u8::try_from(left % 10).unwrap_or(0);
        left /= 10;
    }
    name
}

impl Share {
    /// Makes the missing files.
    pub(crate) fn new(shared_dir: &Path, file_size: u64, keep: bool) -> Result<Self, ShareError> {
        let shared_dir = fs::canonicalize(shared_dir).map_err(failed("find", shared_dir))?;
        let share = Self {
            folder: shared_dir.join(FOLDER),
            file_size,
            keep,
        };
        share.make()?;
        Ok(share)
    }

    fn make(&self) -> Result<(), ShareError> {
        let new = self.path(NEW);
        if new.exists() {
            fs::remove_dir_all(&new).map_err(failed("empty", &new))?;
        }
        for folder in [KNOWN, COLD, FEW, NEW] {
            let folder = self.path(folder);
            fs::create_dir_all(&folder).map_err(failed("make", &folder))?;
        }
        let mark = self.path(MARK);
        let wanted = format!(
            "{} {KNOWN_FILES} {COLD_FILES} {FEW_FILES}\n",
            self.file_size
        );
        if fs::read_to_string(&mark).is_ok_and(|found| found == wanted) {
            return Ok(());
        }
        for (folder, count) in [(KNOWN, KNOWN_FILES), (COLD, COLD_FILES), (FEW, FEW_FILES)] {
            let folder = self.path(folder);
            for number in 0..count {
                let path = folder.join(String::from_utf8_lossy(&name(number)).as_ref());
                let mut bytes = [0; SMALL as usize];
                Seed::of_file(number).fill(0, &mut bytes);
                fs::write(&path, bytes).map_err(failed("write", &path))?;
            }
        }
        self.fill(DATA)?;
        self.fill(DIRECT)?;
        fs::write(&mark, wanted).map_err(failed("write", &mark))
    }

    /// The path of the file with this name.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The size of a large file.
    pub(crate) fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Restores a large file's initial content.
    pub(crate) fn fill(&self, name: &str) -> Result<(), ShareError> {
        let path = self.path(name);
        // In place: the server has it open.
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).open(&path);
        let mut file = file.map_err(failed("make", &path))?;
        file.set_len(self.file_size)
            .map_err(failed("set the size of", &path))?;
        let mut bytes = vec![0; PIECE];
        for offset in (0..self.file_size).step_by(PIECE) {
            Seed::MADE.fill(offset, &mut bytes);
            file.write_all(&bytes).map_err(failed("write", &path))?;
        }
        file.sync_all().map_err(failed("sync", &path))
    }

    /// Reads a large file into the page cache.
    pub(crate) fn warm(&self, name: &str) -> Result<(), ShareError> {
        self.scan(name, |_, _| {})
    }

    /// Writes back a large file's pages in the page cache, and drops them.
    pub(crate) fn evict(&self, name: &str) -> Result<(), ShareError> {
        let path = self.path(name);
        let file = File::open(&path).map_err(failed("open", &path))?;
        file.sync_all().map_err(failed("sync", &path))?;
        let advised = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        advised.map_err(|errno| failed("evict", &path)(errno.into()))
    }

    /// Writes back a large file's dirty pages, so that the next case is not disturbed.
    pub(crate) fn settle(&self, name: &str) -> Result<(), ShareError> {
        let path = self.path(name);
        let file = File::open(&path).map_err(failed("open", &path))?;
        file.sync_all().map_err(failed("sync", &path))
    }

    /// Reads a large file in parts, and passes each with its offset.
    pub(crate) fn scan(
        &self,
        name: &str,
        mut visit: impl FnMut(u64, &[u8]),
    ) -> Result<(), ShareError> {
        let path = self.path(name);
        let mut file = File::open(&path).map_err(failed("open", &path))?;
        let mut bytes = vec![0; PIECE];
        for offset in (0..self.file_size).step_by(PIECE) {
            file.read_exact(&mut bytes).map_err(failed("read", &path))?;
            visit(offset, &bytes);
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.folder)
        {
            eprintln!("load: can't remove {}: {error}", self.folder.display());
        }
    }
}

/// Drops the host's page cache, directory entries and inodes.
pub(crate) fn drop_caches() -> Result<(), ShareError> {
    rustix::fs::sync();
    let path = Path::new("/proc/sys/vm/drop_caches");
    fs::write(path, "3\n").map_err(failed("write to", path))
}

fn failed(act: &'static str, path: &Path) -> impl Fn(io::Error) -> ShareError {
    move |source| ShareError {
        act,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_number_in_them() {
        assert_eq!(&name(0), b"f00000");
        assert_eq!(&name(9_876), b"f09876");
    }

    #[test]
    fn files_are_made_once_and_removed_at_the_end() {
        let folder = std::env::temp_dir().join(format!("load-share-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let size = 16 << 20;
        let kept = Share::new(&folder, size, true).unwrap();
        let mut whole = 0;
        kept.scan(DATA, |offset, bytes| {
            assert_eq!(Seed::MADE.difference(offset, bytes), None);
            whole += bytes.len();
        })
        .unwrap();
        assert_eq!(whole as u64, size);
        let made = fs::metadata(kept.path("cold/f09999"))
            .unwrap()
            .modified()
            .unwrap();
        drop(kept);
        let again = Share::new(&folder, size, false).unwrap();
        let found = fs::metadata(again.path("cold/f09999"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(made, found);
        again.warm(DATA).unwrap();
        again.evict(DATA).unwrap();
        drop(again);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::remove_dir(&folder).unwrap();
    }
}
