//! What an operator can see of several file systems under one mount: `impl Inspect`.
//!
//! A list goes through the mounts in the order of their numbers. Where one ends, the next page begins
//! at the next. The invariant: node ids and paths are those that the guest knows.

use std::sync::atomic::Ordering;

use super::Vfs;
use super::points::Points;
use super::table::{MOUNT_SHIFT, Mount, Table, Target};
use crate::fs::{Dropped, Inspect, KnownInode, MountUsage, NodeId, OpenHandle, Page, Usage};

impl Inspect for Vfs {
    fn inode(&self, node: NodeId) -> Option<KnownInode> {
        let table = self.shards.get();
        let Target::Node(at) = table.resolve(node).ok()? else {
            return None;
        };
        let mut inode = at.fs.inspect()?.inode(at.node)?;
        inode.outward(&table, at.mount, table.mount(at.mount)?);
        Some(inode)
    }

    fn inodes(&self, from: u64, limit: usize) -> Page<KnownInode> {
        self.pages(from, limit, |fs, from, limit| fs.inodes(from, limit))
    }

    fn handles(&self, from: u64, limit: usize) -> Page<OpenHandle> {
        self.pages(from, limit, |fs, from, limit| fs.handles(from, limit))
    }

    fn unlisted(&self) -> Vec<Vec<u8>> {
        let table = self.shards.get();
        let of_mount = |mount: &Mount| {
            let root = || vec![b"/".to_vec()];
            let unlisted = mount.fs.inspect().map_or_else(root, |fs| fs.unlisted());
            let paths = unlisted.into_iter();
            paths
                .filter_map(|path| below(&table.points, mount, Some(path)))
                .collect::<Vec<_>>()
        };
        table.all().flat_map(of_mount).collect()
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
    /// The sum of all mounts, with the evictions of those that were unmounted.
    pub(super) fn in_use(&self) -> Usage {
        let mut sum: Usage = self.shards.get().all().map(|mount| mount.fs.usage()).sum();
        // Relaxed: who has counted it has replaced the table first, under a lock.
        sum.evictions += self.evictions_before.load(Ordering::Relaxed);
        sum
    }

    /// What each mount uses.
    pub(super) fn in_use_by_mount(&self) -> Vec<MountUsage> {
        let table = self.shards.get();
        let usage = |mount: &Mount| {
            let point = below(&table.points, mount, Some(b"/".to_vec()));
            MountUsage {
                mount: String::from_utf8_lossy(&point.unwrap_or_default()).into_owned(),
                usage: mount.fs.usage(),
            }
        };
        table.all().map(usage).collect()
    }

    /// A page of the lists of all file systems, one after the other.
    fn pages<T: Outward>(
        &self,
        from: u64,
        limit: usize,
        page: impl Fn(&dyn Inspect, u64, usize) -> Page<T>,
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
                let mut found = page(fs, from, room);
                for entry in &mut found.entries {
                    entry.outward(&table, number, mount);
                }
                entries.append(&mut found.entries);
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

/// An entry of a list of a mounted file system.
trait Outward {
    /// Gives it the node id and the path that the guest knows.
    fn outward(&mut self, table: &Table, number: u16, mount: &Mount);
}

impl Outward for KnownInode {
    fn outward(&mut self, table: &Table, number: u16, mount: &Mount) {
        outward(&mut self.node, &mut self.path, table, number, mount);
    }
}

impl Outward for OpenHandle {
    fn outward(&mut self, table: &Table, number: u16, mount: &Mount) {
        outward(&mut self.node, &mut self.path, table, number, mount);
    }
}

fn outward(
    node: &mut NodeId,
    path: &mut Option<Vec<u8>>,
    table: &Table,
    number: u16,
    mount: &Mount,
) {
    *node = table.outward(number, *node).unwrap_or(NodeId(0));
    *path = below(&table.points, mount, path.take());
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
