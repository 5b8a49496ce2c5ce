//! Data that is written is what is read: created, appended, overwritten, far out, through two
//! handles, large and at random. Invariant: each check compares with bytes it made itself.

use std::fs::{self, File, OpenOptions};
use std::hash::Hasher;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq, refused};
use crate::fixture::{Checksum, Noise, create_new, read_write, size};

checks![
    created_file_is_empty_and_reads_back_what_is_written,
    appended_bytes_follow_what_was_there,
    append_flag_set_later_takes_effect,
    read_past_the_end_is_short_and_then_empty,
    write_past_the_end_fills_the_gap_with_zeros,
    overwrite_in_the_middle_leaves_the_rest,
    truncating_open_empties_the_file,
    truncating_open_that_is_refused_leaves_the_file,
    exclusive_create_refuses_what_exists,
    exclusive_create_refuses_a_dangling_link,
    open_refuses_what_does_not_fit,
    second_handle_sees_what_the_first_wrote,
    reopened_file_has_what_was_written_before,
    bytes_beyond_four_gigabytes_are_found_again,
    big_file_reads_back_with_its_checksum,
    random_writes_are_all_found_again,
    write_of_every_small_size_reads_back,
    synced_file_and_folder_and_file_system,
    synchronous_writes_are_written,
];

const PAGE: usize = 4096;

fn created_file_is_empty_and_reads_back_what_is_written(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut file = create_new(&path, 0o644)?;
    ensure_eq!(file.metadata()?.len(), 0);
    ensure_eq!(fs::read(&path)?, b"");
    file.write_all(b"some bytes")?;
    ensure_eq!(file.metadata()?.len(), 10);
    ensure_eq!(fs::read(&path)?, b"some bytes");
    drop(file);
    ensure_eq!(fs::read(&path)?, b"some bytes");
    Ok(())
}

fn appended_bytes_follow_what_was_there(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"one")?;
    let mut file = OpenOptions::new().append(true).read(true).open(&path)?;
    file.write_all(b"two")?;
    // Where the handle stands does not matter to an appending write.
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"three")?;
    ensure_eq!(fs::read(&path)?, b"onetwothree");
    OpenOptions::new()
        .append(true)
        .open(&path)?
        .write_all(b"four")?;
    ensure_eq!(fs::read(&path)?, b"onetwothreefour");
    Ok(())
}

fn append_flag_set_later_takes_effect(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"0123456789")?;
    let mut file = OpenOptions::new().write(true).open(&path)?;
    file.write_all(b"ab")?;
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    file.write_all(b"cd")?;
    ensure_eq!(fs::read(&path)?, b"ab23456789cd");
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    file.seek(SeekFrom::Start(4))?;
    file.write_all(b"ef")?;
    ensure_eq!(fs::read(&path)?, b"ab23ef6789cd");
    Ok(())
}

fn read_past_the_end_is_short_and_then_empty(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let content = Noise::bytes(1, PAGE + 100);
    fs::write(&path, &content)?;
    let file = File::open(&path)?;
    let mut buffer = vec![0; 4 * PAGE];
    ensure_eq!(file.read_at(&mut buffer, 0)?, PAGE + 100);
    ensure!(
        buffer[..PAGE + 100] == content,
        "other bytes than those written"
    );
    ensure_eq!(file.read_at(&mut buffer, 4096)?, 100);
    ensure_eq!(file.read_at(&mut buffer, 4196)?, 0);
    ensure_eq!(file.read_at(&mut buffer, 1 << 40)?, 0);
    Ok(())
}

fn write_past_the_end_fills_the_gap_with_zeros(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    file.write_all_at(b"start", 0)?;
    file.write_all_at(b"end", 10_000)?;
    let content = fs::read(&path)?;
    ensure_eq!(content.len(), 10_003);
    ensure_eq!(content[..5], *b"start");
    ensure!(
        content[5..10_000].iter().all(|b| *b == 0),
        "the gap is not zero"
    );
    ensure_eq!(content[10_000..], *b"end");
    Ok(())
}

fn overwrite_in_the_middle_leaves_the_rest(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut content = Noise::bytes(2, 5 * PAGE + 17);
    fs::write(&path, &content)?;
    let file = OpenOptions::new().write(true).open(&path)?;
    for (at, length) in [
        (1, 1),
        (PAGE - 1, 2),
        (2 * PAGE, PAGE),
        (3 * PAGE + 5, PAGE + 3),
    ] {
        let bytes = Noise::bytes(u64::try_from(at)?, length);
        file.write_all_at(&bytes, u64::try_from(at)?)?;
        content[at..at + length].copy_from_slice(&bytes);
    }
    ensure!(
        fs::read(&path)? == content,
        "other bytes than those written"
    );
    Ok(())
}

fn truncating_open_empties_the_file(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, Noise::bytes(3, 3 * PAGE))?;
    let file = OpenOptions::new().write(true).truncate(true).open(&path)?;
    ensure_eq!(file.metadata()?.len(), 0);
    ensure_eq!(fs::read(&path)?, b"");
    file.write_all_at(b"x", 1)?;
    ensure_eq!(fs::read(&path)?, b"\0x");
    // With O_CREAT too, as a shell's redirection does it.
    fs::write(&path, b"new")?;
    ensure_eq!(fs::read(&path)?, b"new");
    Ok(())
}

fn truncating_open_that_is_refused_leaves_the_file(dir: &Path) -> Outcome {
    use std::os::unix::process::CommandExt;
    use std::process::Command;
    let path = dir.join("program");
    fs::copy("/bin/sleep", &path)?;
    let content = fs::read(&path)?;
    let mut running = Command::new(&path).arg0("sleep").arg("60").spawn()?;
    let truncating = OFlags::RDONLY | OFlags::TRUNC | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&path, truncating, Mode::empty());
    running.kill()?;
    running.wait()?;
    // Linux 6.11 and 6.12 let everybody write to what is being executed.
    if opened.is_ok() {
        return Ok(());
    }
    refused(opened, Errno::TXTBSY)?;
    ensure!(fs::read(&path)? == content, "the program is another");
    Ok(())
}

fn exclusive_create_refuses_what_exists(dir: &Path) -> Outcome {
    let path = dir.join("file");
    create_new(&path, 0o644)?.write_all(b"kept")?;
    refused(create_new(&path, 0o644), Errno::EXIST)?;
    refused(create_new(dir, 0o644), Errno::EXIST)?;
    ensure_eq!(fs::read(&path)?, b"kept");
    Ok(())
}

fn exclusive_create_refuses_a_dangling_link(dir: &Path) -> Outcome {
    let link = dir.join("link");
    std::os::unix::fs::symlink("target", &link)?;
    refused(create_new(&link, 0o644), Errno::EXIST)?;
    refused(fs::metadata(dir.join("target")), Errno::NOENT)?;
    // Without O_EXCL the target is created.
    fs::write(&link, b"through the link")?;
    ensure_eq!(fs::read(dir.join("target"))?, b"through the link");
    Ok(())
}

fn open_refuses_what_does_not_fit(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"")?;
    refused(File::open(dir.join("missing")), Errno::NOENT)?;
    refused(File::open(path.join("below")), Errno::NOTDIR)?;
    refused(OpenOptions::new().write(true).open(dir), Errno::ISDIR)?;
    let as_folder = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(&path);
    refused(as_folder, Errno::NOTDIR)?;
    refused(fs::write(dir.join("missing/file"), b""), Errno::NOENT)
}

fn second_handle_sees_what_the_first_wrote(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let (first, second) = (read_write(&path)?, read_write(&path)?);
    for round in 0..20_u8 {
        let at = u64::from(round) * 1000;
        first.write_all_at(&[round; 1500], at)?;
        let mut seen = [0; 1500];
        second.read_exact_at(&mut seen, at)?;
        ensure!(
            seen == [round; 1500],
            "round {round} is not seen by the other handle"
        );
        ensure_eq!(second.metadata()?.len(), at + 1500);
    }
    Ok(())
}

fn reopened_file_has_what_was_written_before(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut content = Vec::new();
    for round in 0..20 {
        let bytes = Noise::bytes(round, 777);
        OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)?
            .write_all(&bytes)?;
        content.extend_from_slice(&bytes);
        ensure!(
            fs::read(&path)? == content,
            "other bytes after round {round}"
        );
    }
    Ok(())
}

fn bytes_beyond_four_gigabytes_are_found_again(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    let far = (1 << 32) + 5;
    file.write_all_at(b"near", 5)?;
    file.write_all_at(b"far", far)?;
    drop(file);
    let file = File::open(&path)?;
    ensure_eq!(file.metadata()?.len(), far + 3);
    let mut four = [0; 4];
    file.read_exact_at(&mut four, 5)?;
    ensure_eq!(four, *b"near");
    ensure_eq!(file.read_at(&mut four, far)?, 3);
    ensure_eq!(four[..3], *b"far");
    file.read_exact_at(&mut four, 1 << 31)?;
    ensure_eq!(four, [0; 4]);
    Ok(())
}

fn big_file_reads_back_with_its_checksum(dir: &Path) -> Outcome {
    const CHUNK: usize = 1 << 20;
    let chunks = size(64, 16);
    let path = dir.join("file");
    let (mut noise, mut written) = (Noise::new(4), Checksum::new());
    let mut chunk = vec![0; CHUNK];
    let mut file = create_new(&path, 0o644)?;
    for _ in 0..chunks {
        noise.fill(&mut chunk);
        written.write(&chunk);
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    // What this machine keeps of it is dropped, so that it has to be fetched.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    drop(file);
    let mut file = File::open(&path)?;
    ensure_eq!(file.metadata()?.len(), u64::try_from(chunks * CHUNK)?);
    let (mut read, mut total) = (Checksum::new(), 0);
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            length => {
                read.write(&chunk[..length]);
                total += length;
            }
        }
    }
    ensure_eq!(total, chunks * CHUNK);
    ensure_eq!(read.finish(), written.finish());
    Ok(())
}

fn random_writes_are_all_found_again(dir: &Path) -> Outcome {
    const SIZE: usize = 2 << 20;
    let path = dir.join("file");
    let mut content = vec![0; SIZE];
    let file = read_write(&path)?;
    rustix::fs::ftruncate(&file, u64::try_from(SIZE)?)?;
    let mut noise = Noise::new(5);
    for round in 0..size(400, 100) {
        let length = 1 + noise.below(if round % 10 == 0 { 200_000 } else { 5000 });
        let at = noise.below(SIZE - length);
        noise.fill(&mut content[at..at + length]);
        file.write_all_at(&content[at..at + length], u64::try_from(at)?)?;
        if round % 25 == 0 {
            let mut seen = vec![0; length + 2000];
            let from = at.saturating_sub(1000);
            let length = file.read_at(&mut seen, u64::try_from(from)?)?;
            ensure!(
                seen[..length] == content[from..from + length],
                "round {round} reads otherwise"
            );
        }
    }
    file.sync_data()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    ensure!(
        fs::read(&path)? == content,
        "other bytes than those written"
    );
    Ok(())
}

fn write_of_every_small_size_reads_back(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let file = read_write(&path)?;
    let content = Noise::bytes(6, 300);
    let mut at = 0;
    for length in (1..=300).step_by(7) {
        file.write_all_at(&content[..length], at)?;
        let mut seen = vec![0; length];
        ensure_eq!(file.read_at(&mut seen, at)?, length);
        ensure!(seen == content[..length], "{length} bytes read otherwise");
        at += u64::try_from(length)?;
    }
    ensure_eq!(file.metadata()?.len(), at);
    Ok(())
}

fn synced_file_and_folder_and_file_system(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut file = create_new(&path, 0o644)?;
    file.write_all(b"bytes")?;
    file.sync_data()?;
    file.write_all(b" and more")?;
    file.sync_all()?;
    let folder = crate::fixture::open_folder(dir)?;
    folder.sync_all()?;
    rustix::fs::syncfs(&folder)?;
    // A handle that only reads can sync as well.
    File::open(&path)?.sync_all()?;
    ensure_eq!(fs::read(&path)?, b"bytes and more");
    Ok(())
}

fn synchronous_writes_are_written(dir: &Path) -> Outcome {
    for (name, flag) in [("sync", libc::O_SYNC), ("dsync", libc::O_DSYNC)] {
        let path = dir.join(name);
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flag);
        let mut file = options.open(&path)?;
        file.write_all(b"one ")?;
        file.write_all(b"two")?;
        ensure_eq!(fs::read(&path)?, b"one two");
    }
    Ok(())
}
