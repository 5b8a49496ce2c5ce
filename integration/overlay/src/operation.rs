//! One random operation, and doing it below a directory.
//!
//! The invariant: an operation is data, so what is done on one mount is done on the other.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::random::Random;

/// Names that are usually those of directories, and names that are usually those of files.
const DIRECTORIES: [&str; 3] = ["a", "b", "c"];
const FILES: [&str; 4] = ["d", "e", "f", "g"];
/// The attributes that are set; the third is one of the overlay's own.
const ATTRIBUTES: [&str; 4] = [
    "user.one",
    "trusted.two",
    "trusted.overlay.opaque",
    "security.three",
];
/// How many files are held open at most.
const SLOTS: u64 = 6;
/// The size of what is read at once.
const READ: usize = 20_000;

/// A random operation.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Create(PathBuf, OFlags, u32),
    Open(PathBuf, OFlags, u64),
    Close(u64),
    ReadOpen(u64, u64),
    WriteOpen(u64, u64, Vec<u8>),
    TruncateOpen(u64, u64),
    ChangeModeOpen(u64, u32),
    StatOpen(u64),
    Write(PathBuf, u64, Vec<u8>),
    Read(PathBuf),
    Truncate(PathBuf, u64),
    MakeDirectory(PathBuf, u32),
    MakeNode(PathBuf, FileType, u64),
    Symlink(PathBuf, String),
    ReadLink(PathBuf),
    Link(PathBuf, PathBuf),
    LinkNameless(PathBuf, PathBuf),
    Unlink(PathBuf),
    RemoveDirectory(PathBuf),
    Rename(PathBuf, PathBuf, RenameFlags),
    ChangeMode(PathBuf, u32),
    ChangeOwner(PathBuf, u32, u32),
    SetTimes(PathBuf, i64),
    SetAttribute(PathBuf, &'static str, Vec<u8>, XattrFlags),
    GetAttribute(PathBuf, &'static str),
    RemoveAttribute(PathBuf, &'static str),
    List(PathBuf),
    Stat(PathBuf),
}

/// What an operation answers.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Bytes(Vec<u8>),
    Text(String),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Text(text) => f.write_str(text),
            Self::Bytes(bytes) => {
                let sum = bytes.iter().fold(0_u32, |sum, byte| {
                    sum.wrapping_mul(31).wrapping_add(u32::from(*byte))
                });
                write!(f, "{} bytes, sum {sum:08x}", bytes.len())
            }
        }
    }
}

/// A directory on which operations are done, and the files that are open there.
#[derive(Debug)]
pub(crate) struct Side {
    root: PathBuf,
    open: HashMap<u64, OwnedFd>,
}

fn bytes(random: &mut Random) -> Vec<u8> {
    let len = usize::try_from(random.below(9000)).unwrap_or_default();
    let first = u8::try_from(random.below(256)).unwrap_or_default();
    (0..len)
        .map(|at| first.wrapping_add(u8::try_from(at % 251).unwrap_or_default()))
        .collect()
}

/// A path whose last name is usually one of `last`, and sometimes one of `others`.
fn path_of(random: &mut Random, last: &[&str], others: &[&str]) -> PathBuf {
    let depth = random.below(3);
    let mut path: PathBuf = (0..depth).map(|_| *random.pick(&DIRECTORIES)).collect();
    let names = if random.one_in(8) { others } else { last };
    path.push(*random.pick(names));
    path
}

fn path(random: &mut Random) -> PathBuf {
    path_of(random, &FILES, &DIRECTORIES)
}

fn directory(random: &mut Random) -> PathBuf {
    path_of(random, &DIRECTORIES, &FILES)
}

/// Either of them.
fn any(random: &mut Random) -> PathBuf {
    if random.one_in(2) {
        directory(random)
    } else {
        path(random)
    }
}

fn attribute(random: &mut Random) -> &'static str {
    let index = random.below(ATTRIBUTES.len() as u64);
    ATTRIBUTES[usize::try_from(index).unwrap_or_default()]
}

fn mode(random: &mut Random) -> u32 {
    *random.pick(&[0o644, 0o600, 0o755, 0o4755, 0o2711, 0o1777, 0o2775, 0o400])
}

impl Operation {
    /// A random operation.
    pub(crate) fn random(random: &mut Random) -> Self {
        let access = [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR];
        let slot = random.below(SLOTS);
        match random.below(46) {
            0..=1 => {
                let extra = [OFlags::empty(), OFlags::EXCL, OFlags::TRUNC, OFlags::APPEND];
                let flags = *random.pick(&access) | *random.pick(&extra);
                let flags = flags | OFlags::CREATE | OFlags::NONBLOCK;
                Self::Create(path(random), flags, mode(random))
            }
            2..=3 => {
                let extra = [OFlags::empty(), OFlags::TRUNC, OFlags::APPEND];
                let flags = *random.pick(&access) | *random.pick(&extra);
                Self::Open(path(random), flags, slot)
            }
            4 => Self::Close(slot),
            5..=6 => Self::ReadOpen(slot, random.below(4) * 3000),
            7 => Self::WriteOpen(slot, random.below(20_000), bytes(random)),
            8 => Self::TruncateOpen(slot, random.below(12_000)),
            9 => Self::ChangeModeOpen(slot, mode(random)),
            10 => Self::StatOpen(slot),
            11..=13 => Self::Write(path(random), random.below(20_000), bytes(random)),
            14..=15 => Self::Read(path(random)),
            16 => Self::Truncate(path(random), random.below(12_000)),
            17..=19 => Self::MakeDirectory(directory(random), mode(random)),
            20 => {
                let kinds = [
                    (FileType::Fifo, 0),
                    (FileType::Socket, 0),
                    (FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
                    (FileType::CharacterDevice, 0),
                    (FileType::BlockDevice, rustix::fs::makedev(240, 77)),
                    (FileType::RegularFile, 0),
                ];
                let (kind, device) = *random.pick(&kinds);
                Self::MakeNode(path(random), kind, device)
            }
            21 => Self::Symlink(path(random), format!("target-{}", random.below(100))),
            22 => Self::ReadLink(path(random)),
            23..=24 => Self::Link(path(random), path(random)),
            25 => Self::LinkNameless(directory(random), path(random)),
            26..=28 => Self::Unlink(path(random)),
            29..=31 => Self::RemoveDirectory(directory(random)),
            32..=35 => {
                let flags = [
                    RenameFlags::empty(),
                    RenameFlags::empty(),
                    RenameFlags::NOREPLACE,
                    RenameFlags::EXCHANGE,
                    RenameFlags::WHITEOUT,
                ];
                let flags = *random.pick(&flags);
                match random.below(8) {
                    0 => Self::Rename(any(random), any(random), flags),
                    1..=4 => Self::Rename(path(random), path(random), flags),
                    _ => Self::Rename(directory(random), directory(random), flags),
                }
            }
            36 => Self::ChangeMode(any(random), mode(random)),
            37 => {
                let owner = u32::try_from(random.below(3) * 500).unwrap_or_default();
                Self::ChangeOwner(any(random), owner, owner + 1)
            }
            38 => {
                let seconds = 1_000_000_000 + random.below(1000);
                Self::SetTimes(any(random), seconds.cast_signed())
            }
            39 => {
                let flags = [XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE];
                let mut value = bytes(random);
                value.truncate(100);
                let name = attribute(random);
                Self::SetAttribute(any(random), name, value, *random.pick(&flags))
            }
            40 => Self::GetAttribute(any(random), attribute(random)),
            41 => Self::RemoveAttribute(any(random), attribute(random)),
            42..=43 => Self::List(directory(random)),
            _ => Self::Stat(any(random)),
        }
    }
}

/// What `stat(2)` says and both sides must agree on. The number of links of a directory is not: it
/// is 1 on a merged directory, and each file system counts in its own way.
fn described(stat: &rustix::fs::Stat) -> String {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_dir = kind == FileType::Directory;
    let size = if is_dir { 0 } else { stat.st_size };
    let links = if is_dir { 0 } else { stat.st_nlink };
    format!(
        "mode {:o} owner {}:{} size {size} links {links} device {:x}",
        stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev
    )
}

impl Side {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
            open: HashMap::new(),
        }
    }

    fn at(&self, path: &Path) -> PathBuf {
        self.root.join(path)
    }

    fn file(&self, slot: u64) -> Result<&OwnedFd, Errno> {
        self.open.get(&slot).ok_or(Errno::BADF)
    }

    /// Does one operation.
    pub(crate) fn perform(&mut self, operation: &Operation) -> Result<Answer, Errno> {
        let done = |()| Answer::Done;
        match operation {
            Operation::Create(path, flags, mode) => {
                let mode = Mode::from_raw_mode(*mode);
                rustix::fs::open(self.at(path), *flags, mode).map(|_| Answer::Done)
            }
            Operation::Open(path, flags, slot) => {
                // Opening a FIFO would wait.
                let stat = rustix::fs::lstat(self.at(path))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Errno::INVAL);
                }
                let opened = rustix::fs::open(self.at(path), *flags, Mode::empty())?;
                self.open.insert(*slot, opened);
                Ok(Answer::Done)
            }
            Operation::Close(slot) => {
                self.open.remove(slot);
                Ok(Answer::Done)
            }
            Operation::ReadOpen(slot, offset) => {
                let mut buffer = vec![0; READ];
                let read = rustix::io::pread(self.file(*slot)?, &mut buffer, *offset)?;
                buffer.truncate(read);
                Ok(Answer::Bytes(buffer))
            }
            Operation::WriteOpen(slot, offset, bytes) => {
                let written = rustix::io::pwrite(self.file(*slot)?, bytes, *offset)?;
                Ok(Answer::Text(written.to_string()))
            }
            Operation::TruncateOpen(slot, size) => {
                rustix::fs::ftruncate(self.file(*slot)?, *size).map(done)
            }
            Operation::ChangeModeOpen(slot, mode) => {
                rustix::fs::fchmod(self.file(*slot)?, Mode::from_raw_mode(*mode)).map(done)
            }
            Operation::StatOpen(slot) => {
                let stat = rustix::fs::fstat(self.file(*slot)?)?;
                let mut text = described(&stat);
                if let Some(at) = text.find(" links") {
                    // See `docs/overlay.md`: the links of a removed file of a lower layer.
                    text.truncate(at);
                }
                Ok(Answer::Text(text))
            }
            Operation::Write(path, offset, bytes) => {
                let flags = OFlags::WRONLY | OFlags::NONBLOCK;
                let file = rustix::fs::open(self.at(path), flags, Mode::empty())?;
                let written = rustix::io::pwrite(&file, bytes, *offset)?;
                Ok(Answer::Text(written.to_string()))
            }
            Operation::Read(path) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK;
                let file = rustix::fs::open(self.at(path), flags, Mode::empty())?;
                let mut buffer = vec![0; READ * 2];
                let read = rustix::io::pread(&file, &mut buffer, 0)?;
                buffer.truncate(read);
                Ok(Answer::Bytes(buffer))
            }
            Operation::Truncate(path, size) => {
                let flags = OFlags::WRONLY | OFlags::NONBLOCK;
                let file = rustix::fs::open(self.at(path), flags, Mode::empty())?;
                rustix::fs::ftruncate(&file, *size).map(done)
            }
            Operation::MakeDirectory(path, mode) => {
                rustix::fs::mkdir(self.at(path), Mode::from_raw_mode(*mode)).map(done)
            }
            Operation::MakeNode(path, kind, device) => {
                let mode = Mode::from_raw_mode(0o640);
                rustix::fs::mknodat(CWD, self.at(path), *kind, mode, *device).map(done)
            }
            Operation::Symlink(path, target) => {
                rustix::fs::symlink(target.as_str(), self.at(path)).map(done)
            }
            Operation::ReadLink(path) => {
                let target = rustix::fs::readlink(self.at(path), Vec::new())?;
                Ok(Answer::Bytes(target.into_bytes()))
            }
            Operation::Link(from, to) => rustix::fs::link(self.at(from), self.at(to)).map(done),
            Operation::LinkNameless(directory, to) => {
                let flags = OFlags::TMPFILE | OFlags::RDWR;
                let mode = Mode::from_raw_mode(0o640);
                let file = rustix::fs::open(self.at(directory), flags, mode)?;
                rustix::io::pwrite(&file, b"nameless", 0)?;
                let to = self.at(to);
                rustix::fs::linkat(file, c"", CWD, to, AtFlags::EMPTY_PATH).map(done)
            }
            Operation::Unlink(path) => rustix::fs::unlink(self.at(path)).map(done),
            Operation::RemoveDirectory(path) => rustix::fs::rmdir(self.at(path)).map(done),
            Operation::Rename(from, to, flags) => {
                rustix::fs::renameat_with(CWD, self.at(from), CWD, self.at(to), *flags).map(done)
            }
            Operation::ChangeMode(path, mode) => {
                rustix::fs::chmod(self.at(path), Mode::from_raw_mode(*mode)).map(done)
            }
            Operation::ChangeOwner(path, uid, gid) => {
                let (uid, gid) = (Uid::from_raw(*uid), Gid::from_raw(*gid));
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::chownat(CWD, self.at(path), Some(uid), Some(gid), flags).map(done)
            }
            Operation::SetTimes(path, seconds) => {
                let time = Timespec {
                    tv_sec: *seconds,
                    tv_nsec: 5,
                };
                let times = Timestamps {
                    last_access: time,
                    last_modification: time,
                };
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(CWD, self.at(path), &times, flags).map(done)
            }
            Operation::SetAttribute(path, name, value, flags) => {
                rustix::fs::lsetxattr(self.at(path), *name, value, *flags).map(done)
            }
            Operation::GetAttribute(path, name) => {
                let mut value = vec![0; 200];
                let len = rustix::fs::lgetxattr(self.at(path), *name, &mut value[..])?;
                value.truncate(len);
                Ok(Answer::Bytes(value))
            }
            Operation::RemoveAttribute(path, name) => {
                rustix::fs::lremovexattr(self.at(path), *name).map(done)
            }
            Operation::List(path) => Ok(Answer::Text(list(&self.at(path))?.join(" "))),
            Operation::Stat(path) => {
                let stat = rustix::fs::lstat(self.at(path))?;
                Ok(Answer::Text(described(&stat)))
            }
        }
    }
}

/// The names in a directory and their types, sorted. Names that can't be looked up are left out: the
/// kernel lists whiteouts that have nothing below.
fn list(path: &Path) -> Result<Vec<String>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
    let directory = rustix::fs::open(path, flags, Mode::empty())?;
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        if !matches!(rustix::fs::lstat(path.join(&*name)), Err(Errno::NOENT)) {
            entries.push(format!("{name}:{:?}", entry.file_type()));
        }
    }
    entries.sort();
    Ok(entries)
}

/// Describes everything below `root`: names, attributes, contents. A time before `since` was set by
/// a program and must be the same on both sides; a later one is that of some operation.
pub(crate) fn describe(root: &Path, since: i64) -> Result<Vec<String>, Errno> {
    let mut lines = Vec::new();
    let mut links = HashMap::new();
    walk(root, Path::new("."), since, &mut links, &mut lines)?;
    Ok(lines)
}

fn walk(
    root: &Path,
    at: &Path,
    since: i64,
    links: &mut HashMap<u64, usize>,
    lines: &mut Vec<String>,
) -> Result<(), Errno> {
    let path = root.join(at);
    let stat = rustix::fs::lstat(&path)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let mut line = format!("{} {}", at.display(), described(&stat));
    // In the kernel, a rename that fails may have changed the time of a directory.
    if kind != FileType::Directory && stat.st_mtime < since {
        line += &format!(" modified {}.{}", stat.st_mtime, stat.st_mtime_nsec);
    }
    // The kernel gives links of a copied-up special file different numbers if it can't mark its origin.
    if kind == FileType::RegularFile && stat.st_nlink > 1 {
        let next = links.len();
        let group = *links.entry(stat.st_ino).or_insert(next);
        line += &format!(" links of group {group}");
    }
    let mut names = vec![0; 4000];
    let len = rustix::fs::llistxattr(&path, &mut names[..])?;
    let mut names: Vec<_> = names[..len]
        .split_inclusive(|byte| *byte == 0)
        .filter_map(|name| std::ffi::CStr::from_bytes_with_nul(name).ok())
        .collect();
    names.sort_unstable();
    for name in names {
        let mut value = vec![0; 4000];
        let len = rustix::fs::lgetxattr(&path, name, &mut value[..])?;
        value.truncate(len);
        line += &format!(" {}={:?}", name.to_string_lossy(), Answer::Bytes(value));
    }
    match kind {
        FileType::RegularFile => {
            let content = std::fs::read(&path)
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            line += &format!(" {:?}", Answer::Bytes(content));
        }
        FileType::Symlink => {
            let target = rustix::fs::readlink(&path, Vec::new())?;
            line += &format!(" to {}", target.to_string_lossy());
        }
        _ => {}
    }
    lines.push(line);
    if kind == FileType::Directory {
        let entries = list(&path)?;
        lines.push(format!("{} has {}", at.display(), entries.join(" ")));
        for entry in entries {
            let name = entry.split(':').next().unwrap_or_default();
            if !matches!(name, "." | "..") {
                walk(root, &at.join(name), since, links, lines)?;
            }
        }
    }
    Ok(())
}
