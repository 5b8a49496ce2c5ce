//! Files and folders that are used after their names have gone. Invariant: the handle is opened
//! before the name goes.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, linkat, openat};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Failure, Outcome, ensure, ensure_eq, refused};
use crate::fixture::{Noise, open_folder, path_of_descriptor, read_write, size};

checks![
    unlinked_file_is_read_and_written,
    unlinked_file_has_no_names_but_attributes,
    unlinked_file_is_cut_and_grown,
    unlinked_file_takes_changes_of_attributes,
    unlinked_file_is_opened_again_through_its_handle,
    unlinked_file_gets_no_name_again,
    name_used_again_is_another_file,
    unlinked_file_of_two_names_lives_on,
    removed_folder_is_empty_and_takes_nothing,
    removed_working_folder_is_no_path_any_more,
    many_unlinked_files_are_kept_apart,
];

fn unlinked(path: &Path, content: &[u8]) -> Result<File, Failure> {
    fs::write(path, content)?;
    let file = read_write(path)?;
    fs::remove_file(path)?;
    Ok(file)
}

fn unlinked_file_is_read_and_written(dir: &Path) -> Outcome {
    let content = Noise::bytes(1, 100_000);
    let file = unlinked(&dir.join("file"), &content)?;
    let mut seen = vec![0; 100_000];
    file.read_exact_at(&mut seen, 0)?;
    ensure!(seen == content, "other bytes than those written");
    file.write_all_at(&content[..5000], 200_000)?;
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    file.read_exact_at(&mut seen[..5000], 200_000)?;
    ensure!(
        seen[..5000] == content[..5000],
        "other bytes than those written"
    );
    ensure_eq!(file.metadata()?.len(), 205_000);
    refused(fs::metadata(dir.join("file")), Errno::NOENT)
}

fn unlinked_file_has_no_names_but_attributes(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"12345")?;
    let ino = fs::metadata(&path)?.ino();
    let file = File::open(&path)?;
    fs::remove_file(&path)?;
    let data = file.metadata()?;
    ensure_eq!(data.nlink(), 0);
    ensure_eq!(data.len(), 5);
    ensure_eq!(data.ino(), ino);
    ensure!(data.is_file(), "no regular file any more");
    Ok(())
}

fn unlinked_file_is_cut_and_grown(dir: &Path) -> Outcome {
    let file = unlinked(&dir.join("file"), &[7; 10_000])?;
    rustix::fs::ftruncate(&file, 100)?;
    ensure_eq!(file.metadata()?.len(), 100);
    rustix::fs::ftruncate(&file, 5000)?;
    let mut seen = vec![1; 6000];
    ensure_eq!(file.read_at(&mut seen, 0)?, 5000);
    ensure!(seen[..100] == [7; 100], "other bytes than those left");
    ensure!(seen[100..5000].iter().all(|b| *b == 0), "no zeros");
    let plain = rustix::fs::FallocateFlags::empty();
    let allocated = rustix::fs::fallocate(&file, plain, 0, 20_000);
    if crate::failure::if_supported(allocated)?.is_some() {
        ensure_eq!(file.metadata()?.len(), 20_000);
    }
    Ok(())
}

fn unlinked_file_takes_changes_of_attributes(dir: &Path) -> Outcome {
    let file = unlinked(&dir.join("file"), b"x")?;
    file.set_permissions(fs::Permissions::from_mode(0o604))?;
    std::os::unix::fs::fchown(&file, Some(1000), Some(2000))?;
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::new(5000, 6))?;
    let data = file.metadata()?;
    ensure_eq!(data.mode() & 0o7777, 0o604);
    ensure_eq!((data.uid(), data.gid()), (1000, 2000));
    ensure_eq!((data.mtime(), data.mtime_nsec()), (5000, 6));
    Ok(())
}

fn unlinked_file_is_opened_again_through_its_handle(dir: &Path) -> Outcome {
    let file = unlinked(&dir.join("file"), b"still here")?;
    let again = read_write(&path_of_descriptor(&file))?;
    again.write_all_at(b"S", 0)?;
    let mut seen = [0; 10];
    file.read_exact_at(&mut seen, 0)?;
    ensure_eq!(seen, *b"Still here");
    drop(file);
    again.read_exact_at(&mut seen, 0)?;
    ensure_eq!(seen, *b"Still here");
    Ok(())
}

fn unlinked_file_gets_no_name_again(dir: &Path) -> Outcome {
    let file = unlinked(&dir.join("file"), b"x")?;
    let descriptor = path_of_descriptor(&file);
    let name = dir.join("again");
    refused(
        linkat(CWD, &descriptor, CWD, &name, AtFlags::SYMLINK_FOLLOW),
        Errno::NOENT,
    )?;
    refused(fs::metadata(&name), Errno::NOENT)
}

fn name_used_again_is_another_file(dir: &Path) -> Outcome {
    let path = dir.join("file");
    let mut handles = Vec::new();
    for round in 0..20_u8 {
        fs::write(&path, [round; 50])?;
        handles.push(read_write(&path)?);
        fs::remove_file(&path)?;
    }
    fs::write(&path, b"the last")?;
    for (round, file) in handles.iter().enumerate() {
        let mut seen = [0; 50];
        file.read_exact_at(&mut seen, 0)?;
        ensure!(
            seen == [u8::try_from(round)?; 50],
            "file {round} has another's bytes"
        );
        file.write_all_at(b"changed", 0)?;
    }
    ensure_eq!(fs::read(&path)?, b"the last");
    Ok(())
}

fn unlinked_file_of_two_names_lives_on(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"bytes")?;
    fs::hard_link(&first, &second)?;
    let file = read_write(&first)?;
    fs::remove_file(&first)?;
    file.write_all_at(b"B", 0)?;
    ensure_eq!(fs::read(&second)?, b"Bytes");
    ensure_eq!(file.metadata()?.nlink(), 1);
    ensure_eq!(fs::metadata(&second)?.nlink(), 1);
    // The first name again, out of the second.
    fs::hard_link(&second, &first)?;
    ensure_eq!(file.metadata()?.nlink(), 2);
    Ok(())
}

fn removed_folder_is_empty_and_takes_nothing(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir(&path)?;
    let folder = open_folder(&path)?;
    fs::remove_dir(&path)?;
    let data = folder.metadata()?;
    ensure!(data.is_dir(), "no folder any more");
    // One that does not count the links of folders says one.
    ensure!(data.nlink() <= 1, "{} names are left", data.nlink());
    let create = OFlags::WRONLY | OFlags::CREATE;
    refused(
        openat(&folder, "file", create, Mode::from_raw_mode(0o644)),
        Errno::NOENT,
    )?;
    refused(
        rustix::fs::mkdirat(&folder, "below", Mode::from_raw_mode(0o755)),
        Errno::NOENT,
    )?;
    refused(
        openat(&folder, "file", OFlags::RDONLY, Mode::empty()),
        Errno::NOENT,
    )?;
    for entry in &mut Dir::new(folder)? {
        match entry {
            Ok(entry) => ensure!(entry.file_name().to_bytes().starts_with(b"."), "not empty"),
            Err(error) => refused(Err::<(), _>(error), Errno::NOENT)?,
        }
    }
    // The name is free.
    fs::create_dir(&path)?;
    Ok(fs::write(path.join("file"), b"")?)
}

fn removed_working_folder_is_no_path_any_more(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir(&path)?;
    crate::process::in_child(|| {
        std::env::set_current_dir(&path)?;
        fs::remove_dir(&path)?;
        refused(std::env::current_dir(), Errno::NOENT)?;
        refused(fs::write("file", b""), Errno::NOENT)?;
        refused(fs::metadata("file"), Errno::NOENT)?;
        ensure!(fs::metadata(".")?.is_dir(), "no folder any more");
        Ok(())
    })
}

fn many_unlinked_files_are_kept_apart(dir: &Path) -> Outcome {
    let mut files = Vec::new();
    for index in 0..size(300, 60) {
        let content = format!("file {index} of many");
        files.push((
            unlinked(&dir.join(format!("file-{index}")), content.as_bytes())?,
            content,
        ));
    }
    ensure_eq!(fs::read_dir(dir)?.count(), 0);
    for (file, content) in &files {
        let mut seen = vec![0; content.len()];
        file.read_exact_at(&mut seen, 0)?;
        ensure_eq!(seen, content.as_bytes());
    }
    Ok(())
}
