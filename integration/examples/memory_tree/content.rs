//! The bytes of a file in memory, as an open file that is no file of the host.
//!
//! The invariant: each read and each write is one, as the lock is held for its whole length.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringfsd::fs::{FileObject, ObjectFuture, Timestamp};
use ringfsd::io::{GuestBuffer, SyncKind, Transferred, WriteMode};
use rustix::io::Errno;

use super::tree::now;

/// The longest file, bytes.
const LONGEST: u64 = 1 << 30;

/// The bytes of a file.
#[derive(Debug, Default)]
pub(super) struct Content {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// When they were last changed.
    changed: Option<Timestamp>,
}

impl Content {
    pub(super) fn size_and_time(&self) -> (u64, Option<Timestamp>) {
        let state = self.lock();
        (state.bytes.len() as u64, state.changed)
    }

    pub(super) fn set_time(&self, at: Timestamp) {
        self.lock().changed = Some(at);
    }

    /// Cuts the file off, or fills it up with zeroes.
    pub(super) fn truncate(&self, size: u64) -> Result<(), Errno> {
        let mut state = self.lock();
        state.bytes.resize(index(size)?, 0);
        state.changed = Some(now());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_into(&self, buffer: &mut GuestBuffer, offset: u64) -> io::Result<usize> {
        let state = self.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = state.bytes.get(from..).unwrap_or_default();
        Ok(buffer.copy_in(0, bytes))
    }

    fn write_from(&self, mode: WriteMode, buffer: &GuestBuffer, offset: u64) -> io::Result<usize> {
        let mut state = self.lock();
        let at = match mode.append {
            true => state.bytes.len(),
            false => index(offset)?,
        };
        let end = index((at as u64).saturating_add(buffer.len() as u64))?;
        if end > state.bytes.len() {
            state.bytes.resize(end, 0);
        }
        state.changed = Some(now());
        let target = state.bytes.get_mut(at..end).unwrap_or_default();
        Ok(buffer.copy_out(0, target))
    }
}

fn index(offset: u64) -> Result<usize, Errno> {
    match usize::try_from(offset) {
        Ok(index) if offset <= LONGEST => Ok(index),
        _ => Err(Errno::FBIG),
    }
}

impl FileObject for Content {
    fn read(self: Arc<Self>, mut buffer: GuestBuffer, offset: u64) -> ObjectFuture<Transferred> {
        Box::pin(async move { (self.read_into(&mut buffer, offset), buffer) })
    }

    fn write(
        self: Arc<Self>,
        mode: WriteMode,
        buffer: GuestBuffer,
        offset: u64,
    ) -> ObjectFuture<Transferred> {
        Box::pin(async move { (self.write_from(mode, &buffer, offset), buffer) })
    }

    fn sync(self: Arc<Self>, _: SyncKind) -> ObjectFuture<io::Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn allocate(self: Arc<Self>, mode: u32, offset: u64, len: u64) -> ObjectFuture<io::Result<()>> {
        Box::pin(async move {
            let end = index(offset.saturating_add(len))?;
            let mut state = self.lock();
            match mode {
                0 if end > state.bytes.len() => state.bytes.resize(end, 0),
                0 => {}
                _ => return Err(Errno::OPNOTSUPP.into()),
            }
            Ok(())
        })
    }
}
