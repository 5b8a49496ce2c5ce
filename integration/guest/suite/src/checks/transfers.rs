//! Other methods to read and write: many buffers in one call, O_DIRECT, copies within the kernel,
//! pipes. Invariant: each check compares with bytes it made itself.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use super::checks;
use crate::failure::{Failure, Outcome, ensure, ensure_eq, refused};
use crate::fixture::{Noise, create_new, read_write};

checks![
    many_unaligned_buffers_are_written_in_one_call,
    many_unaligned_buffers_are_read_in_one_call,
    buffers_as_many_as_the_kernel_takes,
    direct_write_is_seen_by_a_buffered_read,
    buffered_write_is_seen_by_a_direct_read,
    direct_read_at_the_end_is_short,
    copy_file_range_copies_between_files,
    copy_file_range_copies_within_a_file,
    sendfile_sends_the_file,
    splice_moves_bytes_through_a_pipe,
    read_ahead_advice_is_taken,
];

const PAGE: usize = 4096;

/// Lengths that start and end anywhere in a page, from one byte to several pages.
fn odd_lengths(count: usize) -> Vec<usize> {
    let mut noise = Noise::new(77);
    (0..count)
        .map(|index| match index % 5 {
            0 => 1 + noise.below(7),
            1 => PAGE - 3 + noise.below(6),
            2 => 1 + noise.below(500),
            3 => 2 * PAGE + noise.below(PAGE),
            _ => PAGE,
        })
        .collect()
}

fn many_unaligned_buffers_are_written_in_one_call(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let lengths = odd_lengths(100);
    let content = Noise::bytes(1, 13 + lengths.iter().sum::<usize>());
    let file = read_write(&path)?;
    file.write_all_at(&content[..13], 0)?;
    let mut rest = &content[13..];
    let buffers: Vec<IoSlice<'_>> = lengths
        .iter()
        .map(|length| {
            let (buffer, behind) = rest.split_at(*length);
            rest = behind;
            IoSlice::new(buffer)
        })
        .collect();
    ensure_eq!(
        rustix::io::pwritev(&file, &buffers, 13)?,
        content.len() - 13
    );
    ensure!(
        fs::read(&path)? == content,
        "other bytes than those written"
    );
    // At the handle's own position as well.
    let second = dir.join("second");
    let mut file = create_new(&second, 0o644)?;
    ensure_eq!(file.write_vectored(&buffers)?, content.len() - 13);
    ensure!(
        fs::read(&second)? == content[13..],
        "other bytes than those written"
    );
    Ok(())
}

fn read_into(file: &File, lengths: &[usize], at: u64) -> Result<Vec<u8>, Failure> {
    // Each buffer starts at another place of its page.
    let mut store: Vec<Vec<u8>> = lengths.iter().map(|length| vec![0; length + 64]).collect();
    let mut buffers: Vec<IoSliceMut<'_>> = store
        .iter_mut()
        .zip(lengths)
        .enumerate()
        .map(|(index, (bytes, length))| IoSliceMut::new(&mut bytes[index % 64..][..*length]))
        .collect();
    let read = rustix::io::preadv(file, &mut buffers, at)?;
    let mut bytes: Vec<u8> = buffers
        .iter()
        .flat_map(|buffer| buffer.iter().copied())
        .collect();
    bytes.truncate(read);
    Ok(bytes)
}

fn many_unaligned_buffers_are_read_in_one_call(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let lengths = odd_lengths(100);
    let total: usize = lengths.iter().sum();
    let content = Noise::bytes(2, total + 5);
    fs::write(&path, &content)?;
    let file = File::open(&path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    ensure!(
        read_into(&file, &lengths, 5)? == content[5..],
        "other bytes than those written"
    );
    // The file ends within the buffers.
    let short = read_into(&file, &lengths, 20_001)?;
    ensure!(
        short == content[20_001..],
        "other bytes at the end, or another length"
    );
    Ok(())
}

fn buffers_as_many_as_the_kernel_takes(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let lengths: Vec<usize> = (0..1024).map(|index| 1 + index % 97).collect();
    let content = Noise::bytes(3, lengths.iter().sum());
    let file = read_write(&path)?;
    let mut rest = content.as_slice();
    let buffers: Vec<IoSlice<'_>> = lengths
        .iter()
        .map(|length| {
            let (buffer, behind) = rest.split_at(*length);
            rest = behind;
            IoSlice::new(buffer)
        })
        .collect();
    ensure_eq!(rustix::io::pwritev(&file, &buffers, 0)?, content.len());
    ensure!(
        read_into(&file, &lengths, 0)? == content,
        "other bytes than those written"
    );
    Ok(())
}

/// A handle that goes past the cache, or `None` where that can't be had.
fn open_direct(path: &Path) -> Result<Option<File>, Failure> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_DIRECT);
    match options.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Where the first whole page of the bytes starts.
fn page_start(bytes: &[u8]) -> usize {
    bytes.as_ptr().align_offset(PAGE)
}

fn direct_write_is_seen_by_a_buffered_read(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(4, 10 * PAGE);
    fs::write(&path, vec![0xAA; 9 * PAGE])?;
    // It is in the cache, where the direct write must not leave it.
    ensure_eq!(fs::read(&path)?.len(), 9 * PAGE);
    let Some(file) = open_direct(&path)? else {
        return Ok(());
    };
    let start = page_start(&content);
    let bytes = &content[start..][..8 * PAGE];
    file.write_all_at(bytes, 4096)?;
    let seen = fs::read(&path)?;
    ensure_eq!(seen.len(), 9 * PAGE);
    ensure!(
        seen[..PAGE].iter().all(|b| *b == 0xAA),
        "the page before was changed"
    );
    ensure!(seen[PAGE..] == *bytes, "other bytes than those written");
    Ok(())
}

fn buffered_write_is_seen_by_a_direct_read(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(5, 8 * PAGE);
    fs::write(&path, &content)?;
    let Some(file) = open_direct(&path)? else {
        return Ok(());
    };
    let mut store = vec![0; 9 * PAGE];
    let start = page_start(&store);
    let buffer = &mut store[start..start + 8 * PAGE];
    ensure_eq!(file.read_at(buffer, 0)?, 8 * PAGE);
    ensure!(*buffer == content, "other bytes than those written");
    read_write(&path)?.write_all_at(&[7; PAGE], 8192)?;
    ensure_eq!(file.read_at(&mut buffer[..PAGE], 8192)?, PAGE);
    ensure!(
        buffer[..PAGE] == [7; PAGE],
        "the direct read is behind the buffered write"
    );
    Ok(())
}

fn direct_read_at_the_end_is_short(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, Noise::bytes(6, 2 * PAGE + 100))?;
    let Some(file) = open_direct(&path)? else {
        return Ok(());
    };
    let mut store = vec![0; 5 * PAGE];
    let start = page_start(&store);
    let buffer = &mut store[start..start + 4 * PAGE];
    ensure_eq!(file.read_at(buffer, 0)?, 2 * PAGE + 100);
    ensure!(
        buffer[..2 * PAGE + 100] == fs::read(&path)?,
        "other bytes than those written"
    );
    ensure_eq!(file.read_at(buffer, 16384)?, 0);
    Ok(())
}

fn copy_file_range_copies_between_files(dir: &Path) -> Outcome {
    let content = Noise::bytes(7, 300_000);
    fs::write(dir.join("from"), &content)?;
    let (from, to) = (File::open(dir.join("from"))?, read_write(&dir.join("to"))?);
    let (mut source, mut target) = (1001, 77);
    let mut left = 200_000;
    while left > 0 {
        match rustix::fs::copy_file_range(&from, Some(&mut source), &to, Some(&mut target), left)? {
            0 => return Err(Failure::new("nothing copied before the end")),
            copied => left -= copied,
        }
    }
    ensure_eq!((source, target), (201_001, 200_077));
    let copy = fs::read(dir.join("to"))?;
    ensure!(copy[..77].iter().all(|b| *b == 0), "the gap is not zero");
    ensure!(
        copy[77..] == content[1001..201_001],
        "other bytes than those of the source"
    );
    // From beyond the end there is nothing.
    source = 400_000;
    let copied = rustix::fs::copy_file_range(&from, Some(&mut source), &to, None, 100)?;
    ensure_eq!(copied, 0);
    ensure_eq!(fs::read(dir.join("from"))?.len(), content.len());
    Ok(())
}

fn copy_file_range_copies_within_a_file(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut content = Noise::bytes(8, 50_000);
    fs::write(&path, &content)?;
    let file = read_write(&path)?;
    let (mut source, mut target) = (100, 30_000);
    let copied =
        rustix::fs::copy_file_range(&file, Some(&mut source), &file, Some(&mut target), 10_000)?;
    ensure_eq!(copied, 10_000);
    content.copy_within(100..10_100, 30_000);
    ensure!(
        fs::read(&path)? == content,
        "other bytes than those of the source"
    );
    // Ranges that overlap are refused, and nothing is changed.
    let (mut source, mut target) = (0, 500);
    let overlapping =
        rustix::fs::copy_file_range(&file, Some(&mut source), &file, Some(&mut target), 1000);
    refused(overlapping, Errno::INVAL)?;
    ensure!(
        fs::read(&path)? == content,
        "the refused copy changed something"
    );
    Ok(())
}

fn sendfile_sends_the_file(dir: &Path) -> Outcome {
    let content = Noise::bytes(9, 100_000);
    fs::write(dir.join("from"), &content)?;
    let (from, to) = (
        File::open(dir.join("from"))?,
        create_new(&dir.join("to"), 0o644)?,
    );
    let mut sent = 0;
    while sent < content.len() {
        match rustix::fs::sendfile(&to, &from, None, content.len() - sent)? {
            0 => return Err(Failure::new("nothing sent before the end")),
            length => sent += length,
        }
    }
    ensure!(
        fs::read(dir.join("to"))? == content,
        "other bytes than those of the source"
    );
    Ok(())
}

fn splice_moves_bytes_through_a_pipe(dir: &Path) -> Outcome {
    use rustix::pipe::{SpliceFlags, splice};
    let content = Noise::bytes(10, 40_000);
    fs::write(dir.join("from"), &content)?;
    let (from, to) = (
        File::open(dir.join("from"))?,
        create_new(&dir.join("to"), 0o644)?,
    );
    let (read, write) = rustix::pipe::pipe()?;
    let flags = SpliceFlags::empty();
    let mut moved = 0;
    while moved < content.len() {
        let length = splice(&from, None, &write, None, content.len() - moved, flags)?;
        ensure!(length > 0, "nothing moved before the end");
        let mut left = length;
        while left > 0 {
            left -= splice(&read, None, &to, None, left, flags)?;
        }
        moved += length;
    }
    ensure!(
        fs::read(dir.join("to"))? == content,
        "other bytes than those of the source"
    );
    Ok(())
}

fn read_ahead_advice_is_taken(dir: &Path) -> Outcome {
    use rustix::fs::{Advice, fadvise};
    let path = dir.join("file");
    let content = Noise::bytes(11, 500_000);
    fs::write(&path, &content)?;
    let mut file = File::open(&path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    for advice in [
        Advice::Sequential,
        Advice::WillNeed,
        Advice::Random,
        Advice::NoReuse,
    ] {
        fadvise(&file, 0, None, advice)?;
    }
    let mut seen = Vec::new();
    file.read_to_end(&mut seen)?;
    ensure!(seen == content, "other bytes than those written");
    Ok(())
}
