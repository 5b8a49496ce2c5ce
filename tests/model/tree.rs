//! The final content of a host directory, in a form in which two directories can be compared.
//!
//! Times are not compared, as two directories are not written at the same instant. The invariant:
//! hard links are told from copies: files that are one inode have the same number.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// One name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    /// The first name of the same inode.
    first: PathBuf,
    content: Vec<u8>,
    attributes: Vec<(String, Vec<u8>)>,
}

/// All names below a directory.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let (mut found, mut inodes) = (BTreeMap::new(), BTreeMap::new());
    let mut left = vec![PathBuf::new()];
    while let Some(directory) = left.pop() {
        let entries = std::fs::read_dir(root.join(&directory)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            let name = directory.join(name);
            let path = root.join(&name);
            let metadata = std::fs::symlink_metadata(&path).unwrap();
            let first = inodes.entry(metadata.ino()).or_insert_with(|| name.clone());
            let content = if metadata.is_dir() {
                left.push(name.clone());
                Vec::new()
            } else if metadata.is_symlink() {
                let target = std::fs::read_link(&path).unwrap();
                target.into_os_string().into_encoded_bytes()
            } else if metadata.is_file() {
                std::fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            let entry = Entry {
                mode: metadata.permissions().mode(),
                owner: (metadata.uid(), metadata.gid()),
                links: metadata.nlink(),
                first: first.clone(),
                content,
                attributes: attributes(&path),
            };
            found.insert(name, entry);
        }
    }
    found
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0);
    let names = names.map(|name| String::from_utf8(name.to_owned()).unwrap());
    let mut found = Vec::new();
    for name in names.filter(|name| name.starts_with("user.")) {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, &name, &mut value[..]).unwrap();
        value.truncate(length);
        found.push((name, value));
    }
    found.sort();
    found
}
