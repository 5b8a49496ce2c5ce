//! Lists as JSON: inodes, open files, mounts.
//!
//! The invariant: a page has at most [`MAX`] entries, so a reply has a bounded size.

use rustix::fs::FileType;
use serde_json::{Value, json};

use crate::control::{Call, Failure};
use crate::fs::{Dropped, HandleKind, Inspect, KnownInode, NodeId, OpenHandle, Page};
use crate::fuse::FileCounts;
use crate::limits::{LIMITED, Settings};
use crate::server::mounts::Mounts;

/// How many entries a page has unless the client says otherwise, and at most.
const DEFAULT: u64 = 1000;
const MAX: u64 = 10_000;

pub(super) fn inodes(fs: &dyn Inspect, call: &Call) -> Result<Value, Failure> {
    let (after, limit) = range(call)?;
    Ok(page(fs, "inodes", &fs.inodes(after, limit), inode))
}

pub(super) fn handles(fs: &dyn Inspect, call: &Call) -> Result<Value, Failure> {
    let (after, limit) = range(call)?;
    Ok(page(fs, "handles", &fs.handles(after, limit), handle))
}

/// Where a page begins, and how long it is.
fn range(call: &Call) -> Result<(u64, usize), Failure> {
    Ok((call.number("after", 0)?, limit(call, DEFAULT)?))
}

/// How many entries a client wants.
pub(super) fn limit(call: &Call, otherwise: u64) -> Result<usize, Failure> {
    let limit = call.number("limit", otherwise)?;
    if !(1..=MAX).contains(&limit) {
        return Err(Failure::argument("limit", "from 1 to 10000"));
    }
    Ok(usize::try_from(limit).unwrap_or(usize::MAX))
}

/// What was done with files, with their paths as far as `fs` knows them.
pub(super) fn busiest(fs: Option<&dyn Inspect>, files: Vec<(NodeId, FileCounts)>) -> Value {
    let files: Vec<_> = files
        .into_iter()
        .map(|(node, counts)| {
            let path = fs.and_then(|fs| fs.path(node));
            json!({
                "node": node.0,
                "requests": counts.requests,
                "bytes_read": counts.bytes_read,
                "bytes_written": counts.bytes_written,
                "path": path.as_deref().map(text),
            })
        })
        .collect();
    json!({ "files": files })
}

fn page<T>(fs: &dyn Inspect, name: &str, page: &Page<T>, show: impl Fn(&T) -> Value) -> Value {
    let entries: Vec<_> = page.entries.iter().map(show).collect();
    let mut list = json!({ name: entries, "next": page.next });
    // Once for all pages.
    if page.next.is_none() {
        let unlisted = fs.unlisted();
        if !unlisted.is_empty() {
            list["unlisted"] = unlisted.iter().map(|path| text(path)).collect();
        }
    }
    list
}

fn inode(inode: &KnownInode) -> Value {
    json!({
        "node": inode.node.0,
        "inode": inode.number,
        "device": format!("{}:{}", inode.device >> 32, inode.device & u64::from(u32::MAX)),
        "kind": kind(inode.kind),
        "lookups": inode.lookups,
        "open": inode.is_open,
        "path": inode.path.as_deref().map(text),
    })
}

fn handle(open: &OpenHandle) -> Value {
    json!({
        "handle": open.handle.0,
        "node": open.node.0,
        "kind": match open.kind {
            HandleKind::File => "file",
            HandleKind::Directory => "directory",
        },
        "access": match open.flags.cast_signed() & libc::O_ACCMODE {
            libc::O_RDONLY => "read",
            libc::O_WRONLY => "write",
            _ => "read-write",
        },
        "path": open.path.as_deref().map(text),
    })
}

pub(super) fn dropped(dropped: Dropped) -> Value {
    json!({
        "closed_files": dropped.closed_files,
        "unreported_opens": dropped.unreported_opens,
        "inode_descriptors": dropped.inode_descriptors,
    })
}

/// The limits that are set.
pub(super) fn limits(settings: &Settings) -> Value {
    let rates = LIMITED.into_iter().zip(settings.rates());
    let limits = rates
        .filter_map(|(name, rate)| rate.map(|rate| (name.to_owned(), rate.to_string().into())));
    Value::Object(limits.collect())
}

pub(super) fn mounts(mounts: &Mounts) -> Value {
    let mounts = mounts.all().iter().map(|mounted| {
        json!({
            "point": mounted.point.to_string(),
            "source": mounted.source,
            "readonly": mounted.readonly,
        })
    });
    mounts.collect()
}

/// The name of a file's type.
fn kind(mode: u32) -> &'static str {
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::CharacterDevice => "character device",
        FileType::BlockDevice => "block device",
        _ => "unknown",
    }
}

/// A path as a text. Bytes that are no UTF-8 are replaced.
fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
