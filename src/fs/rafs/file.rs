//! An open file of an image.
//!
//! What has been read once is read from the cache file of its blob, by the engine and into the
//! guest's own pages. The invariant: such a read covers extents of settled chunks only (`store`).

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use rustix::io::Errno;

use super::Contents;
use super::store::{self, CacheRange};
use crate::fs::{FileObject, ObjectFuture};
use crate::io::{Attempt, GuestBuffer, SyncKind, Transferred, WriteMode, blocking};

/// A regular file.
#[derive(Debug)]
pub(super) struct RafsFile {
    contents: Arc<Contents>,
    inode: u64,
    size: u64,
    extents: RwLock<Extents>,
}

/// Parts of a file that the cache files have, ascending, none adjacent to the next in both.
#[derive(Debug, Default)]
struct Extents(Vec<Extent>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// Where it begins in the file.
    start: u64,
    len: u64,
    blob: u32,
    /// Where it begins in the cache file.
    at: u64,
}

impl RafsFile {
    pub(super) fn new(contents: &Arc<Contents>, inode: u64, size: u64) -> Self {
        Self {
            contents: Arc::clone(contents),
            inode,
            size,
            extents: RwLock::default(),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Blob, and position in its cache file, of `len` bytes from `offset` on, if it has them.
    fn cached(&self, offset: u64, len: u64) -> Option<(u32, u64)> {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        extents.find(offset, len)
    }

    /// Passes `len` bytes from `offset` on to `each`, a piece at a time. May block.
    pub(super) fn read_blocking(
        &self,
        offset: u64,
        len: usize,
        each: &mut dyn FnMut(&[u8]),
    ) -> io::Result<()> {
        let Contents { image, store } = &*self.contents;
        let inode = image.inode(self.inode)?;
        let mut at = offset;
        for piece in store.pieces(&*inode, offset, len)? {
            store.read(image, &*inode, &piece, at, each)?;
            if store.is_settled(&piece) {
                self.add_extent(at - u64::from(piece.offset()), piece.cache_range());
            }
            at += u64::from(piece.len());
        }
        Ok(())
    }

    fn add_extent(&self, start: u64, range: CacheRange) {
        let mut extents = self.extents.write().unwrap_or_else(PoisonError::into_inner);
        extents.add(Extent {
            start,
            len: u64::from(range.len),
            blob: range.blob,
            at: range.offset,
        });
    }

    fn fill(&self, buffer: &mut GuestBuffer, offset: u64, len: usize) -> io::Result<usize> {
        let mut done = 0;
        let read = self.read_blocking(offset, len, &mut |bytes| {
            done += buffer.copy_in(done, bytes);
        });
        read.map(|()| done).map_err(|error| store::errno(&error))
    }
}

impl FileObject for RafsFile {
    fn read(self: Arc<Self>, mut buffer: GuestBuffer, offset: u64) -> ObjectFuture<Transferred> {
        let rest = self.size.saturating_sub(offset);
        let wanted = rest.min(buffer.len() as u64);
        let Ok(len) = usize::try_from(wanted) else {
            return Box::pin(async { (Err(Errno::INVAL.into()), buffer) });
        };
        if len == 0 {
            return Box::pin(async { (Ok(0), buffer) });
        }
        if let Some((blob, at)) = self.cached(offset, wanted)
            && let Some(file) = self.contents.store.file(blob).cloned()
        {
            buffer.truncate(len);
            // What is in the host's page cache is read at once.
            let filled = match file.try_read_at(&mut buffer, at) {
                Ok(Attempt::Done(n)) if n == len => {
                    return Box::pin(async move { (Ok(len), buffer) });
                }
                Ok(Attempt::Done(n) | Attempt::Partial(n)) => n,
                Ok(Attempt::WouldBlock) => 0,
                Err(error) => return Box::pin(async { (Err(error), buffer) }),
            };
            return Box::pin(async move {
                match file.read_at_from(buffer, filled, at).await {
                    // A guest would take the missing bytes for zeros.
                    (Ok(n), buffer) if n < len => {
                        self.contents.store.report_cache(blob);
                        (Err(Errno::IO.into()), buffer)
                    }
                    done => done,
                }
            });
        }
        Box::pin(async move {
            let read = blocking(move || {
                let result = self.fill(&mut buffer, offset, len);
                (result, buffer)
            });
            read.await
                .unwrap_or_else(|error| (Err(error), GuestBuffer::from_vec(Vec::new())))
        })
    }

    fn write(
        self: Arc<Self>,
        _: WriteMode,
        buffer: GuestBuffer,
        _: u64,
    ) -> ObjectFuture<Transferred> {
        Box::pin(async { (Err(Errno::ROFS.into()), buffer) })
    }

    fn sync(self: Arc<Self>, _: SyncKind) -> ObjectFuture<io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn allocate(self: Arc<Self>, _: u32, _: u64, _: u64) -> ObjectFuture<io::Result<()>> {
        Box::pin(async { Err(Errno::ROFS.into()) })
    }
}

impl Extents {
    fn find(&self, offset: u64, len: u64) -> Option<(u32, u64)> {
        let after = self.0.partition_point(|extent| extent.start <= offset);
        let extent = self.0.get(after.checked_sub(1)?)?;
        let skip = offset - extent.start;
        (skip.checked_add(len)? <= extent.len).then(|| (extent.blob, extent.at + skip))
    }

    fn add(&mut self, new: Extent) {
        if self.find(new.start, new.len).is_some() {
            return;
        }
        let at = self.0.partition_point(|extent| extent.start <= new.start);
        self.0.insert(at, new);
        self.merge(at);
        if let Some(before) = at.checked_sub(1) {
            self.merge(before);
        }
    }

    /// Merges the extent at `index` with the next one if that continues it.
    fn merge(&mut self, index: usize) {
        let Some(&[first, second]) = self.0.get(index..index + 2) else {
            return;
        };
        if first.blob == second.blob
            && first.start + first.len == second.start
            && first.at + first.len == second.at
        {
            self.0.remove(index + 1);
            if let Some(extent) = self.0.get_mut(index) {
                extent.len += second.len;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, len: u64, blob: u32, at: u64) -> Extent {
        Extent {
            start,
            len,
            blob,
            at,
        }
    }

    #[test]
    fn adjacent_extents_are_merged() {
        let mut extents = Extents::default();
        extents.add(extent(200, 100, 0, 1200));
        extents.add(extent(0, 100, 0, 1000));
        assert_eq!(extents.0.len(), 2);
        extents.add(extent(100, 100, 0, 1100));
        assert_eq!(extents.0, [extent(0, 300, 0, 1000)]);
        extents.add(extent(100, 100, 0, 1100));
        assert_eq!(extents.0, [extent(0, 300, 0, 1000)]);
    }

    #[test]
    fn extents_of_other_places_stay_apart() {
        let mut extents = Extents::default();
        extents.add(extent(0, 100, 0, 1000));
        extents.add(extent(100, 100, 1, 1100));
        extents.add(extent(200, 100, 1, 5000));
        assert_eq!(extents.0.len(), 3);
        assert_eq!(extents.find(10, 90), Some((0, 1010)));
        assert_eq!(extents.find(10, 91), None);
        assert_eq!(extents.find(250, 50), Some((1, 5050)));
        assert_eq!(extents.find(250, 51), None);
        assert_eq!(extents.find(u64::MAX, 1), None);
    }
}
