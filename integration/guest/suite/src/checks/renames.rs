//! Renaming: to a new name, over an existing one, with its flags, of folders. Invariant: a refused
//! rename is verified to have changed nothing.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq, refused, refused_with_any};
use crate::fixture::{open_folder, read_write, size};

checks![
    rename_takes_the_file_along,
    rename_over_a_file_replaces_it,
    rename_over_an_open_file_keeps_it_readable,
    rename_of_an_open_file_keeps_its_handle,
    rename_between_two_names_of_a_file_does_nothing,
    rename_noreplace_refuses_what_exists,
    rename_exchange_swaps_two_files,
    rename_exchange_swaps_file_and_folder,
    rename_exchange_needs_both,
    rename_of_a_folder_takes_its_content_along,
    rename_over_an_empty_folder_replaces_it,
    rename_over_a_full_folder_is_refused,
    rename_of_a_folder_into_itself_is_refused,
    rename_across_kinds_is_refused,
    rename_of_an_open_folder_keeps_it_usable,
    rename_back_and_forth_many_times,
];

fn renameat(from: &Path, to: &Path, flags: RenameFlags) -> rustix::io::Result<()> {
    renameat_with(CWD, from, CWD, to, flags)
}

fn rename_takes_the_file_along(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::write(&from, b"content")?;
    let ino = fs::metadata(&from)?.ino();
    fs::rename(&from, &to)?;
    refused(fs::metadata(&from), Errno::NOENT)?;
    ensure_eq!(fs::read(&to)?, b"content");
    ensure_eq!(fs::metadata(&to)?.ino(), ino);
    fs::create_dir(dir.join("folder"))?;
    fs::rename(&to, dir.join("folder/third"))?;
    ensure_eq!(fs::read(dir.join("folder/third"))?, b"content");
    refused(fs::rename(&from, &to), Errno::NOENT)
}

fn rename_over_a_file_replaces_it(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    for round in 0..10_u8 {
        fs::write(&from, [round; 100])?;
        fs::rename(&from, &to)?;
        ensure_eq!(fs::read(&to)?, [round; 100]);
        refused(fs::metadata(&from), Errno::NOENT)?;
    }
    ensure_eq!(fs::metadata(&to)?.nlink(), 1);
    Ok(())
}

fn rename_over_an_open_file_keeps_it_readable(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::write(&to, b"the old one")?;
    fs::write(&from, b"the new one")?;
    let mut old = read_write(&to)?;
    fs::rename(&from, &to)?;
    let mut seen = String::new();
    old.read_to_string(&mut seen)?;
    ensure_eq!(seen, "the old one");
    old.write_all(b", and more")?;
    ensure_eq!(old.metadata()?.len(), 21);
    ensure_eq!(old.metadata()?.nlink(), 0);
    ensure_eq!(fs::read(&to)?, b"the new one");
    Ok(())
}

fn rename_of_an_open_file_keeps_its_handle(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("folder/to"));
    fs::create_dir(dir.join("folder"))?;
    let mut file = read_write(&from)?;
    file.write_all(b"before")?;
    fs::rename(&from, &to)?;
    file.write_all(b" and after")?;
    ensure_eq!(fs::read(&to)?, b"before and after");
    // A new file of the old name is another one.
    fs::write(&from, b"new")?;
    ensure_eq!(file.metadata()?.len(), 16);
    ensure_eq!(fs::read(&to)?, b"before and after");
    Ok(())
}

fn rename_between_two_names_of_a_file_does_nothing(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"x")?;
    fs::hard_link(&first, &second)?;
    fs::rename(&first, &second)?;
    ensure_eq!(fs::read(&first)?, b"x");
    ensure_eq!(fs::metadata(&second)?.nlink(), 2);
    fs::rename(&first, &first)?;
    ensure_eq!(fs::read(&first)?, b"x");
    Ok(())
}

fn rename_noreplace_refuses_what_exists(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::write(&from, b"1")?;
    fs::write(&to, b"2")?;
    refused(renameat(&from, &to, RenameFlags::NOREPLACE), Errno::EXIST)?;
    ensure_eq!(fs::read(&from)?, b"1");
    ensure_eq!(fs::read(&to)?, b"2");
    fs::remove_file(&to)?;
    renameat(&from, &to, RenameFlags::NOREPLACE)?;
    ensure_eq!(fs::read(&to)?, b"1");
    refused(fs::metadata(&from), Errno::NOENT)
}

fn rename_exchange_swaps_two_files(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"1")?;
    fs::write(&second, b"22")?;
    let handle = File::open(&first)?;
    renameat(&first, &second, RenameFlags::EXCHANGE)?;
    ensure_eq!(fs::read(&first)?, b"22");
    ensure_eq!(fs::read(&second)?, b"1");
    ensure_eq!(handle.metadata()?.ino(), fs::metadata(&second)?.ino());
    renameat(&first, &second, RenameFlags::EXCHANGE)?;
    ensure_eq!(fs::read(&first)?, b"1");
    Ok(())
}

fn rename_exchange_swaps_file_and_folder(dir: &Path) -> Outcome {
    let (file, folder) = (dir.join("file"), dir.join("folder"));
    fs::write(&file, b"x")?;
    fs::create_dir(&folder)?;
    fs::write(folder.join("below"), b"y")?;
    renameat(&file, &folder, RenameFlags::EXCHANGE)?;
    ensure_eq!(fs::read(&folder)?, b"x");
    ensure_eq!(fs::read(file.join("below"))?, b"y");
    Ok(())
}

fn rename_exchange_needs_both(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"1")?;
    refused(
        renameat(&first, &second, RenameFlags::EXCHANGE),
        Errno::NOENT,
    )?;
    refused(
        renameat(&second, &first, RenameFlags::EXCHANGE),
        Errno::NOENT,
    )?;
    let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
    refused(renameat(&first, &second, both), Errno::INVAL)?;
    ensure_eq!(fs::read(&first)?, b"1");
    Ok(())
}

fn rename_of_a_folder_takes_its_content_along(dir: &Path) -> Outcome {
    fs::create_dir_all(dir.join("from/a/b"))?;
    for index in 0..20 {
        fs::write(dir.join(format!("from/a/file-{index}")), index.to_string())?;
    }
    let file = File::open(dir.join("from/a/file-7"))?;
    fs::create_dir(dir.join("other"))?;
    fs::rename(dir.join("from"), dir.join("other/to"))?;
    refused(fs::metadata(dir.join("from/a/b")), Errno::NOENT)?;
    for index in 0..20 {
        let path = dir.join(format!("other/to/a/file-{index}"));
        ensure_eq!(fs::read_to_string(path)?, index.to_string());
    }
    ensure_eq!(file.metadata()?.len(), 1);
    ensure!(
        fs::metadata(dir.join("other/to/a/b"))?.is_dir(),
        "the folder below is gone"
    );
    Ok(())
}

fn rename_over_an_empty_folder_replaces_it(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::create_dir(&from)?;
    fs::write(from.join("file"), b"x")?;
    fs::create_dir(&to)?;
    fs::rename(&from, &to)?;
    ensure_eq!(fs::read(to.join("file"))?, b"x");
    refused(fs::metadata(&from), Errno::NOENT)
}

fn rename_over_a_full_folder_is_refused(dir: &Path) -> Outcome {
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::create_dir(&from)?;
    fs::create_dir(&to)?;
    fs::write(to.join("file"), b"x")?;
    refused_with_any(fs::rename(&from, &to), &[Errno::NOTEMPTY, Errno::EXIST])?;
    ensure_eq!(fs::read(to.join("file"))?, b"x");
    ensure!(fs::metadata(&from)?.is_dir(), "the folder is gone");
    Ok(())
}

fn rename_of_a_folder_into_itself_is_refused(dir: &Path) -> Outcome {
    let folder = dir.join("folder");
    fs::create_dir_all(folder.join("below"))?;
    refused(fs::rename(&folder, folder.join("new")), Errno::INVAL)?;
    refused(fs::rename(&folder, folder.join("below/new")), Errno::INVAL)?;
    refused(fs::rename(folder.join("below"), &folder), Errno::NOTEMPTY)?;
    ensure!(
        fs::metadata(folder.join("below"))?.is_dir(),
        "the folder is gone"
    );
    Ok(())
}

fn rename_across_kinds_is_refused(dir: &Path) -> Outcome {
    let (file, folder) = (dir.join("file"), dir.join("folder"));
    fs::write(&file, b"x")?;
    fs::create_dir(&folder)?;
    refused(fs::rename(&file, &folder), Errno::ISDIR)?;
    refused(fs::rename(&folder, &file), Errno::NOTDIR)?;
    ensure_eq!(fs::read(&file)?, b"x");
    ensure!(fs::metadata(&folder)?.is_dir(), "the folder is gone");
    Ok(())
}

fn rename_of_an_open_folder_keeps_it_usable(dir: &Path) -> Outcome {
    use rustix::fs::{Mode, OFlags, openat};
    let (from, to) = (dir.join("from"), dir.join("to"));
    fs::create_dir(&from)?;
    let folder = open_folder(&from)?;
    fs::rename(&from, &to)?;
    let flags = OFlags::WRONLY | OFlags::CREATE;
    let file = openat(&folder, "file", flags, Mode::from_raw_mode(0o644))?;
    File::from(file).write_all_at(b"x", 0)?;
    ensure_eq!(fs::read(to.join("file"))?, b"x");
    // The working folder of a process moves as well.
    crate::process::in_child(|| {
        std::env::set_current_dir(&to)?;
        fs::rename(&to, &from)?;
        fs::write("second", b"y")?;
        ensure_eq!(fs::read(from.join("second"))?, b"y");
        ensure_eq!(std::env::current_dir()?, from);
        Ok(())
    })
}

fn rename_back_and_forth_many_times(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("a/file"), dir.join("b/file"));
    fs::create_dir(dir.join("a"))?;
    fs::create_dir(dir.join("b"))?;
    fs::write(&first, b"x")?;
    for _ in 0..size(100, 20) {
        fs::rename(&first, &second)?;
        refused(fs::metadata(&first), Errno::NOENT)?;
        fs::rename(&second, &first)?;
        refused(fs::metadata(&second), Errno::NOENT)?;
    }
    ensure_eq!(fs::read(&first)?, b"x");
    Ok(())
}
