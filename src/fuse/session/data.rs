//! Operations on the data of open files.
//!
//! READ and WRITE are tried at once, between the file and the guest's own pages; what would
//! wait, and what always may, becomes a future. The invariant: such a future owns all that it
//! touches, the exchange included, and answers it itself.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use super::again::append_again;
use super::{Outcome, Session};
use crate::fs::{FileSystem, Handle, HandleKind, NodeId};
use crate::fuse::abi::{CopyFileRangeOut, InitFlags, WriteOut};
use crate::fuse::reply::{Answer, send_filled};
use crate::fuse::request::{Copying, Range, Request};
use crate::fuse::{Exchange, OUT_HEADER_LEN};
use crate::io::{Attempt, File, SyncKind, WriteMode};

/// Most bytes of one COPY_FILE_RANGE: what the host's kernel moves in one call at most
/// (`MAX_RW_COUNT`), and a count that fits into the reply.
const COPY_MAX: u64 = 0x7fff_f000;

impl<F: FileSystem + ?Sized> Session<F> {
    /// READ: straight into the room of the reply.
    pub(super) fn read<E: Exchange>(
        self: &Arc<Self>,
        mut exchange: E,
        request: &Request<'_>,
        range: Range,
    ) -> Outcome {
        let unique = request.unique;
        let room = exchange.writable().saturating_sub(OUT_HEADER_LEN);
        let len = usize::try_from(range.size).unwrap_or(usize::MAX).min(room);
        let (file, mut buffer) = match self
            .fs
            .file(request.node, range.handle, HandleKind::File)
            .and_then(|file| Ok((file, exchange.reply_buffer(len).ok_or(Errno::INVAL)?)))
        {
            Ok(both) => both,
            Err(errno) => return self.now(exchange, unique, Err(errno)),
        };
        let filled = match file.try_read_at(&mut buffer, range.offset) {
            Ok(Attempt::Done(n)) => {
                drop(buffer);
                send_filled(exchange, unique, n);
                return Outcome::Done;
            }
            Ok(Attempt::Partial(n)) => n,
            Ok(Attempt::WouldBlock) => 0,
            Err(error) => {
                drop(buffer);
                return self.now(exchange, unique, Err(errno(&error)));
            }
        };
        let session = Arc::clone(self);
        self.later(async move {
            let (result, buffer) = file.read_at_from(buffer, filled, range.offset).await;
            drop(buffer);
            match result {
                Ok(n) => send_filled(exchange, unique, n),
                Err(error) => session.finish(exchange, unique, Err(errno(&error))),
            }
        })
    }

    /// WRITE: straight from where the guest has the data.
    pub(super) fn write<E: Exchange>(
        self: &Arc<Self>,
        mut exchange: E,
        request: &Request<'_>,
        range: Range,
        mode: WriteMode,
    ) -> Outcome {
        let unique = request.unique;
        let len = usize::try_from(range.size).unwrap_or(usize::MAX);
        let opened = self.fs.file_to_change(request.node, range.handle);
        let (file, buffer) = match opened.and_then(|file| {
            let payload = exchange.payload(len).ok_or(Errno::INVAL)?;
            if request.caller.kill_set_id {
                self.fs.kill_set_id(request.node, range.handle)?;
            }
            Ok((file, payload))
        }) {
            Ok(both) => both,
            Err(errno) => return self.now(exchange, unique, Err(errno)),
        };
        let mode = WriteMode {
            // A guest that collects writes has found the end of the file already.
            append: mode.append && !self.has_agreed(InitFlags::WRITEBACK_CACHE),
            ..mode
        };
        let begun = match mode.append {
            true => append_again(&mut exchange, &file),
            false => None,
        };
        let mode = WriteMode {
            append: mode.append && begun.is_none(),
            ..mode
        };
        let offset = begun.unwrap_or(range.offset);
        let attempt = match file.try_write_as(mode, &buffer, offset) {
            Ok(attempt) => attempt,
            Err(error) => return self.now(exchange, unique, Err(errno(&error))),
        };
        match attempt {
            Attempt::Done(n) | Attempt::Partial(n) => self.now(exchange, unique, Ok(written(n))),
            Attempt::WouldBlock => self.after(exchange, request, Ok(()), async move |()| {
                let (result, buffer) = file.write_as(mode, buffer, offset).await;
                drop(buffer);
                result.map(written)
            }),
        }
    }

    /// FSYNC, and FSYNCDIR where `directory` is true.
    pub(super) fn fsync<E: Exchange>(
        self: &Arc<Self>,
        exchange: E,
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
        self.after(exchange, request, file, async move |file: File| {
            file.sync(kind).await.map(done)
        })
    }

    /// SYNCFS.
    pub(super) fn syncfs<E: Exchange>(
        self: &Arc<Self>,
        exchange: E,
        request: &Request<'_>,
    ) -> Outcome {
        let file = self.fs.whole_file_system(request.node);
        self.after(exchange, request, file, async |file: File| {
            file.sync_file_system().await.map(done)
        })
    }

    /// FALLOCATE of `len` bytes from `offset` on, in a `mode` of `fallocate(2)`.
    pub(super) fn fallocate<E: Exchange>(
        self: &Arc<Self>,
        exchange: E,
        request: &Request<'_>,
        handle: Handle,
        (offset, len, mode): (u64, u64, u32),
    ) -> Outcome {
        let file = self.file_to_change(request, request.node, handle);
        self.after(exchange, request, file, async move |file: File| {
            file.allocate(mode, offset, len).await.map(done)
        })
    }

    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64.
    pub(super) fn copy<E: Exchange>(
        self: &Arc<Self>,
        exchange: E,
        request: &Request<'_>,
        copying: Copying,
    ) -> Outcome {
        let from = self.fs.file(request.node, copying.from, HandleKind::File);
        let files = from.and_then(|from| {
            let to = self.file_to_change(request, copying.to_node, copying.to)?;
            Ok((from, to))
        });
        self.after(
            exchange,
            request,
            files,
            async move |(from, to): (File, File)| {
                let len = usize::try_from(copying.len.min(COPY_MAX)).unwrap_or(usize::MAX);
                let n = from
                    .copy_range_to(copying.from_offset, &to, copying.to_offset, len, 0)
                    .await?;
                Ok(if copying.wide {
                    let bytes_copied = u64::try_from(n).unwrap_or(u64::MAX);
                    Answer::Copied(CopyFileRangeOut { bytes_copied })
                } else {
                    written(n)
                })
            },
        )
    }

    /// A file that is about to be changed by something in which a guest's kernel doesn't say
    /// whether its caller may keep set-user-ID bits: only a superuser may, if it says who that is.
    fn file_to_change(
        &self,
        request: &Request<'_>,
        node: NodeId,
        handle: Handle,
    ) -> Result<File, Errno> {
        let file = self.fs.file_to_change(node, handle)?;
        if request.caller.uid != Some(0) && self.has_agreed(InitFlags::HANDLE_KILLPRIV_V2) {
            self.fs.kill_set_id(node, handle)?;
        }
        Ok(file)
    }

    /// Does `act` with what is `ready`, and answers then; at once if nothing is.
    fn after<E: Exchange, T: 'static>(
        self: &Arc<Self>,
        exchange: E,
        request: &Request<'_>,
        ready: Result<T, Errno>,
        act: impl AsyncFnOnce(T) -> io::Result<Answer> + 'static,
    ) -> Outcome {
        let unique = request.unique;
        let ready = match ready {
            Ok(ready) => ready,
            Err(errno) => return self.now(exchange, unique, Err(errno)),
        };
        let session = Arc::clone(self);
        self.later(async move {
            let answer = act(ready).await.map_err(|error| errno(&error));
            session.finish(exchange, unique, answer);
        })
    }

    pub(super) fn now<E: Exchange>(
        &self,
        exchange: E,
        unique: u64,
        answer: Result<Answer, Errno>,
    ) -> Outcome {
        self.finish(exchange, unique, answer);
        Outcome::Done
    }

    pub(super) fn later(&self, future: impl Future<Output = ()> + 'static) -> Outcome {
        self.counters.count_later();
        Outcome::Later(Box::pin(future))
    }
}

fn done(_: ()) -> Answer {
    Answer::Done
}

/// The answer to a WRITE: how many bytes. What is asked for fits into a `u32`, so this does.
fn written(n: usize) -> Answer {
    Answer::Written(WriteOut {
        size: u32::try_from(n).unwrap_or(u32::MAX),
        padding: 0,
    })
}

/// The errno for the guest. An error that the host's kernel didn't give is the server's own.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
