//! Copies the data of a file from a lower layer to the upper one.
//!
//! The host clones or copies where both are its files (`copy_file_range(2)` shares blocks where the
//! file system can); otherwise the data pass through a buffer. The invariant: holes stay holes.

use std::sync::Arc;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::fs::{FileObject, OpenFile, Result};
use crate::io::{Engine, File, GuestBuffer, Runtime};

/// How many bytes are read at a time where the host can't copy.
const CHUNK: usize = 1 << 20;

/// Copies `size` bytes of `from` to `to`, which is empty.
pub(super) fn copy(from: OpenFile, to: &File, size: u64) -> Result<()> {
    match from {
        OpenFile::Host(from) => copy_host(&from, to, size)?,
        OpenFile::Object(from) => copy_object(&from, to, size)?,
    }
    // The file may end with a hole.
    rustix::fs::ftruncate(to, size)
}

fn copy_host(from: &File, to: &File, size: u64) -> Result<()> {
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => return Ok(()),
            // Not every file system knows its holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start)).unwrap_or(size);
        copy_range(from, to, start, end.min(size))?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> Result<()> {
    let (mut from_at, mut to_at) = (start, start);
    while from_at < end {
        let len = usize::try_from(end - from_at).unwrap_or(usize::MAX);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), len);
        match copied {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM) => {
                return copy_through_buffer(from, to, from_at, end);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn copy_through_buffer(from: &File, to: &File, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    let mut buffer = vec![0; CHUNK];
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(left);
        let read = match rustix::io::pread(from, &mut buffer[..wanted], at) {
            Ok(0) => return Ok(()),
            Err(Errno::INTR) => continue,
            read => read?,
        };
        write_all(to, &buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

fn write_all(to: &File, mut bytes: &[u8], mut at: u64) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(to, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Copies what isn't a file of the host, on a runtime of this thread. Blocks of zeros stay holes.
fn copy_object(from: &Arc<dyn FileObject>, to: &File, size: u64) -> Result<()> {
    let failed = |error: &std::io::Error| Errno::from_io_error(error).unwrap_or(Errno::IO);
    let runtime = Runtime::new(Engine::ThreadPool).map_err(|error| {
        log::error!("overlay: no runtime to copy a file on: {error}");
        Errno::IO
    })?;
    let mut bytes = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        let wanted = usize::try_from(size - at).map_or(CHUNK, |left| left.min(CHUNK));
        let buffer = GuestBuffer::from_vec(vec![0; wanted]);
        let (read, buffer) = runtime.block_on(Arc::clone(from).read(buffer, at));
        let read = read.map_err(|error| failed(&error))?;
        if read == 0 {
            break;
        }
        let read = buffer.copy_out(0, &mut bytes[..read.min(wanted)]);
        let read_bytes = &bytes[..read];
        if read_bytes.iter().any(|byte| *byte != 0) {
            write_all(to, read_bytes, at)?;
        }
        at += read as u64;
    }
    Ok(())
}
