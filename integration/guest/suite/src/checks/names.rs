//! Valid names: long, of any bytes but two, deep down. Invariant: names are compared as bytes.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure_eq, refused};
use crate::fixture::{open_folder, size};

checks![
    name_of_255_bytes_is_a_name,
    name_of_256_bytes_is_too_long,
    name_may_have_any_byte,
    names_that_differ_in_case_differ,
    name_with_a_slash_at_its_end_is_a_folder,
    dot_and_dot_dot_lead_where_they_should,
    missing_name_appears_when_it_is_created_elsewhere,
    folders_deep_down_are_reached,
    folders_deeper_than_any_path_are_reached_step_by_step,
];

fn listed(dir: &Path) -> std::io::Result<BTreeSet<OsString>> {
    fs::read_dir(dir)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect()
}

fn name_of_255_bytes_is_a_name(dir: &Path) -> Outcome {
    let (name, other) = ("n".repeat(255), "o".repeat(255));
    let path = dir.join(&name);
    fs::write(&path, b"long")?;
    ensure_eq!(fs::read(&path)?, b"long");
    ensure_eq!(listed(dir)?, BTreeSet::from([OsString::from(&name)]));
    fs::rename(&path, dir.join(&other))?;
    fs::hard_link(dir.join(&other), &path)?;
    ensure_eq!(listed(dir)?.len(), 2);
    fs::remove_file(&path)?;
    fs::remove_file(dir.join(&other))?;
    fs::create_dir(&path)?;
    std::os::unix::fs::symlink(&name, dir.join(&other))?;
    ensure_eq!(fs::metadata(dir.join(&other))?.is_dir(), true);
    Ok(())
}

fn name_of_256_bytes_is_too_long(dir: &Path) -> Outcome {
    let path = dir.join("n".repeat(256));
    let file = dir.join("file");
    fs::write(&file, b"")?;
    refused(fs::write(&path, b""), Errno::NAMETOOLONG)?;
    refused(fs::metadata(&path), Errno::NAMETOOLONG)?;
    refused(fs::create_dir(&path), Errno::NAMETOOLONG)?;
    refused(fs::rename(&file, &path), Errno::NAMETOOLONG)?;
    refused(fs::hard_link(&file, &path), Errno::NAMETOOLONG)?;
    refused(std::os::unix::fs::symlink("x", &path), Errno::NAMETOOLONG)?;
    refused(fs::remove_file(&path), Errno::NAMETOOLONG)
}

fn name_may_have_any_byte(dir: &Path) -> Outcome {
    let mut names: BTreeSet<OsString> = (1..=255_u8)
        .filter(|byte| *byte != b'/')
        .step_by(size(1, 9))
        .map(|byte| OsStr::from_bytes(&[b'x', byte, b'y']).to_owned())
        .collect();
    for name in [
        b" leading and trailing ".as_slice(),
        b"-rf",
        b"...",
        b"new\nline",
        b"back\\slash",
        b"\xff\xfe\xc0\x80",
        "grüße 你好 🦀".as_bytes(),
    ] {
        names.insert(OsStr::from_bytes(name).to_owned());
    }
    for name in &names {
        fs::write(dir.join(name), name.as_bytes())?;
    }
    ensure_eq!(listed(dir)?, names);
    for name in &names {
        ensure_eq!(fs::read(dir.join(name))?, name.as_bytes());
        fs::remove_file(dir.join(name))?;
    }
    ensure_eq!(listed(dir)?.len(), 0);
    Ok(())
}

fn names_that_differ_in_case_differ(dir: &Path) -> Outcome {
    for name in ["name", "Name", "NAME"] {
        fs::write(dir.join(name), name)?;
    }
    // Composed and decomposed letters are different bytes too.
    for name in ["\u{e9}", "e\u{301}"] {
        fs::write(dir.join(name), name)?;
    }
    ensure_eq!(listed(dir)?.len(), 5);
    ensure_eq!(fs::read(dir.join("Name"))?, b"Name");
    ensure_eq!(fs::read(dir.join("\u{e9}"))?, "\u{e9}".as_bytes());
    Ok(())
}

fn name_with_a_slash_at_its_end_is_a_folder(dir: &Path) -> Outcome {
    fs::write(dir.join("file"), b"")?;
    fs::create_dir(dir.join("folder"))?;
    ensure_eq!(fs::metadata(dir.join("folder/"))?.is_dir(), true);
    refused(fs::metadata(dir.join("file/")), Errno::NOTDIR)?;
    fs::create_dir(dir.join("second/"))?;
    refused(File::create(dir.join("third/")), Errno::ISDIR)?;
    std::os::unix::fs::symlink("folder", dir.join("link"))?;
    ensure_eq!(fs::symlink_metadata(dir.join("link/"))?.is_dir(), true);
    Ok(())
}

fn dot_and_dot_dot_lead_where_they_should(dir: &Path) -> Outcome {
    use std::os::unix::fs::MetadataExt;
    fs::create_dir_all(dir.join("a/b"))?;
    fs::write(dir.join("file"), b"here")?;
    ensure_eq!(fs::read(dir.join("a/b/../../file"))?, b"here");
    ensure_eq!(fs::read(dir.join("a/./b/./.././../file"))?, b"here");
    let ino = fs::metadata(dir)?.ino();
    let folder = open_folder(&dir.join("a"))?;
    ensure_eq!(
        rustix::fs::statat(&folder, "..", AtFlags::empty())?.st_ino,
        ino
    );
    refused(fs::remove_dir(dir.join("a/.")), Errno::INVAL)?;
    refused(fs::remove_dir(dir.join("a/b/..")), Errno::NOTEMPTY)?;
    // After a move `..` leads to the new parent.
    fs::create_dir(dir.join("c"))?;
    let moved = open_folder(&dir.join("a/b"))?;
    fs::rename(dir.join("a/b"), dir.join("c/b"))?;
    let parent = rustix::fs::statat(&moved, "..", AtFlags::empty())?;
    ensure_eq!(parent.st_ino, fs::metadata(dir.join("c"))?.ino());
    Ok(())
}

fn missing_name_appears_when_it_is_created_elsewhere(dir: &Path) -> Outcome {
    let path = dir.join("file");
    for round in 0..size(30, 9) {
        refused(fs::metadata(&path), Errno::NOENT)?;
        refused(File::open(&path), Errno::NOENT)?;
        let made = dir.join(format!("made-{round}"));
        fs::write(&made, b"x")?;
        // By a rename, by a link, by a creation.
        match round % 3 {
            0 => fs::rename(&made, &path)?,
            1 => fs::hard_link(&made, &path)?,
            _ => fs::write(&path, b"x")?,
        }
        ensure_eq!(fs::read(&path)?, b"x");
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn folders_deep_down_are_reached(dir: &Path) -> Outcome {
    let mut path = dir.to_owned();
    for level in 0..size(100, 40) {
        path.push(format!("level-{level}"));
        fs::create_dir(&path)?;
    }
    fs::write(path.join("file"), b"deep down")?;
    ensure_eq!(fs::read(path.join("file"))?, b"deep down");
    // The top moves, and everything below with it.
    fs::rename(dir.join("level-0"), dir.join("other"))?;
    refused(fs::metadata(&path), Errno::NOENT)?;
    let below = path.strip_prefix(dir.join("level-0"))?;
    ensure_eq!(
        fs::read(dir.join("other").join(below).join("file"))?,
        b"deep down"
    );
    Ok(())
}

fn folders_deeper_than_any_path_are_reached_step_by_step(dir: &Path) -> Outcome {
    // 40 levels of 110 bytes: beyond PATH_MAX.
    let name = "d".repeat(110);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut folder = std::os::fd::OwnedFd::from(open_folder(dir)?);
    for _ in 0..40 {
        rustix::fs::mkdirat(&folder, &name, Mode::from_raw_mode(0o755))?;
        folder = rustix::fs::openat(&folder, &name, flags, Mode::empty())?;
    }
    let create = OFlags::WRONLY | OFlags::CREATE;
    let file = rustix::fs::openat(&folder, "file", create, Mode::from_raw_mode(0o644))?;
    ensure_eq!(rustix::io::write(&file, b"deeper")?, 6);
    ensure_eq!(
        rustix::fs::statat(&folder, "file", AtFlags::empty())?.st_size,
        6
    );
    for _ in 0..3 {
        folder = rustix::fs::openat(&folder, "..", flags, Mode::empty())?;
    }
    ensure_eq!(
        rustix::fs::statat(&folder, &name, AtFlags::empty())?.st_mode & 0o777,
        0o755
    );
    Ok(())
}
