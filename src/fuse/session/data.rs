//! Data operations on open files.
//!
//! READ and WRITE are tried at once, between the file and the guest's own pages. An operation that
//! would wait, or always may wait, becomes a future. The invariant: such a future owns everything
//! that it touches, including the transport, and sends the reply itself.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::reclaim::is_shortage;
use super::replay::replay_append;
use super::{Outcome, Session};
use crate::fs::{FileSystem, Handle, HandleKind, NodeId, OpenFile};
use crate::fuse::abi::{CopyFileRangeOut, InitFlags, WriteOut};
use crate::fuse::reply::{Answer, send_filled};
use crate::fuse::request::{Copying, Operation, Range, Request};
use crate::fuse::{OUT_HEADER_LEN, Transport};
use crate::io::{Attempt, SyncKind, Transferred, WriteMode, blocking};

/// Maximum length of one COPY_FILE_RANGE, bytes: the most that the host's kernel copies in one call
/// (`MAX_RW_COUNT`), and a count that fits into the reply.
const COPY_MAX: u64 = 0x7fff_f000;

impl<F: FileSystem + ?Sized> Session<F> {
    /// Serves an operation on the data of an open file.
    pub(super) fn data<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
    ) -> Outcome {
        match request.operation {
            Operation::Read(range) => self.read(transport, request, range),
            Operation::Write { range, mode } => self.write(transport, request, range, mode),
            Operation::Fsync {
                handle,
                data_only,
                directory,
            } => self.fsync(transport, request, (handle, directory), data_only),
            Operation::Fallocate {
                handle,
                offset,
                len,
                mode,
            } => self.fallocate(transport, request, handle, (offset, len, mode)),
            Operation::CopyFileRange(copying) => self.copy(transport, request, copying),
            Operation::Syncfs => self.syncfs(transport, request),
            // The opcode table dispatches none of these to this method.
            Operation::Init(_)
            | Operation::Destroy
            | Operation::Interrupt { .. }
            | Operation::Lookup { .. }
            | Operation::LookupSelf
            | Operation::LookupParent
            | Operation::Forget { .. }
            | Operation::BatchForget(_)
            | Operation::Getattr { .. }
            | Operation::Statx { .. }
            | Operation::Setattr { .. }
            | Operation::Readlink
            | Operation::Symlink { .. }
            | Operation::Mknod { .. }
            | Operation::Mkdir { .. }
            | Operation::Unlink { .. }
            | Operation::Rmdir { .. }
            | Operation::Rename { .. }
            | Operation::Link { .. }
            | Operation::Open { .. }
            | Operation::Opendir { .. }
            | Operation::Create { .. }
            | Operation::Tmpfile { .. }
            | Operation::Ioctl { .. }
            | Operation::Readdir { .. }
            | Operation::Statfs
            | Operation::Release { .. }
            | Operation::Releasedir { .. }
            | Operation::Flush { .. }
            | Operation::Getlk { .. }
            | Operation::Setlk(_)
            | Operation::Setxattr { .. }
            | Operation::Getxattr { .. }
            | Operation::Listxattr { .. }
            | Operation::Removexattr { .. }
            | Operation::Access { .. }
            | Operation::Lseek { .. }
            | Operation::Setupmapping(_)
            | Operation::Removemapping(_)
            | Operation::Unserved => self.reply_now(transport, request.unique, Err(Errno::NOSYS)),
        }
    }

    /// READ: directly into the reply's space in guest memory.
    fn read<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        request: &Request<'_>,
        range: Range,
    ) -> Outcome {
        let unique = request.unique;
        let room = transport.writable().saturating_sub(OUT_HEADER_LEN);
        let len = usize::try_from(range.size).unwrap_or(usize::MAX).min(room);
        let opened = self
            .fs
            .file(request.node, range.handle, HandleKind::File)
            .and_then(|file| Ok((file, transport.reply_buffer(len).ok_or(Errno::INVAL)?)));
        let (file, mut buffer) = match opened {
            Ok((OpenFile::Host(file), buffer)) => (file, buffer),
            Ok((OpenFile::Object(object), buffer)) => {
                let (session, read) = (Arc::clone(self), object.read(buffer, range.offset));
                return self.defer(async move {
                    session.reply_read(transport, unique, read.await);
                });
            }
            Err(errno) => return self.reply_now(transport, unique, Err(errno)),
        };
        let filled = match file.try_read_at(&mut buffer, range.offset) {
            Ok(Attempt::Done(n)) => {
                drop(buffer);
                send_filled(transport, unique, n);
                return Outcome::Done;
            }
            Ok(Attempt::Partial(n)) => n,
            Ok(Attempt::WouldBlock) => 0,
            Err(error) => {
                drop(buffer);
                return self.reply_now(transport, unique, Err(errno(&error)));
            }
        };
        // In one future: one within another would have room for the inner one twice.
        let session = Arc::clone(self);
        self.defer(async move {
            let read = file.read_at_from(buffer, filled, range.offset).await;
            session.reply_read(transport, unique, read);
        })
    }

    /// Replies to a READ that has filled the reply's space.
    fn reply_read<E: Transport>(&self, transport: E, unique: u64, read: Transferred) {
        let (result, buffer) = read;
        drop(buffer);
        match result {
            Ok(n) => send_filled(transport, unique, n),
            Err(error) => self.finish(transport, unique, Err(errno(&error))),
        }
    }

    /// WRITE: directly from guest memory.
    fn write<E: Transport>(
        self: &Arc<Self>,
        mut transport: E,
        request: &Request<'_>,
        range: Range,
        mode: WriteMode,
    ) -> Outcome {
        let unique = request.unique;
        let len = usize::try_from(range.size).unwrap_or(usize::MAX);
        let opened = self.fs.file_to_change(request.node, range.handle);
        let target = opened.and_then(|file| {
            let payload = transport.payload(len).ok_or(Errno::INVAL)?;
            if request.caller.kill_set_id && len > 0 && !self.fs.may_block_at(request.node) {
                self.fs.kill_set_id(request.node, range.handle)?;
            }
            Ok((file, payload))
        });
        let mode = WriteMode {
            // A guest with a writeback cache has determined the end of the file itself.
            append: mode.append && !self.has_agreed(InitFlags::WRITEBACK_CACHE),
            ..mode
        };
        let (file, buffer) = match target {
            Ok((OpenFile::Host(file), buffer)) if !self.fs.may_block_at(request.node) => {
                (file, buffer)
            }
            Ok((file, buffer)) => {
                let session = Arc::clone(self);
                let kill = request
                    .caller
                    .kill_set_id
                    .then_some((request.node, range.handle));
                return self.defer_with(transport, request, Ok(()), async move |()| {
                    session.kill_set_id_where_it_may_block(kill).await?;
                    let (result, buffer) = file.write(mode, buffer, range.offset).await;
                    drop(buffer);
                    result.map(written)
                });
            }
            Err(errno) => return self.reply_now(transport, unique, Err(errno)),
        };
        let replay_offset = match mode.append {
            true => replay_append(&mut transport, &file),
            false => None,
        };
        let mode = WriteMode {
            append: mode.append && replay_offset.is_none(),
            ..mode
        };
        let offset = replay_offset.unwrap_or(range.offset);
        let first = match file.try_write_as(mode, &buffer, offset) {
            Ok(Attempt::WouldBlock) => None,
            Ok(Attempt::Done(n) | Attempt::Partial(n)) => Some(Ok(n)),
            Err(error) => Some(Err(error)),
        };
        if let Some(result) = &first
            && bytes_before_shortage(result, buffer.len()).is_none()
        {
            let answer = first.unwrap_or(Ok(0)).map(written);
            return self.reply_now(transport, unique, answer.map_err(|error| errno(&error)));
        }
        let session = Arc::clone(self);
        self.defer_with(transport, request, Ok(()), async move |()| {
            let (mut result, mut buffer) = match first {
                Some(result) => (result, buffer),
                None => file.write_as(mode, buffer, offset).await,
            };
            if let Some(done) = bytes_before_shortage(&result, buffer.len()) {
                session.reclaim().await;
                (result, buffer) = file.write_rest(mode, buffer, done, offset).await;
            }
            drop(buffer);
            result.map(written)
        })
    }

    /// FSYNC, or FSYNCDIR if `directory` is true.
    fn fsync<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
        (handle, directory): (Handle, bool),
        data_only: bool,
    ) -> Outcome {
        let of = if directory {
            HandleKind::Directory
        } else {
            HandleKind::File
        };
        let kind = if data_only {
            SyncKind::Data
        } else {
            SyncKind::All
        };
        let file = self.fs.file(request.node, handle, of);
        self.defer_with(transport, request, file, async move |file: OpenFile| {
            file.sync(kind).await.map(done)
        })
    }

    /// SYNCFS.
    fn syncfs<E: Transport>(self: &Arc<Self>, transport: E, request: &Request<'_>) -> Outcome {
        let file = self.fs.whole_file_system(request.node);
        self.defer_with(transport, request, file, async |file: OpenFile| {
            file.sync_file_system().await.map(done)
        })
    }

    /// FALLOCATE of `len` bytes from `offset` on, with the `mode` of `fallocate(2)`.
    fn fallocate<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
        handle: Handle,
        (offset, len, mode): (u64, u64, u32),
    ) -> Outcome {
        let file = self.file_to_change(request, (request.node, handle), len);
        let session = Arc::clone(self);
        self.defer_with(transport, request, file, async move |(file, kill)| {
            Arc::clone(&session)
                .kill_set_id_where_it_may_block(kill)
                .await?;
            let mut result = file.clone().allocate(mode, offset, len).await;
            if is_shortage_error(&result) {
                session.reclaim().await;
                result = file.allocate(mode, offset, len).await;
            }
            result.map(done)
        })
    }

    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    fn copy<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
        copying: Copying,
    ) -> Outcome {
        let from = self.fs.file(request.node, copying.from, HandleKind::File);
        let files = from.and_then(|from| {
            let to = (copying.to_node, copying.to);
            let to = self.file_to_change(request, to, copying.len)?;
            Ok((from, to))
        });
        let session = Arc::clone(self);
        self.defer_with(
            transport,
            request,
            files,
            async move |(from, (to, kill))| {
                Arc::clone(&session)
                    .kill_set_id_where_it_may_block(kill)
                    .await?;
                let len = usize::try_from(copying.len.min(COPY_MAX)).unwrap_or(usize::MAX);
                let copy = || {
                    let (from, to) = (from.clone(), to.clone());
                    from.copy_to(copying.from_offset, to, copying.to_offset, len)
                };
                let mut result = copy().await;
                if is_shortage_error(&result) {
                    session.reclaim().await;
                    result = copy().await;
                }
                let n = result?;
                Ok(if copying.wide {
                    let bytes_copied = u64::try_from(n).unwrap_or(u64::MAX);
                    Answer::Copied(CopyFileRangeOut { bytes_copied })
                } else {
                    written(n)
                })
            },
        )
    }

    /// The file for an operation in which a guest's kernel doesn't say whether its caller may keep
    /// the set-ID bits. Only a superuser may. A kernel that hides the caller's ids (Linux 6.12)
    /// asks for the bits to be cleared by an empty SETATTR first; an older one may not. An operation
    /// on no bytes fails or changes nothing. If clearing the bits may block, it is left to the
    /// caller, and the second value says of which file.
    fn file_to_change(
        &self,
        request: &Request<'_>,
        (node, handle): (NodeId, Handle),
        len: u64,
    ) -> Result<(OpenFile, Option<(NodeId, Handle)>), Errno> {
        let file = self.fs.file_to_change(node, handle)?;
        let keeps = len == 0 || request.caller.uid.is_none_or(|uid| uid == 0);
        if keeps || !self.has_agreed(InitFlags::HANDLE_KILLPRIV_V2) {
            return Ok((file, None));
        }
        if self.fs.may_block_at(node) {
            return Ok((file, Some((node, handle))));
        }
        self.fs.kill_set_id(node, handle)?;
        Ok((file, None))
    }

    async fn kill_set_id_where_it_may_block(
        self: Arc<Self>,
        file: Option<(NodeId, Handle)>,
    ) -> io::Result<()> {
        let Some((node, handle)) = file else {
            return Ok(());
        };
        blocking(move || self.fs.kill_set_id(node, handle)).await??;
        Ok(())
    }

    /// Defers `act` with the value in `prepared`, and replies when it is done. Replies at once if
    /// `prepared` is an error.
    fn defer_with<E: Transport, T: 'static>(
        self: &Arc<Self>,
        transport: E,
        request: &Request<'_>,
        prepared: Result<T, Errno>,
        act: impl AsyncFnOnce(T) -> io::Result<Answer> + 'static,
    ) -> Outcome {
        let unique = request.unique;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(errno) => return self.reply_now(transport, unique, Err(errno)),
        };
        let session = Arc::clone(self);
        self.defer(async move {
            let answer = act(prepared).await.map_err(|error| errno(&error));
            session.finish(transport, unique, answer);
        })
    }

    pub(super) fn reply_now<E: Transport>(
        &self,
        transport: E,
        unique: u64,
        answer: Result<Answer, Errno>,
    ) -> Outcome {
        self.finish(transport, unique, answer);
        Outcome::Done
    }

    pub(super) fn defer(&self, future: impl Future<Output = ()> + 'static) -> Outcome {
        Outcome::Later(Box::pin(future))
    }
}

/// Whether it failed for lack of space.
fn is_shortage_error<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if is_shortage(errno(error)))
}

/// How many bytes were written, if a write of `len` bytes ran out of space; `None` if it did not. A
/// write that ended early may have: writing the rest will tell.
fn bytes_before_shortage(result: &io::Result<usize>, len: usize) -> Option<usize> {
    match result {
        Ok(done) => (*done < len).then_some(*done),
        Err(_) => is_shortage_error(result).then_some(0),
    }
}

fn done(_: ()) -> Answer {
    Answer::Done
}

/// The reply to a WRITE: the number of bytes. The requested size is a `u32`, so the number fits.
fn written(n: usize) -> Answer {
    Answer::Written(WriteOut {
        size: u32::try_from(n).unwrap_or(u32::MAX),
        padding: 0,
    })
}

/// The errno for the guest. An error without an errno comes from the server itself and becomes
/// `EIO`.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
