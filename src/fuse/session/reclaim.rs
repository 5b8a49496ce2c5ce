//! Requests that find no room on the host are tried once more, after what was given back is gone.
//!
//! A guest's kernel says that it drops an inode by FORGET, on a queue of its own, and that a file is
//! closed by RELEASE, which it doesn't wait for. So a program that removes a file and writes another
//! one may be served before the host has closed the first: its space, or its descriptor, isn't
//! free yet. An operation that fails for want of room waits until what is on the queues by then is
//! served and the files concerned are closed, and is tried again. STATFS waits beforehand. The
//! invariant: each is tried twice at most.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use rustix::io::Errno;

use super::{Outcome, Session};
use crate::fs::FileSystem;
use crate::fuse::reply::Answer;
use crate::fuse::request::{Request, decode_as};
use crate::fuse::{OUT_HEADER_LEN, Transport};
use crate::io;

/// Who serves the queues that requests come on.
pub trait Queues: Debug + Send + Sync {
    /// Serves what is on the queues by now; done when all of that is served that can be soon.
    fn serve_waiting(&self) -> Pin<Box<dyn Future<Output = ()>>>;
}

/// Whether an operation failed for want of what FORGET and RELEASE set free: space, inodes, quota,
/// descriptors.
pub(super) fn is_shortage(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOSPC | Errno::DQUOT | Errno::NFILE | Errno::MFILE
    )
}

impl<F: FileSystem + ?Sized> Session<F> {
    /// Says who serves the queues. Said once, before anything is served.
    pub fn set_queues(&self, queues: Box<dyn Queues>) {
        if self.queues.set(queues).is_err() {
            log::debug!("who serves the queues is known already");
        }
    }

    /// Whether anything may be free after a [`reclaim`](Self::reclaim) that isn't now.
    pub(super) fn may_reclaim(&self) -> bool {
        self.queues.get().is_some() || self.fs.pending_closes().is_some()
    }

    /// Waits until what the guest has given back so far is free.
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

    /// Serves the request in `bytes`, which was decoded once, after a [`reclaim`](Self::reclaim).
    /// `failed` is what it is answered if it can't be served any more.
    pub(super) fn after_reclaim<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        bytes: &[u8],
        (unique, failed): (u64, Errno),
    ) -> Outcome {
        let session = Arc::clone(self);
        let bytes = bytes.to_vec();
        self.later(async move {
            session.reclaim().await;
            let answer = match decode_as(&bytes, session.agreed()) {
                Ok(request) => session.once_more(&transport, &request),
                Err(_) => Err(failed),
            };
            session.finish(transport, unique, answer);
        })
    }

    fn once_more<E: Transport>(
        &self,
        transport: &E,
        request: &Request<'_>,
    ) -> Result<Answer, Errno> {
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
