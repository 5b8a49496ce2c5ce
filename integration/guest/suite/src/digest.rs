//! Prints the content of a tree, so that a tree as the guest sees it can be compared with the same
//! tree as the host sees it. Invariant: equal trees give equal lines, in the same order.

use std::fs::{self, File};
use std::hash::Hasher;
use std::io::{BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::failure::Outcome;
use crate::fixture::Checksum;

/// Prints a line for each entry below `dir`, in the order of their names.
///
/// # Errors
///
/// Something can't be read.
pub(crate) fn print(dir: &Path) -> Outcome {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut buffer = vec![0; 256 << 10];
    let mut waiting = vec![PathBuf::new()];
    while let Some(relative) = waiting.pop() {
        let path = dir.join(&relative);
        let data = fs::symlink_metadata(&path)?;
        let kind = data.file_type();
        let mut checksum = Checksum::new();
        let (letter, size) = if kind.is_dir() {
            let mut below = Vec::new();
            for entry in fs::read_dir(&path)? {
                below.push(relative.join(entry?.file_name()));
            }
            // The stack gives them back the other way round.
            below.sort_unstable_by(|a, b| b.cmp(a));
            waiting.append(&mut below);
            ('d', 0)
        } else if kind.is_symlink() {
            checksum.write(fs::read_link(&path)?.as_os_str().as_bytes());
            ('l', data.size())
        } else if kind.is_file() {
            let mut file = File::open(&path)?;
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    length => checksum.write(&buffer[..length]),
                }
            }
            ('f', data.size())
        } else if kind.is_fifo() {
            ('p', 0)
        } else if kind.is_socket() {
            ('s', 0)
        } else {
            checksum.write_u64(data.rdev());
            ('n', 0)
        };
        writeln!(
            out,
            "{:016x} {letter} {:04o} {}:{} {size} {}.{:09} {}",
            checksum.finish(),
            data.mode() & 0o7777,
            data.uid(),
            data.gid(),
            data.mtime(),
            data.mtime_nsec(),
            relative.as_os_str().as_bytes().escape_ascii(),
        )?;
    }
    Ok(out.flush()?)
}
