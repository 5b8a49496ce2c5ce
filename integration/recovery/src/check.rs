//! Checks that everything is as the model says, by the guest's requests and on the host.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use vmm::Session;
use vmm::fuse::{Client, Handle};

use crate::Failure;
use crate::guest::{Guest, differs, directory};
use crate::model::Kind;

/// Checks all names, nodes, contents and open files of one guest thread that has no request in flight.
pub(crate) fn guest(
    fs: &mut Client<Session>,
    guest: &mut Guest,
    share: &Path,
) -> Result<(), Failure> {
    by_requests(fs, guest)?;
    for dir in 0..guest.model.dirs.len() {
        on_host(guest, dir, share)?;
    }
    Ok(())
}

fn noticed(guest: &Guest, place: &str, what: &str) -> Failure {
    Failure::Noticed(format!("guest {}: {place}: {what}", guest.model.guest))
}

fn by_requests(fs: &mut Client<Session>, guest: &mut Guest) -> Result<(), Failure> {
    // Before names are looked up: a lookup might restore an inode that the server has lost.
    for (key, node) in &guest.model.nodes {
        if node.links == 0 && !guest.nameless {
            // The host frees it once it is not open any more.
            continue;
        }
        let place = || format!("node {}", node.nodeid);
        let attr = fs.getattr(node.nodeid)?.attr;
        if let Some(what) = guest.is_as(*key, node.nodeid, &attr) {
            return Err(noticed(guest, &place(), &what));
        }
        if let Kind::Link(target) = &node.kind {
            // On some hosts a link without a name can't be read.
            if node.links > 0 && fs.readlink(node.nodeid)? != *target {
                return Err(noticed(guest, &place(), "it leads elsewhere"));
            }
        }
    }
    let names: Vec<_> = guest.model.names.iter().map(|(n, k)| (*n, *k)).collect();
    for (name, key) in names {
        let dir = guest.model.dirs.get(name.dir).copied().unwrap_or(0);
        let entry = fs.lookup(dir, &name.c())?;
        if let Some(node) = guest.model.nodes.get_mut(&key) {
            node.lookups += 1;
        }
        if let Some(what) = guest.is_as(key, entry.nodeid, &entry.attr) {
            return Err(noticed(guest, &format!("{name:?}"), &what));
        }
    }
    for open in &guest.model.open {
        let Some(node) = guest.model.nodes.get(&open.key) else {
            continue;
        };
        if let Kind::File(content) = &node.kind {
            let found = fs.read(node.nodeid, Handle::raw(open.fh), 0, 128 << 10)?;
            if found != *content {
                let what = differs(&found, content);
                return Err(noticed(guest, &format!("{open:?}"), &what));
            }
        }
    }
    Ok(())
}

fn on_host(guest: &Guest, dir: usize, share: &Path) -> Result<(), Failure> {
    let path = share.join(directory(guest.model.guest, dir));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&path)? {
        found.push(entry?.file_name().to_string_lossy().into_owned());
    }
    found.sort();
    let wanted = guest.model.listed(dir);
    if found != wanted {
        let what = format!("{found:?} instead of {wanted:?}");
        return Err(noticed(guest, &path.display().to_string(), &what));
    }
    for (name, key) in guest.model.names.iter().filter(|(name, _)| name.dir == dir) {
        let path = path.join(name.text());
        let wrong = |what: &str| noticed(guest, &path.display().to_string(), what);
        let kind = guest.model.nodes.get(key).map(|node| &node.kind);
        let found = std::fs::symlink_metadata(&path)?.file_type();
        // Before it is opened: opening a pipe would wait.
        let right = match kind {
            Some(Kind::File(_)) => found.is_file(),
            Some(Kind::Link(_)) => found.is_symlink(),
            Some(Kind::Directory) => found.is_dir(),
            Some(Kind::Pipe) => found.is_fifo(),
            None => false,
        };
        if !right {
            return Err(wrong(&format!("it has another type: {found:?}")));
        }
        match kind {
            Some(Kind::File(content)) => {
                let found = std::fs::read(&path)?;
                if found != *content {
                    return Err(wrong(&differs(&found, content)));
                }
            }
            Some(Kind::Link(target)) => {
                let found = std::fs::read_link(&path)?;
                if found.as_os_str().as_encoded_bytes() != target.as_slice() {
                    return Err(wrong("it leads elsewhere"));
                }
            }
            Some(Kind::Directory | Kind::Pipe) | None => (),
        }
    }
    Ok(())
}

/// Closes and forgets everything. The nodes must be unknown afterwards: no lookup was lost, and none
/// was counted twice.
pub(crate) fn forget(fs: &mut Client<Session>, guest: &mut Guest) -> Result<(), Failure> {
    let opened = std::mem::take(&mut guest.model.open);
    for open in opened {
        let nodeid = guest
            .model
            .nodes
            .get(&open.key)
            .map_or(0, |node| node.nodeid);
        fs.release(nodeid, Handle::raw(open.fh))?;
        if fs.read(nodeid, Handle::raw(open.fh), 0, 1).is_ok() {
            return Err(noticed(guest, &format!("{open:?}"), "it is still open"));
        }
    }
    for node in guest.model.nodes.values() {
        fs.forget(node.nodeid, node.lookups)?;
        if fs.getattr(node.nodeid).is_ok() {
            let lookups = node.lookups;
            let what = format!("it is still known after {lookups} lookups were forgotten");
            return Err(noticed(guest, &format!("node {}", node.nodeid), &what));
        }
    }
    Ok(())
}
