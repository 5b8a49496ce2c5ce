//! File operations on the ring of the tokio-uring runtime that the caller runs on.
//!
//! tokio-uring's own file isn't `Send` and closes itself behind one's back, so the entries are
//! made here, and its driver carries them. The invariant: what an entry points to is owned by
//! the operation at an address that doesn't change, and is freed only after the kernel has
//! completed the operation, also when its future or the runtime is dropped before.

#![allow(
    unsafe_code,
    reason = "ring entries hold raw addresses of guest memory"
)]

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;

use io_uring::squeue::{Entry, Flags};
use io_uring::{cqueue, opcode, types};
use tokio_uring::{OneshotOutputTransform, UnsubmittedOneshot};

use super::buffer::{GuestBuffer, IOV_MAX};
use super::file::{File, SyncKind, position};

/// Completions the kernel keeps for each entry of the submission ring, so that a burst of
/// operations doesn't overflow into its slow list.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// Sets up a runtime with a ring of `entries`.
pub(super) fn runtime(entries: u32) -> io::Result<tokio_uring::Runtime> {
    let mut builder = tokio_uring::builder();
    builder.entries(entries).uring_builder(&setup(entries));
    tokio_uring::Runtime::new(&builder)
}

/// How rings are set up.
pub(super) fn setup(entries: u32) -> io_uring::Builder {
    let mut setup = io_uring::IoUring::builder();
    setup
        .dontfork()
        .setup_clamp()
        .setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY));
    setup
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file, past the page cache.
    Write,
    /// From the buffer into the page cache. The kernel's own threads do it from the beginning:
    /// tried inline, such a write may stop where it would wait and go on later, and so be two.
    WriteBuffered,
}

/// One operation on the buffer from its byte `done` on, the buffer beginning at `offset`.
pub(super) async fn transfer(
    way: Transfer,
    file: &File,
    buffer: GuestBuffer,
    done: usize,
    offset: u64,
) -> (io::Result<usize>, GuestBuffer) {
    let at = match position(offset, done) {
        Ok(position) => position.cast_unsigned(),
        Err(e) => return (Err(e), buffer),
    };
    let fd = types::Fd(file.as_raw_fd());
    let vecs = buffer.io_vecs(done);
    let (entry, vecs) = if let [one] = vecs[..] {
        let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
        let base = one.iov_base.cast();
        let entry = match way {
            Transfer::Read => opcode::Read::new(fd, base, len).offset(at).build(),
            _ => opcode::Write::new(fd, base, len).offset(at).build(),
        };
        (entry, Vec::new())
    } else {
        // On the heap, where it stays when the operation moves.
        let vecs = vecs.into_vec();
        let count = u32::try_from(vecs.len().min(IOV_MAX)).unwrap_or_default();
        let entry = match way {
            Transfer::Read => opcode::Readv::new(fd, vecs.as_ptr(), count)
                .offset(at)
                .build(),
            _ => opcode::Writev::new(fd, vecs.as_ptr(), count)
                .offset(at)
                .build(),
        };
        (entry, vecs)
    };
    let entry = match way {
        Transfer::WriteBuffered => entry.flags(Flags::ASYNC),
        Transfer::Read | Transfer::Write => entry,
    };
    let memory = Memory {
        buffer,
        _vecs: vecs,
        _file: file.clone(),
    };
    // SAFETY: the entry names the descriptor, the vector's heap memory and the buffer's pieces,
    // all of which `memory` owns and none of which moves with it.
    let (result, memory) = unsafe { perform(entry, memory) }.await;
    (result.map(|n| n as usize), memory.buffer)
}

/// `fsync` or `fdatasync`.
pub(super) async fn sync(file: &File, kind: SyncKind) -> io::Result<()> {
    let flags = match kind {
        SyncKind::All => types::FsyncFlags::empty(),
        SyncKind::Data => types::FsyncFlags::DATASYNC,
    };
    let entry = opcode::Fsync::new(types::Fd(file.as_raw_fd()))
        .flags(flags)
        .build();
    // SAFETY: the entry names nothing but the descriptor, which the clone keeps open.
    let (result, _) = unsafe { perform(entry, file.clone()) }.await;
    result.map(drop)
}

/// `fallocate`.
pub(super) async fn allocate(file: &File, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let entry = opcode::Fallocate::new(types::Fd(file.as_raw_fd()), len)
        .offset(offset)
        .mode(mode.cast_signed())
        .build();
    // SAFETY: the entry names nothing but the descriptor, which the clone keeps open.
    let (result, _) = unsafe { perform(entry, file.clone()) }.await;
    result.map(drop)
}

/// What a transfer owns while the kernel works on it.
struct Memory {
    buffer: GuestBuffer,
    _vecs: Vec<libc::iovec>,
    _file: File,
}

/// Puts `entry` on the ring and waits for its completion; hands `held` back after it.
///
/// # Safety
///
/// Whatever the entry points to must be owned by `held`, at an address that stays the same when
/// `held` moves, and `held` must not touch it before it comes back.
///
/// # Panics
///
/// When the caller doesn't run on tokio-uring's runtime.
async unsafe fn perform<H: Unpin + 'static>(entry: Entry, held: H) -> (io::Result<u32>, H) {
    let finish = Finish(PhantomData);
    UnsubmittedOneshot::new(Held(Some(held)), finish, entry)
        .submit()
        .await
}

/// Turns a completion into a result.
struct Finish<H>(PhantomData<fn() -> H>);

impl<H: 'static> OneshotOutputTransform for Finish<H> {
    type Output = (io::Result<u32>, H);
    type StoredData = Held<H>;

    fn transform_oneshot_output(self, mut data: Held<H>, entry: cqueue::Entry) -> Self::Output {
        let result = u32::try_from(entry.result())
            .map_err(|_negative| io::Error::from_raw_os_error(-entry.result()));
        let held = data.0.take().expect("invariant: taken here only");
        (result, held)
    }
}

/// What an operation owns, dropped when it is complete, or else kept until the ring is gone.
///
/// tokio-uring's driver keeps this until the completion when a future is dropped, but drops it
/// at once when the driver itself goes, before it has waited for the kernel.
struct Held<H: 'static>(Option<H>);

impl<H: 'static> Drop for Held<H> {
    fn drop(&mut self) {
        let Some(held) = self.0.take() else { return };
        if SHUTTING_DOWN.get() > 0 {
            keep(Box::new(held));
        }
    }
}

thread_local! {
    /// How many rings are being shut down on this thread.
    static SHUTTING_DOWN: Cell<usize> = const { Cell::new(0) };
    /// What their operations own.
    static KEPT: RefCell<Vec<Box<dyn Any>>> = const { RefCell::new(Vec::new()) };
}

/// Keeps what an operation owns until the last ring of this thread that is being shut down is
/// gone; for ever, if the thread itself is going.
fn keep(held: Box<dyn Any>) {
    let mut held = Some(held);
    if KEPT
        .try_with(|kept| kept.borrow_mut().extend(held.take()))
        .is_err()
    {
        std::mem::forget(held);
    }
}

/// Ends a runtime: drops its tasks, cancels what is in flight, waits for the kernel, and frees
/// then what the operations owned.
///
/// # Safety
///
/// `uring` must not be used any more.
pub(super) unsafe fn shut_down(uring: &mut ManuallyDrop<tokio_uring::Runtime>) {
    // If this unwinds, the count stays, and what would be freed is leaked from then on: the
    // kernel may not be done with it.
    SHUTTING_DOWN.set(SHUTTING_DOWN.get() + 1);
    // SAFETY: the caller doesn't use it any more.
    unsafe { ManuallyDrop::drop(uring) };
    SHUTTING_DOWN.set(SHUTTING_DOWN.get() - 1);
    if SHUTTING_DOWN.get() == 0 {
        // An owner may itself end a runtime when it is dropped, so it isn't borrowed meanwhile.
        let kept = KEPT.try_with(RefCell::take);
        drop(kept);
    }
}
