//! Reads and writes of a [`File`] on [`FileVolatileBuf`]s, with the signatures of the `File` of
//! dbs-fuse and fuse-backend-rs.
//!
//! Each is one operation of the engine, whatever the number of buffers. The invariant: a buffer
//! counts as initialized as far as a read has filled it, and no further.

#![allow(unsafe_code, reason = "sizes of buffers are set here")]

use std::io;

use fuse_backend_rs::file_buf::FileVolatileBuf;

use super::{File, GuestBuffer};

impl File {
    /// Reads from `offset` on into the space behind the initialized bytes of `buf`, until it is
    /// full or the file ends. Returns the number of bytes, and the buffer with as many more
    /// initialized.
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn async_read_at(
        &self,
        buf: FileVolatileBuf,
        offset: u64,
    ) -> (io::Result<usize>, FileVolatileBuf) {
        let mut bufs = [buf];
        let result = self.fill(&mut bufs, offset).await;
        (result, bufs[0])
    }

    /// Like [`async_read_at`](Self::async_read_at), into several buffers, by one operation.
    ///
    /// ```
    /// use fuse_backend_rs::file_buf::FileVolatileBuf;
    /// use ringfsd::io::{Engine, File, Runtime};
    ///
    /// let path = std::env::temp_dir().join(format!("async_readv_at.{}", std::process::id()));
    /// std::fs::write(&path, b"one two")?;
    /// let file = File::from(std::fs::File::open(&path)?);
    /// std::fs::remove_file(&path)?;
    /// let (mut first, mut second) = ([0; 4], [0; 10]);
    /// // SAFETY: both arrays outlive the operation, and nobody else uses them meanwhile.
    /// let bufs = unsafe { vec![FileVolatileBuf::new(&mut first), FileVolatileBuf::new(&mut second)] };
    /// let (read, bufs) =
    ///     Runtime::new(Engine::ThreadPool)?.block_on(file.async_readv_at(bufs, 0));
    /// assert_eq!(read?, 7);
    /// assert_eq!((bufs[0].len(), bufs[1].len()), (4, 3));
    /// assert_eq!((&first, &second[..3]), (b"one ", &b"two"[..]));
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`read_at`](Self::read_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn async_readv_at(
        &self,
        mut bufs: Vec<FileVolatileBuf>,
        offset: u64,
    ) -> (io::Result<usize>, Vec<FileVolatileBuf>) {
        let result = self.fill(&mut bufs, offset).await;
        (result, bufs)
    }

    /// Writes the initialized bytes of `buf` at `offset`. Returns the number of bytes, and the
    /// buffer.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn async_write_at(
        &self,
        buf: FileVolatileBuf,
        offset: u64,
    ) -> (io::Result<usize>, FileVolatileBuf) {
        let (result, _) = self.write_at(GuestBuffer::filled(&[buf]), offset).await;
        (result, buf)
    }

    /// Like [`async_write_at`](Self::async_write_at), from several buffers, by one operation.
    ///
    /// # Errors
    ///
    /// As for [`write_at`](Self::write_at).
    ///
    /// # Panics
    ///
    /// Outside of a runtime.
    pub async fn async_writev_at(
        &self,
        bufs: Vec<FileVolatileBuf>,
        offset: u64,
    ) -> (io::Result<usize>, Vec<FileVolatileBuf>) {
        let (result, _) = self.write_at(GuestBuffer::filled(&bufs), offset).await;
        (result, bufs)
    }

    /// Fills `bufs`, in order.
    async fn fill(&self, bufs: &mut [FileVolatileBuf], offset: u64) -> io::Result<usize> {
        let (result, _) = self.read_at(GuestBuffer::unfilled(bufs), offset).await;
        let mut rest = *result.as_ref().unwrap_or(&0);
        for buf in bufs {
            let added = rest.min(buf.cap() - buf.len());
            rest -= added;
            // SAFETY: the size stays within the capacity.
            unsafe { buf.set_size(buf.len() + added) };
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Engine, Runtime};

    #[test]
    fn bytes_written_from_several_bufs_are_read_into_others_on_each_engine() {
        for &engine in Engine::ALL {
            if let Err(reason) = engine.probe() {
                println!("SKIPPED on {engine}: {reason}");
                continue;
            }
            let file = File::from(tempfile::tempfile().unwrap());
            let mut memory = (0..=255).cycle().take(20_000).collect::<Vec<u8>>();
            let expected = [&memory[..5_000], &memory[10_000..10_001]].concat();
            let start = memory.as_mut_ptr();
            // SAFETY: `at..at + cap` lies in `memory`, which outlives all buffers and is used
            // through them alone until they are gone.
            let buf = |at, len, cap| unsafe {
                FileVolatileBuf::from_raw_ptr(start.wrapping_add(at), len, cap)
            };
            let runtime = Runtime::new(engine).unwrap();
            runtime.block_on(async {
                let source = vec![buf(0, 5_000, 8_000), buf(10_000, 1, 1)];
                let (written, source) = file.async_writev_at(source, 3).await;
                assert_eq!((written.unwrap(), source[0].len()), (5_001, 5_000));
                let target = vec![buf(12_000, 10, 20), buf(13_000, 0, 6_000)];
                let (read, target) = file.async_readv_at(target, 3).await;
                assert_eq!(read.unwrap(), 5_001);
                assert_eq!((target[0].len(), target[1].len()), (20, 4_991));
                let (end, target) = file.async_read_at(target[1], 1 << 20).await;
                assert_eq!((end.unwrap(), target.len()), (0, 4_991));
            });
            let read = [&memory[12_010..12_020], &memory[13_000..17_991]].concat();
            assert_eq!(read, expected, "{engine}");
        }
    }
}
