//! Retries requests that fail for lack of space or descriptors, once the resources that the guest
//! has released are free.
//!
//! A guest's kernel drops an inode by FORGET, on a queue of its own, and closes a file by RELEASE,
//! which it doesn't wait for. So a program that removes a file and writes another one may be served
//! before the host has closed the first: its space, or its descriptor, is not free yet. An
//! operation that fails for lack of space waits until the requests that are on the queues at that
//! moment are served and the files concerned are closed, and is then tried again. STATFS waits
//! beforehand. The invariant: each operation is tried at most twice.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Outcome, Session};
use crate::fs::{FileSystem, waiting};
use crate::fuse::reply::Answer;
use crate::fuse::request::{Request, decode_as};
use crate::fuse::{OUT_HEADER_LEN, Transport};
use crate::io;

/// The queues that requests arrive on.
pub trait Queues: Debug + Send + Sync {
    /// Serves the requests that are on the queues now. Completes when all of them are served that
    /// don't have to wait.
    fn serve_waiting(&self) -> Pin<Box<dyn Future<Output = ()>>>;

    /// Fails the request `unique` with `EINTR` if it waits to be served.
    fn interrupt(&self, unique: u64);
}

/// Whether an operation failed for lack of what FORGET and RELEASE free: space, inodes, quota,
/// descriptors.
pub(super) fn is_shortage(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOSPC | Errno::DQUOT | Errno::NFILE | Errno::MFILE
    )
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Sets the queues. Called once, before any request is served.
    pub fn set_queues(&self, queues: Box<dyn Queues>) {
        if self.queues.set(queues).is_err() {
            log::debug!("the queues are set already");
        }
    }

    /// Interrupts the request `unique` if it waits for the guest, or to be served.
    pub(super) fn interrupt(&self, unique: u64) {
        self.blocking_locks.interrupt(unique);
        if let Some(queues) = self.queues.get() {
            queues.interrupt(unique);
        }
    }

    /// Whether a [`reclaim`](Self::reclaim) can free anything.
    pub(super) fn may_reclaim(&self) -> bool {
        self.queues.get().is_some() || self.fs.pending_closes().is_some()
    }

    /// Waits until everything that the guest has released so far is free.
    pub(super) async fn reclaim(&self) {
        if let Some(queues) = self.queues.get() {
            queues.serve_waiting().await;
        }
        if let Some(wait) = self.fs.pending_closes()
            && let Err(error) = io::blocking(wait).await
        {
            log::debug!("waiting for files to be closed: {error}");
        }
    }

    /// Serves the request in `bytes`, which was decoded successfully before, after a
    /// [`reclaim`](Self::reclaim). Replies with `failed` if it can't be decoded any more.
    pub(super) fn after_reclaim<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        bytes: &[u8],
        (unique, failed): (u64, Errno),
    ) -> Outcome {
        let session = Arc::clone(self);
        let bytes = Arc::<[u8]>::from(bytes);
        self.defer(async move {
            session.reclaim().await;
            let mut answer = match decode_as(&bytes, session.agreed()) {
                Ok(request) => waiting::forbid(|| session.retry(&transport, &request)),
                Err(_) => Err(failed),
            };
            if matches!(answer, Err(waiting::MUST_WAIT)) {
                let room = transport.writable().saturating_sub(OUT_HEADER_LEN);
                answer = session.serve_blocking(bytes, room).await;
            }
            session.finish(transport, unique, answer);
        })
    }

    fn retry<E: Transport>(&self, transport: &E, request: &Request<'_>) -> Result<Answer, Errno> {
        let _inside = self.barrier.enter();
        if !self.is_ready() {
            return Err(Errno::IO);
        }
        if let Some(replay) = self.fs.replay() {
            replay.begin_request(request.unique);
        }
        self.metadata(request, transport.writable().saturating_sub(OUT_HEADER_LEN))
    }
}
