//! Listings of folders: complete, without duplicates, from any offset, while they change.
//! Invariant: `.` and `..` are counted only in the checks about them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Dir, FileType, RawDir};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Failure, Outcome, ensure, ensure_eq, refused, refused_with_any};
use crate::fixture::{open_folder, size};

checks![
    folder_is_made_once_and_removed_once,
    full_folder_is_not_removed,
    empty_folder_has_itself_and_its_parent,
    listing_tells_kind_and_inode_number,
    entries_of_a_full_folder_are_each_listed_once,
    listing_with_the_smallest_buffer_is_complete,
    seekdir_goes_back_to_where_telldir_was,
    rewound_listing_shows_what_has_changed,
    listing_while_deleting_shows_every_entry,
    listing_while_adding_shows_every_old_entry_once,
    two_listings_of_a_folder_do_not_disturb_each_other,
    many_files_are_open_at_once,
];

type Names = BTreeMap<String, usize>;

/// Notes the next entries of a listing, at most `limit`; true if there may be more.
fn read_on(listing: &mut Dir, names: &mut Names, limit: usize) -> Result<bool, Failure> {
    let mut read = 0;
    while read < limit {
        let Some(entry) = listing.read() else {
            return Ok(false);
        };
        let name = entry?.file_name().to_str()?.to_owned();
        if name != "." && name != ".." {
            *names.entry(name).or_default() += 1;
            read += 1;
        }
    }
    Ok(true)
}

fn list(dir: &Path) -> Result<Names, Failure> {
    let mut names = Names::new();
    read_on(&mut Dir::new(open_folder(dir)?)?, &mut names, usize::MAX)?;
    Ok(names)
}

fn fill(dir: &Path, count: usize) -> Result<BTreeSet<String>, Failure> {
    (0..count)
        .map(|index| {
            let name = format!("entry-{index}-{}", "x".repeat(index % 40));
            File::create(dir.join(&name))?;
            Ok(name)
        })
        .collect()
}

/// Each of these once, and nothing else.
fn each_once(names: &Names, wanted: &BTreeSet<String>) -> Outcome {
    for (name, times) in names {
        ensure!(wanted.contains(name), "{name} is listed, and is not there");
        ensure!(*times == 1, "{name} is listed {times} times");
    }
    ensure_eq!(names.len(), wanted.len());
    Ok(())
}

fn folder_is_made_once_and_removed_once(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir(&path)?;
    refused(fs::create_dir(&path), Errno::EXIST)?;
    fs::write(dir.join("file"), b"")?;
    refused(fs::create_dir(dir.join("file")), Errno::EXIST)?;
    refused(fs::create_dir(dir.join("file/below")), Errno::NOTDIR)?;
    refused(fs::create_dir(dir.join("missing/below")), Errno::NOENT)?;
    refused(fs::remove_dir(dir.join("file")), Errno::NOTDIR)?;
    refused(fs::remove_file(&path), Errno::ISDIR)?;
    fs::remove_dir(&path)?;
    refused(fs::remove_dir(&path), Errno::NOENT)?;
    fs::create_dir(&path)?;
    ensure_eq!(list(&path)?.len(), 0);
    Ok(())
}

fn full_folder_is_not_removed(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir_all(path.join("below"))?;
    refused_with_any(fs::remove_dir(&path), &[Errno::NOTEMPTY, Errno::EXIST])?;
    fs::remove_dir(path.join("below"))?;
    fs::write(path.join("file"), b"")?;
    refused_with_any(fs::remove_dir(&path), &[Errno::NOTEMPTY, Errno::EXIST])?;
    fs::rename(path.join("file"), dir.join("file"))?;
    Ok(fs::remove_dir(&path)?)
}

fn empty_folder_has_itself_and_its_parent(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir(&path)?;
    let mut found = BTreeMap::new();
    for entry in &mut Dir::new(open_folder(&path)?)? {
        let entry = entry?;
        found.insert(entry.file_name().to_str()?.to_owned(), entry.ino());
        ensure_eq!(entry.file_type(), FileType::Directory);
    }
    ensure_eq!(found.keys().collect::<Vec<_>>(), [".", ".."]);
    Ok(())
}

fn listing_tells_kind_and_inode_number(dir: &Path) -> Outcome {
    use rustix::fs::{CWD, Mode, mknodat};
    let mode = Mode::from_raw_mode(0o644);
    fs::write(dir.join("file"), b"")?;
    fs::create_dir(dir.join("folder"))?;
    std::os::unix::fs::symlink("file", dir.join("link"))?;
    mknodat(CWD, dir.join("fifo"), FileType::Fifo, mode, 0)?;
    mknodat(CWD, dir.join("socket"), FileType::Socket, mode, 0)?;
    // Once as found, once after all have been looked up.
    for _ in 0..2 {
        let mut seen = 0;
        for entry in &mut Dir::new(open_folder(dir)?)? {
            let entry = entry?;
            let name = entry.file_name().to_str()?;
            let kind = match name {
                "file" => FileType::RegularFile,
                "folder" => FileType::Directory,
                "link" => FileType::Symlink,
                "fifo" => FileType::Fifo,
                "socket" => FileType::Socket,
                _ => continue,
            };
            ensure!(
                entry.file_type() == kind,
                "{name} is listed as {:?}",
                entry.file_type()
            );
            ensure_eq!(entry.ino(), fs::symlink_metadata(dir.join(name))?.ino());
            seen += 1;
        }
        ensure_eq!(seen, 5);
    }
    Ok(())
}

fn entries_of_a_full_folder_are_each_listed_once(dir: &Path) -> Outcome {
    // Links are made faster than files, and are entries just the same.
    let count = size(10_000, 1200);
    let wanted: BTreeSet<String> = (0..count).map(|index| format!("entry-{index}")).collect();
    File::create(dir.join("entry-0"))?;
    for index in 1..count {
        let path = dir.join(format!("entry-{index}"));
        if index % 1000 == 0 {
            // Some file systems allow only so many links to a file.
            File::create(path)?;
        } else {
            fs::hard_link(dir.join(format!("entry-{}", index / 1000 * 1000)), path)?;
        }
    }
    each_once(&list(dir)?, &wanted)?;
    each_once(&list(dir)?, &wanted)
}

fn listing_with_the_smallest_buffer_is_complete(dir: &Path) -> Outcome {
    let mut wanted = fill(dir, size(300, 60))?;
    let long = "l".repeat(255);
    File::create(dir.join(&long))?;
    wanted.insert(long);
    // Just enough for one entry of the longest name.
    let mut buffer = [MaybeUninit::uninit(); 280];
    let mut listing = RawDir::new(open_folder(dir)?, &mut buffer);
    let mut names = Names::new();
    while let Some(entry) = listing.next() {
        let name = entry?.file_name().to_str()?.to_owned();
        if name != "." && name != ".." {
            *names.entry(name).or_default() += 1;
        }
    }
    each_once(&names, &wanted)?;
    // Too small for anything.
    let mut buffer = [MaybeUninit::uninit(); 20];
    match RawDir::new(open_folder(dir)?, &mut buffer).next() {
        Some(refusal) => refused(refusal, Errno::INVAL),
        None => Err(Failure::new("a listing without a buffer is empty")),
    }
}

fn seekdir_goes_back_to_where_telldir_was(dir: &Path) -> Outcome {
    let count = size(500, 200);
    fill(dir, count)?;
    let mut listing = Dir::new(open_folder(dir)?)?;
    let mut entries = Vec::new();
    for entry in &mut listing {
        let entry = entry?;
        entries.push((entry.file_name().to_owned(), entry.offset()));
    }
    ensure_eq!(entries.len(), count + 2);
    let places: BTreeSet<i64> = entries.iter().map(|(_, place)| *place).collect();
    ensure_eq!(places.len(), count + 2);
    // The place of an entry is where the next one is found.
    for index in [count, 7, count / 2, 0, 100, count - 1, 1] {
        listing.seek(entries[index].1)?;
        for (name, _) in &entries[index + 1..entries.len().min(index + 4)] {
            let next = listing
                .read()
                .ok_or_else(|| Failure::new("the list ends too early"))??;
            ensure_eq!(next.file_name(), name.as_c_str());
        }
    }
    listing.seek(entries[count + 1].1)?;
    ensure!(listing.read().is_none(), "there is more after the end");
    Ok(())
}

fn rewound_listing_shows_what_has_changed(dir: &Path) -> Outcome {
    let mut wanted = fill(dir, 50)?;
    let mut listing = Dir::new(open_folder(dir)?)?;
    for round in 0..size(10, 4) {
        let mut names = Names::new();
        listing.rewind();
        read_on(&mut listing, &mut names, usize::MAX)?;
        each_once(&names, &wanted)?;
        let name = format!("new-{round}");
        File::create(dir.join(&name))?;
        wanted.insert(name);
        if let Some(gone) = wanted.pop_first() {
            fs::remove_file(dir.join(gone))?;
        }
    }
    Ok(())
}

fn listing_while_deleting_shows_every_entry(dir: &Path) -> Outcome {
    let wanted = fill(dir, size(1000, 250))?;
    let mut listing = Dir::new(open_folder(dir)?)?;
    let (mut names, mut removed) = (Names::new(), BTreeSet::new());
    // As `rm -r` does it: what has been listed is removed before more is listed.
    let mut more = true;
    while more {
        more = read_on(&mut listing, &mut names, 17)?;
        for name in names.keys() {
            if removed.insert(name.clone()) {
                fs::remove_file(dir.join(name))?;
            }
        }
    }
    each_once(&names, &wanted)?;
    ensure_eq!(list(dir)?.len(), 0);
    Ok(())
}

fn listing_while_adding_shows_every_old_entry_once(dir: &Path) -> Outcome {
    let count = size(500, 150);
    let old = fill(dir, count)?;
    let mut listing = Dir::new(open_folder(dir)?)?;
    let mut names = Names::new();
    let mut added = 0;
    while read_on(&mut listing, &mut names, 25)? && added < count {
        for _ in 0..10 {
            File::create(dir.join(format!("added-{added}")))?;
            added += 1;
        }
    }
    read_on(&mut listing, &mut names, usize::MAX)?;
    for name in &old {
        ensure!(
            names.get(name) == Some(&1),
            "{name} is listed {:?} times",
            names.get(name)
        );
    }
    ensure_eq!(list(dir)?.len(), count + added);
    Ok(())
}

fn two_listings_of_a_folder_do_not_disturb_each_other(dir: &Path) -> Outcome {
    let wanted = fill(dir, size(300, 120))?;
    let (mut first, mut second) = (Dir::new(open_folder(dir)?)?, Dir::new(open_folder(dir)?)?);
    let (mut first_names, mut second_names) = (Names::new(), Names::new());
    let mut more = (true, true);
    while more != (false, false) {
        more.0 = more.0 && read_on(&mut first, &mut first_names, 11)?;
        more.1 = more.1 && read_on(&mut second, &mut second_names, 29)?;
    }
    each_once(&first_names, &wanted)?;
    each_once(&second_names, &wanted)
}

fn many_files_are_open_at_once(dir: &Path) -> Outcome {
    use std::os::unix::fs::FileExt;
    crate::process::raise_open_files(4000)?;
    let count = size(2000, 400);
    let mut files = Vec::new();
    for index in 0..count {
        let file = crate::fixture::create_new(&dir.join(format!("file-{index}")), 0o644)?;
        file.write_all_at(&index.to_le_bytes(), 0)?;
        files.push(file);
    }
    for (index, file) in files.iter().enumerate() {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 0)?;
        ensure_eq!(usize::from_le_bytes(bytes), index);
    }
    drop(files);
    ensure_eq!(fs::read(dir.join("file-399"))?, 399_usize.to_le_bytes());
    Ok(())
}
