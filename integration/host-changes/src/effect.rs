//! What a program's operation leaves in a file, by which it can be recognised.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::fs::{FileType, Stat, fgetxattr, fstat};

/// The extended attribute that programs set.
pub const ATTRIBUTE: &std::ffi::CStr = c"user.record";

/// The maximum number of bytes that are read of a file.
const MOST: usize = 1 << 20;

/// What must be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// This line in the content.
    Line(String),
    /// This length.
    Length(u64),
    /// These permissions, in an inode that was changed since this time after 1970: there are not
    /// enough of them for each to be set once.
    Mode(u32, Duration),
    /// This value of the extended attribute.
    Attribute(String),
    /// A directory of this name.
    Directory,
}

impl Effect {
    /// Whether `file` has this effect.
    pub(crate) fn is_in(&self, file: BorrowedFd<'_>) -> bool {
        let Ok(stat) = fstat(file) else { return false };
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        match self {
            Self::Directory => FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
            Self::Length(length) => is_file && stat.st_size.cast_unsigned() == *length,
            Self::Mode(mode, since) => {
                is_file && stat.st_mode & 0o7777 == *mode && changed_at(&stat) >= *since
            }
            Self::Line(line) => is_file && contains(&content(file), line.as_bytes()),
            Self::Attribute(value) => {
                let mut found = [0; 256];
                let length = fgetxattr(file, ATTRIBUTE, &mut found[..]);
                is_file && length.is_ok_and(|length| found.get(..length) == Some(value.as_bytes()))
            }
        }
    }
}

fn changed_at(stat: &Stat) -> Duration {
    let seconds = u64::try_from(stat.st_ctime).unwrap_or(0);
    let nanoseconds = stat.st_ctime_nsec;
    Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds)
}

fn contains(content: &[u8], line: &[u8]) -> bool {
    content.windows(line.len()).any(|window| window == line)
}

fn content(file: BorrowedFd<'_>) -> Vec<u8> {
    let mut bytes = vec![0; MOST];
    let mut length = 0;
    while length < MOST {
        match rustix::io::pread(file, &mut bytes[length..], length as u64) {
            Ok(read) if read > 0 => length += read,
            _ => break,
        }
    }
    bytes.truncate(length);
    bytes
}

/// The device and inode numbers, for messages.
pub(crate) fn name_of(file: impl AsFd) -> String {
    let file = file.as_fd();
    match fstat(file) {
        Ok(stat) => format!(
            "inode {} with {} names and {} bytes",
            stat.st_ino, stat.st_nlink, stat.st_size
        ),
        Err(errno) => format!("descriptor {}: {errno}", file.as_raw_fd()),
    }
}
