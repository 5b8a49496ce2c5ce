//! File data between a file system of fuse-backend-rs and the guest's own pages.
//!
//! The invariant: data that a file system moves with `write_from` and `read_to` are not copied
//! here; its file reads and writes the guest's pages.

use std::io;

use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use smallvec::SmallVec;

use crate::io::GuestBuffer;

/// The most slices in one call of a file system's file (`IOV_MAX`, uapi `linux/uio.h`).
const MAX_SLICES: usize = 1024;

/// Where a READ puts its data: the reply's space in the guest's memory.
#[derive(Debug)]
pub(super) struct Writer {
    buffer: GuestBuffer,
    filled: usize,
}

impl Writer {
    pub(super) fn new(buffer: GuestBuffer) -> Self {
        Self { buffer, filled: 0 }
    }

    /// How many bytes have been put there, and the buffer.
    pub(super) fn finish(self) -> (usize, GuestBuffer) {
        (self.filled, self.buffer)
    }
}

impl ZeroCopyWriter for Writer {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let room = self.available_bytes().min(count);
        let done = transfer((&self.buffer, self.filled, room), offset, |slices, at| {
            file.read_vectored_at_volatile(slices, at)
        })?;
        self.filled += done;
        Ok(done)
    }

    fn available_bytes(&self) -> usize {
        self.buffer.len() - self.filled
    }
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = self.buffer.copy_in(self.filled, bytes);
        self.filled += done;
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a WRITE takes its data from: the request in the guest's memory.
#[derive(Debug)]
pub(super) struct Reader {
    buffer: GuestBuffer,
    taken: usize,
}

impl Reader {
    pub(super) fn new(buffer: GuestBuffer) -> Self {
        Self { buffer, taken: 0 }
    }

    /// The buffer.
    pub(super) fn finish(self) -> GuestBuffer {
        self.buffer
    }
}

impl ZeroCopyReader for Reader {
    fn read_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let left = (self.buffer.len() - self.taken).min(count);
        let done = transfer((&self.buffer, self.taken, left), offset, |slices, at| {
            file.write_vectored_at_volatile(slices, at)
        })?;
        if done == 0 && left > 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.taken += done;
        Ok(done)
    }
}

impl io::Read for Reader {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let done = self.buffer.copy_out(self.taken, bytes);
        self.taken += done;
        Ok(done)
    }
}

/// Calls `act` with the `len` bytes of `buffer` from `start` on, and the position in the file: once
/// unless the guest's memory is in more pieces than one call takes. Ends with the first short call.
fn transfer(
    (buffer, start, len): (&GuestBuffer, usize, usize),
    offset: u64,
    mut act: impl FnMut(&[FileVolatileSlice<'_>], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let slices: SmallVec<[FileVolatileSlice<'_>; 8]> = buffer.volatile_slices(start, len).collect();
    let mut done = 0;
    for batch in slices.chunks(MAX_SLICES) {
        let wanted: usize = batch.iter().map(FileVolatileSlice::len).sum();
        match act(batch, offset.saturating_add(done as u64)) {
            Ok(n) => {
                done += n.min(wanted);
                if n < wanted {
                    break;
                }
            }
            Err(error) if done == 0 => return Err(error),
            // What is done is done; the error occurs again.
            Err(_) => break,
        }
    }
    Ok(done)
}
