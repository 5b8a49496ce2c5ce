//! Operations in flight, and the buffers that tokio-uring gets.
//!
//! What an operation uses belongs to an [`Owner`], which each of its buffers and its future share.
//! tokio-uring keeps the buffers of an operation whose future was dropped until the kernel has
//! completed it; but it drops them earlier when the runtime is dropped, and then the [`Ring`] keeps
//! what the owner has. The invariant: an owner's resources leave it only with the operation's
//! result, or for the ring.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use ::tokio_uring::buf::{IoBuf, IoBufMut};

use super::ring::{Resources, Ring};
use crate::io::buffer::IOV_MAX;
use crate::io::vectored::Direction;

/// Owns what one operation uses.
pub(super) struct Owner {
    ring: Rc<Ring>,
    /// `None` when the operation has returned them.
    resources: RefCell<Option<Resources>>,
}

impl Owner {
    pub(super) fn new(ring: &Rc<Ring>, resources: Resources) -> Rc<Self> {
        Rc::new(Self {
            ring: Rc::clone(ring),
            resources: RefCell::new(Some(resources)),
        })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Nothing is freed here, within tokio-uring, which is not to be entered again.
        if let Some(resources) = self.resources.take() {
            self.ring.retire(resources);
        }
    }
}

/// One piece of a guest buffer, as a buffer of tokio-uring.
pub(super) struct Piece {
    start: *mut u8,
    len: usize,
    /// What tokio-uring takes for initialized: it reads into the rest, and writes this.
    init: usize,
    /// Keeps the memory mapped.
    _owner: Rc<Owner>,
}

/// The pieces of one operation; tokio-uring passes no more to the kernel than it takes.
///
/// # Safety
///
/// The resources of `owner` must keep the memory of `vecs` mapped, and no Rust reference to it may
/// exist while the operation runs.
pub(super) unsafe fn pieces(
    vecs: &[libc::iovec],
    direction: Direction,
    owner: &Rc<Owner>,
) -> Vec<Piece> {
    let of = |vec: &libc::iovec| Piece {
        start: vec.iov_base.cast(),
        len: vec.iov_len,
        init: match direction {
            Direction::Read => 0,
            Direction::Write => vec.iov_len,
        },
        _owner: Rc::clone(owner),
    };
    vecs.iter().take(IOV_MAX).map(of).collect()
}

// SAFETY: the address doesn't change, and the memory stays mapped as long as the owner has its
// resources. It keeps them, and the ring after it, until the kernel has completed the operation.
unsafe impl IoBuf for Piece {
    fn stable_ptr(&self) -> *const u8 {
        self.start
    }

    fn bytes_init(&self) -> usize {
        self.init
    }

    fn bytes_total(&self) -> usize {
        self.len
    }
}

// SAFETY: as above; the memory is mapped writable.
unsafe impl IoBufMut for Piece {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.start
    }

    unsafe fn set_init(&mut self, pos: usize) {
        self.init = self.init.max(pos);
    }
}

/// The future of one operation. If it is dropped early, the operation still runs to completion.
pub(super) struct Operation<F> {
    /// tokio-uring's future. Not dropped after the runtime, because that panics.
    future: ManuallyDrop<Pin<Box<F>>>,
    /// The first poll has put it on the submission ring.
    is_started: bool,
    owner: Rc<Owner>,
}

impl<F> Operation<F> {
    pub(super) fn new(future: Pin<Box<F>>, owner: Rc<Owner>) -> Self {
        Self {
            future: ManuallyDrop::new(future),
            is_started: false,
            owner,
        }
    }
}

impl<T, F: Future<Output = io::Result<T>>> Future for Operation<F> {
    type Output = (io::Result<T>, Resources);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = if self.owner.ring.is_closed() {
            Err(rustix::io::Errno::CANCELED.into())
        } else {
            if !std::mem::replace(&mut self.is_started, true) {
                self.owner.ring.operation_starts();
            }
            match self.future.as_mut().poll(cx) {
                Poll::Ready(result) => result,
                Poll::Pending => return Poll::Pending,
            }
        };
        let resources = self.owner.resources.take();
        let resources = resources.expect("invariant: not polled after its end");
        Poll::Ready((result, resources))
    }
}

impl<F> Drop for Operation<F> {
    fn drop(&mut self) {
        if self.owner.ring.is_closed() {
            // The kernel has completed the operation: the ring waited for it.
            drop(self.owner.resources.take());
            return;
        }
        // SAFETY: dropped only here, and not used afterwards.
        unsafe { ManuallyDrop::drop(&mut self.future) };
    }
}
