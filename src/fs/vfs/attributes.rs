//! The attributes of the directories that lead to mount points.
//!
//! The invariant: they don't change while the server runs.

use std::time::{Duration, SystemTime};

use rustix::fs::{FileType, RawMode};

use super::points::Point;
use crate::fs::{Attributes, Entry, NodeId, Timestamp};

/// How long the guest may rely on what it knows of them: file systems may be mounted and unmounted.
pub(super) const TTL: Duration = Duration::from_secs(1);

/// Everyone may read and search them.
const MODE: RawMode = 0o555;

/// Preferred size of an operation, bytes.
pub(super) const BLOCK: u32 = 4096;

/// The host's time.
pub(super) fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: since.subsec_nanos(),
    }
}

/// The attributes of `point`, which was made at this time.
pub(super) fn attributes_of(point: &Point, made: Timestamp) -> Attributes {
    Attributes {
        inode: point.number,
        accessed: made,
        modified: made,
        changed: made,
        mode: FileType::Directory.as_raw_mode() | MODE,
        links: 2,
        block_size: BLOCK,
        ..Attributes::default()
    }
}

/// The entry of `point`.
pub(super) fn entry_of(point: &Point, made: Timestamp) -> Entry {
    Entry {
        node: NodeId(point.number),
        generation: 0,
        attributes: attributes_of(point, made),
        attribute_ttl: TTL,
        entry_ttl: TTL,
        submount: false,
    }
}

/// Whether these are the attributes of a directory.
pub(super) fn is_directory(attributes: &Attributes) -> bool {
    FileType::from_raw_mode(attributes.mode) == FileType::Directory
}
