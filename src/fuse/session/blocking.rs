//! Metadata operations of a file system whose methods may block, and those of any other that turn out
//! to take long.
//!
//! The request is served on a blocking thread of the runtime, so neither the worker nor other
//! requests wait for it. The invariant: nothing takes effect there for a session that has ended
//! meanwhile.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use super::data::errno;
use super::reclaim::is_shortage;
use super::{Outcome, Session};
use crate::fs::FileSystem;
use crate::fuse::reply::Answer;
use crate::fuse::request::decode_as;
use crate::fuse::{OUT_HEADER_LEN, Transport};
use crate::io::blocking;

impl<F: FileSystem + ?Sized> Session<F> {
    /// Serves the request in `bytes` on a blocking thread, then replies through `transport`.
    pub(super) fn metadata_blocking<E: Transport>(
        self: &Arc<Self>,
        transport: E,
        unique: u64,
        bytes: &[u8],
    ) -> Outcome {
        let room = transport.writable().saturating_sub(OUT_HEADER_LEN);
        let bytes = Arc::<[u8]>::from(bytes);
        let served = self.serve_blocking(Arc::clone(&bytes), room);
        let session = Arc::clone(self);
        self.defer(async move {
            let mut answer = served.await;
            if matches!(answer, Err(errno) if is_shortage(errno)) && session.may_reclaim() {
                session.reclaim().await;
                answer = session.serve_blocking(bytes, room).await;
            }
            session.finish(transport, unique, answer);
        })
    }

    /// Serves the request in `bytes` on a blocking thread; its reply may have `room` bytes.
    pub(super) fn serve_blocking(
        self: &Arc<Self>,
        bytes: Arc<[u8]>,
        room: usize,
    ) -> impl Future<Output = Result<Answer, Errno>> + use<F> {
        let ended = self.ended.load(Ordering::Relaxed);
        let session = Arc::clone(self);
        let served = blocking(move || session.serve_copy(&bytes, room, ended));
        async move { served.await.unwrap_or_else(|error| Err(errno(&error))) }
    }

    /// Serves the request in `bytes`. Fails if the number of ended sessions is no longer `ended`.
    fn serve_copy(&self, bytes: &[u8], room: usize, ended: u64) -> Result<Answer, Errno> {
        self.fs.prepare_thread().map_err(|error| errno(&error))?;
        let _inside = self.barrier.enter();
        if self.ended.load(Ordering::Relaxed) != ended {
            return Err(Errno::IO);
        }
        let request = decode_as(bytes, self.agreed()).map_err(|error| error.errno())?;
        self.metadata(&request, room)
    }
}
