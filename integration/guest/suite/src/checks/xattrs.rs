//! Extended attributes of users. Invariant: none.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use rustix::fs::{
    XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, getxattr_query,
    listxattr, listxattr_query, lsetxattr, removexattr, setxattr,
};
use rustix::io::Errno;

use super::checks;
use crate::failure::{Failure, Outcome, ensure, ensure_eq, refused, refused_with_any};
use crate::fixture::{Noise, file_of, size};
use crate::process::{ALICE, as_user};

checks![
    xattr_is_set_and_read_and_removed,
    xattr_is_set_through_a_handle,
    xattr_flags_say_whether_it_may_exist,
    xattrs_are_all_listed,
    xattr_value_may_be_empty_or_any_bytes,
    xattr_value_may_be_big,
    xattr_buffer_too_small_is_told,
    xattr_of_a_folder_is_like_a_file_s,
    xattr_of_a_link_or_of_no_kind_is_refused,
    xattr_needs_the_permission_to_write,
    xattr_goes_with_the_file,
];

const NONE: XattrFlags = XattrFlags::empty();

fn value(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; 65536];
    let length = getxattr(path, name, bytes.as_mut_slice())?;
    bytes.truncate(length);
    Ok(bytes)
}

fn names(path: &Path) -> Result<BTreeSet<String>, Failure> {
    let mut bytes = vec![0; 65536];
    let length = listxattr(path, bytes.as_mut_slice())?;
    user_names(&bytes[..length])
}

// What is not the user's (a security module's label) is none of these checks' business.
fn user_names(list: &[u8]) -> Result<BTreeSet<String>, Failure> {
    let mut names = BTreeSet::new();
    for name in list
        .split(|b| *b == 0)
        .filter(|name| name.starts_with(b"user."))
    {
        let name = std::str::from_utf8(name)?.to_owned();
        ensure!(names.insert(name), "a name is listed twice");
    }
    Ok(names)
}

fn xattr_is_set_and_read_and_removed(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    refused(value(&path, "user.colour"), Errno::NODATA)?;
    refused(removexattr(&path, "user.colour"), Errno::NODATA)?;
    setxattr(&path, "user.colour", b"red", NONE)?;
    ensure_eq!(value(&path, "user.colour")?, b"red");
    setxattr(&path, "user.colour", b"blue-green", NONE)?;
    ensure_eq!(value(&path, "user.colour")?, b"blue-green");
    removexattr(&path, "user.colour")?;
    refused(value(&path, "user.colour"), Errno::NODATA)?;
    ensure_eq!(names(&path)?.len(), 0);
    Ok(())
}

fn xattr_is_set_through_a_handle(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let file = File::open(&path)?;
    fsetxattr(&file, "user.colour", b"red", NONE)?;
    ensure_eq!(value(&path, "user.colour")?, b"red");
    let mut bytes = [0; 100];
    ensure_eq!(fgetxattr(&file, "user.colour", &mut bytes)?, 3);
    let length = flistxattr(&file, &mut bytes)?;
    ensure_eq!(user_names(&bytes[..length])?.len(), 1);
    fremovexattr(&file, "user.colour")?;
    // And where there is no name any more.
    fs::remove_file(&path)?;
    fsetxattr(&file, "user.later", b"on", NONE)?;
    ensure_eq!(fgetxattr(&file, "user.later", &mut bytes)?, 2);
    Ok(())
}

fn xattr_flags_say_whether_it_may_exist(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    refused(
        setxattr(&path, "user.a", b"1", XattrFlags::REPLACE),
        Errno::NODATA,
    )?;
    setxattr(&path, "user.a", b"2", XattrFlags::CREATE)?;
    refused(
        setxattr(&path, "user.a", b"3", XattrFlags::CREATE),
        Errno::EXIST,
    )?;
    ensure_eq!(value(&path, "user.a")?, b"2");
    setxattr(&path, "user.a", b"4", XattrFlags::REPLACE)?;
    ensure_eq!(value(&path, "user.a")?, b"4");
    Ok(())
}

fn xattrs_are_all_listed(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    let mut wanted = BTreeSet::new();
    for index in 0..size(40, 20) {
        let name = format!("user.name-{index}-{}", "x".repeat(index));
        setxattr(&path, &name, index.to_string().as_bytes(), NONE)?;
        wanted.insert(name);
    }
    ensure_eq!(names(&path)?, wanted);
    for name in &wanted.clone() {
        removexattr(&path, name)?;
        wanted.remove(name);
        if wanted.len() % 10 == 0 {
            ensure_eq!(names(&path)?, wanted);
        }
    }
    // The longest name there can be.
    let longest = format!("user.{}", "n".repeat(250));
    setxattr(&path, &longest, b"long", NONE)?;
    ensure_eq!(value(&path, &longest)?, b"long");
    ensure!(
        names(&path)?.contains(&longest),
        "the longest name is not listed"
    );
    let longer = format!("{longest}n");
    refused_with_any(
        setxattr(&path, &longer, b"", NONE),
        &[Errno::RANGE, Errno::NAMETOOLONG],
    )
}

fn xattr_value_may_be_empty_or_any_bytes(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    setxattr(&path, "user.empty", b"", NONE)?;
    ensure_eq!(value(&path, "user.empty")?, b"");
    ensure!(names(&path)?.contains("user.empty"), "it is not listed");
    let bytes: Vec<u8> = (0..=255).collect();
    setxattr(&path, "user.bytes", &bytes, NONE)?;
    ensure_eq!(value(&path, "user.bytes")?, bytes);
    Ok(())
}

fn xattr_value_may_be_big(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    // What is beyond a block depends on the file system below; it may be refused, never cut.
    for (length, may_be_refused) in [(3000, false), (16_000, true), (65_536, true)] {
        let bytes = Noise::bytes(1, length);
        let refusals = [Errno::NOSPC, Errno::TOOBIG, Errno::RANGE];
        match setxattr(&path, "user.big", &bytes, NONE) {
            Ok(()) => {
                let seen = value(&path, "user.big")?;
                ensure!(seen == bytes, "{length} bytes read otherwise");
                ensure_eq!(getxattr_query(&path, "user.big")?, length);
            }
            refusal if may_be_refused => refused_with_any(refusal, &refusals)?,
            Err(error) => return Err(error.into()),
        }
    }
    let beyond = vec![0; 65_537];
    refused(setxattr(&path, "user.beyond", &beyond, NONE), Errno::TOOBIG)
}

fn xattr_buffer_too_small_is_told(dir: &Path) -> Outcome {
    let path = dir.join("file");
    fs::write(&path, b"x")?;
    setxattr(&path, "user.a", &[7; 100], NONE)?;
    setxattr(&path, "user.b", &[8; 10], NONE)?;
    ensure_eq!(getxattr_query(&path, "user.a")?, 100);
    refused(getxattr(&path, "user.a", &mut [0; 99]), Errno::RANGE)?;
    ensure_eq!(getxattr(&path, "user.a", &mut [0; 100])?, 100);
    ensure!(
        listxattr_query(&path)? >= 14,
        "the list is shorter than its names"
    );
    refused(listxattr(&path, &mut [0; 13]), Errno::RANGE)
}

fn xattr_of_a_folder_is_like_a_file_s(dir: &Path) -> Outcome {
    let path = dir.join("folder");
    fs::create_dir(&path)?;
    setxattr(&path, "user.a", b"1", NONE)?;
    fs::write(path.join("file"), b"")?;
    ensure_eq!(value(&path, "user.a")?, b"1");
    // It is not inherited.
    ensure_eq!(names(&path.join("file"))?.len(), 0);
    removexattr(&path, "user.a")?;
    ensure_eq!(names(&path)?.len(), 0);
    Ok(())
}

fn xattr_of_a_link_or_of_no_kind_is_refused(dir: &Path) -> Outcome {
    let (path, link) = (dir.join("file"), dir.join("link"));
    fs::write(&path, b"x")?;
    std::os::unix::fs::symlink("file", &link)?;
    refused(lsetxattr(&link, "user.a", b"1", NONE), Errno::PERM)?;
    setxattr(&link, "user.a", b"1", NONE)?;
    ensure_eq!(value(&path, "user.a")?, b"1");
    refused(setxattr(&path, "nokind.a", b"1", NONE), Errno::OPNOTSUPP)?;
    refused_with_any(
        setxattr(&path, "user.", b"1", NONE),
        &[Errno::INVAL, Errno::OPNOTSUPP],
    )
}

fn xattr_needs_the_permission_to_write(dir: &Path) -> Outcome {
    let (readable, secret) = (dir.join("readable"), dir.join("secret"));
    file_of(&readable, b"x", 0o644, (0, 0))?;
    file_of(&secret, b"x", 0o600, (0, 0))?;
    setxattr(&readable, "user.a", b"1", NONE)?;
    setxattr(&secret, "user.a", b"1", NONE)?;
    as_user(ALICE, || {
        ensure_eq!(value(&readable, "user.a")?, b"1");
        refused(setxattr(&readable, "user.a", b"2", NONE), Errno::ACCESS)?;
        refused(removexattr(&readable, "user.a"), Errno::ACCESS)?;
        refused(value(&secret, "user.a"), Errno::ACCESS)
    })?;
    let own = dir.join("own");
    file_of(&own, b"x", 0o600, (1000, 1000))?;
    as_user(ALICE, || {
        setxattr(&own, "user.a", b"2", NONE)?;
        ensure_eq!(value(&own, "user.a")?, b"2");
        Ok(())
    })
}

fn xattr_goes_with_the_file(dir: &Path) -> Outcome {
    let (first, second) = (dir.join("first"), dir.join("second"));
    fs::write(&first, b"x")?;
    setxattr(&first, "user.a", b"1", NONE)?;
    fs::hard_link(&first, &second)?;
    ensure_eq!(value(&second, "user.a")?, b"1");
    fs::rename(&second, dir.join("third"))?;
    setxattr(dir.join("third"), "user.a", b"2", NONE)?;
    ensure_eq!(value(&first, "user.a")?, b"2");
    fs::write(&first, b"new content")?;
    ensure_eq!(value(&first, "user.a")?, b"2");
    Ok(())
}
