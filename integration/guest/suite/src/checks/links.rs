//! Hard and symbolic links. Invariant: none.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, linkat};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Outcome, ensure, ensure_eq, refused};
use crate::fixture::size;

checks![
    hard_links_share_content_and_count,
    hard_link_counts_down_as_names_go,
    hard_link_to_a_folder_is_refused,
    hard_link_to_an_existing_name_is_refused,
    hard_link_to_a_link_is_one_more_of_the_link,
    hard_link_from_an_open_handle,
    symbolic_link_is_read_and_followed,
    symbolic_link_of_4095_bytes_is_read_back,
    symbolic_link_keeps_any_bytes,
    dangling_link_is_a_link_all_the_same,
    links_in_a_circle_are_an_error,
    link_is_not_followed_if_so_asked,
    replaced_link_leads_to_its_new_target,
];

fn hard_links_share_content_and_count(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"one")?;
    fs::hard_link(&first, &second)?;
    fs::create_dir(dir.join("folder"))?;
    let third = dir.join("folder/third");
    fs::hard_link(&second, &third)?;
    for path in [&first, &second, &third] {
        ensure_eq!(fs::metadata(path)?.nlink(), 3);
        ensure_eq!(fs::metadata(path)?.ino(), fs::metadata(&first)?.ino());
    }
    fs::write(&third, b"written through the third")?;
    ensure_eq!(fs::read(&first)?, b"written through the third");
    Ok(())
}

fn hard_link_counts_down_as_names_go(dir: &Path) -> Outcome {
    let path = |index: u64| dir.join(format!("name-{index}"));
    fs::write(path(0), b"bytes")?;
    for index in 1..20 {
        fs::hard_link(path(index - 1), path(index))?;
    }
    let file = File::open(path(3))?;
    for index in 0..19 {
        fs::remove_file(path(index))?;
        ensure_eq!(fs::metadata(path(19))?.nlink(), 19 - index);
        ensure_eq!(file.metadata()?.nlink(), 19 - index);
    }
    ensure_eq!(fs::read(path(19))?, b"bytes");
    Ok(())
}

fn hard_link_to_a_folder_is_refused(dir: &Path) -> Outcome {
    fs::create_dir(dir.join("folder"))?;
    refused(
        fs::hard_link(dir.join("folder"), dir.join("link")),
        Errno::PERM,
    )
}

fn hard_link_to_an_existing_name_is_refused(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"1")?;
    fs::write(&second, b"2")?;
    refused(fs::hard_link(&first, &second), Errno::EXIST)?;
    refused(
        fs::hard_link(dir.join("missing"), dir.join("third")),
        Errno::NOENT,
    )?;
    ensure_eq!(fs::read(&second)?, b"2");
    ensure_eq!(fs::metadata(&first)?.nlink(), 1);
    Ok(())
}

fn hard_link_to_a_link_is_one_more_of_the_link(dir: &Path) -> Outcome {
    let (file, link, copy) = (dir.join("file"), dir.join("link"), dir.join("copy"));
    fs::write(&file, b"x")?;
    symlink("file", &link)?;
    linkat(CWD, &link, CWD, &copy, AtFlags::empty())?;
    ensure_eq!(fs::read_link(&copy)?, PathBuf::from("file"));
    ensure_eq!(fs::symlink_metadata(&link)?.nlink(), 2);
    ensure_eq!(fs::metadata(&file)?.nlink(), 1);
    // Followed, if so asked.
    linkat(CWD, &link, CWD, dir.join("second"), AtFlags::SYMLINK_FOLLOW)?;
    ensure_eq!(fs::metadata(&file)?.nlink(), 2);
    Ok(())
}

fn hard_link_from_an_open_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let file = File::open(&path)?;
    let link = dir.join("link");
    let descriptor = crate::fixture::path_of_descriptor(&file);
    linkat(CWD, &descriptor, CWD, &link, AtFlags::SYMLINK_FOLLOW)?;
    ensure_eq!(fs::metadata(&link)?.ino(), fs::metadata(&path)?.ino());
    ensure_eq!(file.metadata()?.nlink(), 2);
    Ok(())
}

fn symbolic_link_is_read_and_followed(dir: &Path) -> Outcome {
    fs::create_dir_all(dir.join("a/b"))?;
    fs::write(dir.join("a/b/file"), b"target")?;
    for (name, target) in [
        ("direct", PathBuf::from("a/b/file")),
        ("absolute", dir.join("a/b/file")),
        ("roundabout", PathBuf::from("a/../a/./b//file")),
    ] {
        let link = dir.join(name);
        symlink(&target, &link)?;
        ensure_eq!(fs::read_link(&link)?, target);
        ensure_eq!(fs::read(&link)?, b"target");
        let data = fs::symlink_metadata(&link)?;
        ensure!(data.is_symlink(), "no symbolic link");
        ensure_eq!(data.len(), u64::try_from(target.as_os_str().len())?);
    }
    // A link within the path, relative to its own directory.
    symlink("../a", dir.join("a/up"))?;
    ensure_eq!(fs::read(dir.join("a/up/up/up/b/file"))?, b"target");
    // Written through, and removed without its target.
    fs::write(dir.join("direct"), b"through")?;
    fs::remove_file(dir.join("direct"))?;
    ensure_eq!(fs::read(dir.join("a/b/file"))?, b"through");
    Ok(())
}

fn symbolic_link_of_4095_bytes_is_read_back(dir: &Path) -> Outcome {
    for length in [1, 59, 60, 61, 255, 256, 1000, 4000, 4094, 4095] {
        let link = dir.join(format!("link-{length}"));
        let target: String = "abcdefg/".chars().cycle().take(length).collect();
        symlink(&target, &link)?;
        ensure_eq!(fs::read_link(&link)?, PathBuf::from(target));
        ensure_eq!(fs::symlink_metadata(&link)?.len(), u64::try_from(length)?);
    }
    refused(
        symlink("a".repeat(4096), dir.join("longer")),
        Errno::NAMETOOLONG,
    )
}

fn symbolic_link_keeps_any_bytes(dir: &Path) -> Outcome {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let bytes: Vec<u8> = (1..=255).collect();
    let target = OsStr::from_bytes(&bytes);
    symlink(target, dir.join("link"))?;
    ensure_eq!(fs::read_link(dir.join("link"))?.as_os_str(), target);
    refused(symlink("", dir.join("empty")), Errno::NOENT)
}

fn dangling_link_is_a_link_all_the_same(dir: &Path) -> Outcome {
    let link = dir.join("link");
    symlink("nowhere", &link)?;
    refused(fs::metadata(&link), Errno::NOENT)?;
    refused(File::open(&link), Errno::NOENT)?;
    ensure!(
        fs::symlink_metadata(&link)?.is_symlink(),
        "no symbolic link"
    );
    refused(fs::create_dir(&link), Errno::EXIST)?;
    fs::rename(&link, dir.join("renamed"))?;
    ensure_eq!(
        fs::read_link(dir.join("renamed"))?,
        PathBuf::from("nowhere")
    );
    fs::remove_file(dir.join("renamed"))?;
    refused(fs::read_link(dir.join("renamed")), Errno::NOENT)
}

fn links_in_a_circle_are_an_error(dir: &Path) -> Outcome {
    symlink("second", dir.join("first"))?;
    symlink("first", dir.join("second"))?;
    symlink("self", dir.join("self"))?;
    for name in ["first", "second", "self", "self/below"] {
        refused(fs::metadata(dir.join(name)), Errno::LOOP)?;
        refused(File::open(dir.join(name)), Errno::LOOP)?;
    }
    Ok(())
}

fn link_is_not_followed_if_so_asked(dir: &Path) -> Outcome {
    fs::write(dir.join("file"), b"x")?;
    symlink("file", dir.join("link"))?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW);
    refused(options.open(dir.join("link")), Errno::LOOP)?;
    ensure_eq!(options.open(dir.join("file"))?.metadata()?.len(), 1);
    refused(fs::read_link(dir.join("file")), Errno::INVAL)?;
    // A handle on the link itself.
    let handle = options
        .custom_flags(libc::O_NOFOLLOW | libc::O_PATH)
        .open(dir.join("link"))?;
    ensure!(handle.metadata()?.is_symlink(), "no handle on the link");
    ensure_eq!(
        rustix::fs::readlinkat(&handle, "", Vec::new())?.as_bytes(),
        b"file"
    );
    Ok(())
}

fn replaced_link_leads_to_its_new_target(dir: &Path) -> Outcome {
    let link = dir.join("current");
    for round in 0..size(20, 6) {
        let target = format!("release-{round}");
        fs::create_dir(dir.join(&target))?;
        fs::write(dir.join(&target).join("file"), &target)?;
        // As deployments do it: a new link, renamed over the old one.
        symlink(&target, dir.join("next"))?;
        fs::rename(dir.join("next"), &link)?;
        ensure_eq!(fs::read_link(&link)?, PathBuf::from(&target));
        ensure_eq!(fs::read(link.join("file"))?, target.as_bytes());
    }
    Ok(())
}
