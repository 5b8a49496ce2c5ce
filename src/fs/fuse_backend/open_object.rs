//! An open file of a file system of fuse-backend-rs, as data are read from and written to it.
//!
//! Operations run on blocking threads where the file system may block. The invariant: an operation
//! owns the guest's buffer until the file system has returned, and returns it with the result, also
//! if the file system panics.

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError};

use super::Backend;
use super::convert;
use super::core::Core;
use super::handles::Open;
use super::transfer::{Reader, Writer};
use crate::fs::{FileObject, HandleKind, LockOwner, ObjectFuture, Result};
use crate::io::{
    GuestBuffer, Lock, LockKind, RecordLock, SyncKind, Transferred, WriteMode, blocking,
};

/// An open file.
pub(super) struct OpenObject<F> {
    core: Arc<Core<F>>,
    open: Arc<Open>,
}

impl<F: Backend> OpenObject<F> {
    pub(super) fn new(core: Arc<Core<F>>, open: Arc<Open>) -> Self {
        Self { core, open }
    }

    /// Runs `call` where it may wait, if it may.
    fn run<T: Send + 'static>(
        self: Arc<Self>,
        call: impl FnOnce(&Self) -> T + Send + 'static,
        cancelled: impl FnOnce(io::Error) -> T + 'static,
    ) -> ObjectFuture<T> {
        Box::pin(async move {
            if self.core.options().may_block {
                blocking(move || call(&self))
                    .await
                    .unwrap_or_else(cancelled)
            } else {
                call(&self)
            }
        })
    }

    fn run_on_buffer(
        self: Arc<Self>,
        buffer: GuestBuffer,
        call: impl FnOnce(&Self, GuestBuffer) -> (Result<usize>, GuestBuffer) + Send + 'static,
    ) -> ObjectFuture<Transferred> {
        self.run(
            move |object| {
                let (result, buffer) = call(object, buffer);
                (result.map_err(io::Error::from), buffer)
            },
            |error| (Err(error), GuestBuffer::from_vec(Vec::new())),
        )
    }

    fn run_call<T: Send + 'static>(
        self: Arc<Self>,
        call: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> ObjectFuture<io::Result<T>> {
        self.run(|object| Ok(call(object)?), Err)
    }

    fn inode(&self) -> F::Inode {
        self.core.inode(self.open.node)
    }

    fn handle(&self) -> F::Handle {
        F::Handle::from(self.open.handle)
    }

    fn read_into(&self, buffer: GuestBuffer, offset: u64) -> (Result<usize>, GuestBuffer) {
        let size = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        let mut writer = Writer::new(buffer);
        let read = self.core.call(|fs| {
            let (inode, handle, flags) = (self.inode(), self.handle(), self.open.flags());
            let context = &self.open.context;
            fs.read(
                context,
                inode,
                handle,
                &mut writer,
                size,
                offset,
                None,
                flags,
            )
        });
        let (filled, buffer) = writer.finish();
        (read.map(|n| n.min(filled)), buffer)
    }

    fn write_from(
        &self,
        mode: WriteMode,
        buffer: GuestBuffer,
        offset: u64,
    ) -> (Result<usize>, GuestBuffer) {
        let collects_writes = self.core.terms().collects_writes;
        let flags = match collects_writes {
            // The guest's kernel finds the end of the file itself.
            true => self.open.flags(),
            false => self.open.flags_with_append(mode.append),
        };
        let len = buffer.len();
        let size = u32::try_from(len).unwrap_or(u32::MAX);
        let mut reader = Reader::new(buffer);
        let written = self.core.call(|fs| {
            fs.write(
                &self.open.context,
                self.inode(),
                self.handle(),
                &mut reader,
                size,
                offset,
                None,
                collects_writes,
                flags,
                0,
            )
        });
        let written = written.and_then(|n| {
            self.make_durable(mode, flags)?;
            Ok(n.min(len))
        });
        (written, reader.finish())
    }

    /// Makes a write durable that must be, unless the file was opened for such writes.
    fn make_durable(&self, mode: WriteMode, flags: u32) -> Result<()> {
        let synced = libc::O_DSYNC.cast_unsigned();
        match mode.durable {
            Some(kind) if flags & synced == 0 => self.sync_now(kind),
            _ => Ok(()),
        }
    }

    fn sync_now(&self, kind: SyncKind) -> Result<()> {
        let data_only = kind == SyncKind::Data;
        let context = &self.open.context;
        self.core.call(|fs| match self.open.kind {
            HandleKind::File => fs.fsync(context, self.inode(), data_only, self.handle()),
            HandleKind::Directory => fs.fsyncdir(context, self.inode(), data_only, self.handle()),
        })
    }

    fn lock_now(&self, owner: LockOwner, lock: Lock) -> Result<()> {
        let (file_lock, flags) = convert::lock(lock);
        let context = &self.open.context;
        self.core.call(|fs| {
            fs.setlk(
                context,
                self.inode(),
                self.handle(),
                owner.0,
                file_lock,
                flags,
            )
        })?;
        if let Lock::Whole(kind) = lock {
            *self
                .open
                .flock_owner
                .lock()
                .unwrap_or_else(PoisonError::into_inner) =
                (kind != LockKind::Unlock).then_some(owner);
        }
        Ok(())
    }
}

impl<F: Backend> FileObject for OpenObject<F> {
    fn read(self: Arc<Self>, buffer: GuestBuffer, offset: u64) -> ObjectFuture<Transferred> {
        self.run_on_buffer(buffer, move |object, buffer| {
            object.read_into(buffer, offset)
        })
    }

    fn write(
        self: Arc<Self>,
        mode: WriteMode,
        buffer: GuestBuffer,
        offset: u64,
    ) -> ObjectFuture<Transferred> {
        self.run_on_buffer(buffer, move |object, buffer| {
            object.write_from(mode, buffer, offset)
        })
    }

    fn sync(self: Arc<Self>, kind: SyncKind) -> ObjectFuture<io::Result<()>> {
        self.run_call(move |object| object.sync_now(kind))
    }

    fn allocate(self: Arc<Self>, mode: u32, offset: u64, len: u64) -> ObjectFuture<io::Result<()>> {
        self.run_call(move |object| {
            let context = &object.open.context;
            object.core.call(|fs| {
                fs.fallocate(context, object.inode(), object.handle(), mode, offset, len)
            })
        })
    }

    fn conflicting_lock(
        self: Arc<Self>,
        owner: LockOwner,
        lock: RecordLock,
    ) -> ObjectFuture<io::Result<Option<RecordLock>>> {
        self.run_call(move |object| {
            let (lock, flags) = convert::lock(Lock::Record(lock));
            let context = &object.open.context;
            let found = object.core.call(|fs| {
                fs.getlk(
                    context,
                    object.inode(),
                    object.handle(),
                    owner.0,
                    lock,
                    flags,
                )
            });
            found.map(|found| convert::found_lock(&found))
        })
    }

    fn try_lock(self: Arc<Self>, owner: LockOwner, lock: Lock) -> ObjectFuture<io::Result<()>> {
        self.run_call(move |object| object.lock_now(owner, lock))
    }
}

impl<F> fmt::Debug for OpenObject<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenObject")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}
