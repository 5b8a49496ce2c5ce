//! A file's length and the space it takes: truncation, allocation, holes. Invariant: a mode of
//! fallocate that is refused must have changed nothing.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, ftruncate, seek};
use rustix::io::Errno;

use super::checks;
use crate::failure::{
    Failure, Outcome, ensure, ensure_eq, if_supported, refused, refused_with_any,
};
use crate::fixture::{Noise, read_write, space_of};

checks![
    truncate_down_drops_the_bytes_for_good,
    truncate_up_adds_zeros,
    truncate_by_path_and_by_handle_agree,
    truncate_refuses_handles_that_only_read,
    truncate_is_seen_by_an_appending_handle,
    fallocate_extends_the_file,
    fallocate_keeps_the_size_if_asked,
    punched_hole_reads_as_zeros,
    zeroed_range_reads_as_zeros_or_is_refused,
    collapse_and_insert_work_or_are_refused,
    fallocate_refuses_what_makes_no_sense,
    sparse_file_takes_little_space,
    holes_and_data_are_found_by_seeking,
    seek_past_the_end_is_honest,
];

const PAGE: usize = 4096;
const CHUNK: usize = 64 << 10;

fn truncate_down_drops_the_bytes_for_good(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(1, 3 * PAGE);
    fs::write(&path, &content)?;
    let file = read_write(&path)?;
    ftruncate(&file, 5000)?;
    ensure_eq!(file.metadata()?.len(), 5000);
    ensure!(
        fs::read(&path)? == content[..5000],
        "other bytes than those left"
    );
    ftruncate(&file, 12_288)?;
    let seen = fs::read(&path)?;
    ensure_eq!(seen.len(), 12_288);
    ensure!(
        seen[..5000] == content[..5000],
        "other bytes than those left"
    );
    ensure!(seen[5000..].iter().all(|b| *b == 0), "the bytes came back");
    ftruncate(&file, 0)?;
    ensure_eq!(fs::read(&path)?, b"");
    Ok(())
}

fn truncate_up_adds_zeros(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"123")?;
    let file = read_write(&path)?;
    ftruncate(&file, 100_000)?;
    let seen = fs::read(&path)?;
    ensure_eq!(seen.len(), 100_000);
    ensure_eq!(seen[..3], *b"123");
    ensure!(seen[3..].iter().all(|b| *b == 0), "no zeros");
    ftruncate(&file, 5 << 30)?;
    ensure_eq!(file.metadata()?.len(), 5 << 30);
    Ok(())
}

fn truncate_by_path_and_by_handle_agree(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, vec![9; 1000])?;
    let file = read_write(&path)?;
    truncate(&path, 10)?;
    ensure_eq!(file.metadata()?.len(), 10);
    ftruncate(&file, 20)?;
    ensure_eq!(fs::metadata(&path)?.len(), 20);
    truncate(&path, 30)?;
    let mut bytes = [1; 40];
    ensure_eq!(file.read_at(&mut bytes, 0)?, 30);
    ensure_eq!(bytes[..10], [9; 10]);
    ensure_eq!(bytes[10..30], [0; 20]);
    refused(truncate(dir, 0), Errno::ISDIR)?;
    refused(truncate(&dir.join("missing"), 0), Errno::NOENT)
}

#[expect(unsafe_code, reason = "truncate by path has no safe wrapper")]
fn truncate(path: &Path, length: libc::off_t) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a string with its NUL, which outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), length) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn truncate_refuses_handles_that_only_read(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"kept")?;
    refused_with_any(
        ftruncate(File::open(&path)?, 0),
        &[Errno::INVAL, Errno::BADF],
    )?;
    ensure_eq!(fs::read(&path)?, b"kept");
    Ok(())
}

fn truncate_is_seen_by_an_appending_handle(dir: &Path) -> Outcome {
    use std::io::Write;
    let path = dir.join("log");
    let mut log = OpenOptions::new().append(true).create(true).open(&path)?;
    log.write_all(&[b'a'; 5000])?;
    // As a log rotation by copying does it.
    truncate(&path, 0)?;
    log.write_all(b"after")?;
    ensure_eq!(fs::read(&path)?, b"after");
    Ok(())
}

/// A file of eight chunks full of bytes that are not zero, and its content.
fn full_file(path: &Path) -> Result<(File, Vec<u8>), Failure> {
    let content: Vec<u8> = Noise::bytes(2, 8 * CHUNK).iter().map(|b| b | 1).collect();
    fs::write(path, &content)?;
    Ok((read_write(path)?, content))
}

fn fallocate_extends_the_file(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"abc")?;
    let file = read_write(&path)?;
    if if_supported(fallocate(&file, FallocateFlags::empty(), 100, 100_000))?.is_none() {
        ensure_eq!(fs::read(&path)?, b"abc");
        return Ok(());
    }
    let seen = fs::read(&path)?;
    ensure_eq!(seen.len(), 100_100);
    ensure_eq!(seen[..3], *b"abc");
    ensure!(seen[3..].iter().all(|b| *b == 0), "no zeros");
    ensure!(space_of(&file)? >= 100_000, "nothing was allocated");
    Ok(())
}

fn fallocate_keeps_the_size_if_asked(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"abc")?;
    let file = read_write(&path)?;
    if if_supported(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1 << 20))?.is_some() {
        ensure!(space_of(&file)? >= 1 << 20, "nothing was allocated");
    }
    ensure_eq!(file.metadata()?.len(), 3);
    ensure_eq!(fs::read(&path)?, b"abc");
    Ok(())
}

fn punched_hole_reads_as_zeros(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (file, mut content) = full_file(&path)?;
    let before = space_of(&file)?;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // One of whole chunks, one that starts and ends anywhere, one that reaches beyond the end.
    let mut done = true;
    for (from, length) in [
        (CHUNK, 2 * CHUNK),
        (4 * CHUNK + 5, 9999),
        (7 * CHUNK + 1, 4 * CHUNK),
    ] {
        let punched = fallocate(&file, flags, u64::try_from(from)?, u64::try_from(length)?);
        if if_supported(punched)?.is_none() {
            done = false;
            break;
        }
        let to = (from + length).min(content.len());
        content[from..to].fill(0);
    }
    ensure!(
        fs::read(&path)? == content,
        "other bytes around or within the holes"
    );
    ensure_eq!(file.metadata()?.len(), u64::try_from(content.len())?);
    if done {
        file.sync_all()?;
        ensure!(space_of(&file)? < before, "no space was given back");
    }
    Ok(())
}

fn zeroed_range_reads_as_zeros_or_is_refused(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (file, mut content) = full_file(&path)?;
    let zero = FallocateFlags::ZERO_RANGE;
    if if_supported(fallocate(&file, zero, 70_000, 100_000))?.is_some() {
        content[70_000..170_000].fill(0);
        let end = u64::try_from(content.len())?;
        fallocate(&file, zero | FallocateFlags::KEEP_SIZE, end - 10, 5000)?;
        content[8 * CHUNK - 10..].fill(0);
        ensure_eq!(file.metadata()?.len(), end);
        fallocate(&file, zero, end, 5000)?;
        content.resize(8 * CHUNK + 5000, 0);
    }
    ensure!(
        fs::read(&path)? == content,
        "other bytes than there should be"
    );
    Ok(())
}

fn collapse_and_insert_work_or_are_refused(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (file, mut content) = full_file(&path)?;
    let chunk = u64::try_from(CHUNK)?;
    let refusals = [Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS];
    match fallocate(&file, FallocateFlags::COLLAPSE_RANGE, chunk, chunk) {
        Ok(()) => drop(content.drain(CHUNK..2 * CHUNK)),
        refusal => refused_with_any(refusal, &refusals)?,
    }
    ensure!(
        fs::read(&path)? == content,
        "other bytes after the collapse"
    );
    match fallocate(&file, FallocateFlags::INSERT_RANGE, 2 * chunk, chunk) {
        Ok(()) => drop(content.splice(2 * CHUNK..2 * CHUNK, vec![0; CHUNK])),
        refusal => refused_with_any(refusal, &refusals)?,
    }
    ensure!(
        fs::read(&path)? == content,
        "other bytes after the insertion"
    );
    Ok(())
}

fn fallocate_refuses_what_makes_no_sense(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"kept")?;
    let file = read_write(&path)?;
    let plain = FallocateFlags::empty();
    refused(fallocate(&file, plain, 0, 0), Errno::INVAL)?;
    refused(fallocate(File::open(&path)?, plain, 0, 10), Errno::BADF)?;
    refused(
        fallocate(&file, FallocateFlags::PUNCH_HOLE, 0, 10),
        Errno::OPNOTSUPP,
    )?;
    ensure_eq!(fs::read(&path)?, b"kept");
    Ok(())
}

fn sparse_file_takes_little_space(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    file.write_all_at(&[1; 100], 1 << 30)?;
    file.sync_all()?;
    ensure_eq!(file.metadata()?.len(), (1 << 30) + 100);
    let space = space_of(&file)?;
    ensure!(space > 0, "no blocks at all");
    ensure!(space < 1 << 20, "{space} bytes for 100");
    Ok(())
}

/// A file of data at 0 and at 1 MiB, holes behind each, 2 MiB long.
fn file_with_holes(path: &Path) -> Result<File, Failure> {
    let file = read_write(path)?;
    ftruncate(&file, 2 << 20)?;
    file.write_all_at(&vec![1; CHUNK], 0)?;
    file.write_all_at(&vec![2; CHUNK], 1 << 20)?;
    file.sync_all()?;
    Ok(file)
}

fn holes_and_data_are_found_by_seeking(dir: &Path) -> Outcome {
    let file = file_with_holes(&dir.join("file"))?;
    let chunk = u64::try_from(CHUNK)?;
    ensure_eq!(seek(&file, SeekFrom::Data(0))?, 0);
    let hole = seek(&file, SeekFrom::Hole(0))?;
    // One that knows nothing of holes says that there is one at the end.
    ensure!(
        hole == chunk || hole == 2 << 20,
        "the first hole is at {hole}"
    );
    if hole == chunk {
        ensure_eq!(seek(&file, SeekFrom::Data(chunk))?, 1 << 20);
        ensure_eq!(seek(&file, SeekFrom::Hole(1 << 20))?, (1 << 20) + chunk);
        ensure_eq!(seek(&file, SeekFrom::Hole((1 << 20) - 5))?, (1 << 20) - 5);
        refused(seek(&file, SeekFrom::Data((1 << 20) + chunk)), Errno::NXIO)?;
    }
    refused(seek(&file, SeekFrom::Hole(2 << 20)), Errno::NXIO)?;
    refused(seek(&file, SeekFrom::Data(3 << 20)), Errno::NXIO)
}

fn seek_past_the_end_is_honest(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"12345")?;
    let file = read_write(&path)?;
    ensure_eq!(seek(&file, SeekFrom::End(0))?, 5);
    ensure_eq!(seek(&file, SeekFrom::End(100))?, 105);
    ensure_eq!(rustix::io::read(&file, &mut [0; 4])?, 0);
    refused(seek(&file, SeekFrom::End(-6)), Errno::INVAL)?;
    // Another handle's growth moves the end.
    read_write(&path)?.write_all_at(b"67", 5)?;
    ensure_eq!(seek(&file, SeekFrom::End(-1))?, 6);
    Ok(())
}
