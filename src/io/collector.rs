//! Reads from a source that only fills volatile slices, into ordinary memory.
//!
//! The invariant: no more than the wanted number of bytes is collected, and all of them are
//! initialized.

#![allow(unsafe_code, reason = "a slice becomes a volatile one here")]

use std::io::{self, Write};

use fuse_backend_rs::api::filesystem::ZeroCopyWriter;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

/// Collects bytes, up to a limit.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    bytes: Vec<u8>,
    limit: usize,
}

impl Collector {
    /// Collects up to `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    /// The collected bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn room(&self) -> usize {
        self.limit - self.bytes.len()
    }
}

impl Write for Collector {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(self.room());
        self.bytes.extend(bytes.iter().take(n));
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Collector {
    fn write_from(
        &mut self,
        source: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let start = self.bytes.len();
        self.bytes.resize(start + count.min(self.room()), 0);
        let room = self.bytes.get_mut(start..).unwrap_or_default();
        // SAFETY: the slice is used only during the call, while `room` is borrowed exclusively, and
        // is initialized.
        let slice = unsafe { FileVolatileSlice::from_mut_slice(room) };
        let result = source.read_vectored_at_volatile(&[slice], offset);
        let read = *result.as_ref().unwrap_or(&0);
        self.bytes.truncate(start + read);
        result
    }

    fn available_bytes(&self) -> usize {
        self.room()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn no_more_than_the_limit_is_collected() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        let mut collector = Collector::new(7);
        assert_eq!(collector.write_from(&mut file, 4, 1).unwrap(), 4);
        assert_eq!(collector.write_from(&mut file, 4, 5).unwrap(), 3);
        assert_eq!(collector.available_bytes(), 0);
        assert_eq!(collector.into_bytes(), b"1234567");
    }

    #[test]
    fn reading_past_the_end_collects_what_there_is() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123", 0).unwrap();
        let mut collector = Collector::new(100);
        assert_eq!(collector.write_from(&mut file, 50, 2).unwrap(), 2);
        assert_eq!(collector.into_bytes(), b"23");
    }
}
