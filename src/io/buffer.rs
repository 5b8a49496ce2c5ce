//! Guest buffers: memory shared with a guest, as the source or target of one file operation.
//!
//! The guest may change the memory at any time. A buffer is a list of [`FileVolatileBuf`]s and a
//! guard that keeps the memory behind them mapped, because `FileVolatileBuf` itself pins nothing.
//! The invariant: as long as a [`GuestBuffer`] exists, all of its bytes stay mapped.

#![allow(unsafe_code, reason = "raw guest memory becomes buffers here")]

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use fuse_backend_rs::file_buf::{FileVolatileBuf, FileVolatileSlice};
use smallvec::SmallVec;

/// Keeps the memory of a [`GuestBuffer`] mapped while it is held.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// The maximum number of segments in one vectored operation (`IOV_MAX`, uapi `linux/uio.h`).
pub(crate) const IOV_MAX: usize = 1024;

/// The `iovec`s of one operation; up to eight are on the stack.
pub(crate) type IoVecs = SmallVec<[libc::iovec; 8]>;

/// Scattered memory, shared with a guest, that one file operation reads into or writes from.
///
/// The bytes are not accessed here, except by the copy methods: the kernel moves the data directly
/// between the file and the segments.
pub struct GuestBuffer {
    pieces: SmallVec<[FileVolatileBuf; 4]>,
    len: usize,
    guard: Guard,
}

impl GuestBuffer {
    /// Creates a buffer from `pieces` (address and length in bytes, in order), kept mapped by
    /// `guard`. Pieces of length 0 are left out, and adjacent ones are merged.
    ///
    /// # Safety
    ///
    /// Each piece must lie in memory that is mapped readable and writable until `guard` is
    /// dropped, and no Rust reference to that memory may exist while an operation runs.
    pub unsafe fn from_raw_pieces(
        pieces: impl IntoIterator<Item = (*mut u8, usize)>,
        guard: Guard,
    ) -> Self {
        let mut buffer = Self {
            pieces: SmallVec::new(),
            len: 0,
            guard,
        };
        let (mut start, mut len) = (std::ptr::null_mut::<u8>(), 0);
        for (next, next_len) in pieces {
            if next_len == 0 {
                continue;
            }
            if next.addr() == start.addr() + len {
                len += next_len;
                continue;
            }
            // SAFETY: the caller guarantees it for the pieces that were merged into this one.
            unsafe { buffer.push(start, len) };
            (start, len) = (next, next_len);
        }
        // SAFETY: as above.
        unsafe { buffer.push(start, len) };
        buffer
    }

    /// Adds a piece.
    ///
    /// # Safety
    ///
    /// As for [`from_raw_pieces`](Self::from_raw_pieces).
    unsafe fn push(&mut self, start: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        self.len += len;
        // Adjacent pieces may belong to two mappings, so the merged piece uses the exposed address.
        let start = std::ptr::with_exposed_provenance_mut(start.expose_provenance());
        // SAFETY: the caller guarantees that `start..start + len` stays mapped as long as the
        // guard, which the buffer owns along with this piece.
        self.pieces
            .push(unsafe { FileVolatileBuf::from_raw_ptr(start, len, len) });
    }

    /// Creates a buffer that owns its memory, for use without a guest. Read the result of an
    /// operation with [`copy_out`](Self::copy_out).
    #[must_use]
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let len = bytes.len();
        let memory: Arc<Owned> = Arc::new(Owned(Box::into_raw(bytes.into_boxed_slice())));
        let start = memory.0.cast::<u8>();
        // SAFETY: `start..start + len` is the boxed slice, whose only owner is the guard; it is
        // reached through raw pointers alone until the guard drops it.
        unsafe { Self::from_raw_pieces([(start, len)], memory) }
    }

    /// Bytes in the buffer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Truncates the buffer to `len` bytes, if it is longer.
    pub fn truncate(&mut self, len: usize) {
        let mut left = len;
        self.pieces.retain(|piece| {
            let keep = piece.len().min(left);
            left -= keep;
            // SAFETY: `keep` is at most the size the piece has, which is within its capacity.
            unsafe { piece.set_size(keep) };
            keep > 0
        });
        self.len = self.len.min(len);
    }

    /// The space behind the initialized bytes of each of `bufs`: the target of a read.
    ///
    /// `FileVolatileBuf` pins nothing. Who made one, by an unsafe function, has promised that the
    /// memory outlives every copy of it. The buffer holds copies until the operation ends, also if
    /// its future is dropped before: that is how long the memory must stay. Memory that may be
    /// unmapped meanwhile, as a guest's may, needs a guard: see
    /// [`from_raw_pieces`](Self::from_raw_pieces).
    #[must_use]
    pub fn unfilled(bufs: &[FileVolatileBuf]) -> Self {
        Self::of_parts(bufs, |buf| (buf.len(), buf.cap() - buf.len()))
    }

    /// The initialized bytes of `bufs`: the source of a write. The memory must stay as long as for
    /// [`unfilled`](Self::unfilled).
    #[must_use]
    pub fn filled(bufs: &[FileVolatileBuf]) -> Self {
        Self::of_parts(bufs, |buf| (0, buf.len()))
    }

    /// The `part` (offset and length) of each of `bufs`.
    fn of_parts(
        bufs: &[FileVolatileBuf],
        part: impl Fn(&FileVolatileBuf) -> (usize, usize),
    ) -> Self {
        let pieces = bufs.iter().map(|buf| {
            let (offset, len) = part(buf);
            (raw_parts(buf).0.wrapping_add(offset), len)
        });
        // SAFETY: the part lies within the capacity of `buf`, whose maker guarantees that the
        // memory is mapped as long as a copy of `buf` exists, and accessed by nobody but through
        // volatile accesses. The pieces are such copies, so no guard is needed beyond them.
        unsafe { Self::from_raw_pieces(pieces, Arc::new(())) }
    }

    /// Up to `len` bytes from `offset` on, in order, for a file system that reads or writes them by
    /// itself. The slices can't outlive the buffer, which keeps the memory mapped.
    pub fn volatile_slices(
        &self,
        offset: usize,
        len: usize,
    ) -> impl Iterator<Item = FileVolatileSlice<'_>> {
        let mut left = len;
        self.io_vecs(offset).into_iter().map_while(move |vec| {
            let len = vec.iov_len.min(left);
            left -= len;
            // SAFETY: `iov_base..+iov_len` stays mapped while `self` is borrowed, and no Rust
            // reference to it exists, as `from_raw_pieces` demands.
            let slice = || unsafe { FileVolatileSlice::from_raw_ptr(vec.iov_base.cast(), len) };
            (len > 0).then(slice)
        })
    }

    /// The guard that keeps the memory mapped.
    #[must_use]
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Copies bytes from `offset` on into `target` until either ends, and returns their number. For
    /// file systems whose data are in memory. A guest may change the bytes meanwhile.
    pub fn copy_out(&self, offset: usize, target: &mut [u8]) -> usize {
        let mut done = 0;
        for vec in self.io_vecs(offset) {
            let n = vec.iov_len.min(target.len() - done);
            let to = target[done..done + n].as_mut_ptr();
            // SAFETY: `iov_base..+n` stays mapped while `self` lives; `to..+n` is `target`'s
            // own, so the two don't overlap.
            unsafe { std::ptr::copy_nonoverlapping(vec.iov_base.cast::<u8>(), to, n) };
            done += n;
        }
        done
    }

    /// Copies `source` into the buffer at `offset` until either ends, and returns the number of
    /// bytes. For file systems whose data are in memory. A guest may change the bytes at any time.
    pub fn copy_in(&mut self, offset: usize, source: &[u8]) -> usize {
        let mut done = 0;
        for vec in self.io_vecs(offset) {
            let n = vec.iov_len.min(source.len() - done);
            let from = source[done..done + n].as_ptr();
            // SAFETY: `iov_base..+n` stays mapped while `self` lives, and is no memory of
            // `source`'s, to which a guest has no access, so the two don't overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, vec.iov_base.cast::<u8>(), n) };
            done += n;
        }
        done
    }

    /// The `iovec`s of the bytes from `offset` on, in order.
    pub(crate) fn io_vecs(&self, offset: usize) -> IoVecs {
        let mut skip = offset;
        let mut vecs = IoVecs::new();
        for piece in &self.pieces {
            let (base, len) = raw_parts(piece);
            if skip >= len {
                skip -= len;
                continue;
            }
            vecs.push(libc::iovec {
                iov_base: base.wrapping_add(skip).cast(),
                iov_len: len - skip,
            });
            skip = 0;
        }
        vecs
    }
}

impl From<FileVolatileBuf> for GuestBuffer {
    /// The whole capacity, whatever part of it is initialized. For how long the memory must stay,
    /// and for one of the two parts, see [`unfilled`](Self::unfilled) and
    /// [`filled`](Self::filled).
    fn from(buf: FileVolatileBuf) -> Self {
        Self::of_parts(&[buf], |buf| (0, buf.cap()))
    }
}

impl fmt::Debug for GuestBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBuffer")
            .field("pieces", &self.pieces.len())
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

/// Address and length of a piece, without a reference to the bytes, which others may change.
fn raw_parts(piece: &FileVolatileBuf) -> (*mut u8, usize) {
    let mut empty = *piece;
    // SAFETY: 0 bytes are within any capacity.
    unsafe { empty.set_size(0) };
    (empty.io_slice().as_ptr().cast_mut(), piece.len())
}

/// Heap memory that is only reached through raw pointers until it is freed.
struct Owned(*mut [u8]);

// SAFETY: the pointer is the only one to memory that belongs to this value alone.
unsafe impl Send for Owned {}
// SAFETY: nothing is read or written through a shared `Owned`; users access the memory by raw
// address and order their accesses themselves.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the pointer came from `Box::into_raw` and is turned back only here.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_pieces_are_merged_and_empty_ones_dropped() {
        let mut memory = vec![0u8; 64];
        let start = memory.as_mut_ptr();
        let at = |n: usize| start.wrapping_add(n);
        let pieces = [(at(0), 8), (at(8), 8), (at(20), 0), (at(32), 16)];
        // SAFETY: all pieces lie in `memory`, which outlives the buffer and isn't touched.
        let buffer = unsafe { GuestBuffer::from_raw_pieces(pieces, Arc::new(())) };
        assert_eq!(buffer.len(), 32);
        assert_eq!(buffer.io_vecs(0).len(), 2);
    }

    #[test]
    fn io_vecs_start_at_the_offset() {
        let mut memory = vec![0u8; 64];
        let start = memory.as_mut_ptr();
        let pieces = [(start, 10), (start.wrapping_add(20), 10)];
        // SAFETY: all pieces lie in `memory`, which outlives the buffer and isn't touched.
        let buffer = unsafe { GuestBuffer::from_raw_pieces(pieces, Arc::new(())) };
        let vecs = buffer.io_vecs(13);
        assert_eq!(vecs.len(), 1);
        assert_eq!(vecs[0].iov_base.cast::<u8>(), start.wrapping_add(23));
        assert_eq!(vecs[0].iov_len, 7);
    }

    #[test]
    fn truncating_ends_within_a_piece() {
        let mut memory = vec![0u8; 64];
        let start = memory.as_mut_ptr();
        let pieces = [
            (start, 10),
            (start.wrapping_add(20), 10),
            (start.wrapping_add(40), 10),
        ];
        // SAFETY: all pieces lie in `memory`, which outlives the buffer and isn't touched.
        let mut buffer = unsafe { GuestBuffer::from_raw_pieces(pieces, Arc::new(())) };
        buffer.truncate(100);
        assert_eq!(buffer.len(), 30);
        buffer.truncate(13);
        let lens: Vec<_> = buffer.io_vecs(0).iter().map(|vec| vec.iov_len).collect();
        assert_eq!((buffer.len(), lens), (13, vec![10, 3]));
    }

    #[test]
    fn volatile_buf_is_target_where_unfilled_and_source_where_filled() {
        let mut memory = vec![0u8; 64];
        let start = memory.as_mut_ptr();
        // SAFETY: the bytes lie in `memory`, which outlives all buffers and isn't touched.
        let part = unsafe { FileVolatileBuf::from_raw_ptr(start, 10, 30) };
        // SAFETY: as above.
        let empty = unsafe { FileVolatileBuf::from_raw_ptr(start.wrapping_add(40), 0, 20) };
        let starts_and_lens = |buffer: GuestBuffer| -> Vec<_> {
            let slices = buffer.volatile_slices(0, 64);
            slices
                .map(|slice| (slice.as_ptr().addr() - start.addr(), slice.len()))
                .collect()
        };
        let bufs = [part, empty];
        assert_eq!(
            starts_and_lens(GuestBuffer::unfilled(&bufs)),
            [(10, 20), (40, 20)]
        );
        assert_eq!(starts_and_lens(GuestBuffer::filled(&bufs)), [(0, 10)]);
        assert_eq!(starts_and_lens(GuestBuffer::from(part)), [(0, 30)]);
    }

    #[test]
    fn own_memory_is_copied_out_from_any_offset() {
        let buffer = GuestBuffer::from_vec((0..100).collect());
        let mut out = [0; 10];
        assert_eq!(buffer.copy_out(95, &mut out), 5);
        assert_eq!(out[..5], [95, 96, 97, 98, 99]);
    }
}
