//! What an operator can see of several file systems under one mount: `impl Inspect`.
//!
//! A list goes through the mounts in the order of their numbers. Where one ends, the next page begins
//! at the next. The invariant: node ids and paths are those that the guest knows.

use super::Vfs;
use super::points::Points;
use super::table::{MOUNT_SHIFT, Mount, Table, Target};
use crate::fs::{Dropped, Inspect, KnownInode, NodeId, OpenHandle, Page};

impl Inspect for Vfs {
    fn inodes(&self, from: u64, limit: usize) -> Page<KnownInode> {
        self.pages(from, limit, |table, number, mount, fs, from, limit| {
            let page = fs.inodes(from, limit);
            let outward = |mut inode: KnownInode| {
                inode.node = table.outward(number, inode.node).unwrap_or(NodeId(0));
                inode.path = below(&table.points, mount, inode.path);
                inode
            };
            Page {
                entries: page.entries.into_iter().map(outward).collect(),
                next: page.next,
            }
        })
    }

    fn handles(&self, from: u64, limit: usize) -> Page<OpenHandle> {
        self.pages(from, limit, |table, number, mount, fs, from, limit| {
            let page = fs.handles(from, limit);
            let outward = |mut open: OpenHandle| {
                open.node = table.outward(number, open.node).unwrap_or(NodeId(0));
                open.path = below(&table.points, mount, open.path);
                open
            };
            Page {
                entries: page.entries.into_iter().map(outward).collect(),
                next: page.next,
            }
        })
    }

    fn path(&self, node: NodeId) -> Option<Vec<u8>> {
        let table = self.shards.get();
        match table.resolve(node).ok()? {
            Target::Point(point) => Some(table.points.path_of(point.number)),
            Target::Node(at) => {
                let path = at.fs.inspect()?.path(at.node);
                below(&table.points, table.mount(at.mount)?, path)
            }
        }
    }

    fn drop_caches(&self) -> Dropped {
        let table = self.shards.get();
        let all = table.all().filter_map(|mount| mount.fs.inspect());
        all.fold(Dropped::default(), |sum, fs| sum + fs.drop_caches())
    }
}

impl Vfs {
    /// A page of the lists of all file systems, one after the other.
    fn pages<T>(
        &self,
        from: u64,
        limit: usize,
        page: impl Fn(&Table, u16, &Mount, &dyn Inspect, u64, usize) -> Page<T>,
    ) -> Page<T> {
        let table = self.shards.get();
        let (first, mut from) = (from >> MOUNT_SHIFT, from & ((1 << MOUNT_SHIFT) - 1));
        let first = usize::try_from(first).unwrap_or(usize::MAX).max(1);
        let mut entries = Vec::new();
        for number in first..=table.mounts.len() {
            let number = u16::try_from(number).unwrap_or(u16::MAX);
            let start = u64::from(number) << MOUNT_SHIFT;
            let room = limit.saturating_sub(entries.len());
            if room == 0 {
                let next = Some(start);
                return Page { entries, next };
            }
            let mount = table.mount(number);
            if let Some((mount, fs)) = mount.and_then(|mount| Some((mount, mount.fs.inspect()?))) {
                let found = page(&table, number, mount, fs, from, room);
                entries.extend(found.entries);
                if let Some(next) = found.next {
                    let next = Some(start | next);
                    return Page { entries, next };
                }
            }
            from = 0;
        }
        Page {
            entries,
            next: None,
        }
    }
}

/// The path below the point of a mount.
fn below(points: &Points, mount: &Mount, path: Option<Vec<u8>>) -> Option<Vec<u8>> {
    let mut whole = points.path_of(mount.point);
    match path?.as_slice() {
        b"/" if !whole.is_empty() => {}
        path => whole.extend_from_slice(path),
    }
    Some(whole)
}
